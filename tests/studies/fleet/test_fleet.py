"""The simulated fleet: closed forms, conservation, reproducibility, autoscaling and losses."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import fields, replace
from random import Random

import pytest

from rfengine.serving.admission import _RETRY_S
from rfengine.serving.jobs import runner
from rfengine.serving.jobs.store import MOST_ATTEMPTS
from rfengine.serving.replicas.choice import by_room
from rfengine.serving.replicas.plan import ReplicaPlan
from rfengine.serving.replicas.table import Load, Replica
from studies.fleet import fleet as fleet_module
from studies.fleet.arrivals import Demand
from studies.fleet.autoscaling import Queue, Spare
from studies.fleet.fleet import Fleet, FleetPlan
from studies.fleet.measures import Measures
from studies.fleet.node import Limits, Session
from studies.fleet.purchase import refused_share
from studies.fleet.service_times import constant

NEVER = constant(1e6)  # of tests in which nobody watches
TIMES = constant(0.3, encode_s=0.05, delivery_threads=2)
PLAN = FleetPlan(8, Limits(max_sessions=2), machine_cards=4)
BUSY = Demand(viewers_an_hour=480, watch_mean_s=90, jobs_share=0.3, job_frames=201)


@pytest.mark.parametrize("spread", [0.3, 1.2])
def test_refusals_are_those_of_erlangs_loss_formula_whatever_the_lengths(spread: float) -> None:
    """Viewers without patience, on six places."""
    demand = Demand(viewers_an_hour=240, watch_mean_s=60, watch_spread=spread, most_watch_s=math.inf)
    plan = FleetPlan(3, Limits(max_sessions=2), patience_s=0.0)
    shares = []
    for seed in range(10):
        run = Fleet(NEVER, plan, demand, seed, Measures(1e5, since_s=600.0))
        shares.append(run.run(5 * 3600.0)["gave_up_share"])
    half = 4.781 * statistics.stdev(shares) / math.sqrt(10)
    expected = refused_share(6, 4.0)
    assert expected == pytest.approx(0.1172, abs=1e-4)
    assert abs(statistics.mean(shares) - expected) < half < 0.2 * expected


def test_viewers_in_sessions_follow_littles_law() -> None:
    measures, seconds = Measures(), 4000.0
    Fleet(TIMES, PLAN, replace(BUSY, viewers_an_hour=300), 5, measures).run(seconds)
    mean_number = statistics.mean(sample.open_sessions for sample in measures.samples)
    opened = [visit for visit in measures.visits if visit.sessions]
    rate, mean_time = len(opened) / seconds, statistics.mean(visit.watched_s(seconds) for visit in opened)
    assert len(opened) > 250 and mean_number == pytest.approx(rate * mean_time, rel=0.01)


@pytest.mark.parametrize("seed", range(3))
def test_no_viewer_and_no_job_is_lost_from_the_count(seed: int) -> None:
    measures = Measures()
    plan = replace(PLAN, most=12, least=4, start_s=60.0)
    rule = Queue(fewer_after_s=60.0) if seed else Spare(0, 2)
    run = Fleet(TIMES, plan, BUSY, seed, measures, rule)
    report = run.run(1200.0, lost=(600.0 + seed / 3, 0))
    jobs = report["jobs"]
    assert jobs["sent"] == jobs["made"] + jobs["left"] + jobs["failed"] > 20
    there = sum(visit.outcome == "there" for visit in measures.visits)
    backing_off = sum(
        visit.outcome == "there" and visit.sessions[-1:] != [] and visit.sessions[-1][1] is not None
        for visit in measures.visits
    )
    never = sum(visit.outcome == "there" and not visit.sessions for visit in measures.visits)
    assert there == run.open_sessions + backing_off + never and run.waiting <= backing_off + never
    outcomes = [report[f"viewers_{name}"] for name in ("finished", "gave_up", "there")]
    assert sum(outcomes) == report["viewers"] == len(measures.visits)
    assert all(visit.left_s == 0 for visit in measures.visits if visit.outcome == "finished")


def test_the_same_seed_gives_the_same_numbers_and_another_others() -> None:
    def text(seed: int) -> str:
        run = Fleet(TIMES, replace(PLAN, most=12), BUSY, seed, Measures(), Spare(0, 2))
        return json.dumps(run.run(600.0, lost=(300.0, 1)))

    assert text(1) == text(1) != text(2)


def test_after_a_loss_viewers_are_served_elsewhere_and_jobs_after_their_lease() -> None:
    demand = Demand(viewers_an_hour=960, watch_mean_s=60, jobs_share=3.0, job_frames=801)
    limits = Limits(max_sessions=4)
    plan = FleetPlan(12, limits, machine_cards=4, least=12, most=12, start_s=60.0)
    run = Fleet(constant(0.15, 0.01, 2), plan, demand, 0, Measures(), Spare(0, 4))
    report = run.run(240.0, lost=(120.0, 1))
    loss, jobs = report["loss"], report["jobs"]
    assert loss["sessions"] > 3 and loss["gave_up"] == loss["without_picture"] == 0
    assert plan.silence_s + 0.5 < loss["served_again_s"]["p50"] <= loss["all_served_s"] < plan.silence_s + 5.0
    assert jobs["requeued"] > 0 == jobs["failed"] and max(run.measures.job_waits_s) >= plan.job_lease_s
    assert len(run.replicas) == 12  # replaced


def test_without_room_for_them_some_go() -> None:
    demand = Demand(viewers_an_hour=720, watch_mean_s=120, present=24)
    plan = FleetPlan(12, Limits(max_sessions=2), machine_cards=6, patience_s=20.0)
    report = Fleet(TIMES, plan, demand, 0, Measures()).run(600.0, lost=(300.0, 0))
    assert report["loss"]["gave_up"] > 0 and report["refused_share"] > 0


def test_a_job_that_dies_three_times_has_failed() -> None:
    demand = Demand(viewers_an_hour=3600, watch_mean_s=1, jobs_share=0.0)
    run = Fleet(TIMES, replace(PLAN, job_lease_s=1.0), demand, 0, Measures())
    for attempts in range(1, 4):
        run.env.process(run._requeue(fleet_module.Job(0.0, 5, attempts)))
    run.env.run(until=2.0)
    assert (run.measures.jobs_requeued, run.measures.jobs_failed, len(run.jobs)) == (2, 1, 2)


def test_autoscaling_follows_the_load_up_and_down() -> None:
    demand = Demand(viewers_an_hour=0, watch_mean_s=600, present=20)
    plan = FleetPlan(2, Limits(max_sessions=2), least=2, most=40, start_s=30.0)
    measures = Measures()
    run = Fleet(NEVER, plan, demand, 1, measures, Spare(2, 2, fewer_after_s=60.0))
    report = run.run(2 * 3600.0)
    cards = [sample.cards for sample in measures.samples]
    assert max(cards) == 11 and cards[0] == cards[-1] == 2 == min(cards)  # (20 + 2) / 2
    assert report["refused_share"] > 0 == report["viewers_there"]
    assert report["card_hours"] * 3600 == pytest.approx(sum(cards) + 9 * plan.start_s, rel=0.01)


def test_the_servers_rule_drains_sessions_whose_viewers_come_back_and_jobs_that_lose_no_attempt() -> None:
    demand = Demand(viewers_an_hour=0, watch_mean_s=3000, present=4, jobs_share=0.0)
    measures = Measures()
    rule = Queue(fewer_after_s=100.0)
    run = Fleet(TIMES, replace(PLAN, most=8, least=3), demand, 1, measures, rule)
    job = fleet_module.Job(0.0, 10**6)
    for replica in run.replicas:
        run.env.process(run._run_jobs(replica))
    run.env.process(run._send_jobs(0.0))
    run._queue(job)
    report = run.run(1500.0)
    assert len(run.replicas) < 8 and report["drained_share"] > 0 == report["gave_up_share"]
    assert job.attempts == 1 and measures.jobs_requeued == 0
    assert len(run.jobs) + sum(each.job is job for each in run.replicas) == 1
    drained = [visit for visit in measures.visits if visit.ends]
    assert all(len(visit.players) == len(visit.ends) + 1 and not visit.lost for visit in drained)
    assert report["loss"] is None


def test_autoscaling_needs_a_rule_and_a_rule_its_bounds() -> None:
    with pytest.raises(ValueError, match="most is 12 and the rule of autoscaling None"):
        Fleet(TIMES, replace(PLAN, most=12), BUSY, 0, Measures())
    with pytest.raises(ValueError, match="give both, or neither"):
        Fleet(TIMES, PLAN, BUSY, 0, Measures(), Queue())


def test_a_viewer_is_sent_where_the_gateway_would_send_it() -> None:
    random, seen = Random(4), set()
    for _ in range(300):
        limits = Limits(max_sessions=random.randrange(1, 5), memory_bytes=4, session_bytes=1)
        run = Fleet(TIMES, replace(PLAN, cards=4, limits=limits), Demand(0), 0, Measures())
        rooms = {}
        for number, replica in enumerate(run.replicas):
            replica.node.draining = random.random() < 0.2
            taken = random.randrange(limits.max_sessions + 1)
            replica.node.sessions.extend(Session() for _ in range(taken))
            free = 0 if taken == limits.max_sessions else 4 - taken
            load = Load("draining" if replica.node.draining else "ready", free, taken)
            rooms[f"{number}"] = Replica(f"{number}", "", "", 0, 1, load, math.inf)
        chosen = run._place()
        best = next((each for each in by_room(rooms.values(), {}) if each.load.free_bytes), None)
        seen.add(chosen is None)
        assert (chosen and chosen.node.free_bytes) == (best and best.load.free_bytes)
    assert seen == {True, False}


def test_the_numbers_are_the_servers_own() -> None:
    assert fleet_module.JOB_ATTEMPTS == MOST_ATTEMPTS
    assert PLAN.retry_s == _RETRY_S
    assert fleet_module.JOB_RETRY_S == runner._RETRY_S
    replicas = {field.name: field.default for field in fields(ReplicaPlan)}
    assert PLAN.silence_s == 2 * replicas["lease_s"]  # as Gateway._is_silent has it
    assert PLAN.job_lease_s == replicas["job_lease_s"]
