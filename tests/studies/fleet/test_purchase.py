"""Erlang's loss formula, and the cards that it asks for."""

from __future__ import annotations

import math

import pytest

from studies.fleet.purchase import Purchase, offered_for, places_for, refused_share


@pytest.mark.parametrize(("places", "offered"), [(1, 0.5), (2, 1.0), (6, 4.0), (16, 12.0), (40, 30.0)])
def test_the_share_is_erlangs(places: int, offered: float) -> None:
    terms = [offered**count / math.factorial(count) for count in range(places + 1)]
    assert refused_share(places, offered) == pytest.approx(terms[-1] / sum(terms))


@pytest.mark.parametrize("offered", [0.1, 1.0, 14.4, 300.0])
@pytest.mark.parametrize("refused", [0.01, 0.1])
def test_no_place_less_would_do(offered: float, refused: float) -> None:
    places = places_for(offered, refused)
    assert refused_share(places, offered) <= refused < refused_share(places - 1, offered)


@pytest.mark.parametrize("places", [1, 2, 16, 256])
@pytest.mark.parametrize("refused", [0.01, 0.1])
def test_the_most_that_may_come_is_the_inverse(places: int, refused: float) -> None:
    offered = offered_for(places, refused)
    assert refused_share(places, offered) <= refused < refused_share(places, offered + 2e-3)


def test_machines_apart_need_more_cards_than_a_pool() -> None:
    purchase = Purchase(viewers=100.0, places=2)
    assert purchase.pooled_cards == math.ceil(places_for(100.0) / 2) == 59
    assert refused_share(16, 100 / purchase.machines_apart) <= 0.01
    assert refused_share(16, 100 / (purchase.machines_apart - 1)) > 0.01
