"""`rfengine convert`: a published checkpoint in the engine's own layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import OmitArgPrefixes, Positional

from rfengine.checkpoint.convert import Kind, convert
from rfengine.cli.lora_options import LoraOptions
from rfengine.config import DTypeName


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Convert a checkpoint of Wan2.1, of a system that was distilled from it, or of SkyReels-V2-DF, for the
    engine."""

    source: Positional[Path]
    """A checkpoint directory, of ComfyUI or in a cache too, or one file of a generator, of either format."""
    destination: Positional[Path]
    """The directory to make."""
    base: Path | None = None
    """A directory that gives the VAE, the text encoder and the tokenizer where SOURCE lacks them."""
    loras: OmitArgPrefixes[LoraOptions] = LoraOptions()
    dtype: DTypeName = "bfloat16"
    """Precision of the weights written."""
    use_ema: bool = True
    """Take the averaged weights where a file has both."""
    kind: Kind = "auto"
    """The system the model was trained for: its cache and its denoising steps; or skyreels, for diffusion
    forcing. auto goes by the name of the source, and by the tensors of skyreels."""


def run(options: ConvertOptions) -> int:
    convert(
        options.source,
        options.destination,
        base=options.base,
        loras=options.loras.loras(),
        dtype=options.dtype,
        use_ema=options.use_ema,
        kind=options.kind,
    )
    print(f"{options.destination}: converted from {options.source} in {options.dtype}")
    return 0
