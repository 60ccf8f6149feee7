"""Jobs of one directory that several processes make: each is one's at a time, a lost one's is taken up."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from rfengine.serving.errors import Fault, ServiceError
from rfengine.serving.jobs import table as table_module
from rfengine.serving.jobs.runner import JobRunner
from rfengine.serving.jobs.store import MOST_ATTEMPTS, Claimant, JobStore
from rfengine.serving.jobs.table import JobRequest
from support.models import small_pipeline
from support.sessions import eventually, running_service

REQUEST = JobRequest("a red circle", "small", 7, 21, 16, 32, 48)
FAULT = Fault("chunk_failed", "a chunk failed", 500)
LEASE_S = 0.3
Open = Callable[..., JobStore]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    """Opens a store of one directory for a claimant; of a single server where it has no name."""
    with ExitStack() as stack:

        def open_store(name: str | None, lease_s: float = LEASE_S, most_bytes: int = 2**30) -> JobStore:
            claimant = None if name is None else Claimant(name, lease_s)
            store = JobStore(tmp_path / "jobs", most_bytes, 60.0, 100, claimant)
            stack.callback(store.close)
            return store

        yield open_store


def accept(store: JobStore) -> str:
    return store.accept(REQUEST, None, 100).id


def status(store: JobStore, job_id: str) -> str:
    return store.job(job_id, None).status


def partial_file(store: JobStore, job_id: str) -> Path:
    path = store.path(job_id).with_name(f".{job_id}.mp4.1-aa.partial")
    path.write_bytes(b"half")
    return path


def test_one_of_two_begins_a_job(opened: Open) -> None:
    first, second = opened("a"), opened("b")
    job_id = accept(first)
    assert second.begin(job_id) and not first.begin(job_id)
    assert second.renew() == {job_id} and first.renew() == set()
    assert second.job(job_id, None).attempts == 1


def test_of_processes_that_race_exactly_one_begins_each_job(opened: Open, tmp_path: Path) -> None:
    store = opened("a")
    job_ids = [accept(store) for _ in range(40)]
    script = (
        "import sys\nfrom pathlib import Path\n"
        "from rfengine.serving.jobs.store import Claimant, JobStore\n"
        "store = JobStore(Path(sys.argv[1]), 2**30, 60.0, 100, Claimant(sys.argv[2], 60.0))\n"
        "print('ready', flush=True)\nsys.stdin.readline()\n"
        "print(*[job_id for job_id in sys.argv[3:] if store.begin(job_id)])\n"
    )
    root = Path(__file__).parents[3]
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / "jobs"), name, *job_ids],
            cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for name in "bcd"
    ]  # fmt: skip
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    begun = [racer.communicate(timeout=60)[0].split() for racer in racers]
    assert sorted(sum(begun, [])) == sorted(job_ids)
    assert {store.job(job_id, None).attempts for job_id in job_ids} == {1}


def test_a_lost_claimants_job_is_queued_again_without_what_it_wrote(opened: Open) -> None:
    lost, other = opened("a"), opened("b")
    job_id = accept(lost)
    lost.begin(job_id)
    partial = partial_file(lost, job_id)
    other.sweep()
    assert status(other, job_id) == "in_progress" and partial.exists()  # its lease has not ended
    time.sleep(LEASE_S)
    other.sweep()
    assert status(other, job_id) == "queued" and not partial.exists()
    assert other.begin(job_id) and other.job(job_id, None).attempts == 2


def test_a_claimant_that_renews_keeps_its_job(opened: Open) -> None:
    slow, other = opened("a"), opened("b")
    job_id = accept(slow)
    slow.begin(job_id)
    for _ in range(4):
        time.sleep(LEASE_S / 2)
        assert slow.renew() == {job_id}
        other.sweep()
    assert status(other, job_id) == "in_progress"


def test_a_claimant_that_comes_back_changes_nothing_of_what_is_anothers(opened: Open) -> None:
    late, other = opened("a"), opened("b", lease_s=60.0)
    job_id = accept(late)
    late.begin(job_id)
    time.sleep(LEASE_S)
    other.sweep()
    other.begin(job_id)
    partial = partial_file(other, job_id)
    assert late.renew() == set()
    late.advance(job_id, 12)
    late.put_back(job_id, attempt_counts=True)
    late.fail(job_id, FAULT)
    late.made_path(job_id).write_bytes(b"late")
    late.complete(job_id)
    assert not late.made_path(job_id).exists()
    assert status(other, job_id) == "in_progress" and other.job(job_id, None).progress == 0
    assert partial.exists() and other.renew() == {job_id}
    other.made_path(job_id).write_bytes(b"video")
    other.complete(job_id)
    other.complete(job_id)  # as after a change for which the disk had no room at first
    assert other.video(job_id, None).read_bytes() == b"video"
    late.made_path(job_id).write_bytes(b"what comes late")
    late.complete(job_id)  # nor of what another has completed
    late.fail(job_id, FAULT)
    assert status(other, job_id) == "completed" and other.path(job_id).read_bytes() == b"video"
    assert [path.name for path in other.path(job_id).parent.glob("*.mp4")] == [f"{job_id}.mp4"]
    assert status(opened(None), job_id) == "completed"  # the next start finds the file that it knows


def test_a_claimant_that_comes_back_does_not_fail_a_job_that_waits_again(opened: Open) -> None:
    late, other = opened("a"), opened("b")
    job_id = accept(late)
    late.begin(job_id)
    partial = late.made_path(job_id).with_name(f".{job_id}.a.mp4.1-aa.partial")
    partial.write_bytes(b"half")
    time.sleep(LEASE_S)
    other.sweep()
    assert not partial.exists()
    late.fail(job_id, FAULT)  # since its file is gone
    late.complete(job_id)
    assert status(other, job_id) == "queued"
    other.refuse(job_id, FAULT)
    assert other.job(job_id, None).error.code == FAULT.code
    late.refuse(job_id, Fault("other", "another", 500))
    assert other.job(job_id, None).error.code == FAULT.code


def test_what_claimants_left_half_way_or_whole_is_removed_at_the_next_start(opened: Open) -> None:
    lost = opened("a")
    job_id = accept(lost)
    lost.begin(job_id)
    lost.made_path(job_id).write_bytes(b"whole")
    lost.made_path(job_id).with_name(f".{job_id}.a.mp4.1-aa.partial").write_bytes(b"half")
    folder = lost.path(job_id).parent
    time.sleep(LEASE_S)
    assert status(opened(None), job_id) == "queued"
    assert not [path for path in folder.iterdir() if job_id in path.name]


def test_a_table_that_another_keeps_busy_is_a_fault_that_passes_and_fails_no_job(
    opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_module, "_BUSY_S", 0.05)
    store, busy = opened("a", lease_s=60.0), 0
    advance = store.advance

    def advance_while_another_writes(job_id: str, frames: int) -> None:
        nonlocal busy
        with closing(sqlite3.connect(tmp_path / "jobs" / "jobs.sqlite", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            try:
                advance(job_id, frames)
            except ServiceError as error:
                busy += error.fault.code == "storage_busy" and error.fault.retryable
                raise

    monkeypatch.setattr(store, "advance", advance_while_another_writes)
    with running_service(small_pipeline()) as service:
        runner = JobRunner(service, store)
        try:
            job_id = accept(store)
            eventually(lambda: status(store, job_id) in ("completed", "failed"))
        finally:
            runner.stop()
    assert busy and status(store, job_id) == "completed"


def test_the_last_attempt_of_lost_claimants_fails(opened: Open) -> None:
    other = opened("b")
    job_id = accept(other)
    for number in range(MOST_ATTEMPTS):
        assert opened(f"a{number}").begin(job_id)
        time.sleep(LEASE_S)
        other.sweep()
    job = other.job(job_id, None)
    assert (job.status, job.error.code) == ("failed", "interrupted")


def test_a_job_deleted_elsewhere_is_no_longer_claimed(opened: Open) -> None:
    maker, other = opened("a"), opened("b")
    job_id = accept(maker)
    maker.begin(job_id)
    other.delete(job_id, None)
    assert maker.renew() == set()
    maker.path(job_id).write_bytes(b"video")
    maker.complete(job_id)
    assert not maker.path(job_id).exists()


def test_the_quota_is_one_for_all(opened: Open) -> None:
    first, second = opened("a", most_bytes=70_000), opened("b", most_bytes=70_000)
    accept(first)
    accept(second)
    with pytest.raises(Exception, match="all videos have 48896 of 70000"):
        accept(first)


def test_a_single_server_waits_for_the_lease_of_a_replica_that_may_live(opened: Open) -> None:
    replica = opened("a")
    first, second = accept(replica), accept(replica)
    replica.begin(first)
    partial = partial_file(replica, first)
    with sqlite3.connect(replica._directory / "jobs.sqlite") as table:  # as a server without claims left it
        table.execute("UPDATE jobs SET status = 'in_progress' WHERE id = ?", (second,))
    single = opened(None)
    assert status(single, first) == "in_progress" and partial.exists()
    assert status(single, second) == "queued"
    time.sleep(LEASE_S)
    single.sweep()
    assert status(single, first) == "queued" and not partial.exists()
    assert single.begin(first)
    time.sleep(LEASE_S)
    single.sweep()
    assert status(single, first) == "in_progress"  # its own, which no lease ends


def test_a_table_without_claims_gets_them_and_keeps_its_version(opened: Open) -> None:
    store = opened("a")
    job_id = accept(store)
    with sqlite3.connect(store._directory / "jobs.sqlite") as table:  # as an older version made it
        table.executescript("DROP TRIGGER claim_of_ended; DROP TRIGGER claim_of_deleted; DROP TABLE claims")
    again = opened("b")
    assert again.begin(job_id) and again.renew() == {job_id}
    with sqlite3.connect(store._directory / "jobs.sqlite") as table:
        assert table.execute("PRAGMA user_version").fetchone() == (1,)


def test_two_runners_share_a_queue_and_one_stops_what_the_other_has_taken(opened: Open) -> None:
    first, second = opened("a", lease_s=30.0), opened("b", lease_s=30.0)
    pipeline = small_pipeline()
    with running_service(pipeline) as one, running_service(pipeline) as other:
        runners = [JobRunner(one, first), JobRunner(other, second)]
        try:
            jobs = [accept(first) for _ in range(4)]  # the second runner is not told
            eventually(lambda: all(status(first, job_id) == "completed" for job_id in jobs))
            assert {first.job(job_id, None).attempts for job_id in jobs} == {1}
            long = first.accept(JobRequest("a red circle", "small", 7, 4800, 16, 32, 48), None, 100).id
            eventually(lambda: status(first, long) == "in_progress")
            second.delete(long, None)
            eventually(lambda: not runners[0]._running and not runners[1]._running)
        finally:
            for runner in runners:
                runner.stop()
