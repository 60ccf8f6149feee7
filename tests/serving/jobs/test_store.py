"""Jobs survive whatever ends the process, files and rows agree, and a full disk is an error that passes."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from threading import Barrier, Thread

import pytest

from rfengine.serving.errors import Fault, ServiceError
from rfengine.serving.jobs.store import MOST_ATTEMPTS, JobStore, estimated_bytes
from rfengine.serving.jobs.table import JobRequest
from support.small_disk import small_disk

REQUEST = JobRequest("a red circle", "small", 7, 81, 16, 32, 48)
FAULT = Fault("chunk_failed", "a chunk failed", 500)
GENEROUS = 2**30


class Stores:
    """Opens stores, and closes them at the end of the test."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.opened = ExitStack()

    def open(
        self,
        directory: Path | None = None,
        most_bytes: int = GENEROUS,
        life_s: float = 60.0,
        most_waiting: int = 100,
    ) -> JobStore:
        store = JobStore(directory or self.directory / "jobs", most_bytes, life_s, most_waiting)
        self.opened.callback(store.close)
        return store

    def after_a_kill(self, store: JobStore, **options: object) -> JobStore:
        """The next start on what the disk held at this moment: nothing was closed."""
        copy = self.directory / f"copy-{time.monotonic_ns()}"
        shutil.copytree(store._directory, copy, ignore=shutil.ignore_patterns(".lock"))
        return self.open(copy, **options)


@pytest.fixture
def stores(tmp_path: Path) -> Iterator[Stores]:
    opened = Stores(tmp_path)
    with opened.opened:
        yield opened


def accept(store: JobStore, owner: str | None = None, request: JobRequest = REQUEST) -> str:
    return store.accept(request, owner, 1000).id


def completed(store: JobStore, owner: str | None = None, content: bytes = b"video") -> str:
    job_id = accept(store, owner)
    store.begin(job_id)
    store.path(job_id).write_bytes(content)
    store.complete(job_id)
    return job_id


def names(store: JobStore) -> set[str]:
    return {path.name for path in store._directory.iterdir() if "sqlite" not in path.name} - {".lock"}


def code_of(call: object, *arguments: object) -> str:
    with pytest.raises(ServiceError) as raised:
        call(*arguments)
    assert str(raised.value) == raised.value.fault.message
    assert "/jobs" not in raised.value.fault.message  # no path of the server
    return raised.value.fault.code


# Lives of jobs


def test_job_goes_from_queued_to_completed(stores: Stores) -> None:
    store = stores.open()
    job = store.accept(REQUEST, None, 10)
    assert (job.status, job.progress, job.attempts, job.request) == ("queued", 0, 0, REQUEST)
    assert store.next_queued() == job == store.job(job.id, None)
    assert store.begin(job.id)
    store.advance(job.id, 40)
    assert (store.job(job.id, None).status, store.job(job.id, None).progress) == ("in_progress", 49)
    assert store.next_queued() is None
    assert code_of(store.video, job.id, None) == "not_completed"
    store.path(job.id).write_bytes(b"video")
    store.complete(job.id)
    done = store.job(job.id, None)
    assert (done.status, done.progress, done.attempts, done.bytes) == ("completed", 100, 1, 5)
    assert done.expires_at - done.completed_at == 60
    assert store.video(job.id, None).read_bytes() == b"video"
    assert store.counts() == {"queued": 0, "in_progress": 0, "completed": 1, "failed": 0}


def test_failed_job_says_why_and_keeps_no_file(stores: Stores) -> None:
    store = stores.open()
    job_id = accept(store)
    store.begin(job_id)
    store.path(job_id).write_bytes(b"half")
    store.fail(job_id, FAULT)
    job = store.job(job_id, None)
    assert (job.status, job.bytes) == ("failed", 0)
    assert (job.error.code, job.error.message) == ("chunk_failed", "a chunk failed")
    assert names(store) == set()
    assert code_of(store.video, job_id, None) == "job_failed"


def test_accepted_job_is_on_disk_when_it_is_answered(stores: Stores) -> None:
    store = stores.open()
    job = store.accept(REQUEST, "key", 10)
    assert stores.after_a_kill(store).job(job.id, "key") == job
    (synchronous,) = store._table._connection.execute("PRAGMA synchronous").fetchone()
    assert synchronous == 2  # SQLite's FULL: each commit waits for the disk


