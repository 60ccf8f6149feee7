"""ReplicaTable: the replicas of one data directory, each with a lease that it renews, in a SQLite file.

Nothing of it needs to outlive the machine, so no change waits for the disk.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any, Literal

from rfengine.serving.access import is_loopback
from rfengine.serving.jobs.table import Journal
from rfengine.serving.replicas.identity import difference

ReplicaState = Literal["warming up", "ready", "draining", "ended"]
Condition = Literal["warming up", "ready", "draining", "ended", "lost"]

LOST_S = 60.0  # that a replica whose lease has ended is remembered, for clients that ask for its sessions
_BUSY_S = 30.0
_TABLES = """
    CREATE TABLE IF NOT EXISTS replicas (
        name TEXT PRIMARY KEY, address TEXT NOT NULL, machine TEXT NOT NULL, process INTEGER NOT NULL,
        identity TEXT NOT NULL, state TEXT NOT NULL, lease_until REAL NOT NULL, free_bytes INTEGER NOT NULL,
        sessions INTEGER NOT NULL, stream_bytes INTEGER NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS refusals (moment REAL NOT NULL);
"""


@dataclass(frozen=True, slots=True)
class Load:
    """How a replica is. free_bytes: of its memory plan, for one more session. sessions: without those of
    jobs."""

    state: ReplicaState
    free_bytes: int = 0
    sessions: int = 0


@dataclass(frozen=True, slots=True)
class Replica:
    """One replica at one moment.

    address: host:port where the gateway reaches it. process: its number on its machine. stream_bytes: of a
    session of the model's own size. lease_until: in seconds since 1970.
    """

    name: str
    address: str
    machine: str
    process: int
    stream_bytes: int
    load: Load
    lease_until: float

    @property
    def is_gone(self) -> bool:
        """Whether it serves no longer: it has ended, or has not renewed its lease."""
        return self.condition in ("ended", "lost")

    @property
    def condition(self) -> Condition:
        """Its state by its own word, and lost where it should have renewed its lease."""
        state = self.load.state
        return "lost" if state != "ended" and self.lease_until <= time.time() else state


class ReplicaTable:
    """The replicas. Any thread of any process that has the file may call any method.

    lease_s: a replica that does not renew for so long counts as lost. Raises RuntimeError where the file
    cannot be used, and so do all methods.
    """

    def __init__(self, path: Path, journal: Journal = "WAL", lease_s: float = 5.0) -> None:
        self.lease_s = lease_s
        self._path = path
        self._lock = RLock()
        with self._readable_errors():
            self._connection = sqlite3.connect(path, _BUSY_S, isolation_level=None, check_same_thread=False)
            self._connection.row_factory = sqlite3.Row
            self._connection.execute(f"PRAGMA journal_mode = {journal}")
            self._connection.execute("PRAGMA synchronous = OFF")
            self._connection.executescript(_TABLES)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()

    @contextmanager
    def _readable_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            message = f"the table of replicas {self._path} cannot be used ({error}); choose another directory"
            raise RuntimeError(message) from error

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock, self._readable_errors():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise

    def _execute(self, statement: str, *values: object) -> list[sqlite3.Row]:
        with self._lock, self._readable_errors():
            return self._connection.execute(statement, values).fetchall()

    # What replicas do

    def join(
        self, name: str, address: str, machine: str, process: int, identity: dict[str, Any], stream_bytes: int
    ) -> None:
        """Take a place beside the others.

        Raises ValueError where the replica runs anything else than those that are there, and where it or
        another is on another machine and one of them listens on loopback; nothing is changed then.
        """
        text = json.dumps(identity, sort_keys=True)
        with self._transaction():
            for row in self._connection.execute("SELECT * FROM replicas"):
                other = _replica_of(row)
                if other.is_gone:
                    continue
                _require_same(json.loads(text), json.loads(row["identity"]), name, other.name)
                _require_reachable(address, machine, other)
            self._connection.execute(
                "INSERT OR REPLACE INTO replicas VALUES (?, ?, ?, ?, ?, 'warming up', ?, 0, 0, ?)",
                (name, address, machine, process, text, time.time() + self.lease_s, stream_bytes),
            )

    def renew(self, name: str, load: Load) -> bool:
        """Extend a replica's lease and say how it is; False where it was lost for so long that it has no
        place any more, or that replicas of something else have joined."""
        now = time.time()
        rows = self._execute(
            "UPDATE replicas SET lease_until = ?, state = ?, free_bytes = ?, sessions = ? WHERE name = ? "
            "AND NOT EXISTS (SELECT 1 FROM replicas AS other WHERE other.lease_until > ? "
            "AND other.state != 'ended' AND other.identity != replicas.identity) RETURNING name",
            *(now + self.lease_s, load.state, load.free_bytes, load.sessions, name, now),
        )
        return bool(rows)

    def leave(self, name: str, failed: bool = False) -> None:
        """The replica has ended, or with `failed` is lost; it is remembered for a while in both cases."""
        state = "state" if failed else "'ended'"
        self._execute(
            f"UPDATE replicas SET state = {state}, lease_until = ? WHERE name = ?", time.time(), name
        )

    def sweep(self) -> None:
        """Forget replicas that are gone for LOST_S, and refusals as old."""
        before = time.time() - LOST_S
        self._execute("DELETE FROM replicas WHERE lease_until <= ?", before)
        self._execute("DELETE FROM refusals WHERE moment <= ?", before)

    # What the gateway asks, and what decides how many there should be

    def replicas(self) -> dict[str, Replica]:
        """All that are remembered, by name; those that are gone too."""
        rows = self._execute("SELECT * FROM replicas ORDER BY name")
        return {row["name"]: _replica_of(row) for row in rows}

    def note_refusal(self) -> None:
        """No replica had room for a session."""
        self._execute("INSERT INTO refusals VALUES (?)", time.time())

    def refusals(self, seconds: float) -> int:
        """Sessions that no replica had room for, in the last seconds."""
        rows = self._execute("SELECT count(*) FROM refusals WHERE moment > ?", time.time() - seconds)
        return rows[0][0]


def _replica_of(row: sqlite3.Row) -> Replica:
    load = Load(row["state"], row["free_bytes"], row["sessions"])
    return Replica(
        row["name"], row["address"], row["machine"], row["process"], row["stream_bytes"], load,
        row["lease_until"],
    )  # fmt: skip


def _require_same(own: dict[str, Any], other: dict[str, Any], name: str, other_name: str) -> None:
    if different := difference(own, other):
        field, mine, theirs = different
        raise ValueError(
            f"replica {name} has {field} {mine} and replica {other_name} has {theirs}; run the same model, "
            "version and options in all, or stop the others first"
        )


def _require_reachable(address: str, machine: str, other: Replica) -> None:
    loopback = is_loopback(address.rpartition(":")[0]) or is_loopback(other.address.rpartition(":")[0])
    if machine != other.machine and loopback:
        raise ValueError(
            f"replicas at {address} on {machine} and at {other.address} on {other.machine} cannot both be "
            "reached from one gateway; let each listen at its machine's address (replica_host=node)"
        )
