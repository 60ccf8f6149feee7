"""SessionService: states, fairness, leases, memory, faults; every stream is what it is alone."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy
import pytest

from rfengine import Lora, Pipeline
from rfengine.prompts import WeightedText
from rfengine.serving.errors import ServiceError
from rfengine.serving.events import (
    Branch,
    ChangePrompt,
    CommandFailed,
    Ended,
    KeepPoint,
    Moved,
    PointDropped,
    PointKept,
    PromptApplied,
    Seek,
    SessionChunk,
    SessionRequest,
    SessionState,
    StateChanged,
)
from rfengine.serving.options import ServiceOptions
from rfengine.serving.sessions import SessionService
from support.loras import pairs, write_lora
from support.models import SMALL, small_pipeline
from support.sessions import Collected, eventually, opened, running_service


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return small_pipeline()


def alone(pipe: Pipeline, prompt: str, seed: int, chunks: int) -> numpy.ndarray:
    return numpy.concatenate([chunk.frames for chunk in pipe.stream(prompt, seed=seed).take(chunks)])


def request(prompt: str = "a circle", seed: int = 0, **fields: object) -> SessionRequest:
    return SessionRequest(prompt, seed, **fields)


def code_of(service: SessionService, call: object, *arguments: object) -> str:
    with pytest.raises(ServiceError) as caught:
        call(*arguments)
    return caught.value.fault.code


def test_sessions_at_once_are_each_what_they_are_alone(pipe: Pipeline) -> None:
    consumers = [Collected() for _ in range(3)]
    with running_service(pipe) as service:
        for seed, consumer in enumerate(consumers):
            opened(service, request(f"shape {seed}", seed, num_frames=57), consumer)
        ends = [consumer.ended() for consumer in consumers]
    assert [(end.reason, end.chunks, end.fault) for end in ends] == [("finished", 5, None)] * 3
    for seed, consumer in enumerate(consumers):
        assert numpy.array_equal(consumer.frames(), alone(pipe, f"shape {seed}", seed, 5))
        assert [chunk.index for chunk in consumer.chunks] == [0, 1, 2, 3, 4]


def test_turns_go_round(pipe: Pipeline) -> None:
    order: list[int] = []

    class Noting(Collected):
        def take(self, chunk: SessionChunk) -> None:
            super().take(chunk)
            order.append(self.number)

    with running_service(pipe) as service:
        consumers = [Noting() for _ in range(3)]
        for number, consumer in enumerate(consumers):
            consumer.number = number
            consumer.room = 0
            opened(service, request(seed=number, num_frames=69), consumer)
        for consumer in consumers:
            consumer.room = None
        service.wake()
        for consumer in consumers:
            consumer.ended()
    counts = [[order[:stop].count(number) for number in range(3)] for stop in range(len(order))]
    assert all(max(count) - min(count) <= 2 for count in counts)


def test_a_background_session_gets_turns_only_between_others(pipe: Pipeline) -> None:
    with running_service(pipe) as service:
        batch, live = Collected(room=0), Collected(room=0)
        opened(service, request(background=True), batch)
        opened(service, request(num_frames=9 + 12 * 23), live)
        batch.room, live.room = None, None
        service.wake()
        live.ended()
        made = len(batch.chunks)
        assert 1 <= made <= 8  # one in nine turns, and what it had before the other began
        batch.wait(SessionChunk, made + 5)


def test_a_video_is_cut_at_the_frame_that_was_asked_for(pipe: Pipeline) -> None:
    consumer = Collected()
    with running_service(pipe) as service:
        opened(service, request(num_frames=14), consumer)
        assert consumer.ended().reason == "finished"
    assert [len(chunk.frames) for chunk in consumer.chunks] == [9, 5]


def test_a_pause_stops_chunks_and_a_resume_goes_on_bit_for_bit(pipe: Pipeline) -> None:
    consumer = Collected()
    with running_service(pipe) as service:
        session = opened(service, request(num_frames=117), consumer)
        consumer.wait(SessionChunk, 2)
        service.pause(session, "one")
        consumer.wait(StateChanged)
        eventually(lambda: service._turn_started is None)
        time.sleep(0.1)
        made = len(consumer.chunks)
        time.sleep(0.2)
        assert len(consumer.chunks) == made < 10
        assert service.counts()[SessionState.PAUSED] == 1
        service.resume(session, "two")
        consumer.ended()
    states = [(event.state, event.event_id) for event in consumer.of(StateChanged)]
    assert states == [("paused", "one"), ("running", "two"), ("draining", None)]
    assert numpy.array_equal(consumer.frames(), alone(pipe, "a circle", 0, 10))


def test_an_illegal_transition_is_a_typed_error_and_changes_nothing(pipe: Pipeline) -> None:
    consumer = Collected(room=1)
    with running_service(pipe) as service:
        session = opened(service, request(), consumer)
        consumer.wait(SessionChunk)
        assert code_of(service, service.resume, session) == "illegal_transition"
        service.pause(session)
        assert code_of(service, service.pause, session) == "illegal_transition"
        service.close(session)
        service.close(session)
        assert consumer.ended() == Ended("stopped", 1)
        for call in (service.pause, service.resume):
            assert code_of(service, call, session) == "illegal_transition"
        assert code_of(service, service.submit, session, KeepPoint("x")) == "session_ended"
    assert session.state is SessionState.CLOSED


@pytest.mark.parametrize("mode", ["soft", "recache", "hard"])
def test_a_prompt_change_is_applied_to_the_chunk_that_its_receipt_names(pipe: Pipeline, mode: str) -> None:
    consumer = Collected()
    with running_service(pipe) as service:
        session = opened(service, request(num_frames=93), consumer)
        consumer.wait(SessionChunk, 3)
        service.submit(session, ChangePrompt("change", "a square", mode))
        consumer.ended()
    (receipt,) = consumer.of(PromptApplied)
    stream, frames = pipe.stream("a circle"), []
    for index in range(9):
        if index == receipt.chunk_index:
            stream.set_prompt("a square", mode)
        frames.append(next(stream).frames)
    assert numpy.array_equal(consumer.frames(), numpy.concatenate(frames)[: len(consumer.frames())])
    chunks = consumer.chunks
    assert [chunk.started for chunk in chunks if chunk.started] == [("change",)]
    assert chunks[receipt.chunk_index].started == chunks[receipt.chunk_index].completed == ("change",)
    assert consumer.log.index(receipt) + 1 == consumer.log.index(chunks[receipt.chunk_index])
    assert {chunk.prompt for chunk in chunks[receipt.chunk_index :]} == {"a square"}


def test_a_transition_is_active_until_its_last_chunk(pipe: Pipeline) -> None:
    consumer = Collected()
    with running_service(pipe) as service:
        session = opened(service, request(num_frames=117), consumer)
        consumer.wait(SessionChunk, 2)
        service.submit(session, ChangePrompt("slow", "a square", "soft", 3))
        consumer.ended()
    first = consumer.of(PromptApplied)[0].chunk_index
    marks = [(chunk.started, chunk.active, chunk.completed) for chunk in consumer.chunks[first : first + 4]]
    change = ("slow",)
    assert marks == [(change, change, ()), ((), change, ()), ((), (), change), ((), (), ())]


def test_a_prompt_of_several_texts_is_shown_as_one_line(pipe: Pipeline) -> None:
    consumer = Collected()
    mix = (WeightedText("a square", 3), WeightedText("a longer text of a star", 1))
    with running_service(pipe) as service:
        session = opened(service, request(num_frames=93), consumer)
        consumer.wait(SessionChunk, 2)
        service.submit(session, ChangePrompt("mix", mix, "soft", 2, "spherical"))
        consumer.ended()
    first = consumer.of(PromptApplied)[0].chunk_index
    stream, frames = pipe.stream("a circle"), []
    for index in range(9):
        if index == first:
            stream.set_prompt(mix, "soft", 2, "spherical")
        frames.append(next(stream).frames)
    assert numpy.array_equal(consumer.frames(), numpy.concatenate(frames)[: len(consumer.frames())])
    assert [chunk.prompt for chunk in consumer.chunks[:first]] == ["a circle"] * first
    assert {chunk.prompt for chunk in consumer.chunks[first:]} == {stream.prompt}
    assert stream.prompt == "3 * a square | 1 * a longer text of a star"


def test_a_prompt_that_is_none_changes_nothing(pipe: Pipeline) -> None:
    consumer = Collected()
    with running_service(pipe) as service:
        session = opened(service, request(num_frames=57), consumer)
        service.submit(session, ChangePrompt("bad", "  "))
        service.submit(session, ChangePrompt("worse", [("a square", 1), ("  ", 1)], "hard"))
        consumer.ended()
    failed = [(each.event_id, each.fault.code, each.fault.message) for each in consumer.of(CommandFailed)]
    assert [each[:2] for each in failed] == [("bad", "invalid_value"), ("worse", "invalid_value")]
    assert failed[1][2] == "the prompt's text 2 '  ' is empty; give it at least one word"
    assert numpy.array_equal(consumer.frames(), alone(pipe, "a circle", 0, 5))


def test_a_seek_goes_back_and_a_branch_goes_elsewhere(pipe: Pipeline) -> None:
    consumer = Collected(room=2)
    with running_service(pipe) as service:
        session = opened(service, request(), consumer)
        consumer.wait(SessionChunk, 2)
        service.submit(session, KeepPoint("keep"))
        point = consumer.wait(PointKept)[0]
        assert (point.snapshot_id, point.chunk_index, point.automatic) == (0, 2, False)
        consumer.room = 4
        service.wake()
        consumer.wait(SessionChunk, 4)
        service.submit(session, Seek("back", 0))
        service.submit(session, ChangePrompt("new", "a square"))
        consumer.room = 6
        consumer.wait(SessionChunk, 6)
        service.submit(session, Branch("branch", 0, seed=9))
        consumer.room = 8
        consumer.wait(SessionChunk, 8)
        service.submit(session, Seek("nowhere", 5))
        assert consumer.wait(CommandFailed)[0].fault.code == "unknown_snapshot"
        service.close(session)
        consumer.ended()
    moves = [(each.branch_id, each.parent_branch_id, each.chunk_index) for each in consumer.of(Moved)]
    assert moves == [(1, 0, 2), (2, 0, 2)]
    assert [chunk.index for chunk in consumer.chunks] == [0, 1, 2, 3, 2, 3, 2, 3]
    assert [chunk.branch_id for chunk in consumer.chunks] == [0, 0, 0, 0, 1, 1, 2, 2]
    stream = pipe.stream("a circle")
    begun = [next(stream).frames, next(stream).frames]
    saved = stream.snapshot()
    stream.set_prompt("a square")
    assert numpy.array_equal(consumer.frames(2), numpy.concatenate(begun))
    for number in (4, 5):
        assert numpy.array_equal(consumer.chunks[number].frames, next(stream).frames)
    stream = pipe.restore(type(saved)(saved.tensors, saved.info | {"seed": 9}))
    for number in (6, 7):
        assert numpy.array_equal(consumer.chunks[number].frames, next(stream).frames)


def test_a_prompt_that_a_seek_overtakes_is_reported(pipe: Pipeline) -> None:
    consumer = Collected(room=1)
    with running_service(pipe) as service:
        session = opened(service, request(), consumer)
        consumer.wait(SessionChunk)
        for command in (KeepPoint("keep"), ChangePrompt("lost", "a square"), Seek("back", 0)):
            service.submit(session, command)
        consumer.wait(Moved)
        consumer.room = 2
        service.wake()
        consumer.wait(SessionChunk, 2)
    (failed,) = consumer.of(CommandFailed)
    assert (failed.event_id, failed.fault.code) == ("lost", "superseded")
    assert consumer.chunks[1].prompt == "a circle" and not consumer.of(PromptApplied)


def test_automatic_points_reach_back_over_the_whole_session(pipe: Pipeline) -> None:
    stream = pipe.stream("a circle")
    next(stream)
    one = sum(tensor.nbytes for tensor in stream.snapshot().tensors.values())
    consumer = Collected()
    options = {"keep_every": 1, "max_sessions": 1, "host_bytes": 2 * 9 * one}
    with running_service(pipe, **options) as service:
        session = opened(service, request(num_frames=9 + 12 * 39), consumer)
        consumer.ended()
        assert session.points.nbytes == 0  # freed with the session
    kept = {point.snapshot_id: point.chunk_index for point in consumer.of(PointKept)}
    for dropped in consumer.of(PointDropped):
        del kept[dropped.snapshot_id]
    indices = sorted(kept.values())
    assert indices[0] == 0 and 4 <= len(indices) <= 9
    assert {after - before for before, after in zip(indices, indices[1:], strict=False)} == {8}
    marked = {chunk.index: chunk.snapshot_id for chunk in consumer.chunks if chunk.snapshot_id is not None}
    assert all(marked[index] == number for number, index in kept.items())


def test_an_explicit_point_that_does_not_fit_is_refused(pipe: Pipeline) -> None:
    consumer = Collected(room=1)
    with running_service(pipe, host_bytes=1000, max_sessions=1) as service:
        session = opened(service, request(), consumer)
        consumer.wait(SessionChunk)
        service.submit(session, KeepPoint("keep"))
        assert consumer.wait(CommandFailed)[0].fault.code == "snapshot_budget"
        consumer.room = 3
        service.wake()
        consumer.wait(SessionChunk, 3)


def test_a_session_that_would_not_fit_is_refused_before_anything_is_allocated(pipe: Pipeline) -> None:
    one = pipe.stream_bytes()
    with running_service(pipe, memory_bytes=2 * one + one // 2) as service:
        first, second = (opened(service, request(), Collected(room=1)) for _ in range(2))
        with pytest.raises(ServiceError, match="others take .* try again when one has ended") as caught:
            opened(service, request(), Collected())
        fault = caught.value.fault
        assert (fault.code, fault.status, fault.retryable, fault.retry_after_s) == ("no_memory", 429, True, 5)
        assert code_of(service, service.open, request(height=512, width=512), Collected()) == "too_large"
        service.pause(second)
        third = opened(service, request(), Collected(room=1))  # takes the place of the paused one
        third.consumer.wait(SessionChunk)
        assert not second.resident and first.resident and third.resident
        assert code_of(service, service.resume, second) == "no_memory"
        service.close(first)
        first.consumer.ended()
        second.consumer.room = 4
        service.resume(second)
        second.consumer.wait(SessionChunk, 4)
        assert numpy.array_equal(second.consumer.frames(4), alone(pipe, "a circle", 0, 4))
        assert service.memory()["device"] <= service.memory()["budget"]


def test_too_many_sessions_are_refused(pipe: Pipeline) -> None:
    with running_service(pipe, max_sessions=2) as service:
        for _ in range(2):
            opened(service, request(), Collected(room=1))
        assert code_of(service, service.open, request(), Collected()) == "too_many_sessions"


def test_a_paused_session_is_parked_after_a_while_and_can_still_be_steered(pipe: Pipeline) -> None:
    consumer = Collected(room=2)
    with running_service(pipe, park_s=0.05) as service:
        session = opened(service, request(), consumer)
        consumer.wait(SessionChunk, 2)
        service.pause(session)
        eventually(lambda: not session.resident)
        service.submit(session, ChangePrompt("new", "a square"))
        service.submit(session, KeepPoint("keep"))
        assert consumer.wait(PointKept)[0].prompt == "a square"
        eventually(lambda: not session.resident)
        consumer.room = 4
        service.resume(session)
        consumer.wait(SessionChunk, 4)
    stream = pipe.stream("a circle")
    frames = [next(stream).frames, next(stream).frames]
    stream.set_prompt("a square")
    frames += [next(stream).frames, next(stream).frames]
    assert numpy.array_equal(consumer.frames(), numpy.concatenate(frames))


def test_loras_that_are_swapped_while_a_session_is_parked_are_taken_by_it(tmp_path: Path) -> None:
    loras = [Lora(write_lora(tmp_path / "a.safetensors", pairs(SMALL)), 0.8)]
    consumer, pipe = Collected(room=2), small_pipeline()
    with running_service(pipe, park_s=0.05) as service:
        session = opened(service, request(), consumer)
        consumer.wait(SessionChunk, 2)
        service.submit(session, KeepPoint("keep"))
        service.pause(session)
        consumer.wait(PointKept)
        eventually(lambda: not session.resident)
        pipe.set_loras(loras)
        consumer.room = 4
        service.resume(session)
        consumer.wait(SessionChunk, 4)
        service.submit(session, Seek("back", consumer.wait(PointKept)[0].snapshot_id))
        consumer.room = 5
        consumer.wait(SessionChunk, 5)
    alone = small_pipeline()
    stream = alone.stream("a circle")
    frames = [next(stream).frames, next(stream).frames]
    alone.set_loras(loras)
    frames += [next(stream).frames, next(stream).frames]
    frames += [frames[2]]
    assert numpy.array_equal(consumer.frames(), numpy.concatenate(frames))


def test_a_realtime_session_stays_a_little_ahead_of_the_clock(pipe: Pipeline) -> None:
    consumer = Collected()
    with running_service(pipe) as service:
        started = time.monotonic()
        opened(service, request(realtime=True, lead_seconds=0.3), consumer)
        consumer.wait(SessionChunk, 4)
        time.sleep(max(0.0, started + 2.0 - time.monotonic()))
        seconds = len(consumer.frames()) / pipe.config.fps
        elapsed = time.monotonic() - started
    assert elapsed - 0.8 < seconds < elapsed + 0.3 + 12 / pipe.config.fps + 0.2


def test_a_consumer_without_room_holds_its_session_alone(pipe: Pipeline) -> None:
    slow, quick = Collected(room=1), Collected()
    with running_service(pipe) as service:
        opened(service, request(), slow)
        opened(service, request(seed=1, num_frames=57), quick)
        quick.ended()
        assert len(slow.chunks) <= 2
        assert numpy.array_equal(quick.frames(), alone(pipe, "a circle", 1, 5))


def test_a_consumer_that_is_kept_waiting_bounds_what_is_made(pipe: Pipeline) -> None:
    slow = Collected()
    slow.gate.clear()
    with running_service(pipe, delivery_threads=2) as service:
        session = opened(service, request(), slow)
        eventually(lambda: session.chunks == 2)
        time.sleep(0.2)
        assert session.chunks == 2
        slow.gate.set()
        slow.wait(SessionChunk, 5)


def test_a_session_is_cancelled_within_one_denoising_step(pipe: Pipeline, monkeypatch) -> None:
    steps, stop_at = [], threading.Event()
    runner = pipe._engine.runner
    advance = type(runner).advance

    def slow_steps(self, cache, plan, noise, text, on_step=None, clean=None):
        def note(step: int, timestep: float, latents: object) -> None:
            steps.append((plan.chunk, step))
            if plan.chunk == 1 and step == 0:
                stop_at.set()
                time.sleep(0.3)
            return on_step(step, timestep, latents)

        return advance(self, cache, plan, noise, text, note, clean)

    monkeypatch.setattr(type(runner), "advance", slow_steps)
    consumer = Collected()
    with running_service(pipe) as service:
        session = opened(service, request(), consumer)
        assert stop_at.wait(30)
        service.close(session)
        assert consumer.ended().reason == "stopped"
        eventually(lambda: session.released)
        assert not session.resident
    assert steps[-1] == (1, 0)


@pytest.mark.parametrize(
    ("option", "reason"), [("lease_s", "idle"), ("idle_s", "idle"), ("life_s", "expired")]
)
def test_a_session_that_nobody_wants_ends(pipe: Pipeline, option: str, reason: str) -> None:
    consumer = Collected(room=1)
    with running_service(pipe, **{option: 0.1}) as service:
        session = opened(service, request(), consumer)
        consumer.wait(SessionChunk)
        service.pause(session)
        assert consumer.ended().reason == reason


def test_a_lease_that_is_renewed_does_not_end(pipe: Pipeline) -> None:
    consumer = Collected(room=1)
    with running_service(pipe, lease_s=0.5) as service:
        session = opened(service, request(), consumer)
        for _ in range(20):
            service.renew(session)
            time.sleep(0.05)
        assert not consumer.of(Ended)
        assert consumer.ended().reason == "idle"


def test_a_client_that_takes_nothing_is_ended_as_slow(pipe: Pipeline) -> None:
    consumer = Collected(room=1)
    with running_service(pipe, idle_s=0.4) as service:
        opened(service, request(), consumer)
        ended = consumer.ended()
    assert ended.reason == "slow_client" and ended.fault.code == "slow_client"


def test_draining_finishes_the_chunk_and_ends_everybody(pipe: Pipeline) -> None:
    consumers = [Collected() for _ in range(2)]
    with running_service(pipe) as service:
        for seed, consumer in enumerate(consumers):
            opened(service, request(seed=seed), consumer)
            consumer.wait(SessionChunk, 2)
        assert service.ready and service.drain(30)
        assert not service.ready
        assert code_of(service, service.open, request(), Collected()) == "draining"
    for seed, consumer in enumerate(consumers):
        assert consumer.of(Ended)[0].reason == "draining"
        assert isinstance(consumer.log[-1], Ended)
        assert numpy.array_equal(consumer.frames(), alone(pipe, "a circle", seed, len(consumer.chunks)))


def test_a_turn_that_hangs_fails_every_session_and_is_reported(pipe: Pipeline) -> None:
    hang, reported = threading.Event(), []

    class Hanging(Collected):
        def has_room(self) -> bool:
            return True

    consumer, other = Hanging(), Collected(room=1)
    service = SessionService(pipe, ServiceOptions(stall_s=0.5), on_lost=reported.append)
    opened(service, request(seed=1), other)
    other.wait(SessionChunk)
    session = opened(service, request(), consumer)
    session.turn = lambda may_advance: hang.wait(30)
    for each in (consumer, other):
        assert each.ended().fault.code == "engine_lost" and each.ended().fault.retryable
    eventually(lambda: reported == ["a turn takes longer than 0.5 s"])
    assert not service.ready and service.lost
    hang.set()
    service.stop(5)


def test_too_many_commands_are_refused(pipe: Pipeline) -> None:
    consumer = Collected(room=1)
    with running_service(pipe) as service:
        session = opened(service, request(), consumer)
        eventually(lambda: session.resident)
        held = threading.Event()
        session._apply = lambda command: held.wait(20)
        for number in range(65):
            service.submit(session, ChangePrompt(str(number), "a square"))
            time.sleep(0.001)
        assert code_of(service, service.submit, session, KeepPoint("x")) == "too_many_commands"
        held.set()
