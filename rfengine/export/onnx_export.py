"""The decoder graphs as ONNX files: exported by torch's dynamo exporter, checked, written in one piece.

The check decodes a few chunks in onnxruntime on the CPU beside WanVAE.decode.

A file is named by the fingerprint of the VAE, its size, the latents of a chunk, the precision and its stage,
and says the same in its metadata: it holds what its name says, or it is refused.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from torch import Tensor

from rfengine.accuracy import relative_error
from rfengine.checkpoint.directories import EXPORT_FOLDER, CheckpointDirectory, checkpoint_directory
from rfengine.config import Pixels, VAEConfig
from rfengine.config_json import to_dict
from rfengine.export.decoder_graphs import PIXELS, DecoderGraph, state_output
from rfengine.files import replaced
from rfengine.limits import Range, check_fields
from rfengine.models.vae import WanVAE

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch.onnx import ONNXProgram

Precision = Literal["fp16", "bf16", "fp32"]
Stage = Literal["first", "steady"]

FORMAT = 1
STAGES: tuple[Stage, ...] = ("first", "steady")
DTYPES: dict[Precision, torch.dtype] = {
    "fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32,
}  # fmt: skip
_OPSETS: dict[Precision, int] = {"fp16": 18, "bf16": 22, "fp32": 18}  # from 22 on a Conv takes bfloat16
_EXPORTER = ("onnx", "onnxscript")
_NAME_DIGITS, _FOLDER_DIGITS = 12, 16  # of the fingerprint, in names of files and folders
_CHUNKS = 3  # that are checked: the first graph once, the steady one with a history of it and of its own


@dataclass(frozen=True, slots=True)
class ExportSpec:
    """What an exported decoder is of: the VAE, pixels of a frame, latent frames of a chunk, precision."""

    vae_fingerprint: str
    height: Pixels
    width: Pixels
    latents: Annotated[int, Range(1, 64)]
    precision: Precision

    def __post_init__(self) -> None:
        check_fields(self)

    def stem(self, stage: Stage) -> str:
        """Name of the stage's files, without suffix."""
        size = f"{self.height}x{self.width}-{self.latents}"
        return f"vae-{self.vae_fingerprint[:_NAME_DIGITS]}-{size}-{self.precision}-{stage}"

    def onnx_file(self, folder: Path, stage: Stage) -> Path:
        return folder / f"{self.stem(stage)}.onnx"

    def metadata(self, stage: Stage) -> dict[str, str]:
        """What the metadata of the stage's files say."""
        return {
            "rfengine.format": str(FORMAT),
            "rfengine.vae": self.vae_fingerprint,
            "rfengine.height": str(self.height),
            "rfengine.width": str(self.width),
            "rfengine.latents": str(self.latents),
            "rfengine.precision": self.precision,
            "rfengine.stage": stage,
        }

    def refuse_other(self, path: Path, stage: Stage, found: Mapping[str, str], way_out: str) -> None:
        """Raises ValueError when the metadata of `path` are not those of this export."""
        for name, wanted in self.metadata(stage).items():
            if found.get(name) != wanted:
                field, held = name.removeprefix("rfengine."), found.get(name, "nothing")
                raise ValueError(f"{path} says {field} {held} where {wanted} is needed; {way_out}")