def test_job_in_progress_is_queued_again_by_the_next_start(stores: Stores) -> None:
    store = stores.open()
    first, second = accept(store), accept(store)
    store.begin(first)
    store.advance(first, 40)
    again = stores.after_a_kill(store)
    job = again.job(first, None)
    assert (job.status, job.progress, job.attempts, job.request) == ("queued", 0, 1, REQUEST)
    assert again.next_queued().id == first
    assert again.job(second, None).attempts == 0


def test_job_that_is_interrupted_each_time_fails(stores: Stores) -> None:
    store = stores.open()
    job_id = accept(store)
    for attempt in range(MOST_ATTEMPTS):
        assert store.job(job_id, None).status == "queued"
        assert store.begin(job_id), attempt
        store = stores.after_a_kill(store)
    job = store.job(job_id, None)
    assert (job.status, job.error.code, job.attempts) == ("failed", "interrupted", MOST_ATTEMPTS)


def test_job_that_is_put_back_keeps_its_attempts(stores: Stores) -> None:
    store = stores.open()
    job_id = accept(store)
    for _ in range(2 * MOST_ATTEMPTS):
        assert store.begin(job_id)
        store.put_back(job_id, attempt_counts=False)
        assert (store.job(job_id, None).status, store.job(job_id, None).attempts) == ("queued", 0)
    for attempt in range(MOST_ATTEMPTS):
        assert store.begin(job_id)
        store.put_back(job_id, attempt_counts=False)
        assert store.job(job_id, None).attempts == attempt
        assert store.begin(job_id)
        store.put_back(job_id, attempt_counts=True)
    assert store.job(job_id, None).error.code == "interrupted"


def test_completed_job_survives_a_kill_with_its_file(stores: Stores) -> None:
    store = stores.open()
    job_id = completed(store)
    again = stores.after_a_kill(store)
    assert again.video(job_id, None).read_bytes() == b"video"
    assert again.job(job_id, None) == store.job(job_id, None)


def test_files_and_rows_agree_after_a_kill(stores: Stores) -> None:
    store = stores.open()
    whole, lost, cut, renamed, waiting = (
        completed(store), completed(store), completed(store), accept(store), accept(store),
    )  # fmt: skip
    os.unlink(store.path(lost))
    store.path(cut).write_bytes(b"vid")
    store.begin(renamed)
    store.path(renamed).write_bytes(b"video")  # killed between the name and the row
    (store._directory / f".{waiting}.mp4.17-ab.partial").write_bytes(b"half")
    (store._directory / f"video_{'0' * 32}.mp4").write_bytes(b"of no job")
    (store._directory / "notes.mp4").write_bytes(b"of somebody else")
    again = stores.after_a_kill(store)
    assert names(again) == {f"{whole}.mp4", "notes.mp4"}
    assert again.job(whole, None).status == "completed"
    for job_id in (lost, cut):
        job = again.job(job_id, None)
        assert (job.status, job.error.code, job.completed_at, job.bytes) == ("failed", "file_lost", None, 0)
    assert again.job(renamed, None).status == again.job(waiting, None).status == "queued"


def test_deleted_job_leaves_nothing_and_comes_back_by_no_call(stores: Stores) -> None:
    store = stores.open()
    job_id = accept(store)
    store.begin(job_id)
    (store._directory / f".{job_id}.mp4.17-ab.partial").write_bytes(b"half")
    store.delete(job_id, None)
    assert names(store) == set()
    store.advance(job_id, 40)
    store.path(job_id).write_bytes(b"video")
    store.complete(job_id)
    assert names(store) == set()
    store.put_back(job_id, attempt_counts=False)
    store.fail(job_id, FAULT)
    assert names(store) == set()
    assert not store.begin(job_id)
    assert code_of(store.job, job_id, None) == code_of(store.delete, job_id, None) == "not_found"


def test_file_that_is_gone_when_it_is_to_be_complete_fails_its_job(stores: Stores) -> None:
    store = stores.open()
    job_id = accept(store)
    store.begin(job_id)
    store.complete(job_id)
    assert store.job(job_id, None).error.code == "file_lost"


