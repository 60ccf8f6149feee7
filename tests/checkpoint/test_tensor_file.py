from __future__ import annotations

import json
import os
import random
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rfengine.checkpoint.tensor_file import (
    MAX_HEADER_BYTES,
    MAX_METADATA_BYTES,
    MAX_TENSORS,
    StoredTensor,
    open_safetensors,
    read_header,
    write_safetensors,
)

SAMPLE = {
    "float32": torch.randn(3, 5),
    "bfloat16": torch.randn(7).to(torch.bfloat16),
    "float16": torch.randn(2, 2, 2).half(),
    "float64": torch.randn(1).double(),
    "int64": torch.arange(5),
    "bool": torch.tensor([True, False, True]),
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 4),
    "transposed": torch.randn(4, 6).T,
}


def stored(tensors: dict[str, torch.Tensor]) -> dict[str, StoredTensor]:
    return {name: StoredTensor.of(tensor) for name, tensor in tensors.items()}


@pytest.fixture
def sample_file(tmp_path: Path) -> Path:
    write_safetensors(tmp_path / "sample.safetensors", stored(SAMPLE), {"note": "käse"})
    return tmp_path / "sample.safetensors"


def test_written_file_is_read_by_the_library_of_the_format(sample_file: Path) -> None:
    theirs = load_file(sample_file)
    assert theirs.keys() == SAMPLE.keys()
    for name, tensor in SAMPLE.items():
        assert theirs[name].dtype == tensor.dtype and torch.equal(theirs[name], tensor)
    with safe_open(sample_file, "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "käse"}


def test_file_of_the_library_is_read(tmp_path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in SAMPLE.items()}
    save_file(tensors, tmp_path / "theirs.safetensors", {"a": "b"})
    ours = open_safetensors(tmp_path / "theirs.safetensors")
    assert ours.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert ours[name].shape == tensor.shape and ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name].read(), tensor)
    assert read_header(tmp_path / "theirs.safetensors")[1] == {"a": "b"}


def test_every_tensor_starts_at_a_multiple_of_its_element_size(sample_file: Path) -> None:
    for entry in read_header(sample_file)[0].values():
        assert entry.begin % entry.dtype.itemsize == 0


