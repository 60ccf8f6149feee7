"""The work of a chunk of systems that do not denoise one chunk of three frames after another."""

from __future__ import annotations

import pytest

from rfengine.checkpoint.systems import SYSTEMS, configured
from rfengine.costs.chunk import ChunkWork, Runs
from rfengine.costs.shapes import Shapes
from rfengine.presets import PRESETS


def steady(name: str) -> ChunkWork:
    return ChunkWork.steady(Shapes(configured(PRESETS["wan-1.3b"], name)))


def flops(work: ChunkWork) -> int:
    return sum(part.flops for part in work.parts() if not part.decodes)


@pytest.mark.parametrize(
    ("name", "runs"),
    [
        ("reward-forcing", (Runs(5, 3, 9),)),
        ("self-forcing", (Runs(5, 3, 21),)),
        ("causal-forcing-framewise", (Runs(5, 1, 21),)),
        ("causal-forcing-2-step", (Runs(3, 1, 21),)),
        ("one-forcing", (Runs(2, 1, 21),)),
        ("memrope", (Runs(5, 3, 12),)),
        ("wave-forcing-4-step", (Runs(1, 12, 21), Runs(1, 3, 9))),
        ("rolling-forcing", (Runs(1, 15, 21), Runs(1, 3, 6))),
    ],
)
def test_runs_of_a_steady_chunk(name: str, runs: tuple[Runs, ...]) -> None:
    assert steady(name).runs == runs


def test_a_chunk_of_two_steps_and_one_frame_costs_what_is_published() -> None:
    """105 frames per second at 989 TFLOP/s with a window of 9, 73 with four steps: in TFLOP for 12 frames."""
    assert flops(steady("reward-forcing")) == pytest.approx(121.3e12, rel=0.01)
    assert 3 * flops(steady("causal-forcing-2-step")) == pytest.approx(121e12, rel=0.01)
    assert 3 * flops(steady("one-forcing")) == pytest.approx(81e12, rel=0.01)


def test_passes_of_a_rolling_schedule_take_the_rows_of_all_chunks_in_flight() -> None:
    wave, plain = steady("wave-forcing-4-step"), steady("causal-forcing")
    assert wave.chunk_runs == plain.chunk_runs == 5
    assert flops(wave) < flops(plain)  # the context pass sees less
    assert set(SYSTEMS) >= {"wave-forcing-4-step"}
