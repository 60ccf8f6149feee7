"""Which format the weights in a file have, by its content: in a cache it has no suffix, and suffixes err."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from rfengine.files import reading

WeightsFormat = Literal["safetensors", "pickle"]

PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
SAFETENSORS_SUFFIXES = (".safetensors", ".sft")
_START_BYTES = 512
_TAR_OFFSET = 257  # of the name in the header of a tar archive
_LONGEST_HEADER = 2**40  # bytes; more than any file, so the length in front of a header has zeros at its end

# How a file of another format starts, and what it is called.
_FOREIGN = {
    b"GGUF": "a GGUF file",
    b"ggml": "a GGML file",
    b"lmgg": "a GGML file",
    b"ggjt": "a GGML file",
    b"tjgg": "a GGML file",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file",
    b"\x93NUMPY": "a NumPy file",
    b"ftrt": "a TensorRT engine",
    b"\x1f\x8b": "a gzip archive",
    b"\xfd7zXZ\x00": "an xz archive",
    b"BZh": "a bzip2 archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!": "a RAR archive",
}
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1f]")  # what is in no text
_LFS_POINTER = b"version https://git-lfs"


def weights_format(path: Path) -> WeightsFormat:
    """Which of the two formats that are read `path` has; only where its content tells nothing, by its name.

    Raises ValueError for what is no ordinary file or cannot be read, and, by its name, for a format that is
    not read.
    """
    with reading(path) as file:
        start = file.read(_START_BYTES)
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < _LONGEST_HEADER:
        return "safetensors"
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):  # zip, bare
        return "pickle"
    if start:
        _refuse_foreign(path, start)
    suffix = path.suffix.lower()
    if suffix in SAFETENSORS_SUFFIXES:
        return "safetensors"
    if suffix in PICKLE_SUFFIXES:
        return "pickle"
    if not start:
        raise ValueError(f"{path} is empty (0 bytes); get the file again")
    raise ValueError(
        f"{path} starts with {start[:8].hex(' ')}, which is neither safetensors nor a torch pickle; get the "
        "weights as .safetensors or .pt"
    )


def _refuse_foreign(path: Path, start: bytes) -> None:
    name = next((name for magic, name in _FOREIGN.items() if start.startswith(magic)), None)
    if start[_TAR_OFFSET : _TAR_OFFSET + 5] == b"ustar":
        name = "a tar archive"
    elif _is_onnx(start):
        name = "an ONNX model"
    if name is not None:
        raise ValueError(
            f"{path} is {name}, which is not read as weights; get the same weights as .safetensors or .pt"
        )
    if start.startswith((_LFS_POINTER, b"/annex/objects/", b"../.git/annex/")):
        kind = "Git LFS" if start.startswith(_LFS_POINTER) else "git-annex"
        raise ValueError(f"{path} is a {kind} pointer, not the weights; fetch the file itself")
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n") if not _CONTROL.search(start) else b""
    if text.startswith(b"<"):
        raise ValueError(
            f"{path} is a page in HTML or XML, not weights; the download failed, so get it again"
        )
    if text.startswith((b"{", b"[")):
        raise ValueError(
            f"{path} is a text in JSON, not weights; give the weights, and get them again if this is an error"
        )
    if not any(start):
        raise ValueError(
            f"{path} starts with {len(start)} zeros; its download was not finished, so get it again"
        )


def _is_onnx(start: bytes) -> bool:
    """A protobuf message: a small version of the format, then the writing program's name or the graph."""
    return len(start) > 3 and start[0] == 8 and 1 <= start[1] <= 32 and start[2] in (0x12, 0x3A)
