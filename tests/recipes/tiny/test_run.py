import dataclasses
import json

import torch

from recipes.tiny.run import export, load_config, load_transformer
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
    torch.save({"average": WanDiT(preset.model).state_dict()}, directory / "dit.pt")


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
    for name, value in torch.load(tmp_path / "dit.pt", weights_only=True)["average"].items():
        assert torch.equal(model.state_dict()[name], value.half().float())


def test_finished_weights_are_preferred_to_those_of_a_run_that_goes_on(tmp_path):
    write_untrained_run(tmp_path)
    torch.manual_seed(1)
    finished = WanDiT(PRESETS["tiny"].model).state_dict()
    torch.save(finished, tmp_path / "dit_weights.pt")
    loaded = load_transformer(load_config(tmp_path), tmp_path).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in finished.items())