def test_expired_jobs_are_removed_with_their_files(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    store = stores.open()
    done, failed, waiting = completed(store), accept(store), accept(store)
    store.fail(failed, FAULT)
    assert store.sweep() == 0
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 61)
    assert store.sweep() == 2
    assert names(store) == set()
    assert store.job(waiting, None).status == "queued"
    for job_id in (done, failed):
        assert code_of(store.job, job_id, None) == "not_found"


# Owners and lists


def test_key_sees_and_deletes_its_own_jobs_alone(stores: Stores) -> None:
    store = stores.open()
    jobs = {owner: completed(store, owner) for owner in ("one", "two", None)}
    for owner, job_id in jobs.items():
        assert [job.id for job in store.page(owner, None, 10, True)[0]] == [job_id]
        for other in jobs.keys() - {owner}:
            for call in (store.job, store.video, store.delete):
                assert code_of(call, job_id, other) == "not_found"
        assert store.video(job_id, owner).exists()


@pytest.mark.parametrize("newest_first", [True, False])
def test_pages_follow_one_another_though_their_last_job_is_deleted(
    stores: Stores, newest_first: bool
) -> None:
    store = stores.open()
    made = [accept(store) for _ in range(7)]
    seen, after, more = [], None, True
    while more:
        jobs, more = store.page(None, after, 3, newest_first)
        seen += [job.id for job in jobs]
        after = seen[-1]
        store.delete(after, None)
    assert seen == (made[::-1] if newest_first else made)
    assert store.page(None, after, 3, newest_first) == ([], False)


@pytest.mark.parametrize("after", ["", "video_1", "../..", f"video_{'g' * 32}"])
def test_page_after_what_is_no_id_is_an_error(stores: Stores, after: str) -> None:
    assert code_of(stores.open().page, None, after, 3, True) == "invalid_value"


