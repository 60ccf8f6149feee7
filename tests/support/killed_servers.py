"""A server of video jobs in a process of its own, which a test can kill: a fork of one that has imported its
packages, since that takes seconds."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from support.forking_process import ROOT, ForkingProcess

# each line that it reads is the job directory of a server; it answers with the process, then with its address
FORKING = """
import gc, os, signal, sys
import support.models, support.video_api_app, torch, transformers.models.umt5.modeling_umt5
from support.killed_servers import serve

torch.set_num_threads(1)
gc.freeze()  # a fork looks at none of what it inherited, which takes seconds
for line in sys.stdin:
    child = os.fork()
    if not child:
        serve(line.rstrip())
        os._exit(0)
    print(child, flush=True)
    os.waitpid(child, 0)
"""


def serve(directory: str) -> None:
    """Serve the jobs of a directory, until the process is killed."""
    from support.models import small_pipeline
    from support.video_api_app import video_server

    with video_server(small_pipeline(), Path(directory)) as server:
        os.write(1, f"{server.url}\n".encode())
        signal.pause()


class KilledServers:
    """Runs one server at a time."""

    def __init__(self) -> None:
        self._forking = ForkingProcess(FORKING, PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")
        self._process = 0

    def __enter__(self) -> KilledServers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process:
            self.kill()
        self._forking.close()

    def start(self, directory: Path) -> str:
        """The address of a new server."""
        self._forking.write(str(directory))
        self._process = int(self._forking.read_line())
        return self._forking.read_line()

    def kill(self) -> None:
        """End it at once, wherever it is; it gets no signal that it could see."""
        os.kill(self._process, signal.SIGKILL)
        self._process = 0
