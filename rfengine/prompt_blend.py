"""Blends of text states: the weighted mean of several texts, and the way from one prompt to another.

Text states are [1, text_len, text_dim], and a row is one token; rows past the end of a text are 0. All of it
goes row by row and is computed in float32 at least.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, SupportsIndex, get_args

import torch
from torch import Tensor

from rfengine.limits import Range, as_integer, shown
from rfengine.prompts import PromptMode

Interpolation = Literal["linear", "spherical"]
MOST_TRANSITION_CHUNKS = 1000  # of a change of the prompt
_LEAST_SINE = 1e-4  # of the angle of two rows, above which float32 gives the directions between them


def weighted_mean(states: Tensor, weights: Sequence[float]) -> Tensor:
    """sum_i w_i s_i / sum_i w_i of the states [n, text_len, text_dim] of n texts, as [1, text_len, text_dim].

    weights: positive. Where a text has ended its row counts as the 0 that it is, so a longer text is weaker
    there. One text is returned as it is, bit for bit.
    """
    if len(weights) == 1:
        return states
    total = math.fsum(weights)
    exact = states.to(_exact(states))
    mean = sum(state * (weight / total) for state, weight in zip(exact.split(1), weights, strict=True))
    return mean.to(states.dtype)


def interpolated(start: Tensor, target: Tensor, fraction: float, interpolation: Interpolation) -> Tensor:
    """Text states at `fraction` of the way, 0 to 1, from `start` to `target`, which are the ends themselves.

    linear: a + f (b - a). spherical: the direction of a row turns by the same angle in equal parts of the
    way, sin((1 - f) t) / sin t a / |a| + sin(f t) / sin t b / |b| with the angle t of a and b (K. Shoemake,
    Animating rotation with quaternion curves, 1985), and its length goes linearly from |a| to |b|; linear for
    a row that is 0 in one of them, and where both point the same way or opposite ways.
    """
    if fraction in (0, 1):
        return target if fraction else start
    one, other = start.to(_exact(start)), target.to(_exact(start))
    mixed = torch.lerp(one, other, fraction)
    if interpolation == "spherical":
        length, other_length = _lengths(one), _lengths(other)
        least = torch.finfo(one.dtype).tiny
        one, other = one / length.clamp_min(least), other / other_length.clamp_min(least)
        angle = 2 * torch.atan2(_lengths(one - other), _lengths(one + other))
        sine = angle.sin()
        turned = ((1 - fraction) * angle).sin() * one + (fraction * angle).sin() * other
        turned *= torch.lerp(length, other_length, fraction) / sine.clamp_min(_LEAST_SINE)
        turns = (length > 0) & (other_length > 0) & (sine >= _LEAST_SINE)
        mixed = torch.where(turns, turned, mixed)
    return mixed.to(start.dtype)


def _exact(states: Tensor) -> torch.dtype:
    return torch.promote_types(states.dtype, torch.float32)


def _lengths(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=-1, keepdim=True)


def checked_chunks(mode: PromptMode, transition_chunks: SupportsIndex, interpolation: Interpolation) -> int:
    """Chunks of a change of the prompt. Raises ValueError for what VideoStream.set_prompt does not take."""
    if mode not in get_args(PromptMode):
        raise ValueError(f"mode is {shown(mode)}; use 'soft', 'recache' or 'hard'")
    if interpolation not in get_args(Interpolation):
        raise ValueError(f"interpolation is {shown(interpolation)}; use 'linear' or 'spherical'")
    chunks = as_integer("transition_chunks", transition_chunks, Range(1, MOST_TRANSITION_CHUNKS))
    if chunks > 1 and mode != "soft":
        raise ValueError(f"transition_chunks is {chunks} and mode is {mode!r}; a transition is 'soft'")
    return chunks


@dataclass(frozen=True, slots=True, eq=False)
class TextTransition:
    """The way of the text states from `start` to `target` in `chunks` steps, of which `step` are done.

    The states follow from the fraction of the way alone, so no rounding adds up.
    """

    start: Tensor
    target: Tensor
    chunks: int
    interpolation: Interpolation = "linear"
    step: int = 0

    @property
    def ended(self) -> bool:
        return self.step == self.chunks

    def advanced(self) -> TextTransition:
        """The transition one step further."""
        return replace(self, step=self.step + 1)

    def states(self) -> Tensor:
        """The text states at the present step; `target` itself at the end."""
        return interpolated(self.start, self.target, self.step / self.chunks, self.interpolation)

    def tensors(self) -> dict[str, Tensor]:
        """What a snapshot holds of it beside text_states, which `start` is before the first step."""
        return {"text_target": self.target} | ({"text_start": self.start} if self.step else {})

    def values(self) -> dict[str, Any]:
        """What the info of a snapshot holds of it."""
        return {
            "transition_chunks": self.chunks,
            "transition_step": self.step,
            "interpolation": self.interpolation,
        }
