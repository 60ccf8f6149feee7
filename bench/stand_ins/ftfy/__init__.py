"""Stands where ftfy is not installed: plain ASCII needs no mending, and anything else is refused."""

from __future__ import annotations


def fix_text(text: str) -> str:
    if not text.isascii():
        raise ImportError(f"ftfy is not installed and {text[:40]!r} is not plain ASCII; pip install ftfy")
    return text
