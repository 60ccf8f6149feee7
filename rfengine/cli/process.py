"""Run one command or script as a process: streams that accept every character, and pipes that close."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from typing import TypeVar

from rfengine.cli.exit_status import CLOSED_PIPE, INTERRUPTED, OTHER_ERROR
from rfengine.cli.terminal import exit_status_of, one_line

Options = TypeVar("Options")


def run_process(main: Callable[[], int | None], name: str) -> int:
    """Call `main`, which has the process to itself, and return its exit status; `name` begins error lines.

    A character that the terminal's encoding lacks is written as an escape. A closed output pipe ends the
    process silently, output that cannot be written ends it with one line. SystemExit passes through.
    """
    _open_streams()
    try:
        try:
            return main() or 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
    except OSError as error:
        _drop_output()
        if isinstance(error, BrokenPipeError):
            return CLOSED_PIPE
        where = one_line(error) if error.filename else f"the output cannot be written ({error.strerror})"
        print(f"{name}: error: {where}", file=sys.stderr)
        return OTHER_ERROR
    except KeyboardInterrupt:
        print(f"{name}: error: interrupted", file=sys.stderr)
        return INTERRUPTED


def run_script(name: str, kind: type[Options], run: Callable[[Options], int | None]) -> int:
    """The exit status of a script that has the process to itself; its options are the fields of `kind`."""
    import tyro

    return run_process(lambda: exit_status_of(lambda: run(tyro.cli(kind, prog=name))), name)


def _open_streams() -> None:
    """Give a process without standard streams some on /dev/null, so that no file it opens gets their
    descriptors, and let the others write every character."""
    while (file := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(file, True)
    os.close(file)
    for name, file in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, os.fdopen(file, "w", encoding="utf-8", closefd=False))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _drop_output() -> None:
    """Redirect streams that cannot be written to /dev/null, so that their buffers raise no error at exit."""
    for stream, file in ((sys.stdout, 1), (sys.stderr, 2)):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, file)
            os.close(nowhere)
