"""Turns: a lock that threads get in the order they ask for it."""

from __future__ import annotations

from collections import deque
from threading import Condition, get_ident
from types import TracebackType


class Turns:
    """A re-entrant lock for a `with` block, given in the order of asking.

    A plain lock goes to whoever is quickest: a thread that gives it back and asks again at once would keep
    the others waiting for as long as it has work.
    """

    def __init__(self) -> None:
        self._changed = Condition()
        self._queue: deque[int] = deque()  # threads by number; the first one has its turn
        self._depth = 0

    @property
    def is_own(self) -> bool:
        """Whether the calling thread has its turn."""
        with self._changed:
            return bool(self._depth) and self._queue[0] == get_ident()

    def __enter__(self) -> Turns:
        own = get_ident()
        with self._changed:
            if not self._queue or self._queue[0] != own:
                self._queue.append(own)
                try:
                    self._changed.wait_for(lambda: self._queue[0] == own)
                except BaseException:  # an interrupt: nobody may wait for a thread that has gone
                    self._queue.remove(own)
                    self._changed.notify_all()
                    raise
            self._depth += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._depth -= 1
            if not self._depth:
                self._queue.popleft()
                self._changed.notify_all()
