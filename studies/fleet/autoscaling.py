"""How many cards there should be: by the server's own rule, and by one that keeps places free."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

from rfengine.serving.replicas.scaling import wanted_replicas


@dataclass(frozen=True, slots=True)
class State:
    """A fleet at one moment. present: cards that admit, and those that start. sessions: of viewers. working:
    sessions and jobs in progress. waiting: viewers who were refused and try again. refusals: in the last
    REFUSED_S of the server. queued: jobs that wait."""

    present: int
    sessions: int
    working: int
    waiting: int
    refusals: int
    queued: int


class Rule(Protocol):
    """drains: whether a card that is to end ends its sessions; one that does not ends when it is empty."""

    drains: bool

    def wanted(self, now: float, state: State) -> int:
        """Cards that there should be, from `now` on."""
        ...


@dataclass(slots=True)
class Queue:
    """The server's own rule (rfengine/serving/replicas), with its delays, which Ray Serve keeps: a card more
    where jobs or sessions have waited for more_after_s, one less where fewer sessions and jobs than would be
    left have been at work for fewer_after_s."""

    more_after_s: float = 30.0
    fewer_after_s: float = 600.0
    drains: bool = field(default=True, init=False)
    _direction: int = field(default=0, init=False)
    _since: float = field(default=0.0, init=False)

    def wanted(self, now: float, state: State) -> int:
        change = wanted_replicas(state.present, state.queued + state.refusals, state.working) - state.present
        if change != self._direction:
            self._direction, self._since = change, now
        delay = self.more_after_s if change > 0 else self.fewer_after_s
        if not change or now - self._since < delay:
            return state.present
        self._since = now
        return state.present + change


@dataclass(slots=True)
class Spare:
    """A rule that rfengine does not have: as many cards as the open sessions, the viewers who wait and
    `places` more want, at once; fewer once there were too many for fewer_after_s.

    places_a_card: sessions a card. jobs_a_card: waiting jobs for which a card is added.
    """

    places: int
    places_a_card: int
    jobs_a_card: int = 20
    fewer_after_s: float = 600.0
    drains: bool = field(default=False, init=False)
    _too_many_since: float | None = field(default=None, init=False)

    def wanted(self, now: float, state: State) -> int:
        taken = state.sessions + state.waiting + self.places
        wanted = math.ceil(taken / self.places_a_card) + state.queued // self.jobs_a_card
        if wanted >= state.present:
            self._too_many_since = None
            return wanted
        if self._too_many_since is None:
            self._too_many_since = now
        return wanted if now - self._too_many_since >= self.fewer_after_s else state.present
