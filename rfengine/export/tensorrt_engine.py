"""TensorRT engine files: built from exported ONNX files, named by GPU, versions and shape, refused elsewhere.

An engine file is a safetensors file of one byte tensor, so that it is written whole, a truncated one is known
by its header, and its metadata say what it was built from and for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from rfengine.checkpoint.loader import read_safetensors, save_weights
from rfengine.checkpoint.tensor_file import read_header
from rfengine.export.onnx_export import ExportSpec, Stage, read_onnx, write_whole
from rfengine.export.tensorrt_api import import_tensorrt, make_logger, network_flags

WORKSPACE_BYTES = 8 << 30  # what a tactic may take while it is tried and when it runs
_ENGINE = "engine"  # the tensor in the file


@dataclass(frozen=True, slots=True)
class EngineTarget:
    """The machine that an engine is for: TensorRT builds for one kind of GPU and one version of itself."""

    gpu: str
    capability: tuple[int, int]
    tensorrt: str

    @classmethod
    def of(cls, trt: ModuleType, device: torch.device) -> EngineTarget:
        capability = torch.cuda.get_device_capability(device)
        return cls(torch.cuda.get_device_name(device), capability, trt.__version__)

    @property
    def slug(self) -> str:
        """As part of a file name."""
        gpu = re.sub(r"[^A-Za-z0-9]+", "-", self.gpu).strip("-")
        return f"{gpu}-sm{''.join(map(str, self.capability))}-trt{self.tensorrt}"

    def __str__(self) -> str:
        return self.words(self.metadata())

    @staticmethod
    def words(metadata: Mapping[str, str]) -> str:
        """The target in the metadata of an engine file, as errors name it."""
        gpu, capability, version = (
            metadata.get(f"rfengine.{name}", "?") for name in ("gpu", "capability", "tensorrt")
        )
        return f"{gpu} (sm {capability}) with TensorRT {version}"

    def engine_file(self, folder: Path, spec: ExportSpec, stage: Stage) -> Path:
        return folder / f"{spec.stem(stage)}-{self.slug}.engine"

    def timing_file(self, folder: Path) -> Path:
        """The timing cache, which all builds on such a machine share."""
        return folder / f"timing-{self.slug}.cache"

    def metadata(self) -> dict[str, str]:
        return {
            "rfengine.gpu": self.gpu,
            "rfengine.capability": "{}.{}".format(*self.capability),
            "rfengine.tensorrt": self.tensorrt,
        }


def build_engine(folder: Path, spec: ExportSpec, stage: Stage, device: torch.device) -> Path:
    """Build the engine of an exported ONNX file in `folder` for this machine and write it beside it.

    The timing cache of the folder is used and kept. Raises ValueError for an ONNX file that is not the
    export, RuntimeError when TensorRT is missing or fails; then nothing is written.
    """
    trt = import_tensorrt()
    target = EngineTarget.of(trt, device)
    onnx_file = spec.onnx_file(folder, stage)
    model = read_onnx(onnx_file, spec, stage)
    names = [entry.name for entry in (*model.graph.input, *model.graph.output)]
    timing_file = target.timing_file(folder)
    timings = timing_file.read_bytes() if timing_file.is_file() else b""
    with torch.cuda.device(device):
        content, timings = _build(trt, onnx_file, names, timings)
    path = target.engine_file(folder, spec, stage)
    tensor = torch.frombuffer(content, dtype=torch.uint8)
    save_weights(path, {_ENGINE: tensor}, spec.metadata(stage) | target.metadata())
    write_whole(timing_file, timings)
    return path


def _build(trt: ModuleType, onnx_file: Path, names: list[str], timings: bytes) -> tuple[bytearray, bytes]:
    """The serialized engine and the timing cache. names: inputs and outputs that the network must have."""
    log = make_logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(network_flags(trt))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(onnx_file)):
        errors = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        reason = "; ".join(errors) or log.reason()
        raise RuntimeError(f"TensorRT {trt.__version__} cannot read {onnx_file} ({reason}); use a later one")
    inputs = [network.get_input(index).name for index in range(network.num_inputs)]
    outputs = [network.get_output(index).name for index in range(network.num_outputs)]
    if inputs + outputs != names:
        raise RuntimeError(
            f"TensorRT {trt.__version__} renames inputs or outputs of {onnx_file}; use another version"
        )
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE_BYTES)
    cache = config.create_timing_cache(timings)
    if cache is None or not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")  # the kept one is damaged: time again
        if cache is None or not config.set_timing_cache(cache, False):
            raise RuntimeError(f"TensorRT {trt.__version__} takes no timing cache ({log.reason()})")
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError(
            f"TensorRT {trt.__version__} cannot build {onnx_file} ({log.reason()}); free GPU memory or "
            "export another precision"
        )
    return bytearray(plan), bytes(cache.serialize())


def read_engine(folder: Path, spec: ExportSpec, stage: Stage, target: EngineTarget, rebuild: str) -> bytes:
    """The serialized engine of `stage` for `target`.

    rebuild: the command that builds it. Raises ValueError when there is none, when there is one for another
    GPU or version only, and when the file is truncated or an engine of something else.
    """
    path = target.engine_file(folder, spec, stage)
    others = sorted(folder.glob(f"{spec.stem(stage)}-*.engine"))
    if not others:
        raise ValueError(f"{folder} has no engine {spec.stem(stage)}; build it with `{rebuild}`")
    shown = path if path in others else others[0]
    _, metadata = read_header(shown)
    held = EngineTarget.words(metadata)
    if held != str(target):
        raise ValueError(f"{shown} was built for {held}, and this is {target}; build one with `{rebuild}`")
    spec.refuse_other(shown, stage, metadata, f"build it again with `{rebuild} --force`")
    tensors, _ = read_safetensors(shown)
    return tensors[_ENGINE].numpy().tobytes()
