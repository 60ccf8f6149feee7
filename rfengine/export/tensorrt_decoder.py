"""TensorRTDecoder: the lossless decoder of WanVAE as engines that `rfengine export-vae` built.

The state of a stream is two sets of buffers: a call reads one and writes the other, and the next call does
the opposite, so that no state is ever copied. Each direction is captured as a CUDA graph at its first run.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from rfengine.config import EngineConfig
from rfengine.cuda_graph import CapturedCall
from rfengine.export.decoder_graphs import LATENTS, PIXELS, DecoderGraph, state_input, state_output
from rfengine.export.onnx_export import (
    DTYPES,
    STAGES,
    ExportSpec,
    Precision,
    Stage,
    engine_folders,
    vae_fingerprint,
)
from rfengine.export.tensorrt_api import import_tensorrt, make_logger, torch_dtypes
from rfengine.export.tensorrt_engine import EngineTarget, read_engine
from rfengine.grid import LatentGrid
from rfengine.models.vae import DecoderState, WanVAE
from rfengine.ops import choose_ops

logger = logging.getLogger(__name__)


class TensorRTState:
    """State of a TensorRT decoder for one video; TensorRTDecoder.decoder_state makes one.

    Names and values of the slots are those of DecoderState. `frames` counts the latent frames seen.
    """

    def __init__(self, decoder: TensorRTDecoder) -> None:
        self.frames = 0
        self.decoder = decoder
        steady, device = decoder.bindings["steady"], decoder.device
        with torch.inference_mode(False):  # such a state serves calls inside and outside of inference mode
            self._sides = [
                {
                    name: torch.zeros(shape, dtype=steady.dtype, device=device)
                    for name, shape in steady.slot_shapes.items()
                }
                for _ in range(2)
            ]
            self._latents = torch.zeros(steady.latents_shape, dtype=torch.float32, device=device)
            self._pixels = {
                stage: torch.zeros(graph.outputs[PIXELS][0], dtype=steady.dtype, device=device)
                for stage, graph in decoder.bindings.items()
            }
            size = max(engine.device_memory_size_v2 for engine in decoder.engines.values())
            self._activations = torch.empty(max(size, 1), dtype=torch.uint8, device=device)
        self._side = 0  # the set that holds the state; a call writes the other
        self._contexts = {stage: self._context(stage) for stage in STAGES}
        self._captured: dict[int, CapturedCall[None]] = {}
        self._capture = decoder.graphs

    def tensors(self) -> dict[str, Tensor]:
        """The live slots by name; a call overwrites those of two calls ago, so copy them to keep them."""
        return dict(self._sides[self._side])

    def load(self, tensors: Mapping[str, Tensor], frames: int) -> None:
        """Copy a snapshot of any decoder of the same VAE and size into the slots, cast to the engine's dtype.

        Raises ValueError where names or shapes do not fit; then nothing is changed.
        """
        DecoderState(self._sides[self._side]).load(dict(tensors), frames)
        self.frames = frames

    def run(self, latents: Tensor) -> Tensor:
        """The pixels of the next chunk, in a buffer that the next call overwrites; advances the state."""
        stage: Stage = "steady" if self.frames else "first"
        self._latents.copy_(latents)
        if stage == "first":  # slots that the first call leaves out start from zero
            for name, slot in self._sides[1 - self._side].items():
                if state_output(name) not in self.decoder.bindings["first"].outputs:
                    slot.zero_()
        if stage == "steady" and self._capture and self._side not in self._captured:
            self._record(self._side)
        if stage == "steady" and self._side in self._captured:
            self._captured[self._side].replay()
        else:
            self._enqueue(stage, self._side)
        self._side = 1 - self._side
        self.frames += latents.shape[2]
        return self._pixels[stage]

    def _context(self, stage: Stage) -> Any:
        """A context with its activations in the state's own memory; the two stages never run together."""
        trt, engine = self.decoder.trt, self.decoder.engines[stage]
        with torch.cuda.device(self.decoder.device):
            context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
            if context is None:
                raise RuntimeError(
                    f"TensorRT makes no context for the {stage} engine ({self.decoder.reason()}); free memory"
                )
            context.set_device_memory(self._activations.data_ptr(), self._activations.numel())
        return context

    def _enqueue(self, stage: Stage, side: int) -> None:
        """Queue a call on torch's current stream: from the buffers of `side` into the others."""
        graph, context = self.decoder.bindings[stage], self._contexts[stage]
        tensors = {LATENTS: self._latents, PIXELS: self._pixels[stage]}
        tensors |= {state_input(name): slot for name, slot in self._sides[side].items()}
        tensors |= {state_output(name): slot for name, slot in self._sides[1 - side].items()}
        for name in (*graph.inputs, *graph.outputs):
            if not context.set_tensor_address(name, tensors[name].data_ptr()):
                raise RuntimeError(f"TensorRT refuses the address of {name} ({self.decoder.reason()})")
        stream = torch.cuda.current_stream(self.decoder.device)
        if not context.execute_async_v3(stream.cuda_stream):
            raise RuntimeError(f"TensorRT cannot run the {stage} engine ({self.decoder.reason()})")

    def _record(self, side: int) -> None:
        """Record a call as a CUDA graph. It reads one set and writes the other, so it can be repeated."""
        try:
            self._captured[side] = CapturedCall(
                lambda: self._enqueue("steady", side), restore=lambda: None, device=self.decoder.device
            )
        except RuntimeError as error:
            self._capture = False
            logger.warning("the TensorRT decoder runs without CUDA graphs: %s", error)


