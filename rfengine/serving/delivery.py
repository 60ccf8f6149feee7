"""Delivery: hands to each session's consumer what it is to get, in order, on a few shared threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Lock


class Lane:
    """The deliveries of one session: one after the other, in the order in which they were put."""

    __slots__ = ("_lock", "_pool", "_running", "_waiting")

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
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
        self._pool.submit(self._run)

    def _run(self) -> None:
        with self._lock:
            deliver = self._waiting.popleft()
        deliver()
        with self._lock:
            if not self._waiting:
                self._running = False
                return
        self._pool.submit(self._run)  # to the end of the line, so that no session keeps a thread


class Delivery:
    """The threads, and a Lane for each session."""

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, "rfengine-delivery")

    def lane(self) -> Lane:
        return Lane(self._pool)

    def close(self) -> None:
        """Return once everything that was put is delivered."""
        self._pool.shutdown(wait=True)
