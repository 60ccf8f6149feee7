"""Prompts: what a text must be to be one, several texts with weights, and the files that hold one on each
line."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rfengine.files import read_text, text_lines
from rfengine.limits import Range, as_number, shown

logger = logging.getLogger(__name__)

MOST_PROMPTS = 100_000  # of a file
MOST_CHARACTERS = 10_000  # of a text; a text encoder reads 512 tokens at most
MOST_TEXTS = 16  # of a prompt
MOST_WEIGHT = 1_000_000  # of a text
_SHOWN = 80  # characters of a prompt in a warning
_MOST_BYTES = 64 * 2**20  # of a file

PromptMode = Literal["soft", "recache", "hard"]


@dataclass(frozen=True, slots=True)
class WeightedText:
    """One of the texts of a prompt, and its weight beside the others'."""

    text: str
    weight: float = 1.0


Prompt = str | Sequence[WeightedText | tuple[str, float]]
"""A text, or several with weights, of whose text states the weighted mean is taken."""
# What Wan2.1 leads away from: loud colours, overexposure, stillness, blur, subtitles, artefacts, deformed
# hands and faces, crowds, walking backwards (the published configuration).
WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，"
    "形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


def check_prompt(prompt: str, name: str = "the prompt") -> None:
    """Raises ValueError for a blank or too long prompt, and for one that is no text: NUL, half a character.

    name: what the error calls it.
    """
    if not isinstance(prompt, str):
        raise ValueError(f"{name} is {shown(prompt)}; give a text")
    if not prompt.strip():
        raise ValueError(f"{name} {prompt[:40]!r} is empty; give it at least one word")
    if len(prompt) > MOST_CHARACTERS:
        raise ValueError(f"{name} has {len(prompt)} characters; give at most {MOST_CHARACTERS}")
    if "\0" in prompt:
        raise ValueError(f"{name} has a NUL at character {prompt.index(chr(0)) + 1}; give plain text")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} is no UTF-8 at character {error.start + 1} ({prompt[error.start]!r}); give plain text"
        ) from error


def weighted_texts(prompt: Prompt) -> tuple[WeightedText, ...]:
    """The texts of a prompt; one text alone has the weight 1.

    Weights are above 0, at most MOST_WEIGHT, and count beside each other alone: 3 and 1 are three quarters
    and one. Raises ValueError for a text that is no prompt, a wrong weight, no text and more than MOST_TEXTS.
    """
    if isinstance(prompt, str):
        check_prompt(prompt)
        return (WeightedText(prompt),)
    if not isinstance(prompt, Sequence):
        raise ValueError(f"the prompt is {shown(prompt)}; give a text, or pairs of a text and a weight")
    if not 1 <= len(prompt) <= MOST_TEXTS:
        raise ValueError(f"the prompt has {len(prompt)} texts; give at least one and at most {MOST_TEXTS}")
    texts = tuple(_weighted_text(entry, number) for number, entry in enumerate(prompt, 1))
    return texts if len(texts) > 1 else (WeightedText(texts[0].text),)


def _weighted_text(entry: WeightedText | tuple[str, float], number: int) -> WeightedText:
    if isinstance(entry, WeightedText):
        text, weight = entry.text, entry.weight
    elif isinstance(entry, tuple | list) and len(entry) == 2:
        text, weight = entry
    else:
        raise ValueError(
            f"the prompt's text {number} is {shown(entry)}; give a text and a weight, such as ('a cat', 1)"
        )
    check_prompt(text, f"the prompt's text {number}")
    name = f"the prompt's weight {number}"
    if (value := as_number(name, weight, Range(high=MOST_WEIGHT))) <= 0:
        raise ValueError(f"{name} is {shown(weight)}; it must be above 0")
    return WeightedText(text, value)


def prompt_line(prompt: Prompt) -> str:
    """A prompt as it is shown and logged: its text, or `3 * a red circle | 1 * a green square` for several.

    parse_prompt reads it again where no text has a line break, a `|` or white space around it. Raises as
    weighted_texts does.
    """
    first, *others = texts = weighted_texts(prompt)
    if not others:
        return first.text
    return " | ".join(f"{repr(each.weight).removesuffix('.0')} * {each.text}" for each in texts)


def parse_prompt(line: str) -> Prompt:
    """The prompt that a line is: a text, or several between `|`, each after its weight and a star or of
    weight 1. A text alone has no weight, so a star in it is its own. Raises as weighted_texts does."""
    pieces = line.split("|")
    if len(pieces) == 1:
        check_prompt(line)
        return line.strip()
    texts = []
    for piece in pieces:
        number, _, text = piece.partition("*")
        try:
            texts.append(WeightedText(text.strip(), float(number)))
        except ValueError:  # the star is the text's
            texts.append(WeightedText(piece.strip()))
    return weighted_texts(texts)


def warn_of_unknown_words(prompt: str, known: Sequence[str]) -> None:
    """Log a warning for a prompt in which none of the phrases stands that a model knows, where it has any to
    tell."""
    words = "|".join(map(re.escape, known))
    if known and not re.search(rf"\b({words})\b", prompt.lower()):
        logger.warning(
            "the prompt %r has no word that this model knows, so it may show anything; it knows: %s",
            prompt[:_SHOWN],
            ", ".join(known),
        )


def read_prompts(path: Path, skip_empty_lines: bool) -> tuple[str, ...]:
    """The prompts of a UTF-8 file, one for each line, without the white space around them.

    Lines end at \\n or \\r\\n alone. Raises ValueError for a file that is absent, no ordinary file, not UTF-8
    or without a prompt, for more than MOST_PROMPTS, for a line that is no prompt, with its number, and for an
    empty one where those are not skipped.
    """
    if not os.path.lexists(path):
        raise ValueError(f"the prompt file {path} does not exist; give a text file with one prompt per line")
    lines = [line.strip() for line in text_lines(read_text(path, _MOST_BYTES))]
    count = sum(map(bool, lines))
    if not lines or (skip_empty_lines and not count):
        raise ValueError(f"{path} has 0 prompts; write one per line")
    if count > MOST_PROMPTS:
        raise ValueError(f"{path} has {count} prompts; give at most {MOST_PROMPTS} in one file, so split it")
    for number, line in enumerate(lines, 1):
        if line:
            check_prompt(line, f"line {number} of {path}")
        elif not skip_empty_lines:
            raise ValueError(f"{path} has an empty line {number}; every line is a prompt, remove it")
    return tuple(line for line in lines if line)