class TensorRTDecoder:
    """Decodes streams of one size and chunk length through the engines of a checkpoint's VAE.

    Each state has buffers and contexts of its own; calls with one state are queued on torch's current stream
    and must not overlap. graphs: replay the steady call as a CUDA graph.
    """

    def __init__(
        self,
        trt: ModuleType,
        engines: Mapping[Stage, bytes],
        bindings: Mapping[Stage, DecoderGraph],
        device: torch.device,
        graphs: bool = True,
    ) -> None:
        """Raises RuntimeError for an engine that TensorRT cannot load or whose bindings are others."""
        self.trt = trt
        self.bindings = dict(bindings)
        self.device = device
        self.graphs = graphs
        self._log = make_logger(trt)
        self._ops = choose_ops("auto", device)
        with torch.cuda.device(device):
            self._runtime = trt.Runtime(self._log)  # must outlive its engines
            self.engines: dict[Stage, Any] = {}
            for stage, content in engines.items():
                engine = self._runtime.deserialize_cuda_engine(content)
                if engine is None:
                    raise RuntimeError(
                        f"TensorRT {trt.__version__} cannot load the {stage} engine ({self.reason()}); build "
                        "it again with `rfengine export-vae DIR --force`"
                    )
                self._check_bindings(stage, engine)
                self.engines[stage] = engine

    @classmethod
    def open(
        cls,
        directory: Path,
        config: EngineConfig,
        grid: LatentGrid,
        dtype: torch.dtype,
        device: torch.device,
        graphs: bool,
    ) -> TensorRTDecoder:
        """The decoder from the engines that `rfengine export-vae` built of a checkpoint directory.

        They are looked for in config.runtime.tensorrt_directory, else where export-vae leaves them. Each call
        decodes config.cache.chunk_frames latents. dtype: of the model; float16 and bfloat16 serve each other,
        so an engine of the other is used where there is none of its own. graphs: replay the steady call as a
        CUDA graph.
        Raises RuntimeError when TensorRT is missing; ValueError, with the command that builds it, when there
        is no engine for this VAE, size, GPU and version, or a damaged one.
        """
        device, latents = _indexed(device), config.cache.chunk_frames
        given = config.runtime.tensorrt_directory
        trt = import_tensorrt()
        target = EngineTarget.of(trt, device)
        fingerprint = vae_fingerprint(directory, config.vae)
        specs = [
            ExportSpec(fingerprint, grid.height, grid.width, latents, precision)
            for precision in _precisions(dtype)
        ]
        folders = engine_folders(directory, fingerprint, Path(given) if given else None)
        size = f"--height {grid.height} --width {grid.width} --latents {latents}"
        build = f"rfengine export-vae {directory} {size}{f' --out {given}' if given else ''} --precision"
        spec, folder = _find_engine(specs, folders, target, build)
        rebuild = f"{build} {spec.precision}"
        engines = {stage: read_engine(folder, spec, stage, target, rebuild) for stage in STAGES}
        logger.info("the decoder is TensorRT %s in %s", target.tensorrt, spec.precision)
        with torch.device("meta"):
            vae = WanVAE(config.vae).to(DTYPES[spec.precision])
        size = (latents, grid.latent_height, grid.latent_width)
        bindings = {stage: DecoderGraph(vae, *size, first=stage == "first") for stage in STAGES}
        return cls(trt, engines, bindings, device, graphs)

    def decoder_state(
        self, batch: int, height: int, width: int, dtype: torch.dtype, device: torch.device | str
    ) -> TensorRTState:
        """A fresh state, in the dtype of the engines whatever `dtype` is.

        Raises ValueError for another size or device than that of the engines.
        """
        given, held = (batch, height, width), self._size()
        if given != held or _indexed(device) != self.device:
            raise ValueError(
                f"batch, height and width are {given} on {device}; these engines decode latents of {held} on "
                f"{self.device}; build others with `rfengine export-vae`"
            )
        return TensorRTState(self)

    @torch.no_grad()
    def decode(self, latents: Tensor, state: TensorRTState) -> Tensor:
        """Pixels [1, 3, T, H, W], not clamped, of the next chunk; updates `state` in place.

        Raises ValueError for latents of another shape and for the state of another decoder.
        """
        return self._run(latents, state).clone()

    @torch.no_grad()
    def decode_frames(self, latents: Tensor, state: TensorRTState) -> Tensor:
        """RGB frames uint8 [T, H, W, 3] of the next chunk, on the device."""
        return self._ops.frame_pack(self._run(latents, state)[0])

    def reason(self) -> str:
        """TensorRT's last error message."""
        return self._log.reason()

    def _size(self) -> tuple[int, int, int]:
        batch, _, _, height, width = self.bindings["steady"].latents_shape
        return batch, height, width

    def _run(self, latents: Tensor, state: TensorRTState) -> Tensor:
        wanted = self.bindings["steady"].latents_shape
        if tuple(latents.shape) != wanted:
            raise ValueError(f"latents are {tuple(latents.shape)}; these engines decode {wanted}")
        if not isinstance(state, TensorRTState) or state.decoder is not self:
            raise ValueError("the state is of another decoder; make one with decoder_state of this one")
        return state.run(latents)

    def _check_bindings(self, stage: Stage, engine: Any) -> None:
        """Compare names, directions, shapes and types of the engine with those that the state binds."""
        modes, dtypes = self.trt.TensorIOMode, torch_dtypes(self.trt)
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        found = {
            name: (
                engine.get_tensor_mode(name) == modes.INPUT,
                tuple(engine.get_tensor_shape(name)),
                dtypes.get(engine.get_tensor_dtype(name)),
            )
            for name in names
        }
        graph = self.bindings[stage]
        wanted = {name: (True, *binding) for name, binding in graph.inputs.items()}
        wanted |= {name: (False, *binding) for name, binding in graph.outputs.items()}
        for name in sorted(found.keys() | wanted.keys()):
            if found.get(name) != wanted.get(name):
                raise RuntimeError(
                    f"{name} of the {stage} engine is {found.get(name)} where {wanted.get(name)} is needed "
                    "(input, shape, type); build it again with `rfengine export-vae DIR --force`"
                )


