"""Text states on disk: what is kept, what misses, and damage that costs a warning and not the prompt."""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import nn

from rfengine.checkpoint.text_states import TextStateFiles
from rfengine.config import TextConfig
from rfengine.models.text_encoder import ByteTokenizer, TextEncoder, build_umt5

SMALL = TextConfig(259, 32, 48, 64, 3, 2, tokenizer="bytes")
PROMPTS = ["a red cube rolls over the floor", "naïve café, 猫が走る"]
ROWS = len(PROMPTS[0]) + 1


@pytest.fixture(scope="module")
def small_model() -> nn.Module:
    torch.manual_seed(5)
    return build_umt5(SMALL)


@pytest.fixture
def small(small_model) -> nn.Module:
    return copy.deepcopy(small_model)


def never_built() -> nn.Module:
    raise AssertionError("the encoder was built")


def cached_encoder(model, directory, fingerprint="small", text_len=64, dtype=torch.float32) -> TextEncoder:
    files = TextStateFiles(directory, fingerprint, text_len, SMALL.dim)
    return TextEncoder(model, ByteTokenizer(), text_len, dtype=dtype, cache=files)


def plain_states(model) -> torch.Tensor:
    return TextEncoder(model, ByteTokenizer(), 64).encode(PROMPTS[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cached_prompt_needs_no_encoder(small, tmp_path, dtype):
    expected = cached_encoder(small, tmp_path, dtype=dtype).encode(PROMPTS)
    again = cached_encoder(never_built, tmp_path, dtype=dtype)
    found = again.encode([f"  {PROMPTS[1]}\n", PROMPTS[0]])
    assert found.dtype == dtype and torch.equal(found, expected.flip(0))
    with pytest.raises(AssertionError, match="was built"):
        again.encode(["another prompt"])


def test_only_valid_rows_are_stored_and_no_partial_file_stays(small, tmp_path):
    cached_encoder(small, tmp_path, text_len=512).encode(PROMPTS[:1])
    (path,) = tmp_path.iterdir()
    assert path.suffix == ".safetensors"
    with safe_open(path, framework="pt") as file:
        assert file.get_slice("states").get_shape() == [len(PROMPTS[0]) + 1, SMALL.dim]


def test_other_weights_length_dtype_or_text_miss_the_cache(small, tmp_path):
    cached_encoder(small, tmp_path).encode(PROMPTS)
    for other in (
        cached_encoder(never_built, tmp_path, fingerprint="other"),
        cached_encoder(never_built, tmp_path, text_len=65),
        cached_encoder(never_built, tmp_path, dtype=torch.bfloat16),
    ):
        with pytest.raises(AssertionError, match="was built"):
            other.encode(PROMPTS)


def flip_last_byte(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize(
    "damage",
    [lambda content: b"", lambda content: b"not safetensors", lambda content: content[:-8], flip_last_byte],
    ids=["empty", "garbage", "truncated", "flipped"],
)
def test_damaged_entry_is_computed_again_and_replaced(small, tmp_path, caplog, damage):
    encoder = cached_encoder(small, tmp_path)
    expected = encoder.encode(PROMPTS[:1])
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    with caplog.at_level(logging.WARNING):
        assert torch.equal(encoder.encode(PROMPTS[:1]), expected)
    assert [str(path) in record.getMessage() for record in caplog.records] == [True]
    assert path.read_bytes() == whole
    assert torch.equal(cached_encoder(never_built, tmp_path).encode(PROMPTS[:1]), expected)


def test_disk_that_refuses_costs_a_warning_and_not_the_prompt(small, tmp_path, caplog):
    encoder = cached_encoder(small, tmp_path / "states")
    (tmp_path / "states").rmdir()
    with caplog.at_level(logging.WARNING):
        found = encoder.encode(PROMPTS[:1])
    assert torch.equal(found, plain_states(small))
    assert "cannot be kept" in caplog.text


def test_entry_that_cannot_take_its_place_leaves_no_partial_file(small, tmp_path, caplog):
    encoder = cached_encoder(small, tmp_path)
    encoder.encode(PROMPTS[:1])
    (path,) = tmp_path.iterdir()
    path.unlink()
    path.mkdir()
    with caplog.at_level(logging.WARNING):
        encoder.encode(PROMPTS[:1])
    assert "cannot be kept" in caplog.text
    assert list(tmp_path.iterdir()) == [path]


def test_cache_without_a_fingerprint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="fingerprint is empty"):
        TextStateFiles(tmp_path, "", 64, SMALL.dim)


def sealed(states: torch.Tensor) -> bytes:
    """A file of states whose checksum is right."""
    checksum = hashlib.sha256(states.contiguous().view(torch.uint8).numpy()).hexdigest()
    return save({"states": states}, metadata={"sha256": checksum})


@pytest.mark.parametrize(
    "states",
    [
        torch.zeros(ROWS, SMALL.dim + 1),
        torch.zeros(ROWS - 1, SMALL.dim),
        torch.zeros(ROWS, SMALL.dim, 1),
        torch.zeros(ROWS),
        torch.zeros(ROWS, SMALL.dim, dtype=torch.float16),
        torch.zeros(ROWS, SMALL.dim, dtype=torch.int32),
        torch.full((ROWS, SMALL.dim), torch.nan),
        torch.zeros(1 << 14, 1 << 10),
    ],
    ids=["wide", "short", "deep", "flat", "half", "integers", "nan", "huge"],
)
def test_states_that_no_encoder_of_this_shape_gives_are_computed_again(small, tmp_path, caplog, states):
    encoder = cached_encoder(small, tmp_path)
    expected = encoder.encode(PROMPTS[:1])
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(sealed(states))
    assert torch.equal(encoder.encode(PROMPTS[:1]), expected)
    assert "are damaged; they are computed again" in caplog.text and path.read_bytes() == whole


@pytest.mark.parametrize("kind", ["pipe", "directory", "endless", "link to nothing"])
def test_what_is_no_file_in_the_cache_neither_stops_nor_hangs_a_prompt(small, tmp_path, caplog, kind):
    encoder = cached_encoder(small, tmp_path)
    expected = encoder.encode(PROMPTS[:1])
    (path,) = tmp_path.iterdir()
    path.unlink()
    make = {
        "pipe": lambda: os.mkfifo(path),
        "directory": path.mkdir,
        "endless": lambda: path.symlink_to("/dev/zero"),
        "link to nothing": lambda: path.symlink_to("absent"),
    }
    make[kind]()
    assert torch.equal(encoder.encode(PROMPTS[:1]), expected)
    assert "cannot be read" in caplog.text


def test_flipped_and_cut_bytes_of_states_are_never_taken(small, tmp_path):
    expected = cached_encoder(small, tmp_path).encode(PROMPTS[:1])
    files = TextStateFiles(tmp_path, "small", 64, SMALL.dim)
    (path,) = tmp_path.iterdir()
    whole, source = path.read_bytes(), random.Random(0)
    for trial in range(100):
        content = bytearray(whole)
        content[source.randrange(len(whole))] ^= 1 << source.randrange(8)
        path.write_bytes(content[: source.randrange(len(whole))] if trial % 3 == 0 else content)
        found = files.load(PROMPTS[0], ROWS, torch.float32)
        assert found is None or torch.equal(found, expected[0, :ROWS])


def test_a_cache_directory_that_cannot_be_made_costs_a_warning(small, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    found = cached_encoder(small, tmp_path / "file" / "states").encode(PROMPTS[:1])
    assert torch.equal(found, plain_states(small))
    assert "cannot be kept in" in caplog.text
