"""Files that belong to videos: captions, latents, and scores of VBench; each is read strictly.

VBench needs numpy below 2 and transformers 4.33.2, which do not go together with this package. In an
environment of its own, `vbench evaluate --videos_path DIR --dimension NAME --mode=custom_input` writes
*_eval_results.json: an object of dimension: [mean over the videos, [{"video_path": ..., "video_results":
score}, ...]] (VBench 0.1.5).
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from torch import Tensor

from rfengine.checkpoint.tensor_file import open_safetensors
from rfengine.evaluation.prompt_switch import Captions
from rfengine.evaluation.video_frames import Frames
from rfengine.files import read_text, reading, strict_json
from rfengine.toy.captions import parse_caption

logger = logging.getLogger(__name__)

_MOST_TEXT_BYTES = 64 * 2**20
_MOST_LATENT_BYTES = 2**31
_ADVICE = "give the *_eval_results.json that VBench wrote"


def read_captions(path: Path) -> dict[str, Captions]:
    """File name of a video -> its captions, each with the frame it begins at.

    The file is such as {"a.mp4": "a small red circle ...", "b.mp4": [[0, "..."], [96, "..."]]}.

    Raises ValueError, with the file and the entry, for anything else and for captions of no toy world.
    """
    if not os.path.lexists(path):
        raise ValueError(f"{path} cannot be read (it does not exist); give a JSON file of captions")
    text = read_text(path, _MOST_TEXT_BYTES)
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


def read_latents(path: Path, video: Frames) -> Tensor | None:
    """`latents` [C, F, h, w] of a safetensors file, a batch of one taken off; None where there is no file.

    A warning names latents of a shape that cannot be the video's. Raises ValueError for a file that is
    damaged or has none, and for latents of other axes, of integers, above 2 GiB, or that are not finite.
    """
    if not os.path.lexists(path):
        return None
    with reading(path):  # an ordinary file that can be read
        stored = open_safetensors(path)
        if "latents" not in stored:
            raise ValueError(f"{path} has no tensor `latents`; add it or remove the file")
        entry = stored["latents"]
        shape = entry.shape[1:] if len(entry.shape) == 5 and entry.shape[0] == 1 else entry.shape
        if len(shape) != 4 or 0 in shape or not entry.dtype.is_floating_point:
            raise ValueError(
                f"{path} has latents {entry.dtype} {tuple(entry.shape)}; give floating point [C, F, h, w]"
            )
        if entry.nbytes > _MOST_LATENT_BYTES:
            raise ValueError(
                f"{path} has {entry.nbytes} bytes of latents; at most {_MOST_LATENT_BYTES} are read"
            )
        latents = entry.read().float().reshape(shape)
    if not latents.isfinite().all():
        raise ValueError(f"{path} has latents that are not finite; decode and save them again")
    _, frames, height, width = shape
    if frames > video.count or video.height * width != video.width * height:
        logger.warning(
            "%s has %d latent frames of %d x %d, which are none of a video of %d frames of %d x %d",
            path, frames, height, width, video.count, video.height, video.width,
        )  # fmt: skip
    return latents


def read_vbench(path: Path, videos: Iterable[Path]) -> dict[str, float]:
    """The mean of each dimension in a results file of VBench about these videos, or some of them.

    Raises ValueError for any other file, for a dimension without a score, and where it names another video.
    """
    text = read_text(path, _MOST_TEXT_BYTES)
    try:
        content = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}); {_ADVICE}") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} is no object with dimensions; {_ADVICE}")
    names = {video.name for video in videos}
    return {dimension: _mean(path, dimension, entry, names) for dimension, entry in content.items()}


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} as a score, so VBench found no video: run it with --mode=custom_input")


def _mean(path: Path, dimension: str, entry: object, names: set[str]) -> float:
    if not dimension.isidentifier():
        raise ValueError(f"{path} has the dimension {dimension[:60]!r}, which is no name; {_ADVICE}")
    match entry:
        case [int() | float() as mean, [_, *_] as scored] if not isinstance(mean, bool) and _finite(mean):
            pass
        case _:
            raise ValueError(
                f"{path} has {str(entry)[:60]!r} for {dimension}, not a mean and the scored videos; {_ADVICE}"
            )
    for video in scored:
        name = video.get("video_path") if isinstance(video, dict) else None
        if not isinstance(name, str) or "video_results" not in video:
            raise ValueError(
                f"{path} has {str(video)[:60]!r} in {dimension}, not a video and its score; {_ADVICE}"
            )
        if Path(name).name not in names:
            raise ValueError(
                f"{path} scores {Path(name).name}, which is none of the videos; run VBench on these videos"
            )
    return float(mean)


def _finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer of hundreds of digits
        return False
