"""The safetensors file: header checked entry by entry, tensors read and written one at a time.

The format's own library maps the whole file to read it, so that a copy or a cast holds both sizes, and takes
every tensor at once to write it. Here one tensor is in memory at a time, and a damaged file is named in one
sentence.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

import torch
from torch import Tensor

from rfengine.checkpoint.file_format import weights_format
from rfengine.files import open_regular, reading, replaced, strict_json

# A published header has at most a few hundred kilobytes. The format itself allows 100 MB, which as Python
# objects would take gigabytes before anything in it is known to be true.
MAX_HEADER_BYTES = 16_000_000
MAX_METADATA_BYTES = 10_000_000
MAX_TENSORS = 100_000
MAX_AXES = 16
_MAX_BRACKETS = 1_000_000  # opening ones, those inside texts of the metadata included
MAX_NAME_LENGTH = 1000
_MAX_BYTES = 2**63 - 1  # of a tensor or a file, in numbers of 64 bits
_LENGTH_BYTES = 8  # little-endian length in front of the header
_ALIGNMENT = 8  # bytes; the header is padded to it
_OWN_PAGES_BYTES = 1 << 20  # a tensor from this size on is read into pages of its own
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, 
    "BOOL": torch.bool,
}  # fmt: skip
_UNREAD_DTYPES = (
    "F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64", "U16", "U32", "U64",
)  # fmt: skip
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor that is still elsewhere; `read` brings it to the CPU, again at every call. read_rows: the same
    of rows `start` to `stop` of its first axis alone, where that is less work."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    read_rows: Callable[[int, int], Tensor] | None = None

    @classmethod
    def of(cls, tensor: Tensor) -> StoredTensor:
        """A tensor that is in memory, or mapped, already."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor.detach().cpu())

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def part(self, axis: int, start: int, stop: int) -> StoredTensor:
        """Entries `start` to `stop` of one axis, with nothing else in memory once they are read. Of a file,
        rows are read alone, and for another axis one whole tensor for a moment."""
        shape = (*self.shape[:axis], stop - start, *self.shape[axis + 1 :])
        if axis == 0 and self.read_rows is not None:
            return StoredTensor(shape, self.dtype, lambda: self.read_rows(start, stop))
        return StoredTensor(shape, self.dtype, lambda: self.read().narrow(axis, start, stop - start).clone())


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor is in its file: bytes `begin` to `end`, counted from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    def rows(self, start: int, stop: int) -> TensorEntry:
        """Rows `start` to `stop` of the first axis."""
        row = (self.end - self.begin) // self.shape[0]
        begin, end = self.begin + start * row, self.begin + stop * row
        return TensorEntry(self.dtype, (stop - start, *self.shape[1:]), begin, end)


def open_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of one file by name; none is read yet. Raises ValueError as read_header does."""
    return {
        name: StoredTensor(entry.shape, entry.dtype, _reader(path, entry), _row_reader(path, entry))
        for name, entry in read_header(path)[0].items()
    }


def read_header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """The entries and the metadata of one safetensors file, checked against its size; no tensor is read.

    Raises ValueError when the file is absent, empty, truncated, damaged, beyond the limits above or of
    another format.
    """
    text, size = _read_start(path)
    data_start = _LENGTH_BYTES + len(text)
    try:
        if text.count(b"[") + text.count(b"{") > _MAX_BRACKETS:  # each becomes an object of 64 bytes
            raise ValueError(f"it has more than {_MAX_BRACKETS} lists and objects")
        header = strict_json(text.decode())
        if not isinstance(header, dict):
            raise ValueError(f"it is a {type(header).__name__}, not an object")
        metadata = _metadata(header.pop("__metadata__", {}))
        if len(header) > MAX_TENSORS:
            raise ValueError(f"it names {len(header)} tensors, above the limit of {MAX_TENSORS}")
        entries = {name: _entry(name, value, data_start) for name, value in header.items()}
    except _UnreadDType as error:
        raise ValueError(
            f"{path} holds {error}, which the engine does not read; give a file in BF16, F16 or F32"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"{path} has a header that is not of the safetensors format ({error}); get it again"
        ) from error
    _check_offsets(path, entries, data_start, size)
    return entries, metadata


def _read_start(path: Path) -> tuple[bytes, int]:
    """The header's text and the size of the file."""
    with reading(path) as file:
        size = file.seek(0, 2)
        file.seek(0)
        start = file.read(_LENGTH_BYTES)
        length = int.from_bytes(start, "little")
        _check_start(path, start, size, length)
        return file.read(length), size


def _check_start(path: Path, start: bytes, size: int, length: int) -> None:
    if size == 0:
        raise ValueError(f"{path} is empty (0 bytes); get the file again")
    if size < _LENGTH_BYTES:
        raise ValueError(
            f"{path} has {size} bytes, fewer than the {_LENGTH_BYTES} of a safetensors start; get it again"
        )
    too_long = length > MAX_HEADER_BYTES or _LENGTH_BYTES + length > size
    if too_long and weights_format(path) == "pickle":  # which raises for any other format that it knows
        raise ValueError(f"{path} is a torch pickle, not safetensors; run `rfengine convert SRC DST` on it")
    if length > MAX_HEADER_BYTES:
        raise ValueError(
            f"{path} states a header of {length} bytes, above the limit of {MAX_HEADER_BYTES}; "
            "it is damaged or not a safetensors file, so get it again"
        )
    if _LENGTH_BYTES + length > size:
        raise ValueError(
            f"{path} is truncated: the header needs {_LENGTH_BYTES + length} bytes and the file has {size}; "
            "get it again"
        )


class _UnreadDType(ValueError):
    """A dtype that the format has and torch or the engine has not."""


