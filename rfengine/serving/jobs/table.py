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
# WAL is faster and needs memory that processes share; DELETE works between machines too
Journal = Literal["WAL", "DELETE"]
STATUSES: tuple[JobStatus, ...] = ("queued", "in_progress", "completed", "failed")

_VERSION = 1  # of the table
_COLUMNS = """
    id TEXT PRIMARY KEY, owner TEXT, status TEXT NOT NULL, progress INTEGER NOT NULL,
    created_at INTEGER NOT NULL, completed_at INTEGER, expires_at INTEGER, error_code TEXT,
    error_message TEXT, attempts INTEGER NOT NULL, bytes INTEGER NOT NULL, model TEXT NOT NULL,
    seed INTEGER NOT NULL, num_frames INTEGER NOT NULL, fps INTEGER NOT NULL, height INTEGER NOT NULL,
    width INTEGER NOT NULL, prompt TEXT NOT NULL
"""
# beside the jobs in progress, whose they are: a server that has the directory alone has no rows here. The
# triggers let a claim end in the same step as its job, whoever ends it.
_CLAIMS = (
    "CREATE TABLE IF NOT EXISTS claims (job_id TEXT PRIMARY KEY, replica TEXT NOT NULL, "
    "lease_until REAL NOT NULL) WITHOUT ROWID",
    "CREATE TRIGGER IF NOT EXISTS claim_of_ended AFTER UPDATE OF status ON jobs "
    "WHEN NEW.status != 'in_progress' BEGIN DELETE FROM claims WHERE job_id = NEW.id; END",
    "CREATE TRIGGER IF NOT EXISTS claim_of_deleted AFTER DELETE ON jobs "
    "BEGIN DELETE FROM claims WHERE job_id = OLD.id; END",
)
STORAGE_BUSY = "storage_busy"  # code of a fault that passes by itself
_BUSY_S = 30.0  # that a change waits for those of other processes


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
    if isinstance(error, sqlite3.Error) and _primary_code(error) == sqlite3.SQLITE_BUSY:
        logger.warning("another process had the table of jobs for %g s", _BUSY_S)
        return Fault(STORAGE_BUSY, "the server's list of videos is busy; try again", 503, True, 5)
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT) or "disk is full" in str(error):
        message = "the server's disk is full; delete videos, or try again later"
        return Fault("disk_full", message, 507, True, 10)
    logger.error("the job directory fails", exc_info=error)
    return Fault("storage_failed", "the server cannot store videos now; try again later", 503, True, 10)


def _primary_code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF  # beside it is the kind of it


class JobTable:
    """The rows of jobs, by id. Any thread may call any method, and several processes may have the file.

    Methods raise ServiceError where the disk is full or fails, and change nothing then. Raises RuntimeError
    for a file of another version, sqlite3.Error for one that cannot be opened.
    """

    def __init__(self, path: Path, journal: Journal = "WAL") -> None:
        self._lock = RLock()
        self._depth = 0  # of transactions, of which the outermost counts
        self._connection = sqlite3.connect(path, _BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            self._connection.row_factory = sqlite3.Row
            self._connection.execute(f"PRAGMA journal_mode = {journal}")
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
                for statement in _CLAIMS:
                    self._connection.execute(statement)
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
        """Keep other threads and processes out, and make all changes of the block or, after an error, none.
        One inside of another is a part of it."""
        with self._lock:
            if self._depth:
                yield
                return
            self._execute("BEGIN IMMEDIATE")
            self._depth = 1
            try:
                yield
                self._execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):  # a full disk has rolled it back already
                    self._connection.execute("ROLLBACK")
                raise
            finally:
                self._depth = 0

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

    def claimant(self, job_id: str) -> str | None:
        """The replica that makes a job; None where no replica does."""
        rows = self._execute("SELECT replica FROM claims WHERE job_id = ?", job_id)
        return rows[0][0] if rows else None

    def claimed(self, now: float) -> set[str]:
        """The jobs whose replica has its lease at that time."""
        rows = self._execute("SELECT job_id FROM claims WHERE lease_until > ?", now)
        return {job_id for (job_id,) in rows}

    def lost(self, now: float) -> list[Job]:
        """The jobs in progress whose replica has let its lease end."""
        return self._jobs("id IN (SELECT job_id FROM claims WHERE lease_until <= ?)", now)

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

    def claim(self, job_id: str, replica: str, lease_until: float) -> None:
        """The job in progress is a replica's."""
        self._execute("INSERT OR REPLACE INTO claims VALUES (?, ?, ?)", job_id, replica, lease_until)

    def renew(self, replica: str, lease_until: float) -> set[str]:
        """Extend the lease of a replica's jobs, which are returned."""
        statement = "UPDATE claims SET lease_until = ? WHERE replica = ? RETURNING job_id"
        return {job_id for (job_id,) in self._execute(statement, lease_until, replica)}

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
