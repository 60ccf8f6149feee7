"""Stands where hypothesis is not installed: tests with drawn inputs skip themselves, others run."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import strategies

__all__ = ["assume", "example", "given", "settings", "strategies"]
ABSENT = "hypothesis is not installed"

Test = Callable[..., object]


def given(*_: object, **__: object) -> Callable[[Test], Callable[[], None]]:
    def decorate(test: Test) -> Callable[[], None]:
        import pytest

        def skipped() -> None:
            pytest.skip(ABSENT)

        skipped.__name__, skipped.__doc__, skipped.__module__ = test.__name__, test.__doc__, test.__module__
        skipped.pytestmark = getattr(test, "pytestmark", [])
        return skipped

    return decorate


def settings(*_: object, **__: object) -> Callable[[Test], Test]:
    return lambda test: test


example = settings


def assume(condition: object) -> bool:
    return bool(condition)
