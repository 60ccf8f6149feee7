"""The signals that ask a process to stop."""

from __future__ import annotations

import os
import signal

_ALL = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def stop_signals() -> tuple[signal.Signals, ...]:
    """Ctrl-C, termination and the end of the terminal, except those that the process ignores since its
    start: under nohup, or in the background of a shell."""
    return tuple(number for number in _ALL if signal.getsignal(number) != signal.SIG_IGN)


def stops_end_it_at_once(last_line: bytes, status: int) -> None:
    """Until another handler is set, let a signal to stop write `last_line` to standard error and end the
    process with `status`, without clean-up.

    For the time while packages are imported: an exception there can be lost in the import system or come out
    as another one, and nothing is written yet.
    """

    def end(number: int, frame: object) -> None:
        try:
            os.write(2, last_line)
        finally:
            os._exit(status)

    for number in stop_signals():
        signal.signal(number, end)
