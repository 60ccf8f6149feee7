"""Checkpoints of a training: one directory each, complete or not there at all, in safetensors files.

Every rank of the first copy of the weights writes a file of the shards it holds, in the background, beside
the final name, and the directory is renamed when all have finished, so a run that is killed while it saves
has the one before. Another number of ranks can read it, shared out in another way: each reads its own rows
alone. Its record, run.json, states what run it is of and the sha256 of each of its files.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from rfengine.checkpoint.loader import save_weights
from rfengine.checkpoint.tensor_file import StoredTensor, open_safetensors
from rfengine.files import appears, file_sha256, json_object, locked, read_text, write_text
from rfengine.training.config import SEEN_S
from rfengine.training.parallel import Ranks
from rfengine.training.shares import is_first_replica, joined, placed_like, put
from rfengine.training.stages import TrainingStage

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step_(\d{8})")
_LOCK_FILE = ".training.lock"
_RECORD_FILE = "run.json"
_FORMAT = 3
_LIMIT_BYTES = 10_000_000
_LOOK_S = 0.2


class TrainState:
    """What one run hands to the next: models, their optimizers and moving averages, and the step.

    Random draws are keyed by the step (see stages.py), so no generator is kept.
    """

    def __init__(self, stage: TrainingStage) -> None:
        self.stage, self.step = stage, 0

    def weights(self) -> dict[str, Tensor]:
        """The weights of the models and of the averages by name, by reference."""
        values = {
            f"weights.{name}.{key}": value
            for name, model in self.stage.models.items()
            for key, value in model.state_dict().items()
        }
        return values | {
            f"average.{name}.{key}": value
            for name, average in self.stage.averages.items()
            for key, value in average.values.items()
        }

    def moments(self) -> dict[str, Tensor]:
        """The moments of the optimizers by name, by reference; there are none before the first update."""
        return {
            f"moments.{name}.{number}.{row}.{key}": value
            for name, optimizers in self.stage.optimizers.items()
            for number, optimizer in enumerate(optimizers)
            for row, values in optimizer.state_dict()["state"].items()
            for key, value in values.items()
        }

    @torch.no_grad()
    def take(self, step: int, shards: Mapping[str, Sequence[StoredTensor]]) -> None:
        """Put what was read into the models, the averages and the optimizers, in place.

        shards: of each tensor, along its first axis. Raises ValueError, LookupError or RuntimeError for
        tensors that are not those of this state, parts of which may be filled then.
        """
        for name, value in self.weights().items():
            put(value, joined(shards[name]))
        states: dict[tuple[str, int], dict[int, dict[str, Tensor]]] = {}
        for full_name, parts in shards.items():
            if full_name.startswith("moments."):
                _, name, number, row, key = full_name.split(".")
                parameter = _parameters(self.stage.optimizers[name][int(number)])[int(row)]
                rows = states.setdefault((name, int(number)), {})
                rows.setdefault(int(row), {})[key] = placed_like(parameter, joined(parts))
        for name, optimizers in self.stage.optimizers.items():
            for number, optimizer in enumerate(optimizers):
                groups = optimizer.state_dict()["param_groups"]
                state = states.get((name, number), {})
                optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.step = step


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for group in optimizer.param_groups for value in group["params"]]


def _own_shards(values: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Copies on the CPU of what this rank has to write: its shares, if it is in the first replica, and on
    the first rank what every rank has."""
    shards = {}
    for name, value in values.items():
        own = value.to_local() if isinstance(value, DTensor) else value
        writes = is_first_replica(value) if isinstance(value, DTensor) else rank == 0
        if writes and own.numel():
            shards[name] = own.detach().to("cpu", copy=True)
    return shards


def _save_shards(file: Path, shards: Mapping[str, Tensor]) -> dict[str, str]:
    """Write one rank's file; its name and sha256, and nothing for a rank that has nothing to write."""
    if not shards:
        return {}
    save_weights(file, shards)
    return {file.name: file_sha256(file)}


