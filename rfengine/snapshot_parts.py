"""The parts of a snapshot: every rank of tensor parallelism takes one of its own heads, without a word to the
others; together they are the snapshot that one rank alone would have taken."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_OF_HEADS = tuple(
    f"cache.{name}" for name in ("keys", "values", "raw_keys", "sink_low_keys", "sink_low_values")
)
_HEADS_AXIS = 3  # of [L, B, S, H, E]
_PART = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})")
Contents = tuple[dict[str, Tensor], dict[str, Any]]  # tensors and info of a snapshot


def part_of(contents: Contents, rank: int, count: int) -> Contents:
    """What rank `rank` of `count` has of a whole snapshot; views of it. Frames and the state of the decoder
    are the first rank's."""
    tensors = {
        name: _heads(name, tensor, rank, count) if name in _OF_HEADS else tensor
        for name, tensor in contents[0].items()
        if rank == 0 or not name.startswith("decoder.")
    }
    if rank and "ahead.frames" in tensors:
        tensors["ahead.frames"] = tensors["ahead.frames"][:0]
    return tensors, contents[1] | {"part": [rank, count]}


def _heads(name: str, tensor: Tensor, rank: int, count: int) -> Tensor:
    heads = tensor.shape[_HEADS_AXIS] if tensor.ndim == 5 else 0
    if not heads or heads % count:
        raise ValueError(
            f"{name} of the snapshot is {tuple(tensor.shape)}, whose heads {count} ranks cannot share out; "
            "restore it with the model it was taken of"
        )
    return tensor.narrow(_HEADS_AXIS, heads // count * rank, heads // count)


def joined(parts: Sequence[Contents]) -> Contents:
    """The whole snapshot of all its parts, in any order; its tensors are copies where they are joined.

    Raises ValueError where a part is missing or there twice, and for parts of different moments.
    """
    numbered = sorted(
        ((tensors, info | {"part": list(info["part"])}) for tensors, info in parts),
        key=lambda each: each[1]["part"],
    )
    if not numbered:
        raise ValueError("there are 0 parts of the snapshot; give those of all ranks")
    count = numbered[0][1]["part"][1]
    found = [each[1]["part"] for each in numbered]
    if found != [[rank, count] for rank in range(count)]:
        present = ", ".join(f"{rank + 1} of {number}" for rank, number in found)
        raise ValueError(f"the parts of the snapshot are {present}; give each of the {count} once")
    (tensors, info), *others = numbered
    for other, other_info in others:
        if {**other_info, "part": info["part"]} != info or not _continues(tensors, other):
            rank = other_info["part"][0]
            raise ValueError(
                f"parts 1 and {rank + 1} of the snapshot are not of one moment; take it again on all ranks"
            )
    whole = dict(tensors)
    for name in set(_OF_HEADS) & tensors.keys():
        whole[name] = torch.cat([each[name] for each, _ in numbered], dim=_HEADS_AXIS)
    return whole, {name: value for name, value in info.items() if name != "part"}


def _continues(first: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether what is on every rank is the same, and the heads of both can be joined."""
    alike = {name for name in first if not name.startswith("decoder.")}
    if other.keys() != alike:
        return False
    for name in alike - {"ahead.frames"}:
        one, two = first[name], other[name]
        if name in _OF_HEADS and (one.ndim != 5 or one.shape != two.shape or one.dtype != two.dtype):
            return False
        if name not in _OF_HEADS and not torch.equal(one, two):
            return False
    return True


def part_path(path: Path, rank: int, count: int) -> Path:
    """Where a part of the snapshot `path` is: stream-00001-of-00002.safetensors of stream.safetensors."""
    return path.with_name(f"{path.stem}-{rank + 1:05}-of-{count:05}{path.suffix}")


def part_paths(path: Path) -> list[Path]:
    """The files that hold parts of the snapshot `path`, by name."""
    if not path.parent.is_dir():
        return []
    return sorted(
        each
        for each in path.parent.iterdir()
        if each.suffix == path.suffix and (found := _PART.fullmatch(each.stem)) and found["stem"] == path.stem
    )
