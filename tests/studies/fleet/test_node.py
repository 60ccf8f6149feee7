"""One simulated replica: against closed forms, and against the choices of the server's own classes."""

from __future__ import annotations

import math
import statistics
from random import Random
from types import SimpleNamespace

import pytest
import simpy

from rfengine.serving import admission, session, sessions
from rfengine.serving.admission import Admission
from rfengine.serving.events import SessionRequest, SessionState
from rfengine.serving.options import ServiceOptions
from rfengine.serving.session import Session as ServedSession
from rfengine.serving.sessions import SessionService
from studies.fleet import capacity, node, service_times
from studies.fleet.node import FOREGROUND_TURNS, Limits, Node, Session, chunk_wait
from studies.fleet.service_times import ServiceTimes, constant

RUNS, STUDENT_T = 10, 4.781  # of a two-sided interval of 99.9 % with nine degrees of freedom


def interval(values: list[float]) -> tuple[float, float]:
    """The confidence interval of the mean of RUNS independent values."""
    assert len(values) == RUNS
    half = STUDENT_T * statistics.stdev(values) / math.sqrt(RUNS)
    return statistics.mean(values) - half, statistics.mean(values) + half


def mean_wait(times: ServiceTimes, rate: float, arrivals: int, seed: int) -> float:
    """Mean seconds to the first turn of sessions of one chunk that come in a Poisson process."""
    env, random, opened = simpy.Environment(), Random(seed), []
    one = Node(env, times, Limits(), random)

    def come():
        for _ in range(arrivals):
            yield env.timeout(random.expovariate(rate))
            opened.append(Session(None, realtime=False, chunks=1))
            assert one.open(opened[-1]) is None

    env.process(come())
    env.run()
    assert not one.sessions and all(each.started_at is not None for each in opened)
    return statistics.mean(each.started_at - each.opened_at for each in opened[arrivals // 10 :])


def test_waits_are_those_of_an_m_d_1_queue() -> None:
    load = 0.7
    low, high = interval([mean_wait(constant(1.0), load, 4000, seed) for seed in range(RUNS)])
    expected = load / (2 * (1 - load))
    assert low < expected < high < 1.5 * expected  # so narrow that M/M/1, twice as long, is outside


def test_waits_are_those_of_an_m_m_1_queue() -> None:
    load, random = 0.6, Random(7)
    turns = tuple(random.expovariate(1.0) for _ in range(50_000))
    times = ServiceTimes("exponential", "made up", (turns,), (0.0,), 1)
    low, high = interval([mean_wait(times, load, 4000, seed) for seed in range(RUNS)])
    expected = load / (1 - load)
    assert low < expected < high and low > 0.7 * expected  # and M/D/1, half as long, is outside


def played(
    times: ServiceTimes, count: int, seconds: float, realtime: bool = True
) -> list[list[tuple[float, float, int]]]:
    """What `count` sessions of one node get within so many seconds."""
    env = simpy.Environment()
    one, taken = Node(env, times, Limits(), Random(0)), [[] for _ in range(count)]
    for log in taken:
        one.open(Session(lambda *given, log=log: log.append(given), realtime))
    env.run(until=seconds)
    return taken


def test_a_realtime_session_stays_its_lead_ahead_of_the_clock() -> None:
    (log,) = played(constant(0.1), 1, 100.0)
    video = 0.0
    for when, seconds, _ in log:
        video += seconds
        assert when >= 0.1 * len(log[: log.index((when, seconds, _)) + 1]) - 1e-6
        assert video - seconds - (when - 0.1 - log[0][0]) <= node.LEAD_S + 1e-6
    assert video == pytest.approx(100.0 + node.LEAD_S - log[0][0], abs=0.75)
    assert [number for *_, number in log] == list(range(len(log)))
    assert log[0][1] == 9 / 16 and log[1][1] == 12 / 16


def test_sessions_that_are_not_realtime_share_turns_evenly() -> None:
    taken = played(constant(0.25), 4, 100.0, realtime=False)
    assert {len(log) for log in taken} <= {99, 100}
    moments = [when for when, *_ in taken[0]]
    assert moments[1:] == pytest.approx([when + 1.0 for when in moments[:-1]])


def test_an_encoder_that_is_slower_than_the_engine_holds_it_at_two_chunks() -> None:
    (log,) = played(constant(0.1, encode_s=1.0), 1, 50.0, realtime=False)
    assert len(log) == pytest.approx(50, abs=2)


def test_without_threads_of_its_own_the_engine_encodes_between_turns() -> None:
    (log,) = played(constant(0.1, encode_s=0.3, delivery_threads=0), 1, 40.2, realtime=False)
    assert len(log) == 100 and log[0][0] == pytest.approx(0.4)


def test_the_choice_of_the_next_turn_is_the_servers_own() -> None:
    random, env = Random(3), simpy.Environment()
    one, server = Node(env, constant(1.0), Limits(), random), SimpleNamespace(_foreground_turns=0)
    for _ in range(3000):
        kinds = [random.random() < 0.3 for _ in range(random.randrange(5))]
        ours = [Session(background=kind) for kind in kinds]
        theirs = [SimpleNamespace(request=SessionRequest("a", background=kind)) for kind in kinds]
        chosen, expected = one.choose(ours), SessionService._choose(server, theirs)
        assert (chosen and ours.index(chosen)) == (expected and theirs.index(expected))


def test_background_sessions_get_every_ninth_turn_at_least() -> None:
    env, order = simpy.Environment(), []
    one = Node(env, constant(1.0), Limits(), Random(0))
    for name in ("job", "viewer", "viewer"):
        one.open(Session(lambda *_, name=name: order.append(name), False, background=name == "job"))
    env.run(until=100.0)
    places = [place for place, name in enumerate(order) if name == "job"]
    assert {later - earlier for earlier, later in zip(places, places[1:], strict=False)} == {
        FOREGROUND_TURNS + 1
    }


def test_the_last_turn_of_a_job_begins_no_chunk_ahead() -> None:
    times = ServiceTimes("ahead", "made up", ((2.0,), (3.0,), (1.5,)), (0.0,), 1, ahead_s=1.0)
    for chunks, seconds in ((1, 2.0), (2, 2.0 + 2.0), (4, 2.0 + 3.0 + 1.5 + 0.5)):
        env = simpy.Environment()
        one = Node(env, times, Limits(), Random(0))
        one.open(Session(None, False, chunks))
        env.run()
        assert env.now == one.busy_s == times.video_s(chunks) == pytest.approx(seconds)


def test_when_a_session_wants_a_chunk_is_as_in_the_server() -> None:
    random = Random(5)
    for _ in range(500):
        served = ServedSession.__new__(ServedSession)
        served.state, served.consumer = SessionState.RUNNING, SimpleNamespace(has_room=lambda: True)
        served.request = SessionRequest("a", realtime=random.random() < 0.7)
        served.chunks, served._delivered = random.randrange(3), 0
        served._seconds, served._clock_start = random.random() * 5, random.random() * 5
        ours = Session(None, served.request.realtime)
        ours.made, ours.seconds, ours.clock_start = served.chunks, served._seconds, served._clock_start
        ours.undelivered.extend([9.0] * served.chunks)
        expected = served.chunk_wait(5.0)
        if expected is None:  # it wants one when a chunk is delivered
            assert chunk_wait(ours, 5.0) == 4.0
        else:
            assert chunk_wait(ours, 5.0) == pytest.approx(expected)


@pytest.mark.parametrize(("places", "memory"), [(16, 5), (3, 5), (5, 5), (1, 0)])
def test_admission_refuses_as_the_server_does(places: int, memory: int) -> None:
    server = Admission.__new__(Admission)
    server.memory_bytes, server._options = memory, ServiceOptions(max_sessions=places)
    one = Node(simpy.Environment(), constant(1.0), Limits(places, memory, 1), Random(0))
    theirs = []
    for _ in range(8):
        fault = server.refusal(theirs, 1)
        refusal = one.open(Session())
        assert refusal == (fault and fault.code)
        if fault is None:
            points, state = SimpleNamespace(nbytes=0), SessionState.RUNNING
            theirs.append(SimpleNamespace(released=False, state=state, bytes=1, points=points))


def test_the_numbers_are_the_servers_own() -> None:
    assert sessions._FOREGROUND_TURNS == node.FOREGROUND_TURNS
    assert session.MOST_UNDELIVERED == node.MOST_UNDELIVERED
    assert SessionRequest("a").lead_seconds == node.LEAD_S
    assert sessions._DELIVERY_THREADS == service_times.GPU_DELIVERY_THREADS
    assert admission._SHARE_OF_FREE_MEMORY == capacity.SHARE_OF_FREE_MEMORY


def test_a_node_that_is_lost_makes_no_chunk_more_and_one_that_drains_admits_nobody() -> None:
    env, taken = simpy.Environment(), []
    one = Node(env, constant(1.0), Limits(), Random(0))
    kept = Session(lambda *given: taken.append(given), False)
    one.open(kept)
    env.run(until=2.5)
    one.draining = True
    assert one.open(Session()) == "draining"
    env.run(until=3.5)
    assert len(taken) == 3
    assert one.lose() == [kept] and kept.closed and one.refusal() == "draining"
    env.run(until=20.0)
    assert len(taken) == 3