def _find_engine(
    specs: list[ExportSpec], folders: tuple[Path, ...], target: EngineTarget, build: str
) -> tuple[ExportSpec, Path]:
    """The first of `specs` with an engine for `target`, and its folder; else the first of all and the folder
    that has it for another target.

    build: the command that builds one, up to its precision. Raises ValueError where no folder has any.
    """
    for spec in specs:
        for folder in folders:
            if target.engine_file(folder, spec, "steady").is_file():
                return spec, folder
    first = specs[0]
    for folder in folders:
        if any(folder.glob(f"{first.stem('first')}-*.engine")):
            return first, folder
    others = "".join(f", nor has {folder}" for folder in folders[1:])
    raise ValueError(
        f"{folders[0]} has no engine {first.stem('first')}{others}; build it with `{build} {first.precision}`"
    )


def _indexed(device: torch.device | str) -> torch.device:
    """The device with its index, as tensors on it have."""
    device = torch.device(device)
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


def _precisions(dtype: torch.dtype) -> list[Precision]:
    """The precisions that serve a model of `dtype`, the best first. Raises ValueError for any other dtype."""
    own: list[Precision] = [name for name, kind in DTYPES.items() if kind == dtype]
    if not own:
        raise ValueError(
            f"dtype is {dtype}; a TensorRT decoder serves {', '.join(map(str, DTYPES.values()))}"
        )
    halves: list[Precision] = [name for name, kind in DTYPES.items() if kind.itemsize == dtype.itemsize]
    return own + [name for name in halves if name not in own]