def vae_fingerprint(directory: Path, config: VAEConfig) -> str:
    """A sha256 that tells apart the VAEs of two checkpoint directories: their weights and configurations."""
    weights = CheckpointDirectory.of(directory).fingerprint(("vae",))
    parts = [weights, json.dumps(to_dict(config), sort_keys=True)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def export_folder(directory: Path, fingerprint: str, given: Path | None = None) -> Path:
    """The folder that decoders of the checkpoint `directory` are written to: `given`, else the checkpoint's
    own where it can be written and is not the package's, else one in the user's cache directory.

    fingerprint: vae_fingerprint of the checkpoint. Raises ValueError where `given` is a file, RuntimeError
    where there is no such place.
    """
    if given is not None and given.exists() and not given.is_dir():
        raise ValueError(f"{given} is no directory; choose another --out")
    own, *cached = engine_folders(directory, fingerprint, given)
    packaged = directory.resolve() == checkpoint_directory("tiny").resolve()
    if given is not None or (
        not packaged and os.access(own if own.exists() else directory, os.W_OK | os.X_OK)
    ):
        return own
    if not cached:
        raise RuntimeError(f"{directory} cannot be written and there is no home directory; give --out DIR")
    return cached[0]


def engine_folders(directory: Path, fingerprint: str, given: Path | None = None) -> tuple[Path, ...]:
    """The folders that engines are looked for in, in this order: `given` alone, or the checkpoint's own and
    the one in the user's cache directory, which a user without a home directory has not."""
    if given is not None:
        return (given,)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    name = f"{directory.resolve().name}-{fingerprint[:_FOLDER_DIGITS]}"
    cached = (cache / "rfengine" / "tensorrt" / name,) if cache.is_absolute() else ()
    return (directory / EXPORT_FOLDER, *cached)


def missing_packages(*names: str) -> list[str]:
    """Those of the packages `names` that are not installed."""
    return [name for name in names if importlib.util.find_spec(name) is None]


def export_graph(graph: DecoderGraph) -> ONNXProgram:
    """`graph` as an ONNX model of its dtype, checked by ONNX's own checker, weights included.

    The model names its inputs and outputs as the graph does and its values as the traced program does; it
    holds nothing of the machine. Raises RuntimeError when a package of the exporter is missing.
    """
    absent = missing_packages(*_EXPORTER)
    if absent:
        names = " and ".join(absent)
        raise RuntimeError(
            f"{names} cannot be imported and the export needs it; pip install {' '.join(_EXPORTER)}"
        )
    import onnx

    precision = next(name for name, dtype in DTYPES.items() if dtype == graph.dtype)
    with torch.no_grad(), _exporter_is_quiet():
        program = torch.onnx.export(
            graph.eval(),
            graph.example_inputs(),
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            opset_version=_OPSETS[precision],
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    _drop_traces(program)
    model = program.model_proto
    found = {entry.domain: entry.version for entry in model.opset_import}
    if found != {"": _OPSETS[precision]}:
        raise RuntimeError(
            f"the exporter of torch {torch.__version__} wrote opsets {found}; use another torch"
        )
    onnx.checker.check_model(model, full_check=True)
    return program


def write_onnx(program: ONNXProgram, spec: ExportSpec, stage: Stage, folder: Path) -> Path:
    """Write an exported graph into `folder`, over what was there; the file appears whole or not at all."""
    model = program.model_proto
    for key, value in spec.metadata(stage).items():
        model.metadata_props.add(key=key, value=value)
    path = spec.onnx_file(folder, stage)
    write_whole(path, model.SerializeToString(deterministic=True))
    return path


def read_onnx(path: Path, spec: ExportSpec, stage: Stage) -> ModelProto:
    """The model in an exported file.

    Raises ValueError when the file is absent, truncated, damaged, or an export of something else.
    """
    import onnx
    from google.protobuf.message import DecodeError

    again = "export it again with --force"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; run rfengine export-vae")
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
    except (DecodeError, onnx.checker.ValidationError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is truncated or no ONNX file ({reason}); {again}") from error
    spec.refuse_other(path, stage, {entry.key: entry.value for entry in model.metadata_props}, again)
    return model


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all. Raises RuntimeError when it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as partial:
            partial.write_bytes(content)
    except OSError as error:
        raise RuntimeError(
            f"cannot write {path} of {len(content)} bytes ({error.strerror}); free space or change its rights"
        ) from error


def _drop_traces(program: ONNXProgram) -> None:
    """Remove what the exporter notes of the source, such as paths of the machine."""
    graph = program.model.graph
    for entry in (graph, *graph, *(value for node in graph for value in node.outputs)):
        entry.metadata_props.clear()
        entry.doc_string = None


@contextmanager
def _exporter_is_quiet() -> Iterator[None]:
    """The exporter warns of packages and calls of its own that are nobody's concern here."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@dataclass(frozen=True, slots=True)
class Agreement:
    """Largest differences of a stream that onnxruntime decodes, from WanVAE.decode with its own state: of the
    pixels absolute, of a slot of the state relative in its norm."""

    chunks: int
    pixels: float
    state: float

    @property
    def worst(self) -> float:
        return max(self.pixels, self.state)

    def __str__(self) -> str:
        return f"{self.chunks} chunks agree to {self.pixels:.1e} in pixels and {self.state:.1e} in the state"


@torch.no_grad()
def check_in_onnxruntime(vae: WanVAE, latents: int, height: int, width: int) -> Agreement:
    """Decode a stream of chunks of noise with both graphs in onnxruntime on the CPU and with `vae`; compare.

    Both graphs are exported at height x width pixels in the dtype of `vae`, float32 or float16; onnxruntime
    carries its own state from call to call. Raises RuntimeError when a package is missing.
    """
    if missing_packages("onnxruntime"):
        raise RuntimeError("onnxruntime cannot be imported and the check needs it; pip install onnxruntime")
    import onnxruntime

    size = (height // vae.config.spatial_stride, width // vae.config.spatial_stride)
    graphs = [DecoderGraph(vae, latents, *size, first=stage == "first") for stage in STAGES]
    sessions = [
        onnxruntime.InferenceSession(
            export_graph(graph).model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        for graph in graphs
    ]
    state = vae.decoder_state(1, *size, vae.conv2.weight.dtype, "cpu")
    generator = torch.Generator().manual_seed(0)
    slots: dict[str, Tensor] = {}
    of_pixels, of_state = 0.0, 0.0
    for chunk in range(_CHUNKS):
        graph, session = graphs[min(chunk, 1)], sessions[min(chunk, 1)]
        noise = torch.randn(graph.latents_shape, generator=generator, dtype=torch.float32, device="cpu")
        given = (noise, *(slots.values() if chunk else ()))
        feed = {name: tensor.numpy() for name, tensor in zip(graph.inputs, given, strict=True)}
        answers = map(torch.from_numpy, session.run(list(graph.outputs), feed))
        outputs = dict(zip(graph.outputs, answers, strict=True))
        pixels, held = vae.decode(noise, state), state.tensors()
        slots = {name: outputs.get(state_output(name), torch.zeros_like(slot)) for name, slot in held.items()}
        of_pixels = max(of_pixels, (outputs[PIXELS].float() - pixels.float()).abs().max().item())
        of_state = max(of_state, *(relative_error(slots[name], slot) for name, slot in held.items()))
    return Agreement(_CHUNKS, of_pixels, of_state)
