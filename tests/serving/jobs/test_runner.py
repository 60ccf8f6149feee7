"""Jobs become videos in background sessions, and every end of a session leaves its job where it belongs."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rfengine import Pipeline
from rfengine.serving.errors import Fault, ServiceError
from rfengine.serving.events import SessionRequest
from rfengine.serving.jobs.runner import JobRunner, session_request
from rfengine.serving.jobs.store import MOST_ATTEMPTS, JobStore
from rfengine.serving.jobs.table import Job, JobRequest
from rfengine.serving.sessions import SessionService
from rfengine.video import VideoWriter
from support.models import small_pipeline
from support.sessions import WAIT, Collected, eventually, opened, running_service
from support.small_disk import small_disk
from support.video_api_app import assert_same_video

LONG = 4000  # frames; takes seconds


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return small_pipeline()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    opened_store = JobStore(tmp_path / "jobs", 2**30, 60.0, 100)
    yield opened_store
    opened_store.close()


@pytest.fixture
def service(pipeline: Pipeline) -> Iterator[SessionService]:
    with running_service(pipeline) as running:
        yield running


@pytest.fixture
def runner(service: SessionService, store: JobStore) -> Iterator[JobRunner]:
    made = JobRunner(service, store)
    yield made
    assert made.stop(WAIT)


def request_of(num_frames: int = 33, seed: int = 7, prompt: str = "a red circle") -> JobRequest:
    return JobRequest(prompt, "small", seed, num_frames, 16, 32, 48)


def queue(store: JobStore, runner: JobRunner | None = None, **values: object) -> str:
    job_id = store.accept(request_of(**values), None, 1000).id
    if runner is not None:
        runner.wake()
    return job_id


def job_when(store: JobStore, job_id: str, *statuses: str) -> Job:
    """The job once its status is one of these."""
    eventually(lambda: store.job(job_id, None).status in statuses)
    return store.job(job_id, None)


def ended(store: JobStore, job_id: str) -> Job:
    return job_when(store, job_id, "completed", "failed")


def names(store: JobStore) -> set[str]:
    return {path.name for path in store._directory.iterdir() if "mp4" in path.name}


# Videos


def test_job_becomes_the_video_that_the_pipeline_makes(
    pipeline: Pipeline, store: JobStore, runner: JobRunner, tmp_path: Path
) -> None:
    job = ended(store, queue(store, runner))
    assert (job.status, job.progress, job.attempts) == ("completed", 100, 1)
    pipeline.generate("a red circle", num_frames=33, seed=7).save(tmp_path / "own.mp4")
    assert_same_video(store.video(job.id, None), tmp_path / "own.mp4")
    assert names(store) == {f"{job.id}.mp4"}


def test_jobs_are_made_one_at_a_time_oldest_first(
    service: SessionService, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = [queue(store, seed=seed) for seed in range(4)]
    begun, begin = [], JobStore.begin

    def note(self: JobStore, job_id: str) -> bool:
        assert store.counts()["in_progress"] == 0
        begun.append(job_id)
        return begin(self, job_id)

    monkeypatch.setattr(JobStore, "begin", note)
    runner = JobRunner(service, store)
    for job_id in waiting:
        assert ended(store, job_id).status == "completed"
    assert begun == waiting
    assert runner.stop(WAIT)


def test_no_chunk_is_made_before_the_attempt_is_counted(
    service: SessionService, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, chunks = JobStore.begin, []

    def begin_late(self: JobStore, job_id: str) -> bool:
        time.sleep(0.2)
        chunks.append(runner._running[job_id].chunks)
        return begin(self, job_id)

    monkeypatch.setattr(JobStore, "begin", begin_late)
    runner = JobRunner(service, store)
    assert ended(store, queue(store, runner)).status == "completed"
    assert chunks == [0]
    assert runner.stop(WAIT)


def test_several_jobs_are_made_at_once_where_that_is_asked_for(
    service: SessionService, store: JobStore
) -> None:
    jobs = [queue(store, num_frames=LONG) for _ in range(3)]
    runner = JobRunner(service, store, at_once=2)
    eventually(lambda: store.counts()["in_progress"] == 2)
    assert sum(service.counts().values()) == 2
    assert store.job(jobs[2], None).status == "queued"
    assert runner.stop(WAIT)


def test_progress_rises_with_the_frames_that_are_made(
    store: JobStore, runner: JobRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rfengine.serving.jobs.runner._REPORT_S", 0.02)
    job_id = queue(store, runner, num_frames=300)
    seen: list[int] = []
    eventually(lambda: seen.append(store.job(job_id, None).progress) or seen[-1] == 100)
    assert seen == sorted(seen)
    assert len(set(seen)) > 3


def test_realtime_session_is_served_while_a_job_is_made(
    service: SessionService, store: JobStore, runner: JobRunner
) -> None:
    job_id = queue(store, runner, num_frames=LONG)
    job_when(store, job_id, "in_progress")
    consumer = Collected()
    opened(service, SessionRequest("a square", num_frames=9 + 5 * 12), consumer)
    assert consumer.ended().reason == "finished"
    assert store.job(job_id, None).status == "in_progress"


# Ends


def test_deleted_job_is_stopped_and_leaves_no_file(
    service: SessionService, store: JobStore, runner: JobRunner
) -> None:
    job_id = queue(store, runner, num_frames=LONG)
    eventually(lambda: bool(names(store)))
    session = runner._running[job_id]
    store.delete(job_id, None)
    runner.cancel(job_id)
    eventually(lambda: not any(service.counts().values()))
    assert session.frames < LONG
    assert names(store) == set()
    assert ended(store, queue(store, runner)).status == "completed"


def test_job_that_is_deleted_while_it_is_begun_is_not_made(
    service: SessionService, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id, begin = queue(store), JobStore.begin

    def delete_first(self: JobStore, begun_id: str) -> bool:
        if begun_id == job_id:
            store.delete(job_id, None)
        return begin(self, begun_id)

    monkeypatch.setattr(JobStore, "begin", delete_first)
    after = queue(store)
    runner = JobRunner(service, store)
    assert ended(store, after).status == "completed"
    assert names(store) == {f"{after}.mp4"}
    assert runner.stop(WAIT)


def test_stopped_runner_puts_its_job_back_without_an_attempt(
    service: SessionService, store: JobStore
) -> None:
    runner = JobRunner(service, store)
    job_id = queue(store, runner, num_frames=LONG)
    eventually(lambda: store.job(job_id, None).progress > 0)
    assert runner.stop(WAIT)
    job = store.job(job_id, None)
    assert (job.status, job.progress, job.attempts) == ("queued", 0, 0)
    assert names(store) == set()


@pytest.mark.parametrize("how", ["drain", "stop"])
def test_draining_service_ends_the_runner_and_puts_its_job_back(
    pipeline: Pipeline, store: JobStore, how: str
) -> None:
    with running_service(pipeline) as service:
        runner = JobRunner(service, store)
        job_id, waiting = queue(store, runner, num_frames=LONG), queue(store)
        job_when(store, job_id, "in_progress")
        service.drain(WAIT) if how == "drain" else service.stop(WAIT)
        eventually(lambda: not runner._thread.is_alive())
        assert runner.stop(WAIT)
    for each in (job_id, waiting):
        assert (store.job(each, None).status, store.job(each, None).attempts) == ("queued", 0)
    assert names(store) == set()


def test_job_waits_for_room_and_keeps_its_attempts(pipeline: Pipeline, store: JobStore) -> None:
    with running_service(pipeline, max_sessions=1) as service:
        other = Collected(room=0)
        session = opened(service, SessionRequest("a square"), other)
        runner = JobRunner(service, store)
        job_id = queue(store, runner)
        begin, refused = service.open, []

        def note(*arguments: object) -> object:
            try:
                return begin(*arguments)
            except ServiceError as error:
                refused.append(error.fault.code)
                raise

        service.open = note
        eventually(lambda: "too_many_sessions" in refused)
        assert (store.job(job_id, None).status, store.job(job_id, None).attempts) == ("queued", 0)
        service.close(session)
        job = ended(store, job_id)
        assert (job.status, job.attempts) == ("completed", 1)
        assert runner.stop(WAIT)


def test_job_fails_with_the_fault_of_its_session(
    pipeline: Pipeline, store: JobStore, runner: JobRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(Pipeline, "stream", lambda *_, **__: 1 / 0)
        job = ended(store, queue(store, runner))
    assert (job.status, job.error.code) == ("failed", "chunk_failed")
    assert "zero" not in job.error.message
    assert ended(store, queue(store, runner)).status == "completed"


def test_job_that_no_session_can_make_fails(store: JobStore, runner: JobRunner) -> None:
    wrong = JobRequest("a red circle", "small", 7, 33, 16, 33, 48)
    with pytest.raises(ServiceError, match="multiple of 16"):
        runner.check(wrong)
    job_id = store.accept(wrong, None, 1000).id  # it was accepted when the server had other limits
    runner.wake()
    assert ended(store, job_id).error.code == "invalid_value"
    assert ended(store, queue(store, runner)).status == "completed"


def test_job_at_which_the_engine_is_lost_has_its_attempts_counted(
    pipeline: Pipeline, store: JobStore
) -> None:
    job_id = queue(store, num_frames=LONG)
    for attempt in range(1, MOST_ATTEMPTS + 1):
        with running_service(pipeline) as service:
            runner = JobRunner(service, store)
            eventually(lambda: store.job(job_id, None).progress > 0)
            service._lose("a test said so")
            eventually(lambda: store.job(job_id, None).status != "in_progress")
            assert store.job(job_id, None).attempts == attempt
            assert runner.stop(WAIT)
    assert store.job(job_id, None).error.code == "interrupted"
    assert names(store) == set()


# Disks


@pytest.mark.parametrize("number, code", [(errno.ENOSPC, "disk_full"), (errno.EIO, "storage_failed")])
@pytest.mark.parametrize("where", ["write", "close"])
def test_disk_that_fails_under_a_video_fails_its_job_alone(
    store: JobStore, runner: JobRunner, monkeypatch: pytest.MonkeyPatch, where: str, number: int, code: str
) -> None:
    def fail(self: VideoWriter, *_: object) -> None:
        raise self._failure(OSError(number, "of a test")) from OSError(number, "of a test")

    with monkeypatch.context() as broken:
        broken.setattr(VideoWriter, where, fail)
        job = ended(store, queue(store, runner))
    assert (job.status, job.error.code) == ("failed", code)
    assert "/" not in job.error.message
    assert names(store) == set()
    assert ended(store, queue(store, runner)).status == "completed"


def test_video_that_fills_the_disk_fails_its_job_alone(service: SessionService, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 400) as disk:
        store = JobStore(disk / "jobs", 2**30, 60.0, 100)
        runner = JobRunner(service, store)
        job = ended(store, queue(store, runner, num_frames=600))  # of noise, which takes 780 bytes each
        assert (job.status, job.error.code) == ("failed", "disk_full")
        assert names(store) == set()
        assert ended(store, queue(store, runner)).status == "completed"
        assert runner.stop(WAIT)
        store.close()


@pytest.mark.parametrize("where", ["write", "close"])
def test_job_whose_file_fails_in_another_way_does_not_stay_in_progress(
    store: JobStore, runner: JobRunner, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(VideoWriter, where, lambda *_: 1 / 0)
        job = ended(store, queue(store, runner))
    wanted = {"write": "delivery_failed", "close": "write_failed"}
    assert (job.status, job.error.code) == ("failed", wanted[where])
    assert names(store) == set()
    assert ended(store, queue(store, runner)).status == "completed"


def test_job_whose_file_outgrows_the_quota_fails(service: SessionService, tmp_path: Path) -> None:
    store = JobStore(tmp_path / "jobs", 80_000, 60.0, 100)
    runner = JobRunner(service, store)
    job_id = queue(store, runner, num_frames=160)  # of noise, which takes 780 bytes each
    assert ended(store, job_id).error.code == "storage_quota"
    assert names(store) == set()
    assert runner.stop(WAIT)
    store.close()


@pytest.mark.parametrize("method", ["begin", "advance", "complete", "put_back", "fail", "sweep"])
def test_store_that_fails_at_any_call_loses_no_job(
    service: SessionService, store: JobStore, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr("rfengine.serving.jobs.runner._RETRY_S", 0.02)
    monkeypatch.setattr("rfengine.serving.jobs.runner._SWEEP_S", 0.02)
    job_id = queue(store, num_frames=LONG if method == "put_back" else 33)
    real, calls = getattr(JobStore, method), []

    def fail_twice(self: JobStore, *arguments: object, **named: object) -> object:
        calls.append(arguments)
        if len(calls) <= 2:
            raise ServiceError(Fault("disk_full", "the disk is full", 507, True))
        return real(self, *arguments, **named)

    monkeypatch.setattr(JobStore, method, fail_twice)
    if method == "fail":
        monkeypatch.setattr(Pipeline, "stream", lambda *_, **__: 1 / 0)
    runner = JobRunner(service, store)
    if method == "put_back":
        eventually(lambda: store.job(job_id, None).progress > 0)
        service.close(next(iter(runner._running.values())))
        eventually(lambda: len(calls) > 2)
    else:
        job = ended(store, job_id)
        wanted = {"advance": "disk_full", "fail": "chunk_failed"}.get(method)
        assert (job.error.code if job.error else None) == wanted
        if method == "advance":
            ended(store, queue(store, runner))
        eventually(lambda: len(calls) > 1)
    assert runner.stop(WAIT)
    assert store.counts()["in_progress"] == 0


def test_session_of_a_job_takes_turns_in_the_background_and_keeps_no_points() -> None:
    request = session_request(request_of())
    assert (request.background, request.keep_every, request.realtime) == (True, 0, False)
    assert (request.height, request.width, request.num_frames, request.seed) == (32, 48, 33, 7)
