"""The JSON file that says which captions the videos were made from."""

from __future__ import annotations

import os
from pathlib import Path

from rfengine.evaluation.prompt_switch import Captions
from rfengine.files import read_text, strict_json
from rfengine.toy.world import parse_caption

_MOST_BYTES = 64 * 2**20


def read_captions(path: Path) -> dict[str, Captions]:
    """File name of a video -> its captions, each with the frame it begins at.

    The file is such as {"a.mp4": "a small red circle ...", "b.mp4": [[0, "..."], [96, "..."]]}.

    Raises ValueError, with the file and the entry, for anything else and for captions of no toy world.
    """
    if not os.path.lexists(path):
        raise ValueError(f"{path} cannot be read (it does not exist); give a JSON file of captions")
    text = read_text(path, _MOST_BYTES)
    try:
        content = strict_json(text)
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); give an object of file name: caption") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} is no object with entries; write file name: caption for each video")
    return {name: _captions(path, name, entry) for name, entry in content.items()}


def _captions(path: Path, name: str, entry: object) -> Captions:
    parts = [[0, entry]] if isinstance(entry, str) else entry
    well_formed = isinstance(parts, list) and all(
        isinstance(part, list) and len(part) == 2 and type(part[0]) is int and isinstance(part[1], str)
        for part in parts
    )
    starts = [part[0] for part in parts] if well_formed else []
    if not starts or starts[0] != 0 or any(a >= b for a, b in zip(starts, starts[1:], strict=False)):
        raise ValueError(
            f"{path} says {str(entry)[:60]!r} for {name}; give a caption, or pairs of first frame, "
            "from 0 on, and caption"
        )
    for _, text in parts:
        try:
            parse_caption(text)
        except ValueError as error:
            raise ValueError(f"{path}: {name}: {error}") from error
    return tuple((start, text) for start, text in parts)
