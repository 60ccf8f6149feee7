"""What calibration finds of the products, and the command that writes it."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from rfengine import calibration, cli
from rfengine.calibration import CalibrationRun, calibrate
from rfengine.checkpoint.checkpoint import Checkpoint
from rfengine.checkpoint.directories import checkpoint_directory
from rfengine.checkpoint.fp8_table import TABLE_FILE, FP8Table
from rfengine.config import RuntimeConfig
from rfengine.grid import LatentGrid
from rfengine.models.fp8_products import product_names
from rfengine.ops import reference
from rfengine.pipeline import Pipeline
from support.models import SMALL, small_pipeline, write_pipeline


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "small").mkdir()
    return write_pipeline(tmp_path / "small", small_pipeline())


def run_of(checkpoint: Checkpoint, chunks: int = 4) -> CalibrationRun:
    grid = LatentGrid.of(checkpoint.config)
    return CalibrationRun(("a cat", "a dog"), chunks, grid, torch.device("cpu"), torch.float32)


def test_every_product_has_an_error_as_large_as_rounding_makes_it(checkpoint: Path) -> None:
    opened = Checkpoint.open(checkpoint)
    found = calibrate(opened, run_of(opened), 0.1)
    assert tuple(found.table.errors) == product_names(opened.config.model)
    assert all(0.01 < error < 0.1 for error in found.table.errors.values())
    assert found.table.left_out == () and found.table.fingerprint == opened.fingerprint()
    assert len(found.difference) == 4 and all(0.001 < each < 0.5 for each in found.difference)
    assert calibrate(opened, run_of(opened), 0.1) == found  # the same from run to run


def test_what_is_above_the_limit_is_left_out_with_what_depends_on_it(checkpoint: Path) -> None:
    opened = Checkpoint.open(checkpoint)
    errors = calibrate(opened, run_of(opened, 1), 1.0).table.errors
    hidden = [name for name in errors if name.endswith(".ffn.0")]
    limit = min(errors[name] for name in hidden) * 0.999
    left_out = calibrate(opened, run_of(opened, 1), limit).table.left_out
    above = {name for name, error in errors.items() if error > limit}
    assert set(hidden) <= above
    assert set(left_out) == above | {name.replace(".ffn.0", ".ffn.2") for name in hidden}
    assert list(left_out) == [name for name in errors if name in left_out]  # in the order of the model
    everything = calibrate(opened, run_of(opened, 1), 1e-6)
    assert set(everything.table.left_out) == set(errors) and everything.difference == (0.0,)


def test_a_product_that_rounding_spoils_is_found(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row scale for a row with one huge value leaves nothing of the others in a format of 4 bits."""

    def coarse(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values, scale = reference.row_fp8(x)
        return values, scale * 1.5  # as a wrong scale would

    opened = Checkpoint.open(checkpoint)
    monkeypatch.setattr(calibration, "row_fp8", coarse)
    errors = calibrate(opened, run_of(opened, 1), 0.1).table.errors
    spoiled = {name for name, error in errors.items() if error > 0.4}
    assert {name.split(".", 2)[2] for name in spoiled} >= {"self_attn.qkv", "cross_attn.q"}


def test_heads_are_measured_in_units_of_their_own(tmp_path: Path) -> None:
    """One unit for a whole row would leave nothing of the second head."""
    pipeline, head_dim = small_pipeline(), SMALL.dim // SMALL.num_heads
    attention = pipeline.model.blocks[0].self_attn
    attention.v.weight.data[:head_dim] *= 1e6
    attention.v.bias.data[:head_dim] *= 1e6
    attention.o.weight.data[:, :head_dim] = 0
    opened = Checkpoint.open(write_pipeline(tmp_path, pipeline))
    assert calibrate(opened, run_of(opened, 1), 0.1).table.errors["blocks.0.self_attn.o"] < 0.1


def test_hidden_rows_are_measured_in_the_units_that_the_product_has(tmp_path: Path) -> None:
    """A bias of which GELU makes zero is within their reach all the same, and leaves nothing of others."""
    pipeline = small_pipeline()
    pipeline.model.blocks[0].ffn[0].bias.data[0] = -1e7
    opened = Checkpoint.open(write_pipeline(tmp_path, pipeline))
    table = calibrate(opened, run_of(opened, 1), 0.1).table
    assert table.errors["blocks.0.ffn.2"] > 0.9 and table.left_out == ("blocks.0.ffn.2",)


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr(Checkpoint, "load", load)


def test_what_has_no_table_or_no_text_is_refused_before_anything_is_read(
    checkpoint: Path, unread: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["calibrate", str(checkpoint), "--prompt", "a cat", " "]) == 2
    assert "a prompt ' ' is empty; give it at least one word" in capsys.readouterr().err
    vae, encoder = (checkpoint / f"{part}.safetensors" for part in ("vae", "text_encoder"))
    away = encoder.rename(checkpoint / "away")
    assert cli.main(["calibrate", str(checkpoint)]) == 2
    assert "has no text encoder or no tokenizer" in capsys.readouterr().err
    away.rename(encoder)
    vae.unlink()  # a pickle has no fingerprint
    torch.save({"decoder": torch.ones(2)}, vae.with_suffix(".pth"))
    assert cli.main(["calibrate", str(checkpoint)]) == 2
    assert "vae.pth is a pickle, which the engine does not load" in capsys.readouterr().err


def test_a_gpu_without_fp8_is_refused_before_anything_is_read(
    checkpoint: Path, unread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA A100")
    opened = Checkpoint.open(checkpoint)
    run = dataclasses.replace(run_of(opened), device=torch.device("cuda", 0))
    message = "device is cuda:0 and NVIDIA A100 has no FP8 products, .*; calibrate on 'cpu'"
    with pytest.raises(RuntimeError, match=message):
        calibrate(opened, run, 0.1)


def test_activations_that_overflow_are_told(tmp_path: Path) -> None:
    pipeline = small_pipeline()
    expand, _, contract = pipeline.model.blocks[1].ffn
    for layer in (expand, contract):
        layer.weight.data.mul_(300)  # finite in float16, unlike what they make
    opened = Checkpoint.open(write_pipeline(tmp_path, pipeline))
    run = dataclasses.replace(run_of(opened, 1), dtype=torch.float16)
    with pytest.raises(
        ValueError, match=r"result of blocks\..* are not finite in float16; calibrate in another"
    ):
        calibrate(opened, run, 0.1)
    assert calibrate(opened, run_of(opened, 1), 1.0).table.left_out == ()


def test_the_command_writes_the_table_that_fp8_finds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "tiny"
    shutil.copytree(checkpoint_directory("tiny"), directory)
    assert (
        cli.main(["calibrate", str(directory), "--chunks", "1", "--limit", "0.06", "--prompt", "a red ball"])
        == 0
    )
    told = capsys.readouterr().out
    table = FP8Table.read(directory / TABLE_FILE)
    assert "1 videos of 1 chunks at 64 x 64 pixels, in float32" in told
    assert f"{len(table.left_out)} of 24 products left out of FP8" in told and table.left_out
    pipeline = Pipeline.from_pretrained(directory, "cpu", runtime=RuntimeConfig(precision="fp8"))
    assert pipeline.model.left_out_of_fp8 == set(table.left_out)


def test_what_cannot_be_calibrated_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "no" / "table.json"
    assert cli.main(["calibrate", "tiny", "--out", str(out)]) == 2
    assert (
        "table.json cannot be written; name a file in a directory of yours by --out"
        in capsys.readouterr().err
    )
    assert cli.main(["calibrate", "tiny", "--out", "/dev/null"]) == 2
    assert "/dev/null cannot be written; name a file in a directory of yours" in capsys.readouterr().err
    assert cli.main(["calibrate", str(tmp_path / "nothing")]) == 2
    assert "nothing is no directory; give 'tiny' or a checkpoint directory" in capsys.readouterr().err
    assert cli.main(["calibrate", "tiny", "--out", str(tmp_path / "t.json"), "--limit", "2"]) == 2
    assert "--limit is 2" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
