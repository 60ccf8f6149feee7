"""Prompts of the command line, judged before a model is loaded."""

from __future__ import annotations

import re

from rfengine.prompts import check_prompt

_PLAIN_WORDS = re.compile(r"[ !-%'-~]*[A-Za-z0-9][ !-%'-~]*")  # printable ASCII without &


def check_cleaned(prompt: str, name: str = "the prompt") -> None:
    """Raises ValueError as check_prompt does, and where the encoder's cleaning leaves nothing of a prompt."""
    from rfengine.models.text_encoder import clean_text

    check_prompt(prompt, name)
    if _PLAIN_WORDS.fullmatch(prompt):  # of which cleaning leaves every word, and it takes 0.3 ms
        return
    if not clean_text(prompt):
        raise ValueError(f"{name} {prompt[:40]!r} is empty; give it at least one word")