def test_ids_are_in_order_though_the_clock_goes_back(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    store = stores.open()
    first = accept(store)
    monkeypatch.setattr(time, "time", lambda: 1e9)
    second, third = accept(store), accept(store)
    assert first < second < third
    assert store.next_queued().id == first


# Limits


def test_queue_has_a_most_of_all_jobs_and_of_one_key(stores: Stores) -> None:
    store = stores.open(most_waiting=3)
    store.accept(REQUEST, "one", 2)
    store.accept(REQUEST, "one", 2)
    assert code_of(store.accept, REQUEST, "one", 2) == "too_many_jobs"
    last = store.accept(REQUEST, "two", 2).id
    assert code_of(store.accept, REQUEST, "two", 2) == "queue_full"
    store.begin(last)  # a job that is being made does not wait
    store.accept(REQUEST, "two", 2)


def test_jobs_of_many_threads_keep_to_the_most(stores: Stores) -> None:
    store = stores.open(most_waiting=10)
    start, accepted, refused = Barrier(4), [], []

    def ask() -> None:
        start.wait()
        for _ in range(8):
            try:
                accepted.append(accept(store))
            except ServiceError as error:
                refused.append(error.fault.code)

    threads = [Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(accepted)) == store.counts()["queued"] == 10
    assert refused == ["queue_full"] * 22


def test_quota_holds_what_is_reserved_and_what_is_written(stores: Stores) -> None:
    needed = estimated_bytes(REQUEST)
    store = stores.open(most_bytes=2 * needed)
    first, second = completed(store, content=b"x" * (needed // 2)), accept(store)
    assert code_of(store.accept, REQUEST, None, 10) == "storage_quota"
    store.begin(second)
    partial = store._directory / f".{second}.mp4.17-ab.partial"
    partial.write_bytes(b"x" * (needed + needed // 2))
    store.advance(second, 40)  # outgrows what was reserved, and there is room
    partial.write_bytes(b"x" * (needed + needed // 2 + 1))
    assert code_of(store.advance, second, 41) == "storage_quota"
    store.delete(first, None)
    store.advance(second, 42)
    assert store.job(second, None).progress == 51


def test_file_beyond_the_quota_fails_its_job(stores: Stores) -> None:
    needed = estimated_bytes(REQUEST)
    store = stores.open(most_bytes=needed)
    job_id = completed(store, content=b"x" * (needed + 1))
    assert store.job(job_id, None).error.code == "storage_quota"
    assert names(store) == set()


def test_job_beyond_the_whole_quota_is_refused(stores: Stores) -> None:
    store = stores.open(most_bytes=estimated_bytes(REQUEST) - 1)
    assert code_of(store.accept, REQUEST, None, 10) == "too_large"


def test_delete_and_expiry_free_the_quota_at_once(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = estimated_bytes(REQUEST)
    store = stores.open(most_bytes=needed)
    store.delete(completed(store, content=b"x" * needed), None)
    completed(store, content=b"x" * needed)
    assert code_of(store.accept, REQUEST, None, 10) == "storage_quota"
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 61)
    accept(store)


# Directories


def test_directory_has_one_process_at_a_time(stores: Stores) -> None:
    store = stores.open()
    with pytest.raises(RuntimeError, match="another process is serving the jobs there"):
        stores.open()
    store.close()
    stores.open()


def test_jobs_of_another_version_are_left_alone(stores: Stores) -> None:
    store = stores.open()
    accept(store)
    store.close()
    connection = sqlite3.connect(store._directory / "jobs.sqlite")
    connection.execute("PRAGMA user_version = 9")
    with pytest.raises(RuntimeError, match=r"version 9 .*choose another directory"):
        stores.open()
    assert connection.execute("SELECT count(*) FROM jobs").fetchone() == (1,)
    connection.close()


def test_what_is_no_table_is_an_error(stores: Stores, tmp_path: Path) -> None:
    (tmp_path / "jobs.sqlite").write_bytes(b"x" * 5000)
    for directory in (tmp_path, tmp_path / "jobs.sqlite"):
        with pytest.raises(RuntimeError, match="cannot be used .*choose another"):
            stores.open(directory)


# Full disks


def test_table_that_is_full_is_a_typed_error_and_works_again(stores: Stores) -> None:
    store = stores.open()
    kept, begun = accept(store), accept(store)
    store.begin(begun)
    connection = store._table._connection
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {pages}")  # SQLite answers as on a full disk
    long = JobRequest("x" * 9000, "small", 7, 81, 16, 32, 48)
    for _ in range(2):
        assert code_of(store.accept, long, None, 10) == "disk_full"
    assert [job.id for job in store.page(None, None, 10, False)[0]] == [kept, begun]
    store.delete(kept, None)
    connection.execute("PRAGMA max_page_count = 1000000")
    job_id = accept(store, request=long)
    assert stores.after_a_kill(store).job(job_id, None).request == long


@pytest.mark.parametrize("number, code", [(errno.ENOSPC, "disk_full"), (errno.EIO, "storage_failed")])
def test_disk_that_fails_under_a_file_is_a_typed_error(
    stores: Stores, monkeypatch: pytest.MonkeyPatch, number: int, code: str
) -> None:
    store = stores.open()
    job_id = accept(store)
    store.begin(job_id)
    store.path(job_id).write_bytes(b"video")

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number), str(store.path(job_id)))

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", fail)
        assert code_of(store.complete, job_id) == code
    assert store.job(job_id, None).status == "in_progress"
    store.complete(job_id)
    assert store.video(job_id, None).read_bytes() == b"video"


def test_disk_without_room_for_the_video_refuses_it(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    store = stores.open()
    needed = estimated_bytes(REQUEST)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(GENEROUS, 0, 2 * needed - 1))
    accept(store)
    assert code_of(store.accept, REQUEST, None, 10) == "disk_full"


def test_full_disk_is_a_typed_error_until_something_is_deleted(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 400) as disk:
        store = JobStore(disk / "jobs", GENEROUS, 60.0, 100)
        try:
            first = completed(store, content=b"x" * 150_000)
            job_id = accept(store)
            with pytest.raises(OSError, match="No space left"):
                (disk / "filler").write_bytes(b"x" * 400_000)
            assert code_of(store.accept, REQUEST, None, 10) == "disk_full"
            for _ in range(3):  # a read needs no room, and a write fails again and again
                assert code_of(store.begin, job_id) == "disk_full"
                assert store.job(job_id, None).status == "queued"
            store.delete(first, None)
            assert store.begin(job_id)
            store.path(job_id).write_bytes(b"video")
            store.complete(job_id)
            assert store.video(job_id, None).read_bytes() == b"video"
        finally:
            store.close()
