"""How many cards a number of viewers wants, and how many viewers a number of cards serves, by Erlang's loss
formula: viewers who come at random and go where every place is taken."""

from __future__ import annotations

import math
from dataclasses import dataclass

MACHINE_CARDS = 8
REFUSED = 0.01  # of those who come, at their first try


def refused_share(places: int, offered: float) -> float:
    """The share of viewers who find every place taken. offered: viewers at once, if all were admitted."""
    refused = 1.0
    for count in range(1, places + 1):
        refused = offered * refused / (count + offered * refused)
    return refused


def places_for(offered: float, refused: float = REFUSED) -> int:
    """The least places at which no larger share than `refused` finds all taken."""
    share, places = 1.0, 0
    while share > refused:
        places += 1
        share = offered * share / (places + offered * share)
    return places


def offered_for(places: int, refused: float = REFUSED) -> float:
    """The most viewers at once, on average, for so many places; to a thousandth."""
    low, high = 0.0, places / (1 - refused)  # at which the others alone fill every place
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if refused_share(places, middle) <= refused else (low, middle)
    return low


@dataclass(frozen=True, slots=True)
class Purchase:
    """Cards for a session of each viewer's own. viewers: at once, on average over the busiest hour. places: a
    card, by compute."""

    viewers: float
    places: int
    refused: float = REFUSED

    @property
    def pooled_cards(self) -> int:
        """Where a viewer is refused only if no card at all has a place."""
        return math.ceil(places_for(self.viewers, self.refused) / self.places)

    @property
    def machines_apart(self) -> int:
        """Machines of MACHINE_CARDS cards, to each of which viewers are sent blindly, and refused by it
        alone."""
        return math.ceil(self.viewers / offered_for(MACHINE_CARDS * self.places, self.refused))
