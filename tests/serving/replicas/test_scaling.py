"""How many replicas the length of the queue asks for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from rfengine.serving.replicas.scaling import WAITING, WORKING, policy, wanted_replicas


@pytest.mark.parametrize(
    ("present", "waiting", "working", "wanted"),
    [
        (1, 0, 0, 1),
        (1, 1, 5, 2),  # a job or a session waits
        (2, 0.4, 2, 2),  # on average of a while less than one
        (3, 0, 1, 2),
        (3, 0, 2, 3),  # each replica that stays may have one, and one may lose one
        (2, 0, 0, 1),
    ],
)
def test_one_more_while_something_waits_and_one_less_while_most_are_idle(
    present: int, waiting: float, working: float, wanted: int
) -> None:
    assert wanted_replicas(present, waiting, working) == wanted


def test_the_queue_that_all_report_counts_once_and_their_work_together() -> None:
    reported = {WAITING: {"a": 0.0, "b": 3.0}, WORKING: {"a": 2.0, "b": 1.0}}
    context = SimpleNamespace(aggregated_metrics=reported, target_num_replicas=2)
    assert policy(context) == (3, {})
    idle = SimpleNamespace(aggregated_metrics={WORKING: {"a": 0.0, "b": 1.0}}, target_num_replicas=3)
    assert policy(idle) == (2, {})


def test_without_any_report_the_number_stays() -> None:
    assert policy(SimpleNamespace(aggregated_metrics=None, target_num_replicas=1)) == (1, {})
