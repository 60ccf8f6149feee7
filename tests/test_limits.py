from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy
import pytest
import torch

from rfengine.config import EngineConfig
from rfengine.config_json import from_dict, to_dict
from rfengine.limits import (
    DeviceName,
    Entries,
    Range,
    Text,
    as_integer,
    as_number,
    check_fields,
    check_options,
    shown,
)
from rfengine.presets import PRESETS


@dataclass(frozen=True)
class Settings:
    count: Annotated[int, Range(1, 9)] = 1
    share: Annotated[float, Range(0, 1)] = 0.5
    on: bool | None = None
    kind: Literal["a", "b", "c"] = "a"
    sizes: Annotated[tuple[int, ...], Entries(1, 3), Range(1, 4)] = (1,)
    pair: tuple[int, int] = (1, 2)
    name: Annotated[str, Text(1, 5)] = "me"
    device: DeviceName | None = None
    limit: Annotated[int | None, Range(1)] = None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 0}, "count is 0; it must be at least 1"),
        ({"count": 2**31}, "count is 2147483648; it must be at most 9"),
        ({"count": 10**6000}, "count is an integer of 19932 bits; it must be at most 9"),
        ({"count": True}, "count is True; it must be an integer"),
        ({"count": 3.0}, "count is 3.0; it must be an integer"),
        ({"count": None}, "count is None; it must be an integer"),
        ({"count": "7"}, "count is '7'; it must be an integer"),
        ({"share": float("nan")}, "share is nan; it must be a finite number"),
        ({"share": -float("inf")}, "share is -inf; it must be a finite number"),
        ({"share": 10**400}, "share is an integer of 1329 bits; it must be a finite number"),
        ({"on": 1}, "on is 1; it must be true or false"),
        ({"kind": ["a"]}, "kind is ['a']; use 'a', 'b' or 'c'"),
        ({"sizes": [1]}, "sizes is [1]; it must be a tuple of integers (a list in JSON)"),
        ({"sizes": (1, True)}, "sizes is (1, True); it must be a tuple of integers (a list in JSON)"),
        ({"sizes": ()}, "sizes has 0 entries; give at least 1"),
        ({"sizes": (1,) * 9}, "sizes has 9 entries; give at most 3"),
        ({"sizes": (1, 5)}, "sizes is (1, 5); each entry must be at most 4"),
        ({"pair": (1, 2, 3)}, "pair is (1, 2, 3); it must be a tuple of 2 integers (a list in JSON)"),
        ({"name": "a\nb"}, r"name is 'a\nb'; use printable characters alone"),
        ({"name": "\ud800"}, r"name is '\ud800'; use printable characters alone"),
        ({"name": "toolong"}, "name has 7 characters; use 1 to 5"),
        ({"device": "cuda:x"}, "device is 'cuda:x'; use cpu, cuda or cuda:N"),
        ({"limit": 0}, "limit is 0; it must be at least 1"),
    ],
)
def test_a_value_that_a_field_may_not_hold_is_refused_with_the_limit(change: dict, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_fields(dataclasses.replace(Settings(), **change))
    assert str(caught.value) == message


def test_values_at_the_limits_are_taken() -> None:
    check_fields(Settings(9, 1, True, "c", (4, 4, 4), (-5, 5), "fives", "cuda:7", 1))
    check_fields(Settings(share=0))


def test_an_option_is_named_as_it_is_typed() -> None:
    @dataclass(frozen=True)
    class Options:
        num_frames: Annotated[int | None, Range(1, 5)] = None

    check_options(Options())
    with pytest.raises(ValueError, match="--num-frames is 6; it must be at most 5"):
        check_options(Options(6))


def test_integers_of_other_packages_are_taken_and_nothing_else() -> None:
    for seven in (7, numpy.int64(7), numpy.uint8(7), torch.tensor(7)):
        assert as_integer("height", seven) == 7 and type(as_integer("height", seven)) is int
    for wrong in (7.0, True, "7", None, torch.tensor([7, 8]), numpy.float64(7)):
        with pytest.raises(ValueError, match="height is .*; it must be an integer"):
            as_integer("height", wrong)


def test_numbers_of_other_packages_are_taken_and_nothing_else() -> None:
    for half in (0.5, numpy.float32(0.5), numpy.float64(0.5)):
        assert as_number("seconds", half) == 0.5 and type(as_number("seconds", half)) is float
    assert as_number("seconds", numpy.int32(2)) == 2.0
    for wrong in (float("nan"), float("inf"), "1", None, True, 1j):
        with pytest.raises(ValueError, match="seconds is .*; it must be a finite number"):
            as_number("seconds", wrong)
    with pytest.raises(ValueError, match="seconds is an integer of 3322 bits; it must be a finite number"):
        as_number("seconds", 10**1000)
    with pytest.raises(ValueError, match="seconds is 6; it must be at most 5"):
        as_number("seconds", 6, Range(0, 5))


def test_a_long_value_is_shown_short() -> None:
    nested: list[Any] = []
    for _ in range(10_000):
        nested = [nested]
    for value in ("a" * 10**6, 10**10**4, list(range(10**6)), {str(key): 0 for key in range(10**5)}, nested):
        assert len(shown(value)) < 300


def every_field(values: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for name, value in values.items():
        found += [(*path, name), *(every_field(value, (*path, name)) if isinstance(value, dict) else [])]
    return found


ABSURD = [
    0, -1, 2**31, 2**63, 10**30, 1.5, 1e308, float("inf"), float("nan"), True, None, "", "x", "a\n",
    "a" * 10**5, [], [[]], {}, {"a": 1}, [0] * 8, [-1, 2, 2], [2**31] * 4, [None], ["x"], [True] * 3,
    [1] * 10**5,
]  # fmt: skip


@pytest.mark.parametrize("path", every_field(to_dict(PRESETS["tiny"])), ids=".".join)
def test_an_absurd_value_in_any_field_is_refused_by_its_path_or_taken(path: tuple[str, ...]) -> None:
    refused = 0
    for value in ABSURD:
        values = to_dict(PRESETS["tiny"])
        table = values
        for name in path[:-1]:
            table = table[name]
        table[path[-1]] = value
        try:
            from_dict(EngineConfig, values, "engine")
        except ValueError as error:
            refused += 1
            assert str(error).startswith("engine") and len(str(error)) < 600
    assert refused >= len(ABSURD) - 8
