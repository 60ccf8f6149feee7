import dataclasses

import torch

from rfengine.config import PRESETS
from rfengine.models.text_encoder import build_umt5
from rfengine.models.vae import WanVAE
from rfengine.training.latent_dataset import encode_dataset, foreground_cells, load_dataset, save_dataset
from rfengine.training.stage_run import StageRun
from rfengine.training.toy_world import Scene, SceneObject, render

VAE_CONFIG = dataclasses.replace(PRESETS["tiny"].vae, base_dim=4, dim_mult=(1, 1, 1, 1))


def test_foreground_is_where_the_shape_is_at_that_time():
    scene = Scene((SceneObject("red", "square", "small"),), "moving", "fast", "right", "grey wall")
    cells = foreground_cells(scene, render(scene, 9), WanVAE(VAE_CONFIG))
    assert cells.shape == (3, 8, 8)
    # the square spans x = 21.4 .. 42.6 at first, and moves 2 pixels a frame over four frames a latent
    assert cells[0, 4].tolist() == [False, False, True, True, True, True, False, False]
    assert cells[1, 4].tolist() == [False, False, True, True, True, True, True, False]
    assert cells[2, 4].tolist() == [False, False, False, True, True, True, True, True]
    assert not cells[:, 0].any()


def test_dataset_is_read_back_as_it_was_encoded(tmp_path):
    torch.manual_seed(0)
    text_model = build_umt5(PRESETS["tiny"].text)
    run = StageRun(tmp_path, "videos", 0.001)
    written = encode_dataset(WanVAE(VAE_CONFIG).eval(), text_model, 128, 4, run, 0)
    save_dataset(written, tmp_path / "videos.pt")
    read = load_dataset(tmp_path / "videos.pt")
    for name in ("latents", "foreground", "texts", "open_texts", "text_rows"):
        assert torch.equal(getattr(read, name), getattr(written, name))
    count = len(read.latents)
    assert read.latents.shape == (count, 8, 4, 8, 8) and read.foreground.shape == (count, 4, 8, 8)
    assert read.texts.shape[1:] == (128, 96) and read.text_rows.shape == (count,)
    assert int(read.text_rows.max()) == len(read.texts) - 1
