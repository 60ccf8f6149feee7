"""`rfengine export-vae`: the decoder of a checkpoint as ONNX files and as TensorRT engines."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from tyro.conf import Positional, arg

if TYPE_CHECKING:
    from rfengine.checkpoint.checkpoint import Checkpoint
    from rfengine.export.onnx_export import ExportSpec, Stage

logger = logging.getLogger(__name__)

LARGEST_ERROR = 1e-4  # in float32, of values around one
_MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class ExportVAEOptions:
    """Export the VAE's decoder of a checkpoint to ONNX and build TensorRT engines for this machine's GPU."""

    directory: Annotated[Positional[Path], arg(metavar="DIR")]
    """A checkpoint directory, or tiny, which comes with the package."""
    out: Path | None = None
    """The directory that gets the files; DIR/tensorrt, or one in the user's cache directory where DIR cannot
    be written, where nothing is given."""
    height: int | None = None
    """Pixels, a multiple of 16; the size the model was trained at where nothing is given."""
    width: int | None = None
    """Pixels, a multiple of 16."""
    latents: int | None = None
    """Latent frames of a call; those of the checkpoint's chunks, 3 as published, where nothing is given."""
    precision: Literal["fp16", "bf16", "fp32"] = "fp16"
    """Of weights, activations and state; norms are in fp32 inside."""
    onnx_only: bool = False
    """Write the ONNX files and build no engine, which needs neither TensorRT nor a GPU."""
    force: bool = False
    """Write existing files again."""


def run(options: ExportVAEOptions) -> int:
    from rfengine.checkpoint.checkpoint import Checkpoint
    from rfengine.checkpoint.directories import checkpoint_directory
    from rfengine.export.onnx_export import STAGES, ExportSpec, export_folder, read_onnx, vae_fingerprint
    from rfengine.grid import LatentGrid

    directory = checkpoint_directory(options.directory)
    checkpoint = Checkpoint.open(directory)
    config = checkpoint.config
    grid = LatentGrid.of(config, options.height, options.width)
    latents = config.cache.chunk_frames if options.latents is None else options.latents
    fingerprint = vae_fingerprint(directory, config.vae)
    spec = ExportSpec(fingerprint, grid.height, grid.width, latents, options.precision)
    device = None if options.onnx_only else _device_for_engines()
    folder = export_folder(directory, fingerprint, options.out)
    wanted: list[Stage] = []
    for stage in STAGES:
        path = spec.onnx_file(folder, stage)
        if options.force or not path.exists():
            wanted.append(stage)
        else:
            read_onnx(path, spec, stage)
            print(f"{path}: is there already")
    if wanted:
        _export(checkpoint, spec, wanted, folder)
    if device is not None:
        _build(spec, folder, device, options.force)
    return 0


def _device_for_engines() -> torch.device:
    """The GPU that engines are built for; raises RuntimeError, before any work, where they cannot be."""
    from rfengine.export.tensorrt_api import import_tensorrt

    otherwise = "or write the ONNX files alone with --onnx-only"
    try:
        import_tensorrt()
    except RuntimeError as error:
        raise RuntimeError(f"{error}, {otherwise}") from error
    if not torch.cuda.is_available():
        raise RuntimeError(
            f"torch finds no GPU and an engine is built on the one it is for; use one, {otherwise}"
        )
    return torch.device("cuda", torch.cuda.current_device())


def _export(checkpoint: Checkpoint, spec: ExportSpec, stages: list[Stage], folder: Path) -> None:
    """Check the export of these weights in onnxruntime, then write the ONNX files of `stages`."""
    from rfengine.export.decoder_graphs import DecoderGraph
    from rfengine.export.onnx_export import (
        DTYPES,
        check_in_onnxruntime,
        export_graph,
        missing_packages,
        write_onnx,
    )
    from rfengine.grid import LatentGrid
    from rfengine.models.vae import WanVAE

    config = checkpoint.config
    vae = checkpoint.load(lambda: WanVAE(config.vae), "vae", torch.float32).eval()
    grid = LatentGrid.of(config, spec.height, spec.width)
    if missing_packages("onnxruntime"):
        logger.warning("onnxruntime is not installed: the export is not run and compared")
    else:
        agreement = check_in_onnxruntime(vae, spec.latents, 2 * grid.multiple, 2 * grid.multiple)
        print(f"onnxruntime in fp32 at {2 * grid.multiple} x {2 * grid.multiple} pixels: {agreement}")
        if agreement.worst > LARGEST_ERROR:
            raise RuntimeError(
                f"onnxruntime differs from the decoder by {agreement.worst:.1e}, above {LARGEST_ERROR}: "
                "nothing is written; use another version of torch, onnxscript or onnxruntime"
            )
    vae.to(DTYPES[spec.precision])
    for stage in stages:
        size = (spec.latents, grid.latent_height, grid.latent_width)
        program = export_graph(DecoderGraph(vae, *size, first=stage == "first"))
        _report(write_onnx(program, spec, stage, folder))


def _build(spec: ExportSpec, folder: Path, device: torch.device, force: bool) -> None:
    from rfengine.export.onnx_export import STAGES
    from rfengine.export.tensorrt_api import import_tensorrt
    from rfengine.export.tensorrt_engine import EngineTarget, build_engine

    target = EngineTarget.of(import_tensorrt(), device)
    for stage in STAGES:
        path = target.engine_file(folder, spec, stage)
        if path.exists() and not force:
            print(f"{path}: is there already")
        else:
            _report(build_engine(folder, spec, stage, device))


def _report(path: Path) -> None:
    print(f"{path}: {path.stat().st_size / _MIB:.1f} MiB", flush=True)
