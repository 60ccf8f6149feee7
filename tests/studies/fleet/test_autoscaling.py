"""The rules of autoscaling: the server's own with its delays, and the one that keeps places free."""

from __future__ import annotations

from dataclasses import fields

from rfengine.serving.replicas.plan import ReplicaPlan
from studies.fleet.autoscaling import Queue, Spare, State


def state(present: int, sessions: int = 0, refusals: int = 0, queued: int = 0) -> State:
    return State(present, sessions, sessions, 0, refusals, queued)


def test_the_servers_rule_adds_a_card_each_time_that_something_has_waited_for_half_a_minute() -> None:
    rule, present, added = Queue(), 4, []
    for now in range(0, 100, 10):
        wanted = rule.wanted(float(now), state(present, 8, refusals=1))
        if wanted > present:
            added.append(now)
        present = wanted
    assert added == [30, 60, 90] and present == 7


def test_a_wait_that_is_over_counts_from_the_beginning_again() -> None:
    rule = Queue()
    for now in range(0, 300, 10):  # a job waits in two of three looks
        assert rule.wanted(float(now), state(4, 8, queued=int(now % 30 > 0))) == 4


def test_the_servers_rule_ends_a_card_once_few_have_worked_for_ten_minutes() -> None:
    rule = Queue()
    wanted = [rule.wanted(float(now), state(4, 2)) for now in range(0, 630, 30)]
    assert wanted == [4] * 20 + [3]
    later = [rule.wanted(600.0 + now, state(3, 2)) for now in range(0, 1800, 30)]
    assert later == [3] * 60  # as many work as there would be cards


def test_the_delays_are_the_servers_own() -> None:
    defaults = {field.name: field.default for field in fields(ReplicaPlan)}
    rule = Queue()
    assert (rule.more_after_s, rule.fewer_after_s) == (defaults["more_after_s"], defaults["fewer_after_s"])


def test_spare_places_are_kept_at_once_and_given_up_late() -> None:
    rule = Spare(places=3, places_a_card=2, jobs_a_card=5, fewer_after_s=60.0)
    assert rule.wanted(0.0, State(2, 4, 4, 1, 0, 0)) == 4  # 4 + 1 + 3 places
    assert rule.wanted(10.0, State(4, 4, 4, 1, 0, 11)) == 6  # and one for every fifth job
    assert [rule.wanted(now, state(6, 1)) for now in (20.0, 79.0, 80.0)] == [6, 6, 2]
    assert rule.wanted(90.0, state(2, 1)) == 2
    assert rule.wanted(100.0, state(6, 1)) == 6  # the time counts anew
