"""Headers of golden files with wrong values: each is refused before anything is replayed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from rfengine.checkpoint.tensor_file import read_header
from rfengine.parity.golden_header import check_golden_header, parse_golden_header

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
FILES = sorted(GOLDEN.glob("*.safetensors"))
WRONG = {
    "null": None, "true": True, "false": False, "minus two": -2, "third": 1 / 3, "wide": 2**70,
    "huge": 10**400, "nan": math.nan, "infinity": math.inf, "large": 1e300, "text": "x", "digits": "7",
    "empty text": "", "list": [], "list of null": [None], "list of texts": ["1000"], "object": {},
    "nested": [[1]], "long list": [1] * 2000, "list of nan": [math.nan], "list of wide": [2**70],
}  # fmt: skip
# numbers that are no integers are what these are made of; whether they are right the results tell
FRACTIONS = ("alpha", "timestep_shift", "context_timestep", "layer_norm_epsilon")


def header_of(path: Path) -> dict[str, Any]:
    return json.loads(read_header(path)[1]["config"])


def read(header: Any) -> None:
    check_golden_header(parse_golden_header(json.dumps(header)))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_recorded_header_is_read(path: Path) -> None:
    read(header_of(path))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_wrong_value_of_any_key_is_refused_in_one_sentence(path: Path) -> None:
    header = header_of(path)
    for key in header:
        for name, value in WRONG.items():
            if key in FRACTIONS and name == "third" and header.get("sink", "ema") == "ema":
                continue
            if key in ("timestep_shift", "context_timestep") and name == "third":
                continue
            with pytest.raises(ValueError, match="its header|its kind") as caught:
                read(header | {key: value})
            assert len(str(caught.value)) < 400 and "\n" not in str(caught.value), (key, name)


@pytest.mark.parametrize(
    "key",
    [
        "kind", "num_heads", "frames_per_chunk", "local_attn_size", "sink_size", "sink", "positions", "alpha",
        "denoising_steps", "warped_timesteps", "timestep_shift",
    ],
)  # fmt: skip
def test_a_replay_guesses_nothing_that_is_missing(key: str) -> None:
    header = header_of(GOLDEN / "ema_sink.safetensors")
    del header[key]
    with pytest.raises(ValueError, match=f"its header has (no )?{key}"):
        read(header)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"colour": 1}, "has 'colour', which a causal file has not"),
        ({"vocab": 384}, "has 'vocab', which a causal file has not"),
        ({"kind": "clip"}, "its kind is 'clip'; the engine replays causal, vae, umt5"),
        ({"warped_timesteps": [1000.0, 937.5]}, "has 2 warped_timesteps for 4 denoising_steps"),
        ({"local_attn_size": 0}, "it must be -1 or at least 1"),
        ({"local_attn_size": -3}, "local_attn_size -3; it must be a whole number from -1"),
        ({"sink": "frozen"}, "alpha 0.9 and sink 'frozen', which averages nothing"),
        ({"alpha": 1.5}, "alpha 1.5; it must be a number from 0 to 1"),
        ({"num_heads": 2.0}, "num_heads 2.0; it must be a whole number"),
        ({"denoising_steps": [1000, 750, 500, 0]}, "denoising_steps .* a list, each a whole number from 1"),
        ({"seed": -1}, "seed -1; it must be a whole number from 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_a_sentence(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(header_of(GOLDEN / "ema_sink.safetensors") | values)


@pytest.mark.parametrize("text", ["", "[]", "3", "null", "{", "[" * 5000, '{"kind": "vae", "kind": "vae"}'])
def test_text_that_is_no_header_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="its header has no JSON object under 'config'"):
        parse_golden_header(text)
