"""What a field of a configuration or an option may hold: its type and limits are stated beside it, as in
`num_layers: Annotated[int, Range(1, 1024)]`, and checked here, before anything of that size is made."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import re
import reprlib
from dataclasses import dataclass
from numbers import Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, SupportsIndex, Union, get_args, get_origin, get_type_hints

_SHOWN = 60  # characters of a value in an error
_ENTRIES_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Range:
    """Smallest and largest value of a number, or of each number of a tuple; None is no limit on that side."""

    low: float | None = None
    high: float | None = None

    def fault(self, value: Any) -> str:
        """What is wrong with `value` in half a sentence; empty when it is within the limits."""
        whose = "each entry" if isinstance(value, tuple) else "it"
        for number in value if isinstance(value, tuple) else (value,):
            if self.low is not None and number < self.low:
                return f"is {shown(value)}; {whose} must be at least {self.low}"
            if self.high is not None and number > self.high:
                return f"is {shown(value)}; {whose} must be at most {self.high}"
        return ""


@dataclass(frozen=True, slots=True)
class Entries:
    """Fewest and most entries of a tuple."""

    low: int
    high: int

    def fault(self, value: tuple[Any, ...]) -> str:
        if len(value) < self.low:
            return f"has {len(value)} entries; give at least {self.low}"
        return f"has {len(value)} entries; give at most {self.high}" if len(value) > self.high else ""


@dataclass(frozen=True, slots=True)
class Text:
    """Fewest and most characters of a text; `pattern` is all it may be, `wanted` the same in words."""

    low: int
    high: int
    pattern: str = ""
    wanted: str = ""

    def fault(self, value: str) -> str:
        if self.pattern and not re.fullmatch(self.pattern, value):
            return f"is {shown(value)}; use {self.wanted}"
        if not self.low <= len(value) <= self.high:
            return f"has {len(value)} characters; use {self.low} to {self.high}"
        return "" if value.isprintable() else f"is {shown(value)}; use printable characters alone"


DeviceName = Annotated[str, Text(1, 16, r"cpu|cuda(:[0-9]{1,3})?", "cpu, cuda or cuda:N")]


def check_fields(config: Any) -> None:
    """Raises ValueError unless each field of a dataclass is of its type and within its limits."""
    for name, hint in field_hints(type(config)).items():
        check_value(name, getattr(config, name), hint)


def check_options(options: Any) -> None:
    """check_fields for the options of a command, which are named as they are typed: --num-frames."""
    for name, hint in field_hints(type(options)).items():
        check_value(f"--{name.replace('_', '-')}", getattr(options, name), hint)


def check_value(name: str, value: Any, hint: Any) -> None:
    """Raises ValueError, which begins with `name`, unless `value` is what the type `hint` and its limits
    allow."""
    fault = _fault(value, hint)
    if fault:
        raise ValueError(f"{name} {fault}")


def as_integer(name: str, value: SupportsIndex, limits: Range = Range()) -> int:
    """`value` as int: also an integer of numpy, or of a tensor. Raises ValueError for anything else, and
    beyond `limits`."""
    try:
        number = operator.index(value)
    except (TypeError, RuntimeError):  # RuntimeError: a tensor of several values
        number = None
    if number is None or isinstance(value, bool):
        raise ValueError(f"{name} is {shown(value)}; it must be an integer")
    check_value(name, number, Annotated[int, limits])
    return number


def as_number(name: str, value: float, limits: Range = Range()) -> float:
    """`value` as float: also a number of numpy. Raises ValueError for anything else, one that is not finite,
    and beyond `limits`."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ValueError(f"{name} is {shown(value)}; it must be a finite number")
    number = value if isinstance(value, int) else float(value)  # as it is: it may be beyond every float
    check_value(name, number, Annotated[float, limits])
    return float(number)


@functools.cache
def field_hints(kind: type) -> dict[str, Any]:
    """The types of the fields of a dataclass, with their limits."""
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _fault(value: Any, hint: Any) -> str:
    """What is wrong with `value` in half a sentence; empty when nothing is. Only types that fields have."""
    hint, limits = _split(hint)
    present = [option for option in get_args(hint) if option is not NoneType]
    if value is not None and get_origin(hint) in (UnionType, Union) and len(present) == 1:
        hint, more = _split(present[0])
        limits += more
    if not _is_of(value, hint):
        return f"is {shown(value)}; {_wanted(hint)}"
    if value is None:
        return ""
    return next(filter(None, (limit.fault(value) for limit in limits)), "")


def _split(hint: Any) -> tuple[Any, tuple[Range | Entries | Text, ...]]:
    """The type alone, and its limits."""
    if get_origin(hint) is not Annotated:
        return hint, ()
    kind, *stated = get_args(hint)
    return kind, tuple(limit for limit in stated if isinstance(limit, Range | Entries | Text))


def _is_of(value: Any, hint: Any) -> bool:
    origin, options = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return not _fault(value, hint)
    if origin is Literal:
        return any(type(value) is type(option) and value == option for option in options)
    if origin in (UnionType, Union):
        return any(_is_of(value, option) for option in options)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        entries = options[:1] * len(value) if options[-1:] == (...,) else options
        return len(value) == len(entries) and all(map(_is_of, value, entries))
    if hint is float:
        return _is_finite(value)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _is_finite(value: Any) -> bool:
    if type(value) is int:
        return value.bit_length() < 1024  # a float ends there
    return isinstance(value, float) and math.isfinite(value)


_KINDS = {
    int: "an integer", float: "a finite number", bool: "true or false", str: "a text", NoneType: "null",
}  # fmt: skip
_PLURALS = {int: "integers", float: "finite numbers", bool: "true and false", str: "texts"}


def _wanted(hint: Any) -> str:
    """What a value of another type should have been, as the end of a sentence."""
    options = get_args(hint)
    if get_origin(hint) is Literal:
        return f"use {' or '.join(filter(None, (', '.join(map(repr, options[:-1])), repr(options[-1]))))}"
    return f"it must be {_kind(hint)}"


def _kind(hint: Any) -> str:
    origin, options = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _kind(options[0])
    if origin is Literal:
        return " or ".join(map(repr, options))
    if origin in (UnionType, Union):
        return " or ".join(map(_kind, options))
    if origin is tuple:
        entry = options[0] if get_origin(options[0]) is not Annotated else get_args(options[0])[0]
        count = "" if options[-1] is ... else f"{len(options)} "
        return f"a tuple of {count}{_PLURALS.get(entry, 'values')} (a list in JSON)"
    return _KINDS.get(hint) or f"a {hint.__name__}"


class _Shown(reprlib.Repr):
    """Values of any size in a few words; Python refuses to print an integer of many digits."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = _SHOWN
        self.maxlevel = 3
        self.maxlist = self.maxtuple = self.maxdict = _ENTRIES_SHOWN

    def repr_int(self, value: int, level: int) -> str:
        return repr(value) if value.bit_length() <= 4 * _SHOWN else f"an integer of {value.bit_length()} bits"


_REPR = _Shown()


def shown(value: Any) -> str:
    """`value` for an error: as Python writes it, shortened where it is long."""
    return _REPR.repr(value)
