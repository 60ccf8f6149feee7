"""Arrivals and the player of the simulated fleet."""

from __future__ import annotations

import statistics
from random import Random

import pytest

from studies.fleet.arrivals import DAY_S, Demand, Player


def test_arrivals_follow_the_wave_of_the_day() -> None:
    demand = Demand(viewers_an_hour=500, wave=0.8, watch_mean_s=300)
    visits = list(demand.viewers(DAY_S, Random(1)))
    assert len(visits) == pytest.approx(24 * 500, rel=0.03)
    assert [when for when, _ in visits] == sorted(when for when, _ in visits)
    peak = [when for when, _ in visits if abs(when - demand.peak_s) < 3600]
    low = [when for when, _ in visits if abs(when - (demand.peak_s - DAY_S / 2)) < 3600]
    assert len(peak) == pytest.approx(2 * 500 * 1.8, rel=0.1)
    assert len(low) == pytest.approx(2 * 500 * 0.2, rel=0.3)
    assert statistics.mean(length for _, length in visits) == pytest.approx(300, rel=0.05)


def test_who_is_there_at_the_start_has_the_rest_of_a_visit() -> None:
    """The mean rest of a visit is E[length squared] / (2 E[length]), for a lognormal exp(spread squared) / 2
    of the mean."""
    demand = Demand(0, watch_mean_s=100, watch_spread=0.5, present=20_000)
    visits = list(demand.viewers(10.0, Random(2)))
    expected = 100 * 2.718281828 ** (0.5**2) / 2
    assert statistics.mean(length for _, length in visits) == pytest.approx(expected, rel=0.02)


def test_jobs_are_a_share_of_the_viewers() -> None:
    demand = Demand(viewers_an_hour=1000, jobs_share=0.2, job_frames=81)
    assert len(list(demand.jobs(DAY_S, Random(3)))) == pytest.approx(24 * 200, rel=0.05)
    assert demand.job_chunks == 7  # 9 and 6 x 12
    assert Demand(1, job_frames=9).job_chunks == 1 and Demand(1, job_frames=10).job_chunks == 2


def test_a_player_begins_with_its_buffer_and_stalls_where_it_has_played_all() -> None:
    player = Player(buffer_s=1.0)
    player.take(10.0, 0.5)
    assert player.started_at is None
    player.take(12.0, 0.75)
    assert player.started_at == 12.0
    player.take(13.0, 0.75)  # plays until 14
    player.take(14.0, 0.5)
    assert player.stalls == 0
    player.take(15.25, 0.75)  # all was played at 14.5
    assert (player.stalls, player.stalled_s) == (1, 0.75)
    player.take(16.5, 0.75)  # until 16
    assert (player.stalls, player.stalled_s) == (2, 1.25)


@pytest.mark.parametrize("wrong", [{"viewers_an_hour": -1}, {"wave": 1.5}, {"watch_mean_s": 0}])
def test_a_demand_that_cannot_be_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="use at least 0, a share of 1"):
        Demand(**{"viewers_an_hour": 1.0, **wrong})
