"""Prompts: what a text must be to be one, and the files that hold one on each line."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

from rfengine.files import read_text, text_lines
from rfengine.limits import shown

logger = logging.getLogger(__name__)

MOST_PROMPTS = 100_000  # of a file
MOST_CHARACTERS = 10_000  # of a prompt; a text encoder reads 512 tokens at most
_SHOWN = 80  # characters of a prompt in a warning
_MOST_BYTES = 64 * 2**20  # of a file


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
