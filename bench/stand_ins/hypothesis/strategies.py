"""Any strategy, and whatever is made of it: nothing is ever drawn."""

from __future__ import annotations


class Strategy:
    def __call__(self, *_: object, **__: object) -> Strategy:
        return self

    def __getattr__(self, name: str) -> Strategy:
        return __getattr__(name)

    def __or__(self, _: object) -> Strategy:
        return self


def __getattr__(name: str) -> Strategy:
    """Names of Python's own are left out: libraries ask every module for them."""
    if name.startswith("__"):
        raise AttributeError(name)
    return Strategy()
