"""Scores that VBench gave the same videos, from the file it writes in an environment of its own.

VBench needs numpy below 2 and transformers 4.33.2, which do not go together with this package. Its command
`vbench evaluate --videos_path DIR --dimension NAME --mode=custom_input` writes *_eval_results.json: an object
of dimension: [mean over the videos, [{"video_path": ..., "video_results": score}, ...]] (VBench 0.1.5).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from rfengine.files import read_text

_MOST_BYTES = 64 * 2**20
_ADVICE = "give the *_eval_results.json that VBench wrote"


def read_vbench(path: Path, videos: Iterable[Path]) -> dict[str, float]:
    """The mean of each dimension in a results file of VBench about these videos, or some of them.

    Raises ValueError for any other file, for a dimension without a score, and where it names another video.
    """
    text = read_text(path, _MOST_BYTES)
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
