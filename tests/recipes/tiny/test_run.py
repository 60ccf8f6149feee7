import dataclasses
import json

import pytest
import torch

from recipes.tiny.run import Options, export, load_config, load_text_model, load_vae, run_stage
from rfengine.checkpoint.checkpoint import Checkpoint
from rfengine.checkpoint.manifest import verify
from rfengine.config import PRESETS, to_dict
from rfengine.models.dit import WanDiT
from rfengine.models.text_encoder import build_umt5
from rfengine.models.vae import WanVAE


def write_untrained_run(directory) -> None:
    torch.manual_seed(0)
    preset = PRESETS["tiny"]
    measured = dataclasses.replace(preset.vae, latents_std=(2.0,) * preset.vae.z_dim)
    (directory / "vae.json").write_text(json.dumps(to_dict(measured)))
    torch.save(WanVAE(measured).state_dict(), directory / "vae_weights.pt")
    torch.save(build_umt5(preset.text).state_dict(), directory / "text_weights.pt")
    torch.save(WanDiT(preset.model).state_dict(), directory / "dit_weights.pt")


def test_exported_checkpoint_is_the_run_rounded_to_float16_with_measured_statistics(tmp_path):
    write_untrained_run(tmp_path)
    config = load_config(tmp_path)
    assert config.vae.latents_std == (2.0,) * config.vae.z_dim
    export(config, tmp_path, tmp_path / "out")
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert checkpoint.config == config
    verify(tmp_path / "out")
    assert sum(path.stat().st_size for path in (tmp_path / "out").iterdir()) < 16 * 2**20
    model = checkpoint.load(lambda: WanDiT(config.model), "transformer", torch.float32)
    for name, value in torch.load(tmp_path / "dit_weights.pt", weights_only=True).items():
        assert torch.equal(model.state_dict()[name], value.half().float())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "vae_weights.pt does not exist"),
        (b"PK", "vae_weights.pt"),
        (b"", "vae_weights.pt"),
    ],
)
def test_absent_or_damaged_weights_are_named(tmp_path, content, message):
    write_untrained_run(tmp_path)
    (tmp_path / "vae_weights.pt").unlink()
    if content is not None:
        (tmp_path / "vae_weights.pt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_vae(tmp_path)


@pytest.mark.parametrize("steps", [0, -1, 10**12])
def test_steps_that_never_begin_or_never_end_are_refused(tmp_path, steps):
    with pytest.raises(ValueError, match=f"--steps is {steps}; it must be"):
        run_stage(Options("text", tmp_path / "run", steps))
    assert not (tmp_path / "run").exists()


def test_a_stage_leaves_weights_and_its_measurement(tmp_path):
    run_stage(Options("text", tmp_path, steps=1))
    assert load_text_model(PRESETS["tiny"], tmp_path).training is False
    (line,) = (tmp_path / "evaluations.jsonl").read_text().splitlines()
    assert json.loads(line).keys() == {"stage", "held_out_accuracy"}
