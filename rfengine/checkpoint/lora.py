"""LoRAs: which ones and at which scale, their changes in memory, and their merge when a file is written."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from rfengine.checkpoint.lora_change import LoraChange, add_changes, merged
from rfengine.checkpoint.lora_file import lora_changes, open_lora
from rfengine.checkpoint.lora_scale import CONFIG_FILE
from rfengine.checkpoint.tensor_file import StoredTensor
from rfengine.limits import Range, as_number, check_value, shown

logger = logging.getLogger(__name__)

MOST_LORAS = 64
MAX_SCALE = 1000.0
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)

Shapes = Mapping[str, tuple[int, ...]]
FileState = tuple[str, int, int, int]
# What changes each tensor, in the order in which it is added up.
ChangesByTensor = dict[str, tuple["LoadedLora", ...]]


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA to merge: a file, or the directory that PEFT or Diffusers saved it in.

    scale: of all that it adds; 0 leaves the weights as they are, and a negative one takes away.
    allow_unmatched: leave out, with a warning, keys that match nothing in the transformer. Raises ValueError
    for a scale that is no number from -1000 to 1000.
    """

    path: str | Path
    scale: float = 1.0
    allow_unmatched: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.path, str | Path) or not str(self.path) or "\0" in str(self.path):
            raise ValueError(f"the LoRA {shown(self.path)} names no file; give a path")
        check_value(f"allow_unmatched of {self.path}", self.allow_unmatched, bool)
        number = as_number(f"the scale of {self.path}", self.scale, Range(-MAX_SCALE, MAX_SCALE))
        object.__setattr__(self, "scale", number + 0.0)  # minus zero is zero

    @classmethod
    def of(cls, source: Lora | str | Path) -> Lora:
        """`source` itself, or the LoRA of that path at scale 1."""
        return source if isinstance(source, Lora) else cls(source)

    @classmethod
    def parse(cls, text: str, allow_unmatched: bool = False) -> Lora:
        """FILE or FILE:SCALE. What stands behind the last colon is the scale where it is a number.

        A path that ends so itself is given with its scale: style:2:1. Raises ValueError where such a path
        was meant without one.
        """
        path, _, number = text.rpartition(":")
        if not path or not _NUMBER.fullmatch(number):
            return cls(text, 1.0, allow_unmatched)
        if os.path.lexists(text) and not os.path.lexists(path):
            raise ValueError(
                f"{text} is a file, and what stands behind its last colon is read as a scale; give {text}:1"
            )
        return cls(path, float(number), allow_unmatched)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return Path(os.path.abspath(self.path)).name


@dataclass(frozen=True, slots=True, eq=False)
class LoadedLora:
    """A LoRA in memory.

    sha256: of what it changes and by which values, however its file writes that. changes: by the tensor of
    the transformer. path, files: the absolute path it was read from, and what tells the files there from
    others (_files_at).
    """

    lora: Lora
    sha256: str
    changes: dict[str, LoraChange]
    path: str
    files: tuple[FileState, ...]

    @property
    def nbytes(self) -> int:
        return sum(change.nbytes for change in self.changes.values())

    def is_of(self, lora: Lora) -> bool:
        """Whether it was read from the path of `lora`, where nothing is now or the same files are, under the
        same rule for keys that match nothing."""
        path = os.path.abspath(lora.path)
        if (path, lora.allow_unmatched) != (self.path, self.lora.allow_unmatched):
            return False
        return not os.path.lexists(path) or _files_at(path) == self.files


