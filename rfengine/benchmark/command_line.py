"""Options of a script from its dataclass, with argparse alone: a bare CUDA image has no tyro."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from typing_extensions import Doc

Options = TypeVar("Options")


def parse_options(kind: type[Options], arguments: Sequence[str] | None = None) -> Options:
    """An instance of the dataclass `kind`: one option for each field, its help the Doc of its annotation.

    A field of type bool is --name and --no-name. Exits with 2, as argparse does, for options that do not fit.
    """
    parser = argparse.ArgumentParser(description=kind.__doc__)
    hints = get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        _add_option(parser, field.name, hints[field.name], field.default)
    return kind(**vars(parser.parse_args(arguments)))


def _add_option(parser: argparse.ArgumentParser, name: str, hint: Any, default: Any) -> None:
    hint, *notes = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    told = " ".join(note.documentation for note in notes if isinstance(note, Doc)).replace("%", "%%")
    flag = f"--{name.replace('_', '-')}"
    if hint is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=told)
        return
    shown = told if default is None else f"{told} (default: {default})"
    choices = _choices(hint)
    if choices:
        parser.add_argument(flag, choices=choices, default=default, help=shown)
        return
    parser.add_argument(flag, type=_reader(hint), default=default, help=shown, metavar=name.upper())


def _alternatives(hint: Any) -> list[Any]:
    """The types that a value may have, None left out: an option that is not given is None."""
    every = get_args(hint) if get_origin(hint) is UnionType or len(get_args(hint)) > 1 else (hint,)
    return [hint] if get_origin(hint) is Literal else [one for one in every if one is not NoneType]


def _choices(hint: Any) -> list[str]:
    """The words of a Literal; none where anything else may stand."""
    kinds = _alternatives(hint)
    if not all(get_origin(one) is Literal for one in kinds):
        return []
    return [word for one in kinds for word in get_args(one)]


def _reader(hint: Any) -> Any:
    """A function of the text given, which tries one type after another."""
    kinds = _alternatives(hint)

    def read(text: str) -> Any:
        for one in kinds:
            if get_origin(one) is Literal:
                if text in get_args(one):
                    return text
                continue
            try:
                return one(text)
            except ValueError:
                continue
        raise argparse.ArgumentTypeError(f"{text!r} is no {' or '.join(map(_name, kinds))}")

    return read


def _name(kind: Any) -> str:
    return "|".join(get_args(kind)) if get_origin(kind) is Literal else kind.__name__
