"""The scenarios of the study: what is simulated, with which numbers, and what is kept of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from random import Random
from typing import Any

import simpy

from studies.fleet.arrivals import Demand, Player
from studies.fleet.capacity import CARDS_GB, PRECISIONS, memory_plan
from studies.fleet.fleet import Fleet, FleetPlan
from studies.fleet.measure import record_path
from studies.fleet.measures import Measures, percentiles
from studies.fleet.node import Limits, Node, Session
from studies.fleet.service_times import ServiceTimes, computed, measured

Record = dict[str, Any]
HOUR_S = 3600.0
PRECISION = "fp8"  # of the fleets
_MOST_POINTS = 300  # of a kept curve


def limits_of(precision: str, max_sessions: int) -> Limits:
    """Of an H100 of 80 GB."""
    plan = memory_plan(precision)
    return Limits(max_sessions, plan.budget_bytes(CARDS_GB[0]), plan.session_bytes)


def tiny(seed: int) -> Record:
    """The server on `tiny`: what the times of one session alone predict for several, beside what was
    measured."""
    rows = []
    for threads in (1, 2):
        record = json.loads(record_path(threads).read_text())
        for count, seen in record["sessions"].items():
            found = predicted(measured(record), int(count), record["chunks"], record["rounds"] * 10, seed)
            for name in ("chunk_s", "first_fragment_s"):
                row = {"threads": threads, "sessions": int(count), "what": name}
                rows.append(
                    row | {"predicted": percentiles(found[name]), "measured": percentiles(seen[name])}
                )
    return {"rows": rows}


def predicted(times: ServiceTimes, count: int, chunks: int, rounds: int, seed: int) -> dict[str, list[float]]:
    """What studies.fleet.measure would see of `count` sessions at once."""
    firsts, between = [], []
    for number in range(rounds):
        env = simpy.Environment()
        node = Node(env, times, Limits(), Random(f"{seed} {number}"))
        moments: list[list[float]] = [[] for _ in range(count)]
        for kept in moments:
            node.open(Session(lambda when, _, __, kept=kept: kept.append(when), False, chunks))
        env.run()
        all_begun = max(each[0] for each in moments)
        first_end = min(each[-1] for each in moments)
        firsts += [each[0] for each in moments]
        for each in moments:
            shared = [moment for moment in each if all_begun <= moment <= first_end]
            between += [later - earlier for earlier, later in zip(shared, shared[1:], strict=False)]
    return {"first_fragment_s": firsts, "chunk_s": between}


def card(seed: int, most: int = 7, seconds: float = 1200.0) -> Record:
    """One card with 1, 2, ... realtime sessions, as memory admits them: who stalls, and for how long."""
    rows = []
    for precision in PRECISIONS:
        for count in range(1, min(most, memory_plan(precision).sessions(CARDS_GB[0])) + 1):
            env, random = simpy.Environment(), Random(f"{seed} {precision} {count}")
            node = Node(env, computed(precision), Limits(), Random(f"{seed} node"))
            players = [Player(buffer_s=1.0) for _ in range(count)]
            for player in players:
                env.process(_open_later(node, player, random.random() * 10))
            env.run(until=seconds)
            started = [player.started_at for player in players]
            stalled = sum(player.stalled_s for player in players)
            rows.append(
                {
                    "precision": precision, "sessions": count, "utilisation": node.busy_s / seconds,
                    "stall_s_an_hour": stalled / sum(seconds - each for each in started) * HOUR_S,
                }
            )  # fmt: skip
    return {"rows": rows, "seconds": seconds}


def _open_later(node: Node, player: Player, seconds: float):
    yield node.env.timeout(seconds)
    node.open(Session(lambda when, video_s, _: player.take(when, video_s)))


def admission(seed: int, hours: float = 4.0, loads: Sequence[int] = (8, 12, 16, 20, 24)) -> Record:
    """One machine of eight cards at several loads, once with as many sessions a card as it can keep playing
    and once with as many as memory holds."""
    times = computed(PRECISION)
    rows = []
    for places, name in ((times.streams, "compute"), (16, "memory")):
        for load in loads:
            demand = Demand(viewers_an_hour=load * 6, present=load)
            plan = FleetPlan(8, limits_of(PRECISION, places))
            fleet = Fleet(times, plan, demand, seed, Measures(60.0, since_s=0.5 * HOUR_S))
            rows.append({"admits_by": name, "offered": load, **fleet.run(hours * HOUR_S)})
    return {"rows": rows, "hours": hours, "cards": 8}


def day(seed: int, mean: int = 20, spares: Sequence[int] = (0, 4, 8), hours: float = 24.0) -> Record:
    """A day with a wave, jobs and autoscaling, with several numbers of spare places."""
    times = computed(PRECISION)
    demand = Demand(viewers_an_hour=mean * 6, wave=0.8, jobs_share=0.2, present=max(1, mean // 2))
    rows, curves = [], {}
    for spare in spares:
        limits = limits_of(PRECISION, times.streams)
        plan = FleetPlan(mean // 2, limits, least=2, most=4 * mean, spare=spare)
        measures = Measures(60.0, since_s=HOUR_S / 2)
        report = Fleet(times, plan, demand, seed, measures).run(hours * HOUR_S)
        rows.append({"spare": spare, **report})
        curves[str(spare)] = _curves(measures, 0.0)
    return {"rows": rows, "curves": curves, "places_a_card": times.streams, "demand": asdict(demand)}


def loss(seed: int, cards: Sequence[int] = (24, 32), viewers: int = 40, runs: int = 10) -> Record:
    """The loss of a machine of eight cards, once with too few places left and once with enough; several runs
    of each, and the curve of the first. Jobs make a minute of video, one for each viewer."""
    times, at_s = computed(PRECISION), 1800.0
    demand = Demand(viewers_an_hour=viewers * 6, present=viewers, jobs_share=1.0, job_frames=961)
    rows, curves = [], {}
    for count in cards:
        spare = count * times.streams - viewers
        plan = FleetPlan(count, limits_of(PRECISION, times.streams), least=count, most=2 * count, spare=spare)
        reports = []
        for number in range(runs):
            measures = Measures(1.0, since_s=300.0)
            fleet = Fleet(times, plan, demand, seed + number, measures)
            reports.append(fleet.run(HOUR_S, lost=(at_s, 1)))
            if not number:
                curves[str(count)] = _curves(measures, at_s, (at_s - 60, at_s + 420))
        rows.append({"cards": count, "offered": viewers, "runs": reports})
    return {"rows": rows, "curves": curves, "lost_at_s": at_s, "start_s": FleetPlan(1, Limits()).start_s}


def ten_thousand(seed: int, viewers: int = 10_000, seconds: float = 330.0) -> Record:
    """Viewers with a session of their own, on cards of which nine in ten places are taken, and the loss of a
    machine."""
    times, at_s = computed(PRECISION), 240.0
    cards = round(viewers / times.streams / 0.9)
    demand = Demand(viewers_an_hour=viewers * 6, present=viewers)
    plan = FleetPlan(cards, limits_of(PRECISION, times.streams))
    measures = Measures(5.0, since_s=120.0)
    report = Fleet(times, plan, demand, seed, measures).run(seconds, lost=(at_s, 1))
    return {"rows": [{"cards": cards, "offered": viewers, **report}], "curves": _curves(measures, at_s)}


SCENARIOS: dict[str, Callable[[int], Record]] = {
    each.__name__: each for each in (tiny, card, admission, day, loss, ten_thousand)
}


def _curves(
    measures: Measures, zero_s: float, between: tuple[float, float] | None = None
) -> dict[str, list[float]]:
    """The samples as columns, seconds counted from zero_s; of many, evenly chosen ones."""
    samples = [each for each in measures.samples if between is None or between[0] <= each.at_s <= between[1]]
    chosen = samples[:: max(1, len(samples) // _MOST_POINTS)]
    rows = [asdict(replace(each, at_s=each.at_s - zero_s)) for each in chosen]
    return {name: [row[name] for row in rows] for name in rows[0]}
