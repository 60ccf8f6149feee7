"""Delivery: hands to each session's consumer what it is to get, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Lock


class Lane:
    """The deliveries of one session: one after the other, in the order in which they were put."""

    __slots__ = ("_lock", "_running", "_submit", "_waiting")

    def __init__(self, submit: Callable[[Callable[[], None]], object]) -> None:
        self._submit = submit
        self._lock = Lock()
        self._waiting: deque[Callable[[], None]] = deque()
        self._running = False

    def put(self, deliver: Callable[[], None]) -> None:
        """Call `deliver`, which raises nothing, after all that was put before."""
        with self._lock:
            self._waiting.append(deliver)
            if self._running:
                return
            self._running = True
        self._submit(self._run)

    def _run(self) -> None:
        with self._lock:
            deliver = self._waiting.popleft()
        deliver()
        with self._lock:
            if not self._waiting:
                self._running = False
                return
        self._submit(self._run)  # to the end of the line, so that no session holds up the others


class Delivery:
    """Where deliveries run, and a Lane for each session.

    threads: of their own, beside the engine's work. With 0 the engine's thread runs them between two turns,
    by `run_waiting`: on a CPU, encoding beside the engine takes a core from each of its parallel loops.
    on_waiting: called for each delivery that waits for that.
    """

    def __init__(self, threads: int, on_waiting: Callable[[], None]) -> None:
        self._pool = ThreadPoolExecutor(threads, "rfengine-delivery") if threads else None
        self._on_waiting = on_waiting
        self._waiting: deque[Callable[[], None]] = deque()

    def lane(self) -> Lane:
        """The lane of a new session."""
        return Lane(self._wait if self._pool is None else self._pool.submit)

    def _wait(self, run: Callable[[], None]) -> None:
        self._waiting.append(run)
        self._on_waiting()

    @property
    def is_waiting(self) -> bool:
        """Whether run_waiting has something to do."""
        return bool(self._waiting)

    def run_waiting(self) -> None:
        """Run what waits, and what comes meanwhile."""
        while self._waiting:
            self._waiting.popleft()()

    def close(self) -> None:
        """Return once everything that was put is delivered."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)
