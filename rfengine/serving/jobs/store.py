"""JobStore: video jobs that outlive the process, and the files that they make, within a quota of the disk."""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import RLock

from rfengine.files import locked
from rfengine.limits import shown
from rfengine.serving.errors import Fault, ServiceError
from rfengine.serving.jobs.table import (
    Job,
    JobError,
    JobRequest,
    JobStatus,
    JobTable,
    Journal,
    storage_fault,
)

logger = logging.getLogger(__name__)

MOST_ATTEMPTS = 3  # of a job that is interrupted each time
JOB_ID = re.compile(r"video_[0-9a-f]{32}")  # milliseconds since 1970 in 12 digits, then 20 random ones

_TIME_DIGITS = slice(6, 18)  # of an id
_BYTES_PER_PIXEL = 0.25  # x264 at crf 18 makes 0.03 of a calm picture and 0.7 of noise
_FILE_BYTES = 2**14  # of a file beside its pictures
_RETRY_S = 10
_FILE = re.compile(rf"({JOB_ID.pattern})\.mp4")
# as files.partial_path names it, of a claimant too; and a claimant's that is whole
_PARTIAL_FILE = re.compile(rf"\.({JOB_ID.pattern})\.(?:[^.]+\.)?mp4\..*\.partial")
_MADE_FILE = re.compile(rf"({JOB_ID.pattern})\.[^.]+\.mp4")

_INTERRUPTED = JobError(
    "interrupted", f"the server stopped {MOST_ATTEMPTS} times while it made the video; create it again"
)
_FILE_LOST = JobError("file_lost", "the file of the video is gone; create it again")


def estimated_bytes(request: JobRequest) -> int:
    """What is reserved for a job's file: several times what most pictures take."""
    return _FILE_BYTES + int(_BYTES_PER_PIXEL * request.num_frames * request.height * request.width)


@dataclass(frozen=True, slots=True)
class Claimant:
    """A replica that makes jobs of a directory in which others do, too. lease_s: a job whose claim it has not
    renewed for so long is another's."""

    name: str
    lease_s: float = 15.0


