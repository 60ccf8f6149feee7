"""The command in processes of its own, forked from one that has imported its packages: that takes seconds."""

from __future__ import annotations

import json
from pathlib import Path

from support.forking_process import ForkingProcess

# each line that it reads is a directory and the arguments of a command, which leaves its output there
FORKING = """
import gc, json, os, sys
import rfengine.cli.commands, rfengine.cli.generate, transformers.models.umt5.modeling_umt5
from rfengine.cli import main

gc.freeze()  # a fork that ends looks at none of what it inherited, which takes seconds
for line in sys.stdin:
    child = os.fork()
    if not child:
        directory, *sys.argv[1:] = json.loads(line)
        os.chdir(directory)
        for number, name in enumerate(("stdout", "stderr"), 1):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
        sys.exit(main())
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class CommandForks:
    """Runs one command at a time, on a terminal that has only the letters of ASCII."""

    def __init__(self) -> None:
        self._forking = ForkingProcess(FORKING, PYTHONIOENCODING="ascii")
        self._directory = Path()

    def __enter__(self) -> CommandForks:
        return self

    def __exit__(self, *_: object) -> None:
        self._forking.close()

    def start(self, directory: Path, *arguments: str) -> int:
        """The number of the process, which runs in `directory`."""
        self._directory = directory
        self._forking.write(json.dumps([str(directory), *arguments]))
        return int(self._forking.read_line())

    def has_ended(self) -> bool:
        return self._forking.has_line()

    def status(self) -> int:
        """Wait for the end of the process."""
        return int(self._forking.read_line())

    def errors(self) -> str:
        """Without nanobind's last words, which are of what gc.freeze keeps."""
        return (self._directory / "stderr").read_text().partition("nanobind: ")[0]
