"""JobTable: video jobs in one SQLite file. What it returns from is on disk."""

from __future__ import annotations

import errno
import logging
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any, Literal

from rfengine.serving.errors import Fault, ServiceError

logger = logging.getLogger(__name__)

JobStatus = Literal["queued", "in_progress", "completed", "failed"]
STATUSES: tuple[JobStatus, ...] = ("queued", "in_progress", "completed", "failed")

_VERSION = 1  # of the table
_COLUMNS = """
    id TEXT PRIMARY KEY, owner TEXT, status TEXT NOT NULL, progress INTEGER NOT NULL,
    created_at INTEGER NOT NULL, completed_at INTEGER, expires_at INTEGER, error_code TEXT,
    error_message TEXT, attempts INTEGER NOT NULL, bytes INTEGER NOT NULL, model TEXT NOT NULL,
    seed INTEGER NOT NULL, num_frames INTEGER NOT NULL, fps INTEGER NOT NULL, height INTEGER NOT NULL,
    width INTEGER NOT NULL, prompt TEXT NOT NULL
"""


@dataclass(frozen=True, slots=True)
class JobRequest:
    """What a job makes. height, width: pixels. fps: of the model."""

    prompt: str
    model: str
    seed: int
    num_frames: int
    fps: int
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class JobError:
    """Why a job failed, as its Fault said."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Job:
    """A job at one moment.

    owner: name of the key that made it, None where the server has no keys. progress: frames made, of those
    that are wanted, in per cent. Times are in seconds since 1970. attempts: how often it was begun. bytes: of
    its file, and before it is completed what is reserved for it.
    """

    id: str
    owner: str | None
    status: JobStatus
    progress: int
    created_at: int
    completed_at: int | None
    expires_at: int | None
    error: JobError | None
    attempts: int
    bytes: int
    request: JobRequest


def storage_fault(error: OSError | sqlite3.Error) -> Fault:
    """What a client is told where the disk is full or fails."""
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT) or "disk is full" in str(error):
        message = "the server's disk is full; delete videos, or try again later"
        return Fault("disk_full", message, 507, True, 10)
    logger.error("the job directory fails", exc_info=error)
    return Fault("storage_failed", "the server cannot store videos now; try again later", 503, True, 10)


class JobTable:
    """The rows of jobs, by id. Any thread may call any method.

    Methods raise ServiceError where the disk is full or fails, and change nothing then. Raises RuntimeError
    for a file of another version, sqlite3.Error for one that cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._lock = RLock()
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            self._connection.row_factory = sqlite3.Row
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")
            (version,) = self._connection.execute("PRAGMA user_version").fetchone()
            if version not in (0, _VERSION):
                raise RuntimeError(
                    f"{path} is of version {version} and this server keeps jobs in version {_VERSION}; "
                    "choose another directory"
                )
            with self.transaction():
                self._connection.execute(f"CREATE TABLE IF NOT EXISTS jobs ({_COLUMNS}) WITHOUT ROWID")
                self._connection.execute("CREATE INDEX IF NOT EXISTS by_status ON jobs (status, bytes)")
                self._connection.execute(f"PRAGMA user_version = {_VERSION}")
        except BaseException:
            self._connection.close()
            raise

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Keep other threads out, and make all changes of the block or, after an error, none."""
        with self._lock:
            self._execute("BEGIN IMMEDIATE")
            try:
                yield
                self._execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):  # a full disk has rolled it back already
                    self._connection.execute("ROLLBACK")
                raise

    def _execute(self, statement: str, *values: object) -> list[Any]:
        with self._lock:
            try:
                return self._connection.execute(statement, values).fetchall()
            except sqlite3.Error as error:
                raise ServiceError(storage_fault(error)) from error

    def _jobs(self, condition: str, *values: object) -> list[Job]:
        return [_job_of(row) for row in self._execute(f"SELECT * FROM jobs WHERE {condition}", *values)]

    # Questions

    def job(self, job_id: str) -> Job | None:
        """The job of that id."""
        return next(iter(self._jobs("id = ?", job_id)), None)

    def page(self, owner: str | None, after: str | None, limit: int, newest_first: bool) -> list[Job]:
        """The first `limit` jobs of an owner beyond the id `after`, which may be deleted."""
        order, beyond = ("DESC", "<") if newest_first else ("ASC", ">")
        condition = f"owner IS ? AND (? IS NULL OR id {beyond} ?) ORDER BY id {order} LIMIT ?"
        return self._jobs(condition, owner, after, after, limit)

    def next_queued(self) -> Job | None:
        """The job that waits longest."""
        return next(iter(self._jobs("status = 'queued' ORDER BY id LIMIT 1")), None)

    def of_status(self, status: JobStatus) -> list[Job]:
        """All jobs of a status."""
        return self._jobs("status = ?", status)

    def expired(self, now: float) -> list[Job]:
        """The jobs that are to be removed at that time."""
        return self._jobs("expires_at <= ?", now)

    def newest_id(self) -> str | None:
        """The largest id."""
        return self._execute("SELECT max(id) FROM jobs")[0][0]

    def waiting(self, owner: str | None) -> tuple[int, int]:
        """Jobs that wait: of all owners, and of one."""
        counts = "count(*), count(*) FILTER (WHERE owner IS ?)"
        return tuple(self._execute(f"SELECT {counts} FROM jobs WHERE status = 'queued'", owner)[0])

    def bytes_by_status(self) -> dict[JobStatus, int]:
        """What files take, and what is reserved for them."""
        rows = self._execute("SELECT status, sum(bytes) FROM jobs GROUP BY status")
        return dict.fromkeys(STATUSES, 0) | {status: size for status, size in rows}

    def counts(self) -> dict[JobStatus, int]:
        """Jobs by status."""
        rows = self._execute("SELECT status, count(*) FROM jobs GROUP BY status")
        return dict.fromkeys(STATUSES, 0) | {status: number for status, number in rows}

    # Changes

    def insert(self, job: Job) -> None:
        """Add a job that is queued."""
        request = job.request
        self._execute(
            "INSERT INTO jobs (id, owner, status, progress, created_at, attempts, bytes, model, seed, "
            "num_frames, fps, height, width, prompt) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            *(job.id, job.owner, job.status, job.progress, job.created_at, job.attempts, job.bytes),
            *(request.model, request.seed, request.num_frames, request.fps, request.height, request.width),
            request.prompt,
        )

    def delete(self, job_id: str) -> None:
        """Remove a job, if it is there."""
        self._execute("DELETE FROM jobs WHERE id = ?", job_id)

    def set_queued(self, job_id: str, attempts: int) -> None:
        """The job waits again."""
        self._execute(
            "UPDATE jobs SET status = 'queued', progress = 0, attempts = ? WHERE id = ?", attempts, job_id
        )

    def set_in_progress(self, job_id: str, attempts: int) -> None:
        """The job is begun."""
        self._execute(
            "UPDATE jobs SET status = 'in_progress', progress = 0, attempts = ? WHERE id = ?",
            *(attempts, job_id),
        )

    def set_progress(self, job_id: str, progress: int, size: int) -> None:
        """How far the job is, and the bytes that are reserved for it."""
        self._execute("UPDATE jobs SET progress = ?, bytes = ? WHERE id = ?", progress, size, job_id)

    def set_completed(self, job_id: str, size: int, completed_at: int, expires_at: int) -> None:
        """The file of the job is there, with `size` bytes."""
        self._execute(
            "UPDATE jobs SET status = 'completed', progress = 100, bytes = ?, completed_at = ?, "
            "expires_at = ? WHERE id = ?",
            *(size, completed_at, expires_at, job_id),
        )

    def set_failed(self, job_id: str, error: JobError, expires_at: int) -> None:
        """The job has no file, and gets none; if it is there."""
        self._execute(
            "UPDATE jobs SET status = 'failed', bytes = 0, completed_at = NULL, error_code = ?, "
            "error_message = ?, expires_at = ? WHERE id = ?",
            *(error.code, error.message, expires_at, job_id),
        )


def _job_of(row: sqlite3.Row) -> Job:
    code = row["error_code"]
    request = JobRequest(
        row["prompt"], row["model"], row["seed"], row["num_frames"], row["fps"], row["height"], row["width"]
    )
    return Job(
        row["id"], row["owner"], row["status"], row["progress"], row["created_at"], row["completed_at"],
        row["expires_at"], None if code is None else JobError(code, row["error_message"]), row["attempts"],
        row["bytes"], request,
    )  # fmt: skip
