"""The rows of the schedule, compared with a plain restatement of its rule and with Diffusers' matrix."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from rfengine.diffusion_forcing.schedule_matrix import BlockSizes, least_ar_step, schedule_rows
from rfengine.diffusion_forcing.unipc import sigma_table, timesteps_of

STEPS_30 = timesteps_of(sigma_table(30, 8.0))
STEPS_50 = timesteps_of(sigma_table(50, 8.0))


def plain_rows(steps: int, blocks: int, ready: int, ar_step: int) -> list[tuple[list[int], list[bool]]]:
    """The progress of every block in each row, and which of them move, by the rule as it is published."""
    progress, rows = [steps + 1] * ready + [0] * (blocks - ready), []
    while not all(value >= steps for value in progress):
        new: list[int] = []
        for block, own in enumerate(progress):
            leads = block == 0 or progress[block - 1] >= steps
            value = own + 1 if leads else new[block - 1] - ar_step
            new.append(min(max(value, 0), steps + 1))
        moves = [a != b and a != steps + 1 for a, b in zip(new, progress, strict=True)]
        rows.append((new, moves))
        progress = new
    return rows


def test_rows_follow_the_published_rule() -> None:
    for steps, blocks, ready, ar_step in product((1, 2, 5, 8), (1, 2, 3, 7), (0, 1, 2), (0, 1, 2, 3, 5, 9)):
        if ready >= blocks:
            continue
        timesteps = tuple(range(900, 900 - steps, -1))
        shown = (999, *timesteps, 0)
        rows = schedule_rows(timesteps, BlockSizes(blocks, ready, 1, blocks), ar_step)
        plain = plain_rows(steps, blocks, ready, ar_step)
        assert len(rows) == len(plain) == steps + (blocks - 1 - ready) * min(ar_step, steps)
        for row, (progress, moves) in zip(rows, plain, strict=True):
            assert row.timesteps == tuple(shown[value] for value in progress)
            assert row.moving == tuple(block for block, moved in enumerate(moves) if moved)
            assert row.steps == tuple(progress[block] - 1 for block in row.moving)
            assert row.finished == next((at for at, value in enumerate(progress) if value < steps), blocks)


@pytest.mark.parametrize(
    ("timesteps", "ready", "block", "ar_step", "count"),
    [
        (STEPS_30, 0, 5, 5, 50),
        (STEPS_30, 5, 5, 5, 45),
        (STEPS_30, 0, 1, 0, 30),
        (STEPS_50, 0, 5, 5, 70),
        (STEPS_30, 24, 1, 0, 30),
    ],
)
def test_row_counts_of_25_latent_frames(
    timesteps: tuple[int, ...], ready: int, block: int, ar_step: int, count: int
) -> None:
    rows = schedule_rows(timesteps, BlockSizes(25, ready, block, 25), ar_step)
    assert len(rows) == count
    taken = [sum(frame in row.moving for row in rows) for frame in range(25)]
    assert taken == [0] * ready + [len(timesteps)] * (25 - ready)
    assert all((row.start, row.end, len(row.timesteps)) == (0, 25, 25) for row in rows)
    assert rows[-1].finished == 25


def test_first_and_last_rows_are_these_numbers() -> None:
    rows = schedule_rows(STEPS_30, BlockSizes(25, 0, 5, 25), 5)
    blocks = [tuple(row.timesteps[frame] for frame in range(0, 25, 5)) for row in rows]
    assert blocks[0] == (999, 999, 999, 999, 999) and rows[0].moving == (0, 1, 2, 3, 4)
    assert blocks[4] == (980, 999, 999, 999, 999) and rows[4].moving == (0, 1, 2, 3, 4)
    assert blocks[5] == (975, 999, 999, 999, 999) and rows[5].moving == tuple(range(10))
    assert rows[5].steps == (5,) * 5 + (0,) * 5
    assert blocks[30] == (0, *(STEPS_30[step] for step in (25, 20, 15, 10)))
    assert blocks[-1] == (0, 0, 0, 0, 216) and rows[-1].moving == tuple(range(20, 25))
    together = schedule_rows(STEPS_30, BlockSizes(25, 0, 1, 25), 0)
    assert [row.timesteps for row in together] == [(timestep,) * 25 for timestep in STEPS_30]


def test_window_grows_by_a_block_when_it_first_moves() -> None:
    sizes = BlockSizes(50, 0, 5, 25)
    assert least_ar_step(30, sizes) == 6
    rows = schedule_rows(STEPS_30, sizes, 6)
    assert len(rows) == 30 + 9 * 6
    windows = [(row.start, row.end) for row in rows]
    # block 5 first moves in row 30, and each later one six rows on
    assert (
        windows
        == [(0, 25)] * 30 + [(at, at + 25) for at in (5, 10, 15, 20) for _ in range(6)] + [(25, 50)] * 30
    )
    finished = [row.finished for row in rows]
    assert [finished.index(frames) for frames in range(5, 55, 5)] == list(range(29, 84, 6))
    taken = [sum(frame in row.moving for row in rows) for frame in range(50)]
    assert taken == [30] * 50
    assert all(row.start <= row.moving[0] and row.moving[-1] < row.end for row in rows)


def test_every_frame_takes_every_step_inside_the_window() -> None:
    """A start that is longer than the window too."""
    timesteps = (900, 600, 300)
    for frames, ready, base, ar_step in product((4, 7, 12), range(9), (3, 5), (1, 2, 4)):
        sizes = BlockSizes(2 * frames, 2 * ready, 2, 2 * base) if ready < frames else None
        if sizes is None or (frames > base and ar_step < least_ar_step(3, sizes)):
            continue
        rows = schedule_rows(timesteps, sizes, ar_step)
        taken = [[] for _ in range(2 * frames)]
        for row in rows:
            assert row.end - row.start == 2 * min(frames, base) == len(row.timesteps)
            assert row.start <= row.moving[0] and row.moving[-1] < row.end <= 2 * frames
            for frame, step in zip(row.moving, row.steps, strict=True):
                taken[frame].append(step)
        assert taken == [[]] * (2 * ready) + [[0, 1, 2]] * 2 * (frames - ready)


def test_a_step_between_blocks_that_is_too_small_for_the_window_is_refused() -> None:
    message = (
        "ar_step is 5 and 50 latent frames are more than the 25 of a window; with 30 steps use at least 6"
    )
    with pytest.raises(ValueError, match=message):
        schedule_rows(STEPS_30, BlockSizes(50, 0, 5, 25), 5)


def of_diffusers(frames: int, ready: int, block: int, base: int, ar_step: int) -> tuple:
    """Timesteps, steps, masks and windows of all rows, in Diffusers."""
    from diffusers import SkyReelsV2DiffusionForcingPipeline

    return SkyReelsV2DiffusionForcingPipeline.generate_timestep_matrix(
        None, frames, torch.tensor(STEPS_30), base, ar_step, ready, block
    )


@pytest.mark.parametrize(
    ("frames", "ready", "block", "base", "ar_step"),
    [(25, 0, 1, 25, 0), (25, 5, 5, 25, 5), (50, 0, 5, 25, 6), (12, 0, 2, 6, 10), (30, 10, 5, 25, 7)],
)
def test_rows_agree_with_diffusers(frames: int, ready: int, block: int, base: int, ar_step: int) -> None:
    matrix, index, mask, windows = of_diffusers(frames, ready, block, base, ar_step)
    rows = schedule_rows(STEPS_30, BlockSizes(frames, ready, block, base), ar_step)
    assert [(row.start, row.end) for row in rows] == windows
    for number, row in enumerate(rows):
        assert row.timesteps == tuple(matrix[number, row.start : row.end].tolist())
        assert row.moving == tuple(mask[number].nonzero().flatten().tolist())
        assert row.steps == tuple((index[number, list(row.moving)] - 1).tolist())


def test_a_schedule_that_is_a_row_late_differs_from_diffusers() -> None:
    _, _, mask, _ = of_diffusers(25, 0, 5, 25, 5)
    late = schedule_rows(STEPS_30, BlockSizes(25, 0, 5, 25), 6)
    moving = [tuple(row.nonzero().flatten().tolist()) for row in mask]
    assert [row.moving for row in late[:5]] == moving[:5] and late[5].moving != moving[5]
    assert len(mask) == 50 and len(late) == 54


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((26, 0, 5, 25), "frames is 26 latent frames; use a multiple of the 5 of a block"),
        ((25, 3, 5, 25), "ready_frames is 3 latent frames; use a multiple of the 5"),
        ((25, 25, 5, 25), "ready_frames is 25 of 25 latent frames, and nothing is left to make"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockSizes(*sizes)
