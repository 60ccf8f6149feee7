"""Saving and restoring a training: one directory a checkpoint, complete or not there at all.

A checkpoint is written beside its final name by torch.distributed.checkpoint, in the background, and renamed
when every rank has finished, so a run that is killed while it saves has the one before. It can be read by
another number of ranks.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
import torch.distributed.checkpoint as checkpoint
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from rfengine.training.stage_run import WeightAverage

_NAME = re.compile(r"step_(\d{8})")
_FORMAT = 1


class TrainState:
    """What goes on from one run to the next: models, their optimizers and moving averages, and the step.

    Random draws are keyed by the step (see stages.py), so no generator has to be kept.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        optimizers: Mapping[str, torch.optim.Optimizer],
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
        self.identity = {"format": _FORMAT, **json.loads(json.dumps(identity))}
        self.keep = keep
        self._saving: tuple[Future, Path] | None = None
        # ranks talk while they save, beside the training: in a group of their own, or the two would mix
        self._group = distributed.new_group(backend="gloo") if distributed.is_initialized() else None

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        found = sorted(path for path in self.path.glob("step_*") if _NAME.fullmatch(path.name))
        return found[-1] if found else None

    def latest_step(self) -> int:
        """The step of the newest complete checkpoint; 0 where there is none."""
        newest = self.latest()
        return 0 if newest is None else int(_NAME.fullmatch(newest.name)[1])

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
                f"checkpoint {final} was not written ({_cause(error)}); earlier ones are whole: make room "
                "and resume"
            ) from error
        if _is_first():
            (partial / "run.json").write_text(json.dumps(self.identity, indent=1))
            partial.rename(final)
            for path in sorted(self.path.glob("step_????????"))[: -self.keep]:
                shutil.rmtree(path)
        _meet()

    def restore(self, state: TrainState) -> bool:
        """Go on from the newest checkpoint; False where there is none.

        Raises ValueError when it is of another recipe.
        """
        newest = self.latest()
        if newest is None:
            return False
        self._check(newest)
        tree = state.tensors()
        checkpoint.load(tree, checkpoint_id=newest, no_dist=not distributed.is_initialized())
        state.take(tree)
        return True

    def _check(self, newest: Path) -> None:
        try:
            found = json.loads((newest / "run.json").read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{newest} has no readable run.json; remove it to go on from the one before"
            ) from error
        differing = sorted(
            name for name in {*found, *self.identity} if found.get(name) != self.identity.get(name)
        )
        if differing:
            name = differing[0]
            raise ValueError(
                f"{newest} was made with {name} {found.get(name)!r}, this run has "
                f"{self.identity.get(name)!r}; resume with the recipe it was made with, or choose another "
                "directory"
            )


def _cause(error: BaseException) -> str:
    """The first line of what went wrong underneath, on the first rank that failed."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _is_first() -> bool:
    return not distributed.is_initialized() or distributed.get_rank() == 0


def _meet() -> None:
    if distributed.is_initialized():
        distributed.barrier()
