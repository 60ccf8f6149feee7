import dataclasses
import json

import pytest
import torch

from recipes.tiny.run import Options, export, run, run_stage
from recipes.tiny.stages import CHECKPOINT
from recipes.tiny.training import TINY, ToyModel, save_part, stored_engine
from rfengine.checkpoint.checkpoint import Checkpoint
from rfengine.checkpoint.manifest import verify
from rfengine.models.dit import WanDiT
from rfengine.models.text_encoder import build_umt5
from rfengine.models.vae import WanVAE
from rfengine.presets import PRESETS


@pytest.fixture
def untrained(tmp_path):
    """The checkpoint directory of a run whose stages are all done."""
    torch.manual_seed(0)
    preset = PRESETS["tiny"]
    measured = dataclasses.replace(preset.vae, latents_std=(2.0,) * preset.vae.z_dim)
    engine, directory = dataclasses.replace(preset, vae=measured), tmp_path / CHECKPOINT
    save_part(directory, engine, "vae", WanVAE(measured).state_dict())
    save_part(directory, engine, "text_encoder", build_umt5(preset.text).state_dict())
    save_part(directory, engine, "transformer", WanDiT(preset.model).state_dict())
    return directory


def test_exported_checkpoint_is_the_run_rounded_to_float16_with_its_statistics(untrained, tmp_path):
    config = stored_engine(untrained)
    assert config.vae.latents_std == (2.0,) * config.vae.z_dim
    export(untrained, tmp_path / "out")
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert checkpoint.config == config
    verify(tmp_path / "out")
    assert sum(path.stat().st_size for path in (tmp_path / "out").iterdir()) < 16 * 2**20
    model = checkpoint.load(lambda: WanDiT(config.model), "transformer", torch.float32)
    trained = ToyModel.load(untrained).transformer.state_dict()
    for name, value in trained.items():
        assert torch.equal(model.state_dict()[name], value.half().float())


@pytest.mark.parametrize("content", [None, b"PK", b""])
def test_absent_or_damaged_weights_are_named(untrained, tmp_path, content):
    (untrained / "vae.safetensors").unlink()
    if content is not None:
        (untrained / "vae.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"vae\.safetensors"):
        export(untrained, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("steps", [0, -1, 10**12])
def test_steps_that_never_begin_or_never_end_are_refused(tmp_path, steps):
    with pytest.raises(ValueError, match=f"--steps is {steps}; it must be"):
        run(Options("text", tmp_path / "run", steps))
    assert not (tmp_path / "run").exists()


def test_a_stage_leaves_weights_and_its_measurement(tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.tiny.text_encoder._HELD_OUT_TEXTS", 4)
    run_stage(Options("text", tmp_path, steps=1))
    checkpoint = Checkpoint.open(tmp_path / CHECKPOINT)
    assert checkpoint.config == TINY
    states = checkpoint.text_encoder("cpu", torch.float32).encode(["a small red circle"])
    assert states.shape == (1, 144, 96) and states.isfinite().all()
    (line,) = (tmp_path / "evaluations.jsonl").read_text().splitlines()
    assert json.loads(line).keys() == {"stage", "captions", "paraphrases", "open", "held_out_patterns"}
