"""Checkpoints of a training: one directory each, complete or not there at all, read without running code.

A checkpoint is written beside its final name by torch.distributed.checkpoint, in the background, and renamed
when every rank has finished, so a run that is killed while it saves has the one before. Another number of
ranks can read it. Its record, run.json, states what run it is of and the sha256 of each of its files.

torch.distributed.checkpoint keeps an index (`.metadata`) and small values as pickles and loads them as such.
Here the index may name the classes of an index alone, and values go through torch's weights_only reader.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import pickle
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
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from rfengine.files import file_sha256, json_object, locked, open_regular, read_text, write_text
from rfengine.training.learner import WeightAverage
from rfengine.training.parallel import Ranks

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step_(\d{8})")
_LOCK_FILE = ".training.lock"
_RECORD_FILE = "run.json"
_FORMAT = 2
_LIMIT_BYTES = 10_000_000
_INDEX = ".metadata"
_INDEX_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
_INDEX_NAMES = {
    ("torch", "Size"), ("torch", "device"), ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"), ("builtins", "set"), ("pathlib", "PosixPath"),
}  # fmt: skip
# what damaged content makes the reader raise
_DAMAGE = (
    CheckpointException, pickle.UnpicklingError, RuntimeError, ValueError, LookupError, TypeError, EOFError,
    AttributeError, OSError, AssertionError, ImportError, MemoryError,
)  # fmt: skip


class TrainState:
    """What one run hands to the next: models, their optimizers and moving averages, and the step.

    Random draws are keyed by the step (see stages.py), so no generator is kept.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        optimizers: Mapping[str, Sequence[torch.optim.Optimizer]],
        averages: Mapping[str, WeightAverage],
    ) -> None:
        self.models, self.optimizers, self.averages = dict(models), dict(optimizers), dict(averages)
        self.step = 0
        self.tensors()  # moments exist from the start, whether a run saves before its first update or not

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
    """The checkpoints of one run, in `directory`/checkpoints.

    identity: JSON values that a checkpoint must have been made with to be resumed from.
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
        if Ranks().rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            self.path.mkdir(parents=True, exist_ok=True)
        Ranks().meet()
        alone, group = self._group is None, self._group
        saving = checkpoint.async_save(
            state.tensors(), checkpoint_id=partial, no_dist=alone, process_group=group
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
            if Ranks().rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise OSError(
                f"checkpoint {final} was not written ({_first_cause(error)}); earlier ones are whole: make "
                "room and resume"
            ) from error
        if Ranks().rank == 0:
            _write_record(partial, self.identity)
            partial.rename(final)
            for path in self.complete()[: -self.keep]:
                shutil.rmtree(path)
        Ranks().meet()

    def restore(self, state: TrainState) -> bool:
        """Resume from the newest checkpoint that is whole; False where there is none at all.

        A damaged one is reported in a warning and set aside, under its name with `.damaged`.
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
        found: list[ValueError | None] = [None]
        if Ranks().rank == 0:
            try:
                self._check(path)
            except ValueError as error:
                found = [error]
        if distributed.is_initialized():
            distributed.broadcast_object_list(found, src=0, group=self._group)
        try:
            if found[0] is not None:
                raise found[0]
            tree = state.tensors()
            read_checkpoint(tree, path)
        except DamagedCheckpointError as error:
            return str(error)
        state.take(tree)
        return ""

    def _check(self, path: Path) -> None:
        """Raises DamagedCheckpointError for a damaged checkpoint, ValueError for one that is not of this
        run."""
        found = _check_record(path)
        for name in sorted({*found, *self.identity}):
            if found.get(name) != self.identity.get(name):
                raise ValueError(
                    f"{path} was made with {name} {found.get(name)!r}, this run has "
                    f"{self.identity.get(name)!r}; resume with the recipe it was made with, or choose "
                    "another directory"
                )

    def _set_aside(self, damaged: list[tuple[Path, str]], taken: Path) -> None:
        if Ranks().rank == 0:
            for path, problem in damaged:
                logger.warning(
                    "checkpoint %s is damaged: %s; %s is taken, and the damaged one is kept as %s.damaged",
                    path, problem, taken.name, path.name,
                )  # fmt: skip
                aside = path.with_suffix(".damaged")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
        Ranks().meet()


