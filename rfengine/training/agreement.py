"""The ranks of a training compared before it begins: each has to run the same code on the same configuration,
weights and data, or the training would be of none of them."""

from __future__ import annotations

import hashlib
import os
import platform
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rfengine.checkpoint.directories import CheckpointDirectory, checkpoint_directory
from rfengine.checkpoint.layouts import Part
from rfengine.config_json import to_dict
from rfengine.files import file_sha256, open_regular
from rfengine.training.checkpoints import first_difference
from rfengine.training.config import TrainConfig
from rfengine.training.parallel import Ranks

_SHOWN = 12  # signs of a sha256 in a sentence
_HASHED_BYTES = 1 << 26  # of a file of data, which may have gigabytes
_PARTS: dict[str, tuple[Part, ...]] = {
    "student": ("transformer",),
    "teacher": ("transformer",),
    "critic": ("transformer",),
    "base": ("vae", "text_encoder"),
}


def facts_of(config: TrainConfig, group: int) -> dict[str, Any]:
    """What has to be the same on every rank. group: ranks that hold one copy of the weights together."""
    return {
        "versions": {
            "rfengine": _sources(Path(__file__).parents[1]),
            "torch": torch.__version__,
            "Python": platform.python_version(),
        },
        "ranks of one copy of the weights": group,
        "config": to_dict(config),
        "weights": {
            name: _weights(source, parts)
            for name, parts in _PARTS.items()
            if (source := getattr(config, name))
        },
        "files": {name: _file(path) for name, path in _paths(config).items()},
    }


def check_agreement(facts: Mapping[str, Any], ranks: Ranks) -> None:
    """Raises ValueError on every rank where one of them has other facts than the first, with the first that
    differs and both values."""
    found = ranks.gathered((socket.gethostname(), dict(facts)))
    first_host, first = found[0]
    for rank, (host, others) in enumerate(found):
        if others != first:
            name, here, there = first_difference("", others, first)
            raise ValueError(
                f"rank {rank} on {host} has {name} {here!r} and rank 0 on {first_host} {there!r}; start all "
                "ranks with the same"
            )


def _sources(package: Path) -> str:
    """The sha256 of the package's Python files and how many there are."""
    digest, paths = hashlib.sha256(), sorted([*package.rglob("*.py"), *(package / "kernels").glob("*.py")])
    for path in paths:
        digest.update(f"{path.relative_to(package)} {file_sha256(path)}\n".encode())
    return f"{digest.hexdigest()[:_SHOWN]} of {len(paths)} sources"


def _weights(source: str, parts: tuple[Part, ...]) -> str:
    """The fingerprint of what is read of a checkpoint directory; why there is none, which loading tells."""
    try:
        return CheckpointDirectory.of(checkpoint_directory(source)).fingerprint(parts)[:_SHOWN]
    except (ValueError, OSError) as error:
        return str(error)


def _paths(config: TrainConfig) -> dict[str, Path]:
    """What the stage reads beside weights. Words such as "toy" are no paths, even where one is called so."""
    paths = {}
    if config.stage not in ("dmd", "re-dmd") or config.data != "toy":
        paths["data"] = Path(config.data)
    if config.stage == "re-dmd" and config.reward not in ("toy", "flow"):
        paths["reward"] = Path(config.reward)
    return paths


def _file(path: Path) -> str:
    """Names and sizes of a directory, size and the sha256 of the start of a file; "" where there is none,
    which the stage tells or makes."""
    if path.is_dir():
        sizes = sorted((str(file.relative_to(path)), file.stat().st_size) for file in path.rglob("*"))
        digest = hashlib.sha256(os.fsencode(repr(sizes))).hexdigest()
        return f"{digest[:_SHOWN]} of {len(sizes)} names"
    if not path.is_file():
        return ""
    with open_regular(path) as file:
        digest = hashlib.sha256(file.read(_HASHED_BYTES)).hexdigest()
    return f"{digest[:_SHOWN]} of {path.stat().st_size} bytes"
