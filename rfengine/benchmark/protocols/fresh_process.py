"""A process that has done nothing yet, which loads an engine and makes a clip or the chunks of a stream.

`python -m rfengine.benchmark.protocols.fresh_process FOLDER` reads the Task that `run_fresh` left there. Its
marks are times of time.monotonic, which all processes of a machine share on Linux.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rfengine.benchmark.measured_engine import PROMPT, SEED, MeasuredEngine
from rfengine.benchmark.protocols.protocol import Setting

TASK_FILE, MARKS_FILE, TENSORS_FILE = "task.pickle", "marks.json", "tensors.safetensors"
_ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Task:
    """What the process does: a clip of `frames` frames, or the first `chunks` chunks of a stream."""

    setting: Setting
    frames: int | None = None
    chunks: int | None = None


def run_fresh(task: Task, folder: Path, variables: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The marks of a process that did `task` under these environment variables, and its ops' backends.

    Chunks are left in TENSORS_FILE in `folder`. Raises RuntimeError with the last words of one that failed.
    """
    (folder / TASK_FILE).write_bytes(pickle.dumps(task))
    paths = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(folder)],
        env=os.environ | {"PYTHONPATH": paths} | (variables or {}), capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode != 0:
        last = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise RuntimeError(f"the process that was to load the model anew failed: {last}")
    return json.loads((folder / MARKS_FILE).read_text())


def first_chunks(engine: MeasuredEngine, chunks: int) -> dict[str, Tensor]:
    """Latents and frames of the first chunks of a new stream, on the host, by what they are and the chunk."""
    stream, made = engine.stream(), {}
    for chunk in stream.take(chunks):
        made[f"latents {chunk.index}"] = stream.latents.to("cpu", copy=True).contiguous()
        made[f"frames {chunk.index}"] = torch.from_numpy(chunk.frames.copy())
    return made


def kept_chunks(folder: Path) -> dict[str, Tensor]:
    """What a process left of its first chunks."""
    return load_file(folder / TENSORS_FILE)


def main() -> None:
    marks, folder = {"imported": time.monotonic()}, Path(sys.argv[1])
    task = pickle.loads((folder / TASK_FILE).read_bytes())
    if task.setting.options.threads is not None:
        torch.set_num_threads(task.setting.options.threads)
    engine = task.setting.load()
    marks["loaded"] = time.monotonic()
    if task.chunks is not None:
        save_file(first_chunks(engine, task.chunks), folder / TENSORS_FILE)
    else:
        size = {"height": engine.grid.height, "width": engine.grid.width}

        def mark(_: object) -> None:
            marks.setdefault("first_frame", time.monotonic())

        engine.pipeline.generate(PROMPT, num_frames=task.frames, seed=SEED, on_chunk=mark, **size)
        marks["made"] = time.monotonic()
    (folder / MARKS_FILE).write_text(json.dumps(marks | {"ops": engine.pipeline.model.ops.choice}))


if __name__ == "__main__":
    main()