@contextmanager
def locked_run(directory: Path) -> Iterator[None]:
    """Keep other trainings out of `directory`, which is made and goes if nothing was written, during the
    block.

    Raises RuntimeError at once where another training runs there. Under several ranks the first one holds it.
    """
    if Ranks().rank:
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


class DamagedCheckpointError(ValueError):
    """A checkpoint that is not whole; the message says what is wrong with it."""


def _write_record(directory: Path, identity: Mapping[str, Any]) -> None:
    """Write the record of the files in `directory`. identity: JSON values. Raises OSError."""
    files = {
        path.name: file_sha256(path) for path in sorted(directory.iterdir()) if path.name != _RECORD_FILE
    }
    content = {"format": _FORMAT, "identity": dict(identity), "files": files}
    write_text(directory / _RECORD_FILE, json.dumps(content | {"sha256": _digest(content)}, indent=1) + "\n")


def _check_record(directory: Path) -> dict[str, Any]:
    """Compare every file of a checkpoint with its record, and return the identity.

    Raises DamagedCheckpointError where anything is absent, changed or not readable.
    """
    path = directory / _RECORD_FILE
    try:
        content = json_object(read_text(path, _LIMIT_BYTES), path)
    except ValueError as error:
        raise DamagedCheckpointError(f"its {_RECORD_FILE} cannot be read") from error
    stated = content.pop("sha256", None)
    if content.get("format") != _FORMAT or stated != _digest(content):
        raise DamagedCheckpointError(f"its {_RECORD_FILE} is damaged")
    for name, digest in content["files"].items():
        try:
            problem = "" if file_sha256(directory / name) == digest else "is not what was written"
        except FileNotFoundError:
            problem = "is absent"
        except (OSError, ValueError) as error:
            problem = f"cannot be read ({error})"
        if problem:
            raise DamagedCheckpointError(f"its file {name} {problem}")
    return content["identity"]


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_checkpoint(tree: dict[str, Any], directory: Path) -> None:
    """Fill `tree` in place, as torch.distributed.checkpoint.load does.

    Raises DamagedCheckpointError, on every rank, where the checkpoint cannot be read; parts of `tree` may be
    filled then.
    """
    try:
        checkpoint.load(
            tree,
            storage_reader=_Reader(directory),
            planner=_Planner(),
            no_dist=not distributed.is_initialized(),
        )
    except _DAMAGE as error:
        raise DamagedCheckpointError(f"it cannot be read ({_first_cause(error)})") from error


def _first_cause(error: BaseException) -> str:
    """The first line of what went wrong underneath, on the first rank that failed."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        plain = "." not in name
        dtype = module == "torch" and plain and isinstance(vars(torch).get(name), torch.dtype)
        if plain and (module in _INDEX_MODULES or (module, name) in _INDEX_NAMES or dtype):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{_INDEX} names {module}.{name}, which is no part of an index")


class _Reader(FileSystemReader):
    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._index = directory / _INDEX

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open_regular(self._index) as file:
            metadata = _IndexUnpickler(file).load()
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, Mapping):
            raise pickle.UnpicklingError(f"{_INDEX} holds no index")
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        for name in {str(info.relative_path) for info in metadata.storage_data.values()}:
            if Path(name).name != name:
                raise pickle.UnpicklingError(f"{_INDEX} names {name}, which lies elsewhere")
            open_regular(self._index.with_name(name)).close()  # a pipe would be waited for
        return metadata


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        checked = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), checked)
        checked.seek(0)
        super().load_bytes(read_item, checked)
