"""Prompts of one text and of several, and prompt files: what is wrong is one sentence."""

from __future__ import annotations

import hashlib
import math
import os
from pathlib import Path

import pytest

from rfengine import prompts
from rfengine.prompts import (
    MOST_CHARACTERS,
    MOST_PROMPTS,
    WAN_NEGATIVE_PROMPT,
    WeightedText,
    check_prompt,
    parse_prompt,
    prompt_line,
    read_prompts,
    warn_of_unknown_words,
    weighted_texts,
)


def test_prompts_are_the_lines_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffa cat\n a dog \nein Bär\n", encoding="utf-8")
    assert read_prompts(path, skip_empty_lines=False) == ("a cat", "a dog", "ein Bär")


def test_lines_end_at_line_feeds_alone(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    lines = ["a\u2028b", "c \x0b d", "e\x85 f", "g\x1ch", "i\x0cj", "k\u2029l", "m\rn"]
    path.write_bytes("\r\n".join(lines).encode() + b"\n")
    assert read_prompts(path, skip_empty_lines=False) == tuple(lines)


def test_empty_lines_are_skipped_where_they_may_be(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\r\n a cat\n\n  \na dog")
    assert read_prompts(path, skip_empty_lines=True) == ("a cat", "a dog")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a cat\n\na dog\n", "empty line 2"),
        (b"a cat\n   \n", "empty line 2"),
        (b"", "0 prompts"),
        (b"\xff\xfe", "not UTF-8 at byte 0"),
        ("a c\ud800t".encode(errors="surrogatepass"), "not UTF-8 at byte 3"),
        (b"a cat\na d\0g", "line 2 of .* has a NUL at character 4"),
        (b"a cat\n" + b"x" * (MOST_CHARACTERS + 1), "line 2 of .* has 10001 characters; give at most 10000"),
        (None, "does not exist"),
    ],
)
def test_prompt_file_that_is_wrong_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(path, skip_empty_lines=False)


def test_only_empty_lines_are_no_prompts(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(b"\n \n\n")
    with pytest.raises(ValueError, match="has 0 prompts"):
        read_prompts(tmp_path / "prompts.txt", skip_empty_lines=True)


def test_more_prompts_than_the_limit_are_refused_with_it(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"a\n" * MOST_PROMPTS)
    assert len(read_prompts(path, skip_empty_lines=True)) == MOST_PROMPTS
    path.write_bytes(b"a\n" * 1_000_000)
    with pytest.raises(ValueError, match="has 1000000 prompts; give at most 100000 in one file, so split it"):
        read_prompts(path, skip_empty_lines=True)


def test_file_that_never_ends_and_one_that_waits_are_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"a" * 33)
    monkeypatch.setattr(prompts, "_MOST_BYTES", 32)
    for path, message in (
        (tmp_path / "pipe", "is a pipe"),
        (Path("/dev/zero"), "is a device"),
        (tmp_path, "is a directory"),
        (tmp_path / "large", "has more than the 32 bytes"),
    ):
        with pytest.raises(ValueError, match=message):
            read_prompts(path, skip_empty_lines=True)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (" \n", r"the prompt ' \\n' is empty"),
        ("a\0", "the prompt has a NUL at character 2"),
        ("caf\udce9", r"the prompt is no UTF-8 at character 4 \('\\udce9'\)"),
        ("a" * 10_001, "the prompt has 10001 characters; give at most 10000"),
    ],
)
def test_text_that_is_no_prompt_is_refused(prompt: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_prompt(prompt)


def test_a_prompt_without_a_known_word_is_warned_of_with_those_there_are(caplog):
    known = ("ball", "to the left")
    for prompt in ("a BALL", "off to the left", "ball."):
        warn_of_unknown_words(prompt, known)
    warn_of_unknown_words("a cat", ())  # of a model that cannot tell
    assert not caplog.records
    warn_of_unknown_words("a football on the left " + 100 * "x", known)
    (record,) = caplog.records
    assert "has no word that this model knows" in record.getMessage()
    assert record.getMessage().endswith("it knows: ball, to the left") and len(record.getMessage()) < 200


# Several texts with weights


def test_a_prompt_is_a_text_or_several_with_weights() -> None:
    circle = WeightedText("a circle")
    for prompt in ("a circle", [circle], [("a circle", 7)], (["a circle", 0.5],)):
        assert weighted_texts(prompt) == (circle,)  # alone, its weight says nothing
    assert weighted_texts([("a", 3), WeightedText("b")]) == (WeightedText("a", 3.0), WeightedText("b", 1.0))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (7, "the prompt is 7; give a text, or pairs of a text and a weight"),
        (None, "the prompt is None; give a text"),
        (" ", "the prompt ' ' is empty"),
        ([], "the prompt has 0 texts; give at least one and at most 16"),
        ([("a", 1)] * 17, "the prompt has 17 texts; give at least one and at most 16"),
        (["a"], r"the prompt's text 1 is 'a'; give a text and a weight, such as \('a cat', 1\)"),
        ([("a", 1), ("b",)], r"the prompt's text 2 is \('b',\); give a text and a weight"),
        ([("a", 1), (2, 1)], "the prompt's text 2 is 2; give a text"),
        ([("a", 1), ("b", 0)], "the prompt's weight 2 is 0; it must be above 0"),
        ([("a", -1.5)], "the prompt's weight 1 is -1.5; it must be above 0"),
        ([("a", math.nan)], "the prompt's weight 1 is nan; it must be a finite number"),
        ([("a", math.inf)], "the prompt's weight 1 is inf; it must be a finite number"),
        ([("a", 1e7)], "the prompt's weight 1 is 10000000.0; it must be at most 1000000"),
        ([("a", "1")], "the prompt's weight 1 is '1'; it must be a finite number"),
    ],
)
def test_texts_and_weights_that_cannot_be_are_refused(prompt: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weighted_texts(prompt)


@pytest.mark.parametrize(
    ("line", "prompt"),
    [
        (" a circle ", "a circle"),
        ("2 * a circle", "2 * a circle"),  # alone, a text has no weight
        ("3 * a circle | a square", (WeightedText("a circle", 3.0), WeightedText("a square"))),
        ("a * b |.5*c*d", (WeightedText("a * b"), WeightedText("c*d", 0.5))),
        ("1 * 2 * a | 1e-3 * b", (WeightedText("2 * a"), WeightedText("b", 0.001))),
    ],
)
def test_a_line_has_one_text_or_several_between_bars(line: str, prompt: object) -> None:
    assert parse_prompt(line) == prompt
    assert parse_prompt(prompt_line(prompt)) == prompt


def test_a_line_shows_the_weights_as_they_are_given() -> None:
    assert prompt_line("a | b") == "a | b"
    assert prompt_line([("a", 3), ("b", 0.1)]) == "3 * a | 0.1 * b"


@pytest.mark.parametrize(
    "line", ["a |", "| a", "2 * | a", "-1 * a | b", "0 * a | b", "nan * a | b", "a || b"]
)
def test_a_line_with_an_empty_text_or_a_wrong_weight_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="the prompt's (text|weight) [12]"):
        parse_prompt(line)


def test_negative_prompt_is_the_published_one() -> None:
    text = WAN_NEGATIVE_PROMPT
    digest = "ce96e0324e4b54ce4b6e867f669ca520952e1a34cc116543516b1897f0d3c47e"
    assert len(text) == 137 and hashlib.sha256(text.encode()).hexdigest() == digest
