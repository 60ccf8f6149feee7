"""VideoPlan: everything about a video that is known before the model is loaded, as host numbers."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, NoReturn

from rfengine.config import EngineConfig
from rfengine.diffusion_forcing.options import DiffusionForcingOptions
from rfengine.diffusion_forcing.schedule_matrix import BlockSizes, Row, least_ar_step, schedule_rows
from rfengine.diffusion_forcing.unipc import UniPCTable, sigma_table, timesteps_of
from rfengine.diffusion_forcing_config import DiffusionForcingConfig
from rfengine.grid import LatentGrid
from rfengine.video import check_frames, frame_count

if TYPE_CHECKING:
    from numpy import ndarray

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Piece:
    """Latent frames that are denoised together. repeated: those at its beginning that the video has already.
    sizes.ready_frames, at its beginning too, are clean from the start, and no more than that."""

    sizes: BlockSizes
    repeated: int
    rows: tuple[Row, ...]

    @property
    def window(self) -> int:
        """Latent frames of a row."""
        return self.rows[0].end - self.rows[0].start


@dataclass(frozen=True, slots=True)
class VideoPlan:
    """num_frames: pixel frames that are kept. overlap_frames: pixel frames that a piece takes over from the
    one before. block_frames: of the block-causal attention, None where all frames see all."""

    grid: LatentGrid
    fps: int
    num_frames: int
    pieces: tuple[Piece, ...]
    table: UniPCTable
    guidance_scale: float
    negative_prompt: str
    overlap_frames: int
    block_frames: int | None

    @property
    def row_count(self) -> int:
        """Rows of all pieces; each is one pass of the model, or two with guidance."""
        return sum(len(piece.rows) for piece in self.pieces)


def piece_count(total: int, base: int, overlap: int) -> int:
    """Pieces of a video of `total` latent frames: the first has `base`, each later one base - overlap new
    ones."""
    return 1 + -(-max(0, total - base) // (base - overlap))


def plan_video(
    config: EngineConfig, options: DiffusionForcingOptions, start_frames: int = 0, has_end: bool = False
) -> VideoPlan:
    """The plan of a video that begins with `start_frames` given pixel frames, and ends on a given one.

    Raises ValueError, before anything is loaded, for what the model cannot make.
    """
    forcing = require_diffusion_forcing(config)
    grid = LatentGrid.of(config, options.height, options.width)
    fps = options.fps or config.fps
    count = frame_count(fps, num_frames=options.num_frames or forcing.base_frames)
    picture = start_frames == 1
    steps = options.steps or forcing.steps
    shift = options.shift or (forcing.image_shift if picture else forcing.shift)
    guidance = forcing.image_guidance_scale if picture else forcing.guidance_scale
    table = UniPCTable.of(sigma_table(steps, shift, options.sigmas))
    base = grid.latent_frames(forcing.base_frames)
    _check_block(options, base, has_end)
    start = _latents_of("the start", start_frames, grid)
    overlap = _latents_of("overlap_history", options.overlap_history or 0, grid)
    if overlap >= base:
        raise ValueError(
            f"overlap_history is {options.overlap_history} and a piece has {forcing.base_frames} frames; use "
            f"at most {grid.pixel_frames(base - 1)}"
        )
    total = grid.latent_frames(count)
    if total > base:
        _check_long(options, grid, count, base, has_end, steps)
    sizes = _piece_sizes(total, base, overlap, options.causal_block_size)
    ready = [_ready("the start", start, options)]
    if len(sizes) > 1:
        ready += [_ready("overlap_history", overlap, options)] * (len(sizes) - 1)
    if ready[0] >= sizes[0]:
        _refuse_start(start_frames, grid.pixel_frames(sizes[0]), count, len(sizes))
    rows_of = cache(partial(schedule_rows, timesteps_of(table.sigmas), ar_step=options.ar_step))
    pieces = []
    for index, (frames, clean) in enumerate(zip(sizes, ready, strict=True)):
        blocks = BlockSizes(frames, clean, options.causal_block_size, min(frames, base))
        pieces.append(Piece(blocks, overlap if index else 0, rows_of(blocks)))
    return VideoPlan(
        grid,
        fps,
        count,
        tuple(pieces),
        table,
        options.guidance_scale or guidance,
        options.negative_prompt if options.negative_prompt is not None else forcing.negative_prompt,
        options.overlap_history or 0,
        options.causal_block_size if options.causal_attention else None,
    )


def check_given(plan: VideoPlan, start_frames: ndarray | None, end_frame: ndarray | None) -> None:
    """Raises ValueError unless the frames, uint8 [T, H, W, 3] and [H, W, 3], are of the size of the video."""
    import numpy

    height, width = plan.grid.height, plan.grid.width
    if start_frames is not None:
        check_frames(start_frames, height, width)
    if end_frame is not None:
        check_frames(end_frame[None] if isinstance(end_frame, numpy.ndarray) else end_frame, height, width)


def require_diffusion_forcing(config: EngineConfig) -> DiffusionForcingConfig:
    """What `config` says of diffusion forcing. Raises ValueError where it says nothing."""
    if config.diffusion_forcing is None:
        raise ValueError(
            f"{config.name} is no diffusion forcing model; use rfengine.Pipeline, or a directory that "
            "`rfengine convert` made of SkyReels-V2-DF"
        )
    return config.diffusion_forcing


def _check_block(options: DiffusionForcingOptions, base: int, has_end: bool) -> None:
    size = options.causal_block_size
    if base % size:
        divisors = ", ".join(str(number) for number in range(1, base + 1) if base % number == 0)
        raise ValueError(
            f"causal_block_size is {size} and the model sees {base} latent frames at once; use one of "
            f"{divisors}"
        )
    if has_end and options.causal_attention:
        raise ValueError(
            "causal_attention is on and an end frame is given, which no frame before it would see; leave one "
            "of them out"
        )


def _refuse_start(start: int, piece: int, count: int, pieces: int) -> NoReturn:
    if pieces > 1:
        raise ValueError(
            f"the start has {start} frames and the first piece of this video has {piece}; give a shorter "
            "start, such as the last frames of it, or an ar_step in place of overlap_history"
        )
    raise ValueError(
        f"the start has {start} frames and num_frames is {count}, with those of the start; ask for more, or "
        "give a shorter start"
    )


def _check_long(
    options: DiffusionForcingOptions, grid: LatentGrid, count: int, base: int, has_end: bool, steps: int
) -> None:
    """Raises ValueError unless a video that is longer than the window can be made."""
    if options.overlap_history is not None:
        return
    least = least_ar_step(steps, BlockSizes(base, 0, options.causal_block_size, base))
    if has_end or options.ar_step < least:
        raise ValueError(
            f"num_frames is {count} and the model sees {grid.pixel_frames(base)} at once; give an "
            f"overlap_history, such as 17, or without an end frame an ar_step of at least {least}"
        )


def _piece_sizes(total: int, base: int, overlap: int, block: int) -> list[int]:
    """Latent frames of each piece, whole blocks; one piece where no overlap is asked for."""
    if total <= base or not overlap:
        return [-(-total // block) * block]
    sizes = [base]
    for index in range(1, piece_count(total, base, overlap)):
        made = base + (index - 1) * (base - overlap)
        sizes.append(-(-min(total - made + overlap, base) // block) * block)
    return sizes


def _latents_of(name: str, frames: int, grid: LatentGrid) -> int:
    """Latent frames of the clean pixel frames at a beginning."""
    if frames and (frames - 1) % grid.temporal_stride:
        near = frames - (frames - 1) % grid.temporal_stride
        raise ValueError(
            f"{name} has {frames} frames; whole latent frames are 1 + a multiple of {grid.temporal_stride}: "
            f"use {near} or {near + grid.temporal_stride}"
        )
    return grid.latent_frames(frames)


def _ready(name: str, latents: int, options: DiffusionForcingOptions) -> int:
    """Of the clean latent frames at a beginning, those that fill whole blocks."""
    size = options.causal_block_size
    ready = latents - latents % size
    if latents and not ready:
        raise ValueError(
            f"{name} has {latents} latent frames and causal_block_size is {size}, and whole blocks alone are "
            "kept; use causal_block_size 1, or more frames"
        )
    if ready < latents:
        logger.warning(
            "%s has %d latent frames and blocks have %d: its last %d are made anew", name, latents, size,
            latents - ready,
        )  # fmt: skip
    return ready
