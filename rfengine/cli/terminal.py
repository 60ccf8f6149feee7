"""What the commands share: one line for each error and warning, signals to stop, the choice of a device."""

from __future__ import annotations

import logging
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from rfengine.cli.exit_status import CALLER_ERROR, INTERRUPTED, OTHER_ERROR
from rfengine.stop_signals import stop_signals

if TYPE_CHECKING:
    import torch


def find_device(name: str | None, option: str = "--device") -> torch.device | None:
    """The device that `option` names; None for None. Raises ValueError where it is unknown or absent."""
    if name is None:
        return None
    import torch

    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if match is None:
        raise ValueError(f"{option} is {name!r}; use cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if name.startswith("cuda") else 0
    if name != "cpu" and int(match[1] or 0) >= count:
        raise ValueError(f"{option} is {name} and torch finds {count} CUDA devices; use {option} cpu")
    return torch.device(name)


def one_line(error: object) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def fail(error: object, status: int) -> int:
    """Print the error on standard error and return `status`."""
    with suppress(OSError):  # the terminal may be gone; the status says it too
        sys.stderr.write(f"rfengine: error: {one_line(error)}\n")  # at once: other ranks have this terminal
    return status


def exit_status_of(run: Callable[[], int | None]) -> int:
    """Run a command or a script and return its exit status, each error reported as one line.

    A closed pipe is left to the process.
    """
    try:
        with one_line_warnings():
            return run() or 0
    except BrokenPipeError:
        raise
    except ValueError as error:
        return fail(error, CALLER_ERROR)
    except (RuntimeError, OSError) as error:
        return fail(error, OTHER_ERROR)
    except KeyboardInterrupt as error:
        return fail(f"interrupted; {str(error) or 'nothing was written'}", INTERRUPTED)


class _OnceFilter(logging.Filter):
    """Lets each message through once: the configuration is read before and while a model is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        fresh = message not in self.seen
        self.seen.add(message)
        return fresh


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """Show warnings of the engine and of libraries as one line on stderr, without their source location."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter("rfengine: warning: %(message)s"))
    handler.addFilter(_OnceFilter())
    logger = logging.getLogger("rfengine")
    logger.addHandler(handler)

    def show(message: Warning | str, *place: object) -> None:
        print(f"rfengine: warning: {one_line(message)}", file=sys.stderr)

    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            yield
    finally:
        logger.removeHandler(handler)


@contextmanager
def stops_as_interrupt(own_process: bool) -> Iterator[None]:
    """Let every signal to stop raise KeyboardInterrupt: the video up to there plays, no partial file stays.

    own_process: the process ends after the command, so signals are ignored once one has come.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, signal.default_int_handler) for number in stop_signals()}
    afterwards: signal.Handlers = signal.SIG_DFL
    try:
        yield
    except KeyboardInterrupt:
        afterwards = signal.SIG_IGN
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, afterwards if own_process else handler)


@contextmanager
def interrupt_waits(then_raise: bool = True) -> Iterator[None]:
    """Defer signals to stop until the block is done: half a write would spoil the file."""
    if threading.current_thread() is not threading.main_thread():  # others never get the signal
        yield
        return
    pending: list[int] = []

    def note(number: int, frame: object) -> None:
        pending.append(number)

    previous = {number: signal.signal(number, note) for number in stop_signals()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if pending and then_raise:
        raise KeyboardInterrupt
