"""Reads a training checkpoint without running code that may lie in it.

torch.distributed.checkpoint keeps an index (`.metadata`) and small values as pickles and loads them as such.
Here the index may name the classes of an index alone, and values go through torch's weights_only reader.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
import torch.distributed.checkpoint as checkpoint
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from rfengine.files import open_regular
from rfengine.training.checkpoint_record import DamagedCheckpointError

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
        raise DamagedCheckpointError(f"it cannot be read ({first_cause(error)})") from error


def first_cause(error: BaseException) -> str:
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
