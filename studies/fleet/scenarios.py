"""The scenarios of the study: what is simulated, with which numbers, and what is kept of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from random import Random
from typing import Any

import simpy

from studies.fleet.arrivals import Demand, Player
from studies.fleet.autoscaling import Queue, Spare
from studies.fleet.capacity import CARDS_GB, PRECISIONS, Load, memory_plan
from studies.fleet.fleet import Fleet, FleetPlan
from studies.fleet.measure import record_path
from studies.fleet.measures import Measures, all_means, percentiles
from studies.fleet.node import Limits, Node, Session
from studies.fleet.service_times import ServiceTimes, computed, measured

Record = dict[str, Any]
HOUR_S = 3600.0
PRECISION = "fp8"  # of the fleets
_MOST_POINTS = 300  # of a kept curve
_MOST_RUNS = 100


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


def admission(
    seed: int, hours: float = 4.0, loads: Sequence[int] = (8, 12, 16, 20, 24), runs: int = 10
) -> Record:
    """One machine of eight cards at several loads, once with as many sessions a card as it can keep playing
    and once with as many as memory holds; the same viewers come in both."""
    times = computed(PRECISION)
    rows = []
    for places, name in ((times.streams, "compute"), (16, "memory")):
        plan = FleetPlan(8, limits_of(PRECISION, places))
        for load in loads:
            demand = Demand(viewers_an_hour=load * 6, present=load)
            reports = [
                Fleet(times, plan, demand, each, Measures(60.0, since_s=0.5 * HOUR_S)).run(hours * HOUR_S)
                for each in _seeds(seed, runs)
            ]
            rows.append({"admits_by": name, "offered": load, "plan": asdict(plan), **all_means(reports)})
    return {"rows": rows, "hours": hours, "cards": 8, "runs": runs, "times": asdict(times)}


def day(
    seed: int,
    mean: int = 20,
    rules: Sequence[int | None] = (None, 0, 4, 8),
    hours: float = 24.0,
    runs: int = 5,
) -> Record:
    """A day with a wave, jobs and autoscaling: by the server's own rule, which is None, and with several
    numbers of spare places. The curves are of each first run."""
    times = computed(PRECISION)
    # at midnight the wave is at its mean
    demand = Demand(viewers_an_hour=mean * 6, wave=0.8, jobs_share=0.2, present=mean)
    plan = FleetPlan(mean // 2, limits_of(PRECISION, times.streams), least=2, most=4 * mean)
    rows, curves = [], {}
    for spare in rules:
        reports = []
        for number, each in enumerate(_seeds(seed, runs)):
            rule = Queue() if spare is None else Spare(spare, times.streams)
            measures = Measures(60.0, since_s=HOUR_S / 2)
            reports.append(Fleet(times, plan, demand, each, measures, rule).run(hours * HOUR_S))
            if not number:
                curves["server" if spare is None else str(spare)] = _curves(measures, 0.0)
        rows.append({"spare": spare, **all_means(reports)})
    return {
        "rows": rows, "curves": curves, "places_a_card": times.streams, "runs": runs,
        "demand": asdict(demand), "plan": asdict(plan), "times": asdict(times),
    }  # fmt: skip


def loss(
    seed: int,
    kinds: Sequence[tuple[int, int, float]] = ((24, 8, 10.0), (32, 8, 10.0), (32, 1, 0.0)),
    viewers: int = 40,
    runs: int = 10,
) -> Record:
    """The loss of a machine of eight cards, once with too few places left and once with enough, and of one
    process, of which the others hear at once. kinds: cards, cards that are lost together, and seconds until
    that is known. Several runs of each, and the curve of the first. Jobs make a minute of video, one for
    each viewer."""
    times, at_s = computed(PRECISION), 1800.0
    demand = Demand(viewers_an_hour=viewers * 6, present=viewers, jobs_share=1.0, job_frames=961)
    rows, curves = [], {}
    for count, together, silence_s in kinds:
        plan = FleetPlan(
            count, limits_of(PRECISION, times.streams), least=count, most=2 * count,
            machine_cards=together, silence_s=silence_s,
        )  # fmt: skip
        reports = []
        for number, each in enumerate(_seeds(seed, runs)):
            rule = Spare(count * times.streams - viewers, times.streams)
            measures = Measures(1.0, since_s=300.0)
            reports.append(Fleet(times, plan, demand, each, measures, rule).run(HOUR_S, lost=(at_s, 1)))
            if not number and together > 1:
                curves[str(count)] = _curves(measures, at_s, (at_s - 60, at_s + 420))
        rows.append(
            {"cards": count, "together": together, "offered": viewers, "plan": asdict(plan), "runs": reports}
        )
    return {
        "rows": rows, "curves": curves, "lost_at_s": at_s, "start_s": FleetPlan(1, Limits()).start_s,
        "demand": asdict(demand), "times": asdict(times),
    }  # fmt: skip


def ten_thousand(seed: int, viewers: int = 10_000, seconds: float = 330.0) -> Record:
    """Viewers with a session of their own, on cards of which nine in ten places are taken, and the loss of a
    machine."""
    times, at_s = computed(PRECISION), 240.0
    cards = Load(viewers, viewers, times.streams).cards
    demand = Demand(viewers_an_hour=viewers * 6, present=viewers)
    plan = FleetPlan(cards, limits_of(PRECISION, times.streams))
    measures = Measures(5.0, since_s=120.0)
    report = Fleet(times, plan, demand, seed, measures).run(seconds, lost=(at_s, 1))
    row = {"cards": cards, "together": plan.machine_cards, "offered": viewers, "plan": asdict(plan), **report}
    return {"rows": [row], "curves": _curves(measures, at_s), "times": asdict(times)}


def _seeds(seed: int, runs: int) -> range:
    """Of the runs of one scenario, of which two seeds share none."""
    return range(_MOST_RUNS * seed, _MOST_RUNS * seed + runs)


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
