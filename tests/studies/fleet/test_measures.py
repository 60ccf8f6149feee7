"""The measures of a simulated fleet, of visits that are worked out by hand."""

from __future__ import annotations

from random import Random

import pytest

from studies.fleet.arrivals import Player
from studies.fleet.measures import (
    Measures,
    SessionEnd,
    Visit,
    all_means,
    mean_of_runs,
    percentile,
    percentiles,
)


def visit(came_at: float, outcome: str, sessions: list[tuple[float, float | None]]) -> Visit:
    made = Visit(came_at, 100.0, outcome)
    made.sessions = sessions
    for opened, _ in sessions:
        player = Player(buffer_s=1.0)
        made.players.append(player)
        player.take(opened + 2.0, 1.0)
    return made


def test_a_percentile_is_the_least_value_that_so_many_do_not_exceed() -> None:
    values = [float(each) for each in range(1, 101)]
    assert percentiles(values[::-1]) == {"p50": 50.0, "p95": 95.0, "p99": 99.0}
    assert percentile([3.0], 50) == percentile([3.0], 99) == 3.0 and percentile([], 50) is None


def test_the_report_counts_starts_stalls_and_hours() -> None:
    measures = Measures(since_s=10.0, run_s=1000.0, card_s=7200.0, busy_s=1800.0)
    stalled = visit(20.0, "finished", [(25.0, 125.0)])
    stalled.players[0].take(30.0, 1.0)  # its second of video was played at 28
    early, late = visit(5.0, "finished", [(5.0, 105.0)]), visit(900.0, "there", [(900.0, None)])
    gone = Visit(50.0, 100.0, "gave up", refusals=3)
    measures.visits = [early, stalled, gone, late]
    report = measures.report()
    assert (report["viewers"], report["viewers_finished"], report["viewers_there"]) == (3, 1, 1)
    assert (
        report["gave_up_share"] == report["refused_share"] == report["stalled_share"] == pytest.approx(1 / 3)
    )
    assert report["start_s"] == {"p50": 2.0, "p95": 7.0, "p99": 7.0}
    assert report["stall_s_an_hour"] == pytest.approx(2.0 / 200.0 * 3600)  # 100 s, and 100 s so far
    assert report["utilisation"] == 0.25 and report["viewer_hours"] == pytest.approx(300 / 3600)
    assert report["viewers_a_card"] == pytest.approx(300 / 7200) and report["loss"] is None


def test_the_time_until_all_are_served_again_leaves_out_who_gave_up_and_waits_for_all_others() -> None:
    again = visit(0.0, "there", [(0.0, 500.0), (503.0, None)])
    again.ends = [SessionEnd(500.0, True)]
    gone = visit(0.0, "gave up", [(0.0, 500.0)])
    gone.ends = [SessionEnd(500.0, True)]
    without = visit(0.0, "there", [(0.0, 500.0)])
    without.ends = [SessionEnd(500.0, True)]
    found = Measures(visits=[again, gone]).report()["loss"]
    assert (found["sessions"], found["gave_up"], found["without_picture"]) == (2, 1, 0)
    assert found["all_served_s"] == found["served_again_s"]["p99"] == 5.0
    found = Measures(visits=[again, gone, without]).report()["loss"]
    assert found["without_picture"] == 1 and found["all_served_s"] is None


def test_who_left_before_the_next_picture_keeps_nobody_waiting() -> None:
    again = visit(0.0, "there", [(0.0, 500.0), (503.0, None)])
    again.ends = [SessionEnd(500.0, True)]
    left = visit(0.0, "finished", [(0.0, 500.0)])
    left.ends = [SessionEnd(500.0, True)]
    found = Measures(visits=[again, left]).report()["loss"]
    assert (found["sessions"], found["without_picture"], found["all_served_s"]) == (2, 0, 5.0)


def test_a_session_that_was_drained_is_no_loss() -> None:
    drained = visit(0.0, "there", [(0.0, 400.0), (402.0, 500.0), (503.0, None)])
    drained.ends = [SessionEnd(400.0, False)]
    report = Measures(visits=[drained]).report()
    assert report["loss"] is None and report["drained_share"] == 1.0
    drained.ends.append(SessionEnd(500.0, True))
    assert drained.served_again_s == [5.0]


def test_the_mean_of_runs_has_its_confidence_interval() -> None:
    found = mean_of_runs([2.0, 4.0, None, 6.0])
    assert found["mean"] == 4.0 and found["half"] == pytest.approx(4.303 * 2.0 / 3**0.5)
    assert mean_of_runs([3.0]) == {"mean": 3.0, "half": None}
    assert mean_of_runs([None]) == {"mean": None, "half": None}
    runs = [{"share": each, "jobs": {"p95": 10 * each}, "loss": None} for each in (1.0, 2.0, 3.0)]
    means = all_means(runs)
    assert set(means) == {"share", "jobs"} and means["share"]["mean"] == 2.0
    assert means["jobs"]["p95"] == {"mean": 20.0, "half": pytest.approx(4.303 * 10.0 / 3**0.5)}


def test_the_intervals_hold_what_they_say() -> None:
    """Of runs of five normal values each, the mean is outside of 5 % of the intervals."""
    random, outside = Random(1), 0
    for _ in range(4000):
        found = mean_of_runs([random.gauss(0.0, 1.0) for _ in range(5)])
        outside += abs(found["mean"]) > found["half"]
    assert 0.04 < outside / 4000 < 0.06