def _metadata(values: Any) -> dict[str, str]:
    if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
        raise ValueError("__metadata__ is not an object of texts")
    length = sum(len(key) + len(value) for key, value in values.items())
    if length > MAX_METADATA_BYTES:
        raise ValueError(f"__metadata__ has {length} characters, above the limit of {MAX_METADATA_BYTES}")
    return values


def _entry(name: str, value: Any, data_start: int) -> TensorEntry:
    if len(name) > MAX_NAME_LENGTH or not name.isprintable():
        raise ValueError(
            f"the name {shortened(name)} has signs that cannot be printed or more than {MAX_NAME_LENGTH}"
        )
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise ValueError(f"{name} lacks its dtype, shape or data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if dtype in _UNREAD_DTYPES:
        raise _UnreadDType(f"{name} in {dtype}")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"{name} has dtype {shortened(dtype)}, which is not one of {', '.join(_DTYPES)}")
    if not isinstance(shape, list) or len(shape) > MAX_AXES or not all(map(_is_size, shape)):
        raise ValueError(
            f"{name} has the shape {shortened(shape)}, which is not made of whole numbers below 2**63, "
            f"at most {MAX_AXES} of them"
        )
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise ValueError(
            f"{name} has the data_offsets {shortened(offsets)}, which are not two whole numbers below 2**63"
        )
    begin, end = offsets
    width = _DTYPES[dtype].itemsize
    if math.prod(max(1, number) for number in shape) * width > _MAX_BYTES:
        raise ValueError(f"{name} has the shape {shortened(shape)}, which no memory holds")
    if math.prod(shape) * width != end - begin:
        raise ValueError(
            f"{name} has shape {shape} in {dtype}, which does not fill data_offsets {begin} to {end}"
        )
    return TensorEntry(_DTYPES[dtype], tuple(shape), data_start + begin, data_start + end)


def _is_size(number: Any) -> bool:
    return type(number) is int and 0 <= number <= _MAX_BYTES


def _check_offsets(path: Path, entries: dict[str, TensorEntry], data_start: int, size: int) -> None:
    position = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            raise ValueError(
                f"{path} has a gap or an overlap in front of {name}; it is damaged, so get it again"
            )
        position = entry.end
    if position > size:
        raise ValueError(
            f"{path} is truncated: its tensors need {position} bytes and it has {size}; get it again"
        )
    if position < size:
        raise ValueError(
            f"{path} has {size - position} bytes after its last tensor; it is damaged, so get it again"
        )


def _reader(path: Path, entry: TensorEntry) -> Callable[[], Tensor]:
    def read() -> Tensor:
        tensor = _allocate(entry)
        try:
            with open_regular(path) as file:
                file.seek(entry.begin)
                count = file.readinto(_bytes_of(tensor))
        except OSError as error:
            raise RuntimeError(
                f"cannot read {path} ({error.strerror}); make it readable and try again"
            ) from error
        if count != entry.end - entry.begin:
            raise RuntimeError(f"{path} became shorter while it was read; load it again once it is whole")
        return tensor

    return read


def _row_reader(path: Path, entry: TensorEntry) -> Callable[[int, int], Tensor] | None:
    if not entry.shape or not entry.shape[0]:
        return None
    return lambda start, stop: _reader(path, entry.rows(start, stop))()


def _allocate(entry: TensorEntry) -> Tensor:
    """Uninitialised memory, which for a large tensor goes back to the system with it.

    The heap would keep it: between the tensors that a load casts and keeps, the freed ones leave holes.
    """
    size = entry.end - entry.begin
    if size < _OWN_PAGES_BYTES:
        return torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=entry.dtype).reshape(entry.shape)


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def write_safetensors(
    path: Path,
    tensors: Mapping[str, StoredTensor],
    metadata: Mapping[str, str] | None = None,
    show_progress: bool = False,
) -> None:
    """Write `tensors` to `path`, reading one at a time; the file appears whole or not at all.

    metadata: strings for the header. show_progress draws a bar when a terminal is there to see it.
    Raises RuntimeError when the file cannot be written, the disk being full for instance; nothing is left
    behind.
    """
    header, order = _build_header(tensors, metadata)
    needed = len(header) + sum(stored.nbytes for stored in tensors.values())
    try:
        with replaced(path) as beside, beside.open("xb") as file:
            file.write(header)
            for name in _progress(order, path.name) if show_progress else order:
                tensor = tensors[name].read()
                assert tuple(tensor.shape) == tensors[name].shape and tensor.dtype == tensors[name].dtype
                file.write(_bytes_of(tensor.contiguous()))
    except OSError as error:
        raise RuntimeError(
            f"cannot write {path} of {needed} bytes ({error.strerror}); free space or choose another place"
        ) from error


def _build_header(
    tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str] | None
) -> tuple[bytes, list[str]]:
    """The file up to its first tensor, and the order of tensors: wide dtypes first aligns all."""
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": _metadata({"format": "pt", **(metadata or {})})}
    position = 0
    for name in order:
        stored = tensors[name]
        if stored.dtype not in _DTYPE_NAMES:
            raise ValueError(f"{name} is {stored.dtype}; safetensors holds {', '.join(_DTYPES)}")
        end = position + stored.nbytes
        header[name] = {
            "dtype": _DTYPE_NAMES[stored.dtype], "shape": list(stored.shape), "data_offsets": [position, end],
        }  # fmt: skip
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(
            f"the header has {len(text)} bytes, above the limit of {MAX_HEADER_BYTES}; write fewer tensors "
            "or a shorter metadata"
        )
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text, order


def _progress(names: list[str], description: str) -> Iterable[str]:
    from tqdm import tqdm

    return tqdm(names, desc=description, unit="tensor", disable=None)