def finished_checkpoints(run: Path) -> list[Path]:
    """The checkpoints that were finished in the directory of a run, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("step_*") if _NAME.fullmatch(path.name))


def check_same_checkpoints(run: Path, ranks: Ranks) -> None:
    """Wait until every rank sees the finished checkpoints that the first one sees, which may take a while
    after another node has written one. Raises ValueError on every rank where one never does."""
    first = ranks.gathered([path.name for path in finished_checkpoints(run)])[0]
    deadline = time.monotonic() + SEEN_S
    while (own := [path.name for path in finished_checkpoints(run)]) != first:
        if time.monotonic() >= deadline:
            break
        time.sleep(_LOOK_S)
    for rank, names in enumerate(ranks.gathered(own, patient=True)):
        if names != first:
            raise ValueError(
                f"rank {rank} sees the checkpoints {names} in {run} and rank 0 {first}; give a directory "
                "that all nodes share"
            )


class TrainingCheckpoints:
    """The checkpoints of one run, in `directory`/checkpoints.

    identity: JSON values that a checkpoint must have been made with to be resumed from.
    """

    def __init__(self, directory: Path, identity: Mapping[str, Any], keep: int) -> None:
        self.path = directory / "checkpoints"
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))
        self.keep, self.ranks = keep, Ranks()
        self._writer = ThreadPoolExecutor(max_workers=1)
        self._saving: tuple[Future[dict[str, str]], Path] | None = None

    def complete(self) -> list[Path]:
        """The checkpoints that were finished, oldest first; reading may still find one damaged."""
        return finished_checkpoints(self.path.parent)

    def save(self, state: TrainState, wait: bool = False) -> None:
        """Begin to save; the one before is finished first. With `wait` it is complete on return.

        Raises OSError when the disk is full or cannot be written: earlier checkpoints are untouched.
        """
        self.finish()
        final = self.path / f"step_{state.step:08d}"
        partial, rank = final.with_suffix(".partial"), self.ranks.rank
        # the first alone looks: another node may not see yet what it has just renamed
        is_there, failure = self.ranks.gathered(_begun(final, partial) if rank == 0 else (False, ""))[0]
        if failure:
            raise OSError(_unwritten(final, failure))
        if is_there:
            return
        shards = _own_shards(state.weights() | state.moments(), rank)
        file = partial / f"rank_{rank:05d}.safetensors"
        self._saving = self._writer.submit(_save_shards, file, shards), final
        if wait:
            self.finish()

    def finish_if_written(self) -> None:
        """Give the save in the background its name once all ranks have written theirs, without a wait: a run
        that dies after that goes on from it."""
        if self._saving is not None and not self.ranks.agreed("" if self._saving[0].done() else "writing"):
            self.finish()

    def finish(self) -> None:
        """Wait for the save in the background and give it its name."""
        if self._saving is None:
            return
        (saving, final), self._saving = self._saving, None
        files, failure = {}, ""
        try:
            files = saving.result()
        except (OSError, RuntimeError, ValueError) as error:
            failure = str(error)
        parts = self.ranks.gathered((files, failure), patient=True)
        failure = next((failure for _, failure in parts if failure), "")
        if self.ranks.rank == 0:
            record = {name: digest for files, _ in parts for name, digest in files.items()}
            failure = failure or self._give_name(final, record)
            if failure:
                shutil.rmtree(final.with_suffix(".partial"), ignore_errors=True)
        if failure := self.ranks.agreed(failure):
            raise OSError(_unwritten(final, failure))

    def _give_name(self, final: Path, files: Mapping[str, str]) -> str:
        """Write the record of a checkpoint whose files are written, and rename it; why that failed, else
        "". Older ones go; what cannot be removed now is tried again with the next."""
        partial = final.with_suffix(".partial")
        try:
            _write_record(partial, self.identity, files)
            partial.rename(final)
        except OSError as error:
            return str(error)
        for path in self.complete()[: -self.keep]:
            shutil.rmtree(path, ignore_errors=True)
        return ""

    def restore(self, state: TrainState) -> bool:
        """Resume from the newest checkpoint that is whole; False where there is none at all.

        A damaged one is reported in a warning and set aside, under its name with `.damaged`; what a run that
        was killed while it saved has left goes.
        Raises ValueError when none is whole, or when one is of another recipe.
        """
        if self.ranks.rank == 0:
            for path in self.path.glob("step_*.partial"):
                shutil.rmtree(path, ignore_errors=True)
        damaged: list[tuple[Path, str]] = []
        for name in reversed(self.ranks.gathered([path.name for path in self.complete()])[0]):
            path = self.path / name
            problem = self._take(path, state)
            if not problem:
                self._set_aside(damaged, path)
                return True
            damaged.append((path, problem))
        if damaged:
            path, problem = damaged[0]
            raise ValueError(
                f"none of the {len(damaged)} checkpoints in {self.path} is whole: of {path.name}, {problem}; "
                "start again in another directory"
            )
        return False

    def _take(self, path: Path, state: TrainState) -> str:
        """Read a checkpoint into `state`; what is wrong with one that is damaged, else "".

        Raises ValueError for one of another recipe.
        """
        found = self._examine(path) if self.ranks.rank == 0 else ([], "", "")
        files, problem, refusal = self.ranks.gathered(found)[0]
        if refusal:
            raise ValueError(refusal)
        if not problem:
            problem = self.ranks.agreed(
                _damage(path, files[self.ranks.rank :: self.ranks.count]), patient=True
            )
        if problem:
            return problem
        shards: dict[str, list[StoredTensor]] = {}
        try:
            for name, _ in files:
                for key, tensor in open_safetensors(path / name).items():
                    shards.setdefault(key, []).append(tensor)
            state.take(int(path.name.removeprefix("step_")), shards)
        except torch.OutOfMemoryError:  # which says nothing of the files
            raise
        except (OSError, RuntimeError, ValueError, LookupError) as error:
            problem = f"it cannot be read ({error})"
        return self.ranks.agreed(problem, patient=True)

    def _examine(self, path: Path) -> tuple[list[tuple[str, str]], str, str]:
        """The files of a checkpoint with their sha256, what is damaged of its record, and why it is not of
        this run; "" for nothing."""
        try:
            found, files = _read_record(path)
        except ValueError as error:
            return [], str(error), ""
        if found == self.identity:
            return sorted(files.items()), "", ""
        name, made, wanted = first_difference("", found, self.identity)
        refusal = (
            f"{path} was made with {name} {made!r}, this run has {wanted!r}; resume with the recipe it was "
            "made with, or choose another directory"
        )
        return [], "", refusal

    def _set_aside(self, damaged: list[tuple[Path, str]], taken: Path) -> None:
        if self.ranks.rank == 0:
            for path, problem in damaged:
                logger.warning(
                    "checkpoint %s is damaged: %s; %s is taken, and the damaged one is kept as %s.damaged",
                    path, problem, taken.name, path.name,
                )  # fmt: skip
                aside = path.with_suffix(".damaged")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
        self.ranks.meet()


@contextmanager
def locked_run(directory: Path, wait_s: float = 0.0) -> Iterator[None]:
    """Keep other trainings out of `directory`, which is made and goes if nothing was written, during the
    block.

    Under several ranks the first one holds it. wait_s: how long to wait for another to let go. Raises
    RuntimeError on every rank at once where another training runs there and where the first cannot write
    there; where a rank does not see the directory of the first, after the time that another node may need.
    """
    ranks, refusal, lock = Ranks(), "", directory / _LOCK_FILE
    with ExitStack() as stack:
        if ranks.rank == 0:
            try:
                if not directory.exists():
                    directory.mkdir(parents=True, exist_ok=True)
                    stack.callback(_remove_empty, directory)
                stack.enter_context(locked(lock, f"training in {directory}", wait_s))
            except (RuntimeError, OSError) as error:
                refusal = str(error)
        if refusal := ranks.agreed(refusal, patient=True):
            raise RuntimeError(refusal)
        seen = ranks.gathered(appears(lock, SEEN_S), patient=True)
        blind = [str(rank) for rank, sees in enumerate(seen) if not sees]
        if blind:
            raise RuntimeError(
                f"{directory.absolute()} of rank 0 is not there on rank {', '.join(blind)}; give a directory "
                "that all nodes share"
            )
        yield


def _remove_empty(directory: Path) -> None:
    with suppress(OSError):  # the run has left something in it
        directory.rmdir()


def _begun(final: Path, partial: Path) -> tuple[bool, str]:
    """Whether a checkpoint is there already, and why an empty directory for it cannot be made, else ""."""
    if final.exists():
        return True, ""
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        return False, str(error)
    return False, ""


def _unwritten(final: Path, failure: str) -> str:
    return f"checkpoint {final} was not written ({failure}); earlier ones are whole: make room and resume"


def _write_record(directory: Path, identity: Mapping[str, Any], files: Mapping[str, str]) -> None:
    """Write the record of `files`, name to sha256, in `directory`. identity: JSON values. Raises OSError."""
    content = {"format": _FORMAT, "identity": dict(identity), "files": dict(files)}
    write_text(directory / _RECORD_FILE, json.dumps(content | {"sha256": _digest(content)}, indent=1) + "\n")


def first_difference(name: str, one: Any, other: Any) -> tuple[str, Any, Any]:
    """The dotted name of the first value in which two tables differ, and both values; None for none."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return name, one, other
    keys = sorted({*one, *other})
    key = next(key for key in keys if (key in one) != (key in other) or one[key] != other[key])
    return first_difference(f"{name}.{key}".lstrip("."), one.get(key), other.get(key))


def _read_record(directory: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The identity of a checkpoint and the sha256 of its files by name. Raises ValueError where the record is
    absent, changed or not readable."""
    path = directory / _RECORD_FILE
    try:
        content = json_object(read_text(path, _LIMIT_BYTES), path)
    except ValueError as error:
        raise ValueError(f"its {_RECORD_FILE} cannot be read") from error
    stated = content.pop("sha256", None)
    if stated != _digest(content):
        raise ValueError(f"its {_RECORD_FILE} is damaged")
    if content.get("format") != _FORMAT:
        raise ValueError(f"its {_RECORD_FILE} has format {content.get('format')}, and {_FORMAT} is read")
    return content["identity"], content["files"]


def _damage(directory: Path, files: Sequence[tuple[str, str]]) -> str:
    """What is wrong with the first of these files, names with their sha256, that is not what was written;
    "" for nothing."""
    for name, digest in files:
        try:
            problem = "" if file_sha256(directory / name) == digest else "is not what was written"
        except FileNotFoundError:
            problem = "is absent"
        except (OSError, ValueError) as error:
            problem = f"cannot be read ({error})"
        if problem:
            return f"its file {name} {problem}"
    return ""


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
