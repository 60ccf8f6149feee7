"""Options of a dataclass, read by argparse."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
from typing_extensions import Doc

from rfengine.benchmark.command_line import parse_options


@dataclass(frozen=True)
class Options:
    """What is asked."""

    count: Annotated[int, Doc("How many; 100% of them.")] = 3
    kind: Annotated[Literal["round", "square"] | None, Doc("Which.")] = None
    place: Annotated[int | Literal["last"], Doc("Where.")] = "last"
    output_file: Annotated[Path | None, Doc("Where to.")] = None
    loud: Annotated[bool, Doc("How.")] = True


def test_nothing_given_is_the_dataclass_itself() -> None:
    assert parse_options(Options, []) == Options()


def test_every_type_is_read() -> None:
    given = ["--count", "5", "--kind", "round", "--place", "7", "--output-file", "a.txt", "--no-loud"]
    assert parse_options(Options, given) == Options(5, "round", 7, Path("a.txt"), False)
    assert parse_options(Options, ["--place", "last"]).place == "last"


@pytest.mark.parametrize(
    "given", [["--count", "many"], ["--kind", "oval"], ["--place", "first"], ["--unknown", "1"]]
)
def test_what_does_not_fit_exits_with_two(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse_options(Options, given)
    assert left.value.code == 2
    assert capsys.readouterr().err


def test_help_shows_the_documentation(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_options(Options, ["--help"])
    assert "How many; 100% of them. (default: 3)" in capsys.readouterr().out
