"""What is computed of a card and of a fleet's cost."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rfengine.serving.admission import Admission
from rfengine.serving.events import SessionRequest
from rfengine.serving.options import ServiceOptions
from studies.fleet.capacity import Load, Prices, memory_plan, points_bytes, streams
from studies.fleet.service_times import chunk_floor_s


def test_sessions_by_memory_are_what_admission_would_take() -> None:
    plan = memory_plan("bf16")
    assert plan.shared_bytes / 2**30 == pytest.approx(15.30, abs=0.01)
    assert plan.session_bytes / 2**30 == pytest.approx(6.27, abs=0.01)
    assert (
        plan.sessions(80) * plan.session_bytes
        <= plan.budget_bytes(80)
        == int(0.8 * (80e9 - plan.shared_bytes))
    )
    assert plan.budget_bytes(80) < (plan.sessions(80) + 1) * plan.session_bytes
    assert memory_plan("fp8-attention").session_bytes > memory_plan("fp8").session_bytes == plan.session_bytes


def test_points_are_kept_from_the_host_memory_that_is_named_and_not_from_less() -> None:
    needed, options = 10**6, ServiceOptions(max_sessions=2)
    enough = points_bytes(needed, options.max_sessions)
    server = Admission.__new__(Admission)
    for host_bytes, every in ((enough, options.keep_every), (enough - 4, 0)):
        server._options = replace(options, host_bytes=host_bytes)
        assert server.new_points(SessionRequest("a"), needed).keep_every == every


def test_sessions_by_compute_keep_the_playback_rate() -> None:
    floor = chunk_floor_s("bf16", "h100")
    assert [streams(floor, each) for each in (0.2, 0.3, 0.5, 0.7, 1.0)] == [0, 1, 1, 2, 3]


def test_a_load_costs_its_cards_its_network_and_what_it_keeps() -> None:
    load = Load(streams=180, viewers=360, places=2, filled=0.9, bits_a_second=4e6)
    assert load.cards == 100
    assert load.egress_gbit_s == pytest.approx(1.44) and load.egress_gb_hour == pytest.approx(648)
    cost = load.cost_hour(Prices(3.0, 0.1, 0.73), recorded_hours=10)
    assert cost == pytest.approx({"cards": 300.0, "egress": 64.8, "storage": 180 * 1.8 * 10 * 0.001})
    assert Load(181, 181, 2).cards == 101 and Load(1, 10_000, 2).cards == 1
