"""The decoder graphs as ONNX files: exported by torch's dynamo exporter, checked, written in one piece.

A file is named by the fingerprint of the VAE, its size, the latents of a chunk, the precision and its stage,
and says the same in its metadata: it holds what its name says, or it is refused.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch

from rfengine.checkpoint.directories import CheckpointDirectory
from rfengine.config import Pixels, VAEConfig, to_dict
from rfengine.export.decoder_graphs import DecoderGraph
from rfengine.files import replaced
from rfengine.limits import Range, check_fields

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
_NAME_DIGITS = 12  # of the fingerprint, in file names


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
            input_names=graph.input_names,
            output_names=graph.output_names,
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
