"""Saving and restoring a training: one directory a checkpoint, complete or not there at all.

A checkpoint is written beside its final name by torch.distributed.checkpoint, in the background, and renamed
when every rank has finished, so a run that is killed while it saves has the one before. It can be read by
another number of ranks.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
import torch.distributed.checkpoint as checkpoint
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from rfengine.files import locked
from rfengine.training.checkpoint_reader import first_cause, read_checkpoint
from rfengine.training.checkpoint_record import DamagedCheckpointError, check_record, write_record
from rfengine.training.weight_average import WeightAverage

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step_(\d{8})")
_LOCK_FILE = ".training.lock"


class TrainState:
    """What goes on from one run to the next: models, their optimizers and moving averages, and the step.

    Random draws are keyed by the step (see stages.py), so no generator has to be kept.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        optimizers: Mapping[str, Sequence[torch.optim.Optimizer]],
        averages: Mapping[str, WeightAverage],
    ) -> None:
        self.models, self.optimizers, self.averages = dict(models), dict(optimizers), dict(averages)
        self.step = 0
        self.tensors()  # moments are there from the start, whether a run saves before its first update or not

    def tensors(self) -> dict[str, Any]:
        """A tree of tensors and numbers that torch.distributed.checkpoint takes, by reference."""
        tree: dict[str, Any] = {"step": self.step}
        for name, model in self.models.items():
            weights, moments = get_state_dict(model, self.optimizers[name])
            tree[name] = {"weights": weights, "optimizer": moments}
        for name, average in self.averages.items():
            tree[f"{name}_average"] = dict(average.values)
        return tree

    def take(self, tree: Mapping[str, Any]) -> None:
        """Put a tree that was read into the models, the optimizers and the averages."""
        self.step = int(tree["step"])
        for name, model in self.models.items():
            set_state_dict(
                model,
                self.optimizers[name],
                model_state_dict=tree[name]["weights"],
                optim_state_dict=tree[name]["optimizer"],
            )
        for name, average in self.averages.items():
            average.load(tree[f"{name}_average"])


class CheckpointDirectory:
    """The checkpoints of one run, in `directory`/checkpoints, and what run they are of.

    identity: what a checkpoint must have been made with to be gone on from, as JSON values.
    """

    def __init__(self, directory: Path, identity: Mapping[str, Any], keep: int) -> None:
        self.path = directory / "checkpoints"
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))
        self.keep = keep
        # torch warns at each save and load of a run of one process that it takes it for one
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        self._saving: tuple[Future, Path] | None = None
        # ranks talk while they save, beside the training: in a group of their own, or the two would mix
        self._group = distributed.new_group(backend="gloo") if distributed.is_initialized() else None

    def complete(self) -> list[Path]:
        """The checkpoints that were finished, oldest first; reading may still find one damaged."""
        return sorted(path for path in self.path.glob("step_*") if _NAME.fullmatch(path.name))

    def save(self, state: TrainState, wait: bool = False) -> None:
        """Begin to save; the one before is finished first. With `wait` it is complete on return.

        Raises OSError when the disk is full or cannot be written: earlier checkpoints are untouched.
        """
        self.finish()
        final = self.path / f"step_{state.step:08d}"
        if final.exists():
            return
        partial = final.with_suffix(".partial")
        if _is_first():
            shutil.rmtree(partial, ignore_errors=True)
            self.path.mkdir(parents=True, exist_ok=True)
        _meet()
        alone = not distributed.is_initialized()
        saving = checkpoint.async_save(
            state.tensors(), checkpoint_id=partial, no_dist=alone, process_group=self._group
        )
        self._saving = (saving, final)
        if wait:
            self.finish()

    def finish(self) -> None:
        """Wait for the save in the background and give it its name."""
        if self._saving is None:
            return
        (saving, final), self._saving = self._saving, None
        partial = final.with_suffix(".partial")
        try:
            saving.result()
        except (OSError, RuntimeError, CheckpointException) as error:
            if _is_first():
                shutil.rmtree(partial, ignore_errors=True)
            raise OSError(
                f"checkpoint {final} was not written ({first_cause(error)}); earlier ones are whole: make "
                "room and resume"
            ) from error
        if _is_first():
            write_record(partial, self.identity)
            partial.rename(final)
            for path in self.complete()[: -self.keep]:
                shutil.rmtree(path)
        _meet()

    def restore(self, state: TrainState) -> bool:
        """Go on from the newest checkpoint that is whole; False where there is none at all.

        A damaged one is told in a warning and set aside, under its name with `.damaged`.
        Raises ValueError when none is whole, or when one is of another recipe.
        """
        damaged: list[tuple[Path, str]] = []
        for path in reversed(self.complete()):
            problem = self._take(path, state)
            if not problem:
                self._set_aside(damaged, path)
                return True
            damaged.append((path, problem))
        if damaged:
            path, problem = damaged[0]
            raise ValueError(
                f"none of the {len(damaged)} checkpoints in {self.path} is whole: of {path.name}, {problem}; "
                "begin anew in another directory"
            )
        return False

    def _take(self, path: Path, state: TrainState) -> str:
        """Read a checkpoint into `state`; what is wrong with one that is damaged, else ""."""
        problem, refusal = self._from_first(self._examine(path) if _is_first() else ("", ""))
        if refusal:
            raise ValueError(refusal)
        if problem:
            return problem
        tree = state.tensors()
        try:
            read_checkpoint(tree, path)
        except DamagedCheckpointError as error:
            return str(error)
        state.take(tree)
        return ""

    def _examine(self, path: Path) -> tuple[str, str]:
        """What is damaged, and why a checkpoint that is whole is not of this run; "" for nothing."""
        try:
            found = check_record(path)
        except DamagedCheckpointError as error:
            return str(error), ""
        differing = sorted(
            name for name in {*found, *self.identity} if found.get(name) != self.identity.get(name)
        )
        if not differing:
            return "", ""
        name = differing[0]
        return "", (
            f"{path} was made with {name} {found.get(name)!r}, this run has {self.identity.get(name)!r}; "
            "resume with the recipe it was made with, or choose another directory"
        )

    def _from_first(self, found: tuple[str, str]) -> tuple[str, str]:
        """What the first rank found, on every rank."""
        if not distributed.is_initialized():
            return found
        told = [found]
        distributed.broadcast_object_list(told, src=0, group=self._group)
        return told[0]

    def _set_aside(self, damaged: list[tuple[Path, str]], taken: Path) -> None:
        if _is_first():
            for path, problem in damaged:
                logger.warning(
                    "checkpoint %s is damaged: %s; %s is taken, and the damaged one is kept as %s.damaged",
                    path, problem, taken.name, path.name,
                )  # fmt: skip
                aside = path.with_suffix(".damaged")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
        _meet()


@contextmanager
def locked_run(directory: Path) -> Iterator[None]:
    """Keep other trainings out of `directory`, which is made and goes if nothing was written, during the
    block.

    Raises RuntimeError at once where another training runs there. Under several ranks the first one holds it.
    """
    if not _is_first():
        yield
        return
    found = directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with locked(directory / _LOCK_FILE, f"training in {directory}"):
            yield
    finally:
        if not found:
            with suppress(OSError):  # the run has left something in it
                directory.rmdir()


def _is_first() -> bool:
    return not distributed.is_initialized() or distributed.get_rank() == 0


def _meet() -> None:
    if distributed.is_initialized():
        distributed.barrier()
