from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import save

from rfengine.checkpoint.file_format import weights_format

SAFETENSORS = save({"a": torch.ones(2)})


def pickled(zipped: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save({"a": torch.ones(2)}, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("weights"), io.BytesIO())
    return file.getvalue()


def array() -> bytes:
    file = io.BytesIO()
    numpy.save(file, numpy.ones(3))
    return file.getvalue()


@pytest.mark.parametrize("name", ["model", "model.pt", "model.bin", "model.safetensors", "model.PT", "ab12"])
def test_the_content_says_what_a_file_is_whatever_its_name(tmp_path: Path, name: str) -> None:
    for content, expected in (
        (SAFETENSORS, "safetensors"),
        (pickled(), "pickle"),
        (pickled(False), "pickle"),
    ):
        (tmp_path / "blob").write_bytes(content)
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).symlink_to("blob")
        assert weights_format(tmp_path / name) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"GGUF\x03\0\0\0" + bytes(64),
            "is a GGUF file, which is not read as weights; get the same weights as",
        ),
        (b"\x89HDF\r\n\x1a\n" + bytes(8), "is an HDF5 file"),
        (b"\x1f\x8b\x08\0" + bytes(8), "is a gzip archive"),
        (b"\x08\x08\x12\x07pytorch" + bytes(20), "is an ONNX model"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n",
            "is a Git LFS pointer, not the weights",
        ),
        (b"\n<!DOCTYPE html><html></html>", "is a page in HTML or XML, not weights; the download failed"),
        (b'{"error": "Repository not found"}', "is a text in JSON, not weights"),
        (bytes(4096), "starts with 512 zeros; its download was not finished"),
        (tar(), "is a tar archive"),
        (array(), "is a NumPy file"),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".safetensors", ".pt"])
def test_other_formats_are_refused_by_their_names(
    tmp_path: Path, content: bytes, message: str, suffix: str
) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"model{suffix} {message}"):
        weights_format(path)


def test_a_name_counts_only_where_the_content_says_nothing(tmp_path: Path) -> None:
    for content in (b"", b"\x01\x02\x03\x04\x05\x06\x07\x08\x09"):
        for name, expected in (("a.SAFETENSORS", "safetensors"), ("a.Pth", "pickle")):
            (tmp_path / name).write_bytes(content)
            assert weights_format(tmp_path / name) == expected
    (tmp_path / "a").write_bytes(b"\x01\x02\x03")
    with pytest.raises(ValueError, match="a starts with 01 02 03, which is neither safetensors nor a torch"):
        weights_format(tmp_path / "a")
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a is empty \(0 bytes\)"):
        weights_format(tmp_path / "a")


def test_what_is_no_ordinary_file_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "link.pt").symlink_to("blobs/absent")
    (tmp_path / "loop.pt").symlink_to("loop.pt")
    for path, message in (
        (tmp_path / "pipe.pt", "is a pipe; give an ordinary file"),
        (Path("/dev/zero"), "/dev/zero is a device"),
        (tmp_path, "is a directory"),
        (tmp_path / "absent.pt", "absent.pt does not exist; check the path"),
        (tmp_path / "link.pt", "link.pt is a link to a file that is not there: a download was not finished"),
        (tmp_path / "loop.pt", "loop.pt cannot be read"),
    ):
        with pytest.raises(ValueError, match=message):
            weights_format(path)
