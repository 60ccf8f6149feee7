"""Snapshots of older formats as those of the present one, which counts latent frames and not chunks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rfengine.config import CacheConfig
from rfengine.config_json import from_dict, to_dict

OLDER_FORMATS = (2, 3)  # alike but for the checksum, which 2 lacks


def upgraded(
    info: Mapping[str, Any], tensors: Mapping[str, Tensor], number: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """info and tensors of a snapshot in one of OLDER_FORMATS, in format `number`. Raises ValueError where a
    value that is read here is none that such a snapshot has."""
    config, next_chunk, slots = from_dict(CacheConfig, info.get("cache")), *_counted(info)
    size = config.chunk_frames
    held = [frame for slot in slots for frame in ([-1] * size if slot < 0 else _frames(slot, size))]
    clean = {name: each for name, each in tensors.items() if name.startswith("window_latents.")}
    numbers = range(max(0, next_chunk - config.past_frames // size), next_chunk)
    kept = [f"window_latents.{chunk}" for chunk in numbers]
    if lacking := [name for name in kept if name not in clean]:
        raise ValueError(f"the snapshot lacks {lacking[0]}; take it again")
    others = {name: each for name, each in tensors.items() if name not in clean}
    if kept:
        others["window_latents"] = torch.cat([clean[name] for name in kept], dim=2)
    values = {name: value for name, value in info.items() if name != "slot_chunks"}
    values |= {
        "format": number, "cache": _as_json(to_dict(config)), "first_timesteps": [], "rolling": "none",
        "held": held, "next_frame": next_chunk * size, "joint_chunks": 0,
    }  # fmt: skip
    return values, others


def _counted(info: Mapping[str, Any]) -> tuple[int, list[int]]:
    next_chunk, slots = info.get("next_chunk"), info.get("slot_chunks")
    integers = [next_chunk, *slots] if isinstance(slots, list) else [None]
    if not all(type(value) is int and -1 <= value < 2**31 for value in integers) or next_chunk < 0:
        raise ValueError("next_chunk and slot_chunks of the snapshot are no counts of chunks; take it again")
    return next_chunk, slots


def _frames(chunk: int, size: int) -> list[int]:
    return list(range(chunk * size, (chunk + 1) * size))


def _as_json(values: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