class JobStore:
    """The jobs of one data directory, and their videos beside the table.

    A job that was accepted is on disk. A completed job has its whole file at any moment in which the process
    may be killed: the file is on disk under its name before the job is called completed. The next start
    queues what was in progress again, up to MOST_ATTEMPTS times, and removes what was left half-way.
    most_bytes: of all files, with what is reserved for those to come. life_s: of a job after its end.
    most_waiting: jobs in the queue. claimant: where other processes make jobs of the directory, who makes
    them here; the directory is then not locked, and nothing is repaired but what `sweep` takes back.

    Any thread may call any method; each raises ServiceError where the disk is full or fails, and works again
    when it does. Raises RuntimeError where another process has the directory, or it cannot be used.
    """

    def __init__(
        self,
        directory: Path,
        most_bytes: int,
        life_s: float,
        most_waiting: int,
        claimant: Claimant | None = None,
        journal: Journal = "WAL",
    ) -> None:
        self.most_bytes = most_bytes
        self.claimant = claimant
        self._directory = directory
        self._life_s = life_s
        self._most_waiting = most_waiting
        self._lock = RLock()  # of the table and the files together
        with ExitStack() as stack:
            try:
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                if claimant is None:
                    stack.enter_context(locked(directory / ".lock", "serving the jobs there"))
                self._table = JobTable(directory / "jobs.sqlite", journal)
                stack.callback(self._table.close)
                if claimant is None:
                    with self._exclusive():  # so that no replica begins a job meanwhile
                        self._repair()
            except (OSError, sqlite3.Error, ServiceError) as error:
                raise RuntimeError(
                    f"the job directory {directory} cannot be used ({error}); free space, make it writable "
                    "or choose another"
                ) from error
            self._held = stack.pop_all()

    def close(self) -> None:
        """Let go of the directory; the store is of no use afterwards."""
        with self._lock:
            self._held.close()

    def _repair(self) -> None:
        """Make the table and the files agree, however the last process ended; what a replica that may live
        is making stays its own."""
        claimed = self._table.claimed(time.time())
        sizes: dict[str, int] = {}
        for entry in os.scandir(self._directory):
            if match := _PARTIAL_FILE.fullmatch(entry.name) or _MADE_FILE.fullmatch(entry.name):
                if match[1] not in claimed:
                    os.unlink(entry.path)
            elif (match := _FILE.fullmatch(entry.name)) and match[1] not in claimed:
                sizes[match[1]] = entry.stat().st_size
        completed = self._table.of_status("completed")
        whole = {job.id for job in completed if sizes.get(job.id) == job.bytes}
        for job_id in sizes.keys() - whole:  # before the table changes, for which a full disk has no room
            self._remove_files(job_id)
        for job in completed:
            if job.id not in whole:
                logger.error("the file of job %s is gone", job.id)
                self._table.set_failed(job.id, _FILE_LOST, self._expiry())
        for job in self._table.of_status("in_progress"):
            if job.id not in claimed:
                self._interrupted(job)

    def _interrupted(self, job: Job) -> None:
        logger.warning("job %s was interrupted in attempt %d", job.id, job.attempts)
        self._queue_again(job, attempt_counts=True)

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Keep other threads out of the table and the files, and other processes, all or nothing."""
        with self._lock, self._table.transaction():
            yield

    # What clients ask for

    def accept(self, request: JobRequest, owner: str | None, most_of_owner: int) -> Job:
        """Queue a job. most_of_owner: how many of one owner may wait.

        Raises ServiceError where too many wait, and where its file would not fit.
        """
        needed = estimated_bytes(request)
        if needed > self.most_bytes:
            message = (
                f"the file is estimated at {needed} bytes and the server keeps {self.most_bytes}; ask for a "
                "shorter or smaller video"
            )
            raise ServiceError(Fault("too_large", message, 413))
        with self._lock:
            self.sweep()
            with self._exclusive():
                self._require_place(owner, most_of_owner)
                if (fault := self._quota_fault(needed)) is not None:
                    raise ServiceError(fault)
                self._require_disk(needed)
                job_id, now = self._new_id(), int(time.time())
                job = Job(job_id, owner, "queued", 0, now, None, None, None, 0, needed, request)
                self._table.insert(job)
        return job

    def _new_id(self) -> str:
        """Larger than every other, so that ids are in the order of their jobs even if the clock goes back."""
        newest = self._table.newest_id()
        after = 0 if newest is None else int(newest[_TIME_DIGITS], 16) + 1
        return f"video_{max(after, int(time.time() * 1000)):012x}{secrets.token_hex(10)}"

    def _require_place(self, owner: str | None, most_of_owner: int) -> None:
        waiting, own = self._table.waiting(owner)
        if own >= most_of_owner:
            message = f"{own} of your videos wait, which is the limit; try again when one has been made"
            raise ServiceError(Fault("too_many_jobs", message, 429, True, _RETRY_S))
        if waiting >= self._most_waiting:
            message = f"{waiting} videos wait, which is the limit; try again when one has been made"
            raise ServiceError(Fault("queue_full", message, 429, True, _RETRY_S))

    def _quota_fault(self, more: int) -> Fault | None:
        """Why there may be no `more` bytes, if so."""
        used = sum(self._table.bytes_by_status().values())
        if more <= 0 or used + more <= self.most_bytes:
            return None
        message = (
            f"the video needs {more} bytes more and all videos have {used} of {self.most_bytes}; delete "
            "some, or try again when some have expired"
        )
        return Fault("storage_quota", message, 429, True, _RETRY_S)

    def _require_disk(self, more: int) -> None:
        """Raises ServiceError unless the disk has room for this job and those that wait."""
        try:
            free = shutil.disk_usage(self._directory).free
        except OSError as error:
            raise ServiceError(storage_fault(error)) from error
        reserved = self._table.bytes_by_status()["queued"]
        if reserved + more > free:
            message = (
                f"the video may need {more} bytes and the server's disk has {max(0, free - reserved)} free; "
                "delete videos, or try again later"
            )
            raise ServiceError(Fault("disk_full", message, 507, True, _RETRY_S))

    def job(self, job_id: str, owner: str | None) -> Job:
        """A job of that owner. Raises ServiceError where the owner has none of that id."""
        job = self._table.job(job_id) if JOB_ID.fullmatch(job_id) else None
        if job is None or job.owner != owner:
            message = f"there is no video {shown(job_id)}; it may have been deleted, or have expired"
            raise ServiceError(Fault("not_found", message, 404))
        return job

    def page(
        self, owner: str | None, after: str | None, limit: int, newest_first: bool
    ) -> tuple[list[Job], bool]:
        """The next `limit` jobs of an owner after the id `after`, which may be deleted; whether more follow.

        Raises ServiceError where `after` is no id.
        """
        if after is not None and not JOB_ID.fullmatch(after):
            message = f"after is {shown(after)}; give the id of the last video of the page before"
            raise ServiceError(Fault("invalid_value", message, 400, param="after"))
        jobs = self._table.page(owner, after, limit + 1, newest_first)
        return jobs[:limit], len(jobs) > limit

    def video(self, job_id: str, owner: str | None) -> Path:
        """The file of a completed job. Raises ServiceError where there is none, or not yet."""
        job = self.job(job_id, owner)
        if job.error is not None:
            raise ServiceError(Fault("job_failed", f"the video failed: {job.error.message}", 409))
        if job.status != "completed":
            message = f"the video is {job.status}, {job.progress} % are made; ask again when it is completed"
            raise ServiceError(Fault("not_completed", message, 409, True, 1))
        return self.path(job_id)

    def delete(self, job_id: str, owner: str | None) -> None:
        """Remove a job of that owner with its file. Raises ServiceError where there is none."""
        with self._exclusive():
            self.job(job_id, owner)
            self._forget(job_id)

    def sweep(self) -> int:
        """Remove the jobs that have expired with their files, and queue those of lost replicas again, without
        what these had written; returns how many have expired."""
        now = time.time()
        with self._exclusive():
            expired = self._table.expired(now)
            for job in expired:
                self._forget(job.id)
            for job in self._table.lost(now):
                self._remove_files(job.id)
                self._interrupted(job)
        return len(expired)

    def _forget(self, job_id: str) -> None:
        self._remove_files(job_id)  # first: then a full disk has room for the change of the table
        self._table.delete(job_id)

    def counts(self) -> dict[JobStatus, int]:
        """Jobs by status."""
        return self._table.counts()

    # What makes the videos

    def path(self, job_id: str) -> Path:
        """Where the file of a job is, or will be."""
        return self._directory / f"{job_id}.mp4"

    def made_path(self, job_id: str) -> Path:
        """Where the file of a job is made, until `complete`: a claimant has one of its own, so that one who
        has lost the job cannot replace what another has made."""
        path = self.path(job_id)
        return path if self.claimant is None else path.with_suffix(f".{self.claimant.name}.mp4")

    def next_queued(self) -> Job | None:
        """The job that waits longest."""
        return self._table.next_queued()

    def begin(self, job_id: str) -> bool:
        """Call a queued job in progress, and count the attempt; False where it was deleted, or another has
        begun it."""
        with self._exclusive():
            job = self._table.job(job_id)
            if job is None or job.status != "queued":
                return False
            self._table.set_in_progress(job_id, job.attempts + 1)
            if self.claimant is not None:
                self._table.claim(job_id, self.claimant.name, time.time() + self.claimant.lease_s)
        return True

    def renew(self) -> set[str]:
        """Extend the claimant's lease; returns the jobs that are still its own. Others were deleted, or taken
        by another after the lease had ended."""
        return self._table.renew(self.claimant.name, time.time() + self.claimant.lease_s)

    def advance(self, job_id: str, frames: int) -> None:
        """So many frames of a job in progress are written.

        Raises ServiceError where the file has outgrown what was reserved, and there is no quota for more. A
        deleted job, and one that is another claimant's, is left alone; so it is by the methods below.
        """
        with self._exclusive():
            if (job := self._in_progress(job_id)) is None:
                return
            size = max(job.bytes, self._partial_bytes(job_id))
            if (fault := self._quota_fault(size - job.bytes)) is not None:
                raise ServiceError(fault)
            self._table.set_progress(job_id, min(100, 100 * frames // job.request.num_frames), size)

    def complete(self, job_id: str) -> None:
        """The file of a job is whole, and gets its name; a file beyond the quota makes the job fail."""
        path, made = self.path(job_id), self.made_path(job_id)
        with self._exclusive():
            if (job := self._in_progress(job_id)) is None:
                if self._table.job(job_id) is None:
                    self._remove_files(job_id)
                elif made != path:
                    with suppress(OSError):
                        made.unlink()
                return
            try:
                if made != path and made.exists():  # when this is done again it has its name
                    made.replace(path)
                size = path.stat().st_size
                _sync_directory(self._directory)
            except FileNotFoundError:
                self.fail(job_id, Fault(_FILE_LOST.code, _FILE_LOST.message, 500))
                return
            except OSError as error:
                raise ServiceError(storage_fault(error)) from error
            if (fault := self._quota_fault(size - job.bytes)) is not None:
                self.fail(job_id, fault)
                return
            self._table.set_completed(job_id, size, int(time.time()), self._expiry())

    def refuse(self, job_id: str, fault: Fault) -> None:
        """A job that waits can never be made."""
        with self._exclusive():
            job = self._table.job(job_id)
            if job is not None and job.status == "queued":
                self._table.set_failed(job_id, JobError(fault.code, fault.message), self._expiry())

    def fail(self, job_id: str, fault: Fault) -> None:
        """A job that was begun has failed for good."""
        with self._exclusive():
            if self._is_of_another(job_id):
                return
            self._remove_files(job_id)
            self._table.set_failed(job_id, JobError(fault.code, fault.message), self._expiry())

    def put_back(self, job_id: str, attempt_counts: bool) -> None:
        """Queue a job in progress again. Where the attempt counts and was its last, it has failed."""
        with self._exclusive():
            if (job := self._in_progress(job_id)) is not None:
                self._queue_again(job, attempt_counts)

    def _queue_again(self, job: Job, attempt_counts: bool) -> None:
        if attempt_counts and job.attempts >= MOST_ATTEMPTS:
            self._table.set_failed(job.id, _INTERRUPTED, self._expiry())
        else:
            self._table.set_queued(job.id, job.attempts - (not attempt_counts))

    def _in_progress(self, job_id: str) -> Job | None:
        job = self._table.job(job_id)
        own = job is not None and job.status == "in_progress" and not self._is_of_another(job_id)
        return job if own else None

    def _is_of_another(self, job_id: str) -> bool:
        """Whether a claimant has lost the job: it is another's, or waits for one."""
        if self.claimant is None or self._table.job(job_id) is None:
            return False
        return self._table.claimant(job_id) != self.claimant.name

    def _expiry(self) -> int:
        return int(time.time() + self._life_s)

    # Files

    def _partial_files(self, job_id: str) -> list[os.DirEntry[str]]:
        with os.scandir(self._directory) as entries:
            return [entry for entry in entries if entry.name.startswith(f".{job_id}.")]

    def _partial_bytes(self, job_id: str) -> int:
        """Bytes of the file that is being written."""
        size = 0
        for entry in self._partial_files(job_id):
            with suppress(FileNotFoundError):  # renamed or removed just now
                size += entry.stat().st_size
        return size

    def _remove_files(self, job_id: str) -> None:
        try:
            made = self._directory.glob(f"{job_id}.*.mp4")
            for path in (self.path(job_id), *made, *self._partial_files(job_id)):
                with suppress(FileNotFoundError):
                    os.unlink(path)
        except OSError as error:
            raise ServiceError(storage_fault(error)) from error


def _sync_directory(directory: Path) -> None:
    """Put the names of its files on disk."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
