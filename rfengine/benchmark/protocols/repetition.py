"""Whether a stream is the same bit for bit when it is made again: in the same process, and in another."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from rfengine.benchmark.protocols.fresh_process import Task, first_chunks, kept_chunks, run_fresh
from rfengine.benchmark.protocols.protocol import Figures, Trial
from rfengine.benchmark.timing import recorded_chunks

REPLAYED_CHUNKS = 2  # beyond the first replay of a graph
IN_ONE_PROCESS, IN_TWO_PROCESSES = "in_one_process", "in_two_processes"


@dataclass(frozen=True, slots=True)
class Difference:
    """Where two runs first differ: what ("latents" or "frames"), in which chunk, how many of its values, and
    by how much at most; None where one of them is not a number."""

    what: str
    chunk: int
    values: int
    of_values: int
    largest: float | None


def first_difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Difference | None:
    """The first difference of two runs of first_chunks, in the order they were made; None where every bit is
    the same."""
    for name, ours in one.items():
        theirs, (what, chunk) = other[name], name.split()
        differs = (_bits(ours) != _bits(theirs)).reshape(ours.numel(), -1).any(dim=1)
        if count := int(differs.sum()):
            apart = (ours.double() - theirs.double()).abs().max()
            largest = float(apart) if apart.isfinite() else None
            return Difference(what, int(chunk), count, ours.numel(), largest)
    return None


def _bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)


def measure_repetition(trial: Trial) -> Figures:
    """The same seed twice in this process and once in another, until graphs have been replayed."""
    chunks = recorded_chunks(trial.engine.pipeline.config.cache) + REPLAYED_CHUNKS
    first, again = (first_chunks(trial.engine, chunks) for _ in range(2))
    ops = trial.engine.pipeline.model.ops.choice
    trial.release()
    with tempfile.TemporaryDirectory() as folder:
        marks = run_fresh(Task(trial.setting, chunks=chunks), Path(folder))
        elsewhere = kept_chunks(Path(folder))
    return {
        "compared_chunks": chunks,
        IN_ONE_PROCESS: _words(first_difference(first, again)),
        IN_TWO_PROCESSES: _words(first_difference(first, elsewhere)),
        "other_ops": sorted(name for name, backend in ops.items() if marks["ops"][name] != backend),
    }


def differs(figures: Figures) -> bool:
    """Whether figures of a protocol, if they are of measure_repetition, name a difference."""
    pairs = (figures.get(name) for name in (IN_ONE_PROCESS, IN_TWO_PROCESSES))
    return any(pair is not None and not pair["equal"] for pair in pairs)


def _words(difference: Difference | None) -> dict[str, object]:
    return {"equal": difference is None, "difference": difference and asdict(difference)}
