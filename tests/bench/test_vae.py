"""bench/vae.py on the smallest video: figures, quality, floors, refusals."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import pytest
import torch

from bench import vae, vae_decoders
from bench.vae import REST, Options, WrongDecoderError, layer_parts, layer_paths, measure, render
from bench.vae_decoders import BY_LATENT, FP8_ROW, OURS, PLAIN, TINY_ROW, Setting, diffusers_candidates
from rfengine.checkpoint.checkpoint import Checkpoint
from rfengine.cli.process import run_script
from rfengine.config import VAEConfig
from rfengine.costs.vae import decode_work
from rfengine.grid import LatentGrid
from rfengine.presets import PRESETS

SMALLEST = Options(
    device="cpu", model="tiny", height=32, width=32, chunks=2, fp8=True, diffusers=False, threads=1
)


def setting_of(config: VAEConfig) -> Setting:
    checkpoint = Checkpoint.random(dataclasses.replace(PRESETS["wan-1.3b"], vae=config))
    grid = LatentGrid.of(checkpoint.config, 32, 32)
    return Setting.load(checkpoint, grid, torch.float32, torch.device("cpu"))


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    threads = torch.get_num_threads()
    found = measure(SMALLEST)
    torch.set_num_threads(threads)
    return found


def test_every_decoder_has_times_and_its_distance_from_float32(figures):
    rows = {row["decoder"]: row for row in figures["decoders"]}
    assert list(rows) == [OURS, FP8_ROW, PLAIN, BY_LATENT, TINY_ROW]
    assert [row["tier"] for row in rows.values()] == [
        "lossless", "near-lossless", "lossless", "lossless", "reduced"
    ]  # fmt: skip
    for row in rows.values():
        assert len(row["chunks_ms"]) == 2 and row["frame_ms"] == pytest.approx(row["chunk_ms"] / 12)
    assert rows[OURS]["psnr_db"] > 100 > rows[FP8_ROW]["psnr_db"] > 40 > rows[TINY_ROW]["psnr_db"]
    assert rows[PLAIN]["largest_error"] == 0 < rows[OURS]["largest_error"] < 1e-5
    assert rows[OURS]["floor_ms"] > 0 and "floor_ms" not in rows[TINY_ROW]
    assert figures["chunk_over_latent_by_latent"].keys() == {OURS, PLAIN}
    assert figures["left_out"] == {"diffusers": "switched off"}
    assert json.loads(json.dumps(figures)) == figures


def test_the_table_has_a_line_for_every_decoder_and_every_layer(figures):
    lines = render(figures).splitlines()
    assert any(line.startswith(f"{TINY_ROW:<28}reduced") for line in lines)
    assert sum(line.startswith("decoder.upsamples") for line in lines) == 13
    assert lines[-1] == "left out: diffusers: switched off"


def test_layers_cover_the_work_of_the_whole_but_for_what_folding_saves(figures):
    setting = setting_of(VAEConfig(base_dim=32))
    parts = layer_parts(setting)
    assert list(parts) == [*layer_paths(setting), REST] and all(parts.values())
    work = decode_work(setting.config.vae, setting.grid, 3, False)
    upsampling = sum(2 * w.multiply_adds for path, w in work.products.items() if "resample" in path)
    whole = sum(part.flops for held in parts.values() for part in held)
    assert whole == pytest.approx(2 * work.multiply_adds - 5 / 9 * upsampling)
    eights = [part for held in layer_parts(setting, fp8=True).values() for part in held if part.is_fp8]
    assert sum(part.flops > 0 for part in eights) == 17
    assert len(figures["layers"]) == 17 and all(row["ms"] > 0 for row in figures["layers"])


def test_diffusers_has_the_same_weights_and_streams_to_the_same_pixels():
    pytest.importorskip("diffusers")
    setting = setting_of(VAEConfig(base_dim=8))
    latents, exact = vae._exact(setting)
    for candidate in diffusers_candidates(setting, compiles=False):
        with torch.no_grad():
            quality = vae._quality(candidate, latents, exact)
            assert quality["psnr_db"] > 100, candidate.name
            decode = candidate.open(True)
            assert [len(decode(chunk)) for chunk in latents] == [9, 12, 12]


def test_a_wrong_decoder_is_not_timed(monkeypatch):
    run = vae._quality

    def spoiled(candidate, latents, exact):
        found = run(candidate, latents, exact)
        return {**found, "psnr_db": 60.0} if candidate.name == OURS else found

    monkeypatch.setattr(vae, "_quality", spoiled)
    monkeypatch.setattr(vae, "_time", lambda *_: pytest.fail("it was timed"))
    with pytest.raises(WrongDecoderError, match="our decoder is wrong, so nothing was timed: 60.0 dB"):
        measure(SMALLEST)


def test_what_cannot_run_has_its_reason_instead_of_figures(monkeypatch):
    def broken(packs):
        raise RuntimeError("no compiler here\nand more")

    made = vae_decoders.our_candidates

    def candidates(setting, fp8):
        every = list(made(setting, fp8))
        return [*every, dataclasses.replace(every[0], name="broken", open=broken)]

    monkeypatch.setattr(vae, "our_candidates", candidates)
    monkeypatch.setattr(vae.importlib.util, "find_spec", lambda _: None)
    figures = measure(dataclasses.replace(SMALLEST, chunks=1, fp8=None, diffusers=True))
    assert figures["left_out"]["diffusers"] == "diffusers is not installed: pip install diffusers"
    row = next(row for row in figures["decoders"] if row["decoder"] == "broken")
    assert row == {"decoder": "broken", "tier": "lossless", "error": "RuntimeError: no compiler here"}
    assert "no compiler here" in render(figures) and figures["left_out"]["FP8"] == "not asked for"


@pytest.mark.parametrize(
    ("options", "message"),
    [(("--chunks", "0"), "--chunks is 0; it must be at least 1"), (("--height", "30"), "multiple of")],
)
def test_a_setting_that_cannot_be_is_one_sentence(options, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["vae.py", "--device", "cpu", *options])
    assert run_script("vae", Options, vae.run) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1
