"""Service times: computed ones against the roofline, measured ones against their record."""

from __future__ import annotations

import pytest

from bench.roofline import Options, roofline
from rfengine.grid import LatentGrid
from rfengine.presets import PRESETS
from studies.fleet.service_times import (
    CHUNK_FRAMES,
    CHUNK_SECONDS,
    FIRST_FRAMES,
    FPS,
    ServiceTimes,
    chunk_floor_s,
    computed,
    measured,
)


@pytest.mark.parametrize("precision", ["bf16", "fp8", "fp8-attention"])
def test_a_steady_turn_is_the_rooflines_floor_over_the_efficiency(precision: str) -> None:
    floor_s = roofline(Options(precision=precision))["totals"]["with_vae"]["floor_ms"] / 1e3
    assert chunk_floor_s(precision, "h100") == pytest.approx(floor_s)
    for efficiency in (0.5, 1.0):
        times = computed(precision, efficiency=efficiency)
        assert times.turn(2, 17) == times.turn(99, 3) == pytest.approx(floor_s / efficiency)
        assert times.streams == int(CHUNK_SECONDS * efficiency / floor_s)
        assert times.origin == "computed"


def test_the_second_turn_makes_the_chunk_ahead_as_well() -> None:
    first, second, steady = (computed("bf16").turn(chunk, 0) for chunk in range(3))
    ahead = roofline(Options(chunk=2))["totals"]["without_vae"]["floor_ms"] / 1e3 / 0.5
    alone = roofline(Options(chunk=1))["totals"]["with_vae"]["floor_ms"] / 1e3 / 0.5
    assert second == pytest.approx(alone + ahead) and first < steady < second


def test_samples_are_played_in_their_order() -> None:
    alone = {"turn_0_s": [5.0], "turn_1_s": [4.0], "turn_later_s": [1.0, 2.0, 3.0], "outside_s": [0.5, 0.0]}
    times = measured({"alone": alone})
    assert [times.turn(7, place) for place in range(4)] == [1.0, 2.0, 3.0, 1.0]
    assert (times.turn(0, 8), times.turn(1, 8), times.encode(3)) == (5.0, 4.0, 0.0)
    assert times.delivery_threads == 0 and times.steady_s == pytest.approx(2.25)


@pytest.mark.parametrize("turns", [(), ((),), ((-1.0,),)])
def test_times_without_samples_or_below_zero_are_refused(turns: tuple[tuple[float, ...], ...]) -> None:
    with pytest.raises(ValueError, match="give at least one sample of each, none below 0"):
        ServiceTimes("wrong", "made up", turns, (0.1,), 1)


@pytest.mark.parametrize("efficiency", [0.0, -0.5, 1.1])
def test_an_efficiency_that_is_none_is_refused(efficiency: float) -> None:
    with pytest.raises(ValueError, match=f"efficiency is {efficiency:g}"):
        computed("bf16", efficiency=efficiency)


def test_a_prompt_takes_its_floor_over_the_efficiency_as_well() -> None:
    half, whole = (computed("bf16", efficiency=each).turn(0, 0) for each in (0.5, 1.0))
    assert half == pytest.approx(2 * whole)


def test_what_a_later_turn_does_ahead_is_its_chunk_without_the_decoder() -> None:
    floor_ms = roofline(Options(precision="fp8"))["totals"]["without_vae"]["floor_ms"]
    times = computed("fp8")
    assert times.ahead_s == pytest.approx(floor_ms / 1e3 / 0.5)
    assert times.last_turn(0, 0) == times.turn(0, 0)  # whose next chunk is not begun


def test_the_frames_of_a_chunk_are_those_of_the_models() -> None:
    for name in ("tiny", "wan-1.3b"):
        config = PRESETS[name]
        grid, chunk = LatentGrid.of(config), config.cache.chunk_frames
        found = config.fps, grid.pixel_frames(chunk), chunk * grid.temporal_stride
        assert found == (FPS, FIRST_FRAMES, CHUNK_FRAMES)