def load_loras(
    sources: Iterable[Lora | str | Path],
    shapes: Shapes,
    *,
    loaded: Sequence[LoadedLora] = (),
    pickles: bool = False,
) -> tuple[LoadedLora, ...]:
    """The LoRAs with all their values, for a transformer of these `shapes`, in the order given.

    loaded: what is in memory already, by path, is not read again. pickles: read those too. Raises ValueError
    as open_lora and lora_changes do, for more than 64, for one that is given twice, and for whole tensors
    (modules_to_save) at another scale than 1 or 0 or in two LoRAs.
    """
    if isinstance(sources, str | Path | Lora) or not isinstance(sources, Iterable):
        raise ValueError(f"loras is {shown(sources)}; give a list of LoRAs")
    wanted = [Lora.of(source) for source in sources]
    if len(wanted) > MOST_LORAS:
        raise ValueError(f"{len(wanted)} LoRAs are given; give at most {MOST_LORAS}")
    loras = []
    for lora in wanted:
        known = next((each for each in loaded if each.is_of(lora)), None)
        each = _load(lora, shapes, pickles) if known is None else replace(known, lora=lora)
        twin = next((other for other in loras if other.sha256 == each.sha256), None)
        if twin is not None:
            raise ValueError(
                f"{twin.lora.path} and {lora.path} are the same LoRA; give it once, at the sum of the scales"
            )
        loras.append(each)
    _check_whole(loras)
    return tuple(loras)


def _files_at(path: str) -> tuple[FileState, ...]:
    """Name, size, time of the last change and number of the file at `path` and of the adapter_config.json
    beside it, or of what is in that directory."""
    names, found = [path, os.path.join(os.path.dirname(path), CONFIG_FILE)], []
    if os.path.isdir(path):
        with suppress(OSError):  # which opening the LoRA says
            names = [os.path.join(path, name) for name in sorted(os.listdir(path))]
    for name in names:
        with suppress(OSError):
            state = os.stat(name)
            found.append((name, state.st_size, state.st_mtime_ns, state.st_ino))
    return tuple(found)


def _load(lora: Lora, shapes: Shapes, pickles: bool) -> LoadedLora:
    path = os.path.abspath(lora.path)
    files = _files_at(path)
    file = open_lora(Path(lora.path), pickles)
    changes = {
        name: change.in_memory() for name, change in lora_changes(file, shapes, lora.allow_unmatched).items()
    }
    logger.info("%s: changes %d tensors at scale %g", file.label, len(changes), lora.scale)
    return LoadedLora(lora, _digest(changes), changes, path, files)


def _digest(changes: Mapping[str, LoraChange]) -> str:
    digest = hashlib.sha256()
    for target, change in sorted(changes.items()):
        for field, stored in change.tensors().items():
            place = [target, field, change.factor, list(stored.shape), str(stored.dtype)]
            digest.update(json.dumps(place).encode())
            digest.update(stored.read().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _check_whole(loras: Sequence[LoadedLora]) -> None:
    taken: dict[str, Lora] = {}
    for each in loras:
        for target, change in each.changes.items():
            if change.whole is None or each.lora.scale == 0:
                continue
            if each.lora.scale != 1:
                raise ValueError(
                    f"{each.lora.path} holds {target} whole, which has no scale, and is given at "
                    f"{each.lora.scale:g}; give it at 1, or at 0 to leave it out"
                )
            other = taken.setdefault(target, each.lora)
            if other is not each.lora:
                raise ValueError(
                    f"{other.path} and {each.lora.path} both hold {target} whole; give one of them"
                )


def changes_by_tensor(loras: Sequence[LoadedLora]) -> ChangesByTensor:
    """The LoRAs that change each tensor. They come in the order of their sha256, so that the order in which
    they were given changes no bit of the sum; one at scale 0 changes nothing."""
    found: dict[str, list[LoadedLora]] = {}
    for each in sorted(loras, key=lambda each: each.sha256):
        if each.lora.scale != 0:
            for target in each.changes:
                found.setdefault(target, []).append(each)
    return {target: tuple(each) for target, each in found.items()}


def with_loras(weight: Tensor, target: str, loras: Sequence[LoadedLora]) -> Tensor:
    """The tensor `target` of the transformer with what `loras` do to it, in float32."""
    return merged(weight, _at_scales(target, loras))


def add_loras(transformer: dict[str, StoredTensor], loras: Sequence[LoadedLora]) -> None:
    """Replace the changed tensors in `transformer` by merged ones, which are computed when they are read."""
    changing = changes_by_tensor(loras)
    add_changes(transformer, {target: _at_scales(target, each) for target, each in changing.items()})


def _at_scales(target: str, loras: Sequence[LoadedLora]) -> list[tuple[float, LoraChange]]:
    return [(each.lora.scale, each.changes[target]) for each in loras]
