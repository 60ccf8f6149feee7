"""What a configuration says held against the tensors it speaks of, before anything of its sizes is built."""

from __future__ import annotations

from pathlib import Path

from rfengine.checkpoint.directories import CONFIG_FILE, part_files
from rfengine.checkpoint.file_format import weights_format
from rfengine.checkpoint.layouts import Part
from rfengine.checkpoint.shapes import PartConfig, describe_mismatch, expected_shapes
from rfengine.checkpoint.weights_file import open_part
from rfengine.config import EngineConfig


def part_configs(config: EngineConfig) -> dict[Part, PartConfig]:
    """The configuration of each part of a checkpoint."""
    return {
        "transformer": config.model,
        "vae": config.vae,
        "text_encoder": config.text,
        "tiny_vae": config.tiny_vae,
    }


def require_agreement(directory: Path, config: EngineConfig) -> None:
    """Raises ValueError unless the parts that `directory` has are of the sizes that its `config` says.

    The headers of the files are read and no tensor is.
    """
    for part, stated in part_configs(config).items():
        files = part_files(directory, part)
        if not files or any(weights_format(path) == "pickle" for path in files):
            continue
        found, stored = open_part(files)
        if found != part:
            raise ValueError(
                f"{files[0]} holds a {found}, not a {part}; the directory {directory} is mixed up"
            )
        problem = describe_mismatch(
            expected_shapes(stated), {name: tensor.shape for name, tensor in stored.items()}
        )
        if problem:
            raise ValueError(
                f"{files[0]} does not fit the model of {CONFIG_FILE}: {problem}; get both from one place"
            )
