"""How long a media file says it is, so that one that was cut off is told from a short one."""

from __future__ import annotations

import os
from typing import BinaryIO

_EBML_HEADER, _SEGMENT = 0x1A45DFA3, 0x18538067
_BOX_TYPES = {
    b"ftyp", b"styp", b"sidx", b"moov", b"moof", b"mdat", b"mfra", b"meta", b"udta", b"uuid", b"free",
    b"skip", b"wide", b"pnot",
}  # fmt: skip


def declared_bytes(file: BinaryIO) -> int:
    """The end of the last part that an MP4, Matroska or AVI file states the length of; 0 where none does.

    The file is read at the places where lengths stand, and is at its start afterwards.
    """
    file.seek(0)
    start = file.read(12)
    if start[:4] == b"RIFF":
        end = _riff_end(file)
    elif int.from_bytes(start[:4], "big") == _EBML_HEADER:
        end = _segment_end(file)
    else:
        end = _boxes_end(file)
    file.seek(0)
    return end


def _riff_end(file: BinaryIO) -> int:
    """The end of the last RIFF chunk: files above a gigabyte have several."""
    size, end = os.fstat(file.fileno()).st_size, 0
    while end < size:
        file.seek(end)
        head = file.read(8)
        if head[:4] != b"RIFF":
            break
        end += 8 + int.from_bytes(head[4:], "little")
        end += end % 2
    return end - end % 2


def _segment_end(file: BinaryIO) -> int:
    """The end of the first segment; 0 where its length is left open, as live recordings do."""
    file.seek(4)
    length = _ebml_number(file)
    if length is None:
        return 0
    file.seek(length, os.SEEK_CUR)
    if int.from_bytes(file.read(4), "big") != _SEGMENT:
        return 0
    length = _ebml_number(file)
    return 0 if length is None else file.tell() + length


def _ebml_number(file: BinaryIO) -> int | None:
    """A number whose first byte says in how many bytes it stands; None for the one that means unknown."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    more = 8 - first[0].bit_length()
    value = int.from_bytes(first + file.read(more), "big") & ((1 << 7 * (more + 1)) - 1)
    return None if value == (1 << 7 * (more + 1)) - 1 else value


def _boxes_end(file: BinaryIO) -> int:
    """The end of the last box that has a known type and stands where the one before it ends."""
    size, end = os.fstat(file.fileno()).st_size, 0
    while end < size:
        file.seek(end)
        head = file.read(16)
        length = int.from_bytes(head[:4], "big")
        least = 8
        if length == 1:
            length, least = int.from_bytes(head[8:16], "big"), 16
        if head[4:8] not in _BOX_TYPES or length < least:  # 0 means up to the end of the file
            break
        end += length
    return end
