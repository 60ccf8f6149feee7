"""Golden files whose header and tensors do not belong together, which is seen before the replay."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rfengine.checkpoint.loader import read_safetensors, save_weights
from rfengine.parity.golden_file import GoldenFile

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
FILES = sorted(GOLDEN.glob("*.safetensors"))
EMA, VAE, UMT5 = (GOLDEN / f"{name}.safetensors" for name in ("ema_sink", "vae", "umt5"))
# A size that is another whole number is right by itself; these are the ones that no tensor's shape tells and
# that change the results instead.
SEEN_IN_RESULTS = {"local_attn_size", "sink_size", "alpha", "timestep_shift", "context_timestep"}
# The noise was recorded, so a replay draws nothing: its seed changes nothing.
IRRELEVANT = {"seed"}


def opened(path: Path) -> GoldenFile:
    return GoldenFile(path, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_another_size_in_the_header_than_in_the_tensors_is_refused(path: Path) -> None:
    golden = opened(path)
    golden.config_and_weights()
    header = golden.header
    for key, value in header.items():
        if type(value) is not int or key in SEEN_IN_RESULTS | IRRELEVANT:
            continue
        if key in ("frames_per_chunk", "num_heads") and golden.kind == "causal":
            continue  # compared with the shapes of the noise and of the recorded cache, in the replay
        for other in (value + 1, 2 * value, 2**20):
            golden.header = header | {key: other}
            with pytest.raises(ValueError, match=f"state[sd] {key} (is )?{other}"):
                golden.config_and_weights()
    for key, value in header.items():
        if isinstance(value, list) and key not in ("denoising_steps", "warped_timesteps"):
            golden.header = header | {key: [*value, value[-1]]}
            with pytest.raises(ValueError, match=f"states {key}"):
                golden.config_and_weights()


def changed(source: Path, path: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    tensors, metadata = read_safetensors(source)
    change(tensors)
    save_weights(path, tensors, {"config": metadata["config"]})
    return path


@pytest.mark.parametrize(
    ("source", "change", "message"),
    [
        (VAE, lambda tensors: tensors.update({"t.more": torch.ones(1)}), "it has t.more, which a vae file"),
        (VAE, lambda tensors: tensors.update({"more": torch.ones(1)}), "it has .*more, neither w"),
        (VAE, lambda tensors: tensors.pop("t.video"), "no tensor t.video"),
        (VAE, lambda tensors: tensors.pop("t.pixels"), "no tensor t.pixels"),
        (
            VAE,
            lambda tensors: [tensors.pop(f"t.{name}") for name in ("latents", "video", "pixels", "encoded")],
            "no tensor t.latents",
        ),
        (UMT5, lambda tensors: tensors.pop("t.mask"), "no tensor t.mask"),
        (UMT5, lambda tensors: tensors.update({"t.mask": torch.ones(2, 64)}), "t.mask is in torch.float32"),
        (UMT5, lambda tensors: tensors.update({"t.ids": torch.ones(2, 0).long()}), "t.ids is .*none empty"),
        (UMT5, lambda tensors: tensors.update({"t.ids": torch.ones(2).long()}), "it must have 2 axes"),
        (UMT5, lambda tensors: tensors.update({"t.embeds": torch.ones(2, 64, 64).int()}), "floating-point"),
        (
            UMT5,
            lambda tensors: tensors.update({key: tensors[key].long() for key in ("w.norm.weight",)}),
            "are whole numbers",
        ),
    ],
)  # fmt: skip
def test_tensors_that_no_replay_can_use_are_refused(
    source: Path, change: Callable, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        opened(changed(source, tmp_path / "changed.safetensors", change))


def test_a_header_of_text_in_the_place_of_config_is_refused(tmp_path: Path) -> None:
    tensors, _ = read_safetensors(UMT5)
    for metadata in ({}, {"config": ""}, {"config": json.dumps([1])}):
        save_weights(tmp_path / "x.safetensors", tensors, metadata)
        with pytest.raises(ValueError, match="no JSON object under 'config'"):
            opened(tmp_path / "x.safetensors")
