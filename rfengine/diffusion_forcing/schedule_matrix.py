"""The schedule of diffusion forcing: which step every latent frame of a video is at in each row, a row being
one pass of the model (diffusion forcing: arXiv 2407.01392, and arXiv 2504.13074 for SkyReels-V2).

Blocks of latent frames follow one another, each `ar_step` rows behind the one before it, or all together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rfengine.diffusion_forcing.unipc import PURE_NOISE_TIMESTEP


@dataclass(frozen=True, slots=True)
class BlockSizes:
    """Latent frames of a piece of video, all multiples of block_frames.

    ready_frames: clean from the start, at the beginning. base_frames: that the model sees at once.
    """

    frames: int
    ready_frames: int
    block_frames: int
    base_frames: int

    def __post_init__(self) -> None:
        for name in ("frames", "ready_frames", "base_frames"):
            if (count := getattr(self, name)) % self.block_frames:
                raise ValueError(
                    f"{name} is {count} latent frames; use a multiple of the {self.block_frames} of a block"
                )
        if self.ready_frames >= self.frames:
            raise ValueError(
                f"ready_frames is {self.ready_frames} of {self.frames} latent frames, and nothing is left to "
                "make; ask for more"
            )


@dataclass(frozen=True, slots=True)
class Row:
    """One pass. start, end: the latent frames of the window that is fed. timesteps: of those, as the model is
    shown them. moving: the frames that take a step of the solver, and steps: which one, from 0. finished:
    frames from the start of the piece that are clean after it."""

    start: int
    end: int
    timesteps: tuple[int, ...]
    moving: tuple[int, ...]
    steps: tuple[int, ...]
    finished: int


def least_ar_step(steps: int, sizes: BlockSizes) -> int:
    """The smallest distance between blocks at which each is clean before it leaves a window that grows."""
    return -(-steps // (sizes.base_frames // sizes.block_frames))


def schedule_rows(timesteps: Sequence[int], sizes: BlockSizes, ar_step: int) -> tuple[Row, ...]:
    """The rows until every block is clean: steps + (blocks - 1 - ready blocks) * ar_step of them, where
    ar_step is at most steps; beyond that a block begins when the one before it is clean.

    timesteps: of the solver's steps. A block's progress p counts from 0, pure noise, over the steps, where it
    is shown timesteps[p - 1] and moves, to one beyond them: clean, timestep 0. ar_step 0 moves all blocks
    together. Raises ValueError where the video is longer than the window and ar_step too small for it.
    """
    steps, size = len(timesteps), sizes.block_frames
    blocks, base = sizes.frames // size, min(sizes.frames, sizes.base_frames) // size
    if blocks > base and ar_step < (least := least_ar_step(steps, sizes)):
        raise ValueError(
            f"ar_step is {ar_step} and {sizes.frames} latent frames are more than the {sizes.base_frames} of "
            f"a window; with {steps} steps use at least {least}, so that a block is clean before it leaves"
        )
    shown = (PURE_NOISE_TIMESTEP, *timesteps, 0)
    ready = sizes.ready_frames // size
    progress = [steps + 1] * ready + [0] * (blocks - ready)
    # end: of the window; first: the first block that is not clean
    rows, end, first = [], max(base, ready), ready
    while first < blocks:
        moving = _advance(progress, first, steps, ar_step)
        if end < blocks and end in moving:
            end += 1
        while first < blocks and progress[first] >= steps:
            first += 1
        window = range(max(end - base, 0), end)
        rows.append(
            Row(
                window.start * size,
                window.stop * size,
                _each_frame([shown[progress[block]] for block in window], size),
                tuple(range(moving.start * size, moving.stop * size)),
                _each_frame([progress[block] - 1 for block in moving], size),
                first * size,
            )
        )
    return tuple(rows)


def _advance(progress: list[int], first: int, steps: int, ar_step: int) -> range:
    """Go on by one row, in place, where `first` is the first block that is not clean; returns the blocks that
    move, which are neighbours. Those before them are clean and those after them pure noise."""
    if first:
        progress[first - 1] = steps + 1
    block = first
    while block < len(progress):
        new = progress[block] + 1 if block == first else max(progress[block - 1] - ar_step, 0)
        if new == progress[block]:
            break
        progress[block] = new
        block += 1
    return range(first, block)


def _each_frame(values: Sequence[int], size: int) -> tuple[int, ...]:
    """The value of each block, once for each of its `size` frames."""
    return tuple(value for value in values for _ in range(size))
