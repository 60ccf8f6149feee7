"""The command line: one module for each command, its options a dataclass, each error one sentence.

Importing it takes a few milliseconds, so that a signal to stop meets its handler from the start.
"""

from __future__ import annotations

from rfengine.cli.exit_status import CALLER_ERROR, INTERRUPTED, OTHER_ERROR
from rfengine.stop_signals import stops_end_it_at_once

TYPE_CHECKING = False  # as typing has it, which takes longer to import than all of this
if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["CALLER_ERROR", "INTERRUPTED", "OTHER_ERROR", "main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 1 for a failure, 2 for wrong input, 130 after Ctrl-C.

    Without arguments those of the process are taken, and the process is the command's own.
    """
    if arguments is None:
        stops_end_it_at_once(b"rfengine: error: interrupted; nothing was written\n", INTERRUPTED)
        from rfengine.cli.process import run_process

        return run_process(_run_in_own_process, "rfengine")
    from rfengine.cli.commands import run_command

    return run_command(arguments)


def _run_in_own_process() -> int:
    from rfengine.cli.commands import run_command  # torch and others with it, which takes a second or more

    return run_command(None)