def test_each_read_gives_memory_of_its_own(sample_file: Path) -> None:
    tensor = open_safetensors(sample_file)["float32"]
    tensor.read().zero_()
    assert torch.equal(tensor.read(), SAMPLE["float32"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_large_tensors_come_back_and_can_be_changed(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = (1000 * torch.randn(1100, 1000)).to(dtype)
    write_safetensors(tmp_path / "large.safetensors", stored({"a": tensor}))
    found = open_safetensors(tmp_path / "large.safetensors")["a"].read()
    assert found.dtype == dtype and found.is_contiguous() and torch.equal(found, tensor)
    assert torch.equal(found.add_(1), tensor + 1)


def raw(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


FOREIGN = {
    "zero bytes": (b"", r"is empty \(0 bytes\)"),
    "few bytes": (b"abc", "has 3 bytes, fewer than the 8"),
    "pickle": (
        b"PK\x03\x04" + b"\0" * 30,
        "is a torch pickle, not safetensors; run `rfengine convert SRC DST`",
    ),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    "text": (b"hello world, this is no checkpoint", "header of .* bytes, above the limit of 16000000"),
    "huge header": (
        (MAX_HEADER_BYTES + 1).to_bytes(8, "little"),
        "header of 16000001 bytes, above the limit",
    ),
    "cut header": (raw({"a": entry()}, b"\0" * 4)[:20], "is truncated: the header needs .* the file has 20"),
    "cut data": (raw({"a": entry()}, b"\0\0"), "is truncated: its tensors need .* bytes"),
    "overlap": (raw({"a": entry(), "b": entry()}, b"\0" * 4), "a gap or an overlap in front of b"),
    "gap": (raw({"a": entry(offsets=[4, 8])}, b"\0" * 8), "a gap or an overlap in front of a"),
    "bytes after": (raw({"a": entry()}, b"\0" * 9), "has 5 bytes after its last tensor"),
}
MANY = b"{" + b",".join(b'"%d":0' % number for number in range(MAX_TENSORS + 1)) + b"}"
BAD_HEADERS = {
    "no json": (b"not json", "Expecting value"),
    "no utf-8": (b'{"\xff": 1}', "can't decode"),
    "deep json": (b"[" * 100_000, "nested too deep"),
    "json list": ([1, 2], "it is a list, not an object"),
    "not a number": (b'{"a": NaN}', "NaN is no number of JSON"),
    "name twice": (b'{"a": 1, "b": 2, "a": 1}', "has the key 'a' twice"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, "__metadata__ is not an object of texts"),
    "metadata list": ({"__metadata__": ["a"]}, "__metadata__ is not an object of texts"),
    "long metadata": (
        {"__metadata__": {"a": "x" * MAX_METADATA_BYTES}}, "__metadata__ has 10000001 characters"
    ),
    "many tensors": (MANY, "100001 tensors"),
    "many lists": (b'{"a": [' + b"[]," * 1_000_000 + b"0]}", "more than 1000000 lists and objects"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, "shape"),
    "no object": ({"a": 3}, "a lacks its dtype"),
    "line end in a name": ({"a\nb": entry()}, r"the name 'a\\nb' has signs"),
    "half a sign in a name": ({"\ud800": entry()}, "has signs that cannot be printed"),
    "long name": ({"a" * 1001: entry()}, "the name 'aaa.* or more than 1000"),
    "unknown dtype": ({"a": entry("F99")}, "dtype 'F99', which is not one of F64, F32"),
    "dtype list": ({"a": entry(["F32"])}, "dtype .*, which is not one of F64, F32"),
    "negative shape": ({"a": entry(shape=[-1])}, "is not made of whole numbers"),
    "fractional shape": ({"a": entry(shape=[1.0])}, "is not made of whole numbers"),
    "shape of truth": ({"a": entry(shape=[True])}, "is not made of whole numbers"),
    "shape text": ({"a": entry(shape="1")}, "is not made of whole numbers"),
    "many axes": ({"a": entry(shape=[1] * 300_000)}, "at most 16 of them"),
    "many wide axes": ({"a": entry(shape=[2**62] * 300_000)}, "at most 16 of them"),
    "no elements of a huge axis": ({"a": entry(shape=[0, 10**30], offsets=[0, 0])}, "whole numbers below 2"),
    "no elements of two axes": ({"a": entry(shape=[0, 2**62, 2**62], offsets=[0, 0])}, "no memory holds"),
    "number of 5000 digits": (b'{"a": ' + b"9" * 5000 + b"}", "an integer of 5000 digits"),
    "wide offsets": ({"a": entry(offsets=[0, 2**64])}, "data_offsets .* not two whole numbers below 2"),
    "three offsets": ({"a": entry(offsets=[0, 4, 4])}, "data_offsets .* not two whole numbers"),
    "offsets of truth": ({"a": entry("U8", (1,), [False, True])}, "data_offsets .* not two whole numbers"),
    "backwards": ({"a": entry(offsets=[4, 0])}, "does not fill data_offsets 4 to 0"),
    "wrong size": ({"a": entry(shape=[2])}, "does not fill data_offsets 0 to 4"),
}  # fmt: skip
DAMAGED = FOREIGN | {
    name: (raw(header, b"\0" * 4), f"has a header that is not of the safetensors format .*{message}")
    for name, (header, message) in BAD_HEADERS.items()
}


@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_and_foreign_files_are_named_in_one_sentence(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        open_safetensors(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("dtype", ["F8_E8M0", "F4", "U64", "C64"])
def test_dtypes_that_torch_lacks_are_named(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "exotic.safetensors"
    path.write_bytes(raw({"a": entry(dtype)}, b"\0" * 4))
    with pytest.raises(ValueError, match=f"holds a in {dtype}, which the engine does not read; give a file"):
        open_safetensors(path)


def test_a_header_of_90_million_bytes_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "wide.safetensors"
    with path.open("wb") as file:
        file.write((90_000_000).to_bytes(8, "little"))
        file.truncate(90_000_100)
    with pytest.raises(ValueError, match="header of 90000000 bytes, above the limit of 16000000"):
        open_safetensors(path)


def test_a_pipe_a_device_and_a_directory_are_named_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "link.safetensors").symlink_to("/dev/zero")
    for path, kind in (
        (tmp_path / "pipe.safetensors", "a pipe"),
        (tmp_path / "link.safetensors", "a device"),
        (tmp_path, "a directory"),
    ):
        with pytest.raises(ValueError, match=f"{path} is {kind}; give an ordinary file"):
            open_safetensors(path)


def test_what_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "sample.safetensors"
    with pytest.raises(ValueError, match="__metadata__ has .* characters, above the limit"):
        write_safetensors(path, stored({"a": torch.ones(1)}), {"note": "x" * MAX_METADATA_BYTES})
    many = {f"{'n' * 900}{number}": StoredTensor.of(torch.ones(1)) for number in range(17_000)}
    with pytest.raises(ValueError, match="the header has .* bytes, above the limit"):
        write_safetensors(path, many)
    assert list(tmp_path.iterdir()) == []


HOSTILE = (
    None, True, -1, 0, 1.5, 1e300, 2**63, 10**30, "", "F32", [], [0], [True], [2**40, 2**40], {}, {"a": 1}
)  # fmt: skip


def test_wrong_values_anywhere_in_a_header_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "wrong.safetensors"
    for key in ("dtype", "shape", "data_offsets"):
        for value in HOSTILE:
            if (key, value) in (("dtype", "F32"), ("shape", [])):  # which are right
                continue
            path.write_bytes(raw({"a": entry() | {key: value}}, b"\0" * 4))
            with pytest.raises(ValueError, match="wrong.safetensors"):
                open_safetensors(path)


def test_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="absent.safetensors does not exist"):
        open_safetensors(tmp_path / "absent.safetensors")


def test_random_damage_gives_a_clear_error_or_readable_tensors(sample_file: Path, tmp_path: Path) -> None:
    content, dice = bytearray(sample_file.read_bytes()), random.Random(0)
    path, refused = tmp_path / "mutated.safetensors", 0
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(dice.randint(1, 4)):
            damaged[dice.randrange(len(damaged))] = dice.randrange(256)
        path.write_bytes(damaged[: dice.choice([len(damaged), dice.randrange(len(damaged))])])
        try:
            for tensor in open_safetensors(path).values():
                tensor.read()
        except ValueError:
            refused += 1
    assert 150 < refused < 300


def test_file_that_shrinks_between_opening_and_reading_is_reported(sample_file: Path) -> None:
    tensors = open_safetensors(sample_file)
    with sample_file.open("r+b") as file:
        file.truncate(sample_file.stat().st_size - 100)
    with pytest.raises(RuntimeError, match="became shorter while it was read"):
        for tensor in tensors.values():
            tensor.read()


def test_full_disk_leaves_nothing_behind_and_keeps_the_old_file(
    tmp_path: Path, with_file_limit: Callable[[int], None]
) -> None:
    path = tmp_path / "weights.safetensors"
    write_safetensors(path, stored({"a": torch.ones(4)}))
    before = path.read_bytes()
    with_file_limit(100_000)
    with pytest.raises(
        RuntimeError, match=r"cannot write .*weights.safetensors of 4000\d\d\d bytes .*free space"
    ):
        write_safetensors(path, stored({"a": torch.ones(1_000_000)}))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_failing_tensor_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail() -> torch.Tensor:
        raise ValueError("no such tensor")

    with pytest.raises(ValueError, match="no such tensor"):
        write_safetensors(tmp_path / "x.safetensors", {"a": StoredTensor((1,), torch.float32, fail)})
    assert list(tmp_path.iterdir()) == []


def test_dtype_that_the_format_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a is torch.complex64; safetensors holds F64"):
        write_safetensors(tmp_path / "x.safetensors", stored({"a": torch.ones(1, dtype=torch.complex64)}))


@pytest.fixture
def with_file_limit() -> Callable[[int], None]:
    """Makes writes beyond a number of bytes fail as on a full disk, until the test ends."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize(("axis", "start", "stop"), [(0, 1, 3), (0, 2, 2), (1, 0, 2), (1, 3, 5)])
def test_a_part_of_a_tensor_is_that_slice_of_it(tmp_path: Path, axis: int, start: int, stop: int) -> None:
    whole = torch.randn(4, 5, 3, dtype=torch.float64).to(torch.bfloat16)
    save_file({"before": torch.ones(7), "whole": whole}, tmp_path / "model.safetensors")
    stored = open_safetensors(tmp_path / "model.safetensors")["whole"]
    for source in (stored, StoredTensor.of(whole)):
        part = source.part(axis, start, stop)
        read = part.read()
        assert read.shape == part.shape and read.untyped_storage().nbytes() == part.nbytes
        assert torch.equal(read, whole.narrow(axis, start, stop - start))
