"""Datasets of latents: made, kept, and refused where a file holds anything else."""

import dataclasses
import random

import pytest
import torch

from recipes.tiny.noise import VALUES, places
from recipes.tiny.videos import TRAINED_WORLD, encode_dataset, foreground_cells, video_parts
from rfengine.models.vae import WanVAE
from rfengine.presets import PRESETS
from rfengine.toy.captions import sample_scenes
from rfengine.toy.data import load_dataset, save_dataset
from rfengine.toy.world import Scene, SceneObject, render

VAE_CONFIG = dataclasses.replace(PRESETS["tiny"].vae, base_dim=4, dim_mult=(1, 1, 1, 1))


def test_foreground_is_where_the_shape_is_at_that_time():
    scene = Scene((SceneObject("red", "square", "small"),), "moving", "fast", "right", "grey wall")
    cells = foreground_cells([(scene, 0, 9)], render(scene, 9), WanVAE(VAE_CONFIG))
    assert cells.shape == (3, 8, 8)
    # the square spans x = 21.4 .. 42.6 at first, and moves 2 pixels a frame over four frames a latent
    assert cells[0, 4].tolist() == [False, False, True, True, True, True, False, False]
    assert cells[1, 4].tolist() == [False, False, True, True, True, True, True, False]
    assert cells[2, 4].tolist() == [False, False, False, True, True, True, True, True]
    assert not cells[:, 0].any()


def test_dataset_is_read_back_as_it_was_encoded(tmp_path):
    written = encode_dataset("tiny", 2, videos=9, seed=0)
    save_dataset(written, tmp_path / "videos.pt")
    read = load_dataset(tmp_path / "videos.pt")
    for name in ("latents", "foreground", "texts", "text_rows", "places", "values"):
        found, expected = getattr(read, name), getattr(written, name)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert read.latents.shape == (9, 8, 6, 8, 8) and read.foreground.shape == (9, 6, 8, 8)
    assert read.texts.shape[1:] == (144, 96) and read.text_rows.shape == (9, 2, 2)
    assert read.text_rows.flatten().unique().tolist() == list(range(len(read.texts)))
    first = sample_scenes(8, 0, TRAINED_WORLD, "train")
    assert torch.equal(read.places[:8], torch.tensor([places(scene, TRAINED_WORLD) for scene in first]))
    assert read.values.shape == (9, 3, len(VALUES), 2) and not read.values[:, 2, 1:3].isnan().any()
    assert read.values[:, 0].isnan().all()
    switched = read.text_rows[:, 0, 0] != read.text_rows[:, 1, 0]
    assert 0 < int(switched.sum()) < 9 and len(read.texts) == 2 * (9 + int(switched.sum()))


def test_a_scene_that_follows_begins_with_a_chunk_and_goes_on_from_the_first() -> None:
    generator, starts = random.Random(0), [0, 9, 21, 33]
    drawn = [video_parts(scene, starts, generator) for scene in sample_scenes(200, 1)]
    switches = [parts[1][1] for parts in drawn if len(parts) == 2]
    assert 60 < len(switches) < 100 and set(switches) == {9, 21}
    for first, at, end in (parts[0] for parts in drawn):
        assert at == 0 and end in (33, 9, 21)
        assert render(first, 1).shape == (1, 64, 64, 3)
    assert all(parts[-1][2] == 33 for parts in drawn)
    assert all(len(video_parts(scene, starts[:2], generator)) == 1 for scene in sample_scenes(50, 1))


GOOD = {
    "latents": torch.zeros(2, 8, 4, 3, 3).half(),
    "foreground": torch.zeros(2, 4, 3, 3, dtype=torch.bool),
    "texts": torch.zeros(3, 5, 7).half(),
    "text_rows": torch.tensor([[[0, 1]], [[2, 0]]]),
    "places": torch.zeros(2, 3),
    "values": torch.zeros(2, 3, len(VALUES), 2),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": torch.zeros(2, 8, 4, 3)}, "latents .2, 8, 4, 3. and texts"),
        ({"latents": GOOD["latents"][:0]}, "latents .0, 8"),
        ({"latents": GOOD["latents"] + torch.nan}, "latents in torch.float16 that are not all finite"),
        ({"texts": GOOD["texts"].int()}, "texts in torch.int32 that are not all finite"),
        ({"foreground": torch.zeros(2, 4, 3, 3)}, "foreground in torch.float32"),
        ({"foreground": torch.zeros(2, 4, 3, dtype=torch.bool)}, "foreground .2, 4, 3. where"),
        ({"text_rows": torch.tensor([[[0, 1]], [[3, 0]]])}, "text_rows from 0 to 3 of 3 texts"),
        ({"text_rows": torch.tensor([[[0, 1]], [[2, -1]]])}, "text_rows from -1 to 2 of 3 texts"),
        ({"text_rows": torch.tensor([[[0, 1]]])}, "text_rows .1, 1, 2. where"),
        ({"places": torch.zeros(3, 3)}, "places .3, 3. where"),
        ({"places": torch.full((2, 3), torch.nan)}, "places in torch.float32 that are not all finite"),
        ({"values": torch.zeros(2, 2, len(VALUES), 2)}, "values .2, 2, 12, 2. where"),
        ({"more": torch.zeros(1)}, "holds .*more"),
    ],
)
def test_file_of_other_tensors_is_refused(tmp_path, change, message):
    torch.save(GOOD | change, tmp_path / "clips.pt")
    with pytest.raises(ValueError, match=rf"clips.pt .*{message}.*--stage videos"):
        load_dataset(tmp_path / "clips.pt")


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.99])
def test_truncated_file_is_refused(tmp_path, kept):
    path = tmp_path / "clips.pt"
    torch.save(GOOD, path)
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    with pytest.raises(ValueError, match=r"clips\.pt"):
        load_dataset(path)


@pytest.mark.parametrize("content", [[1, 2], {"latents": 3}, torch.zeros(2)])
def test_foreign_file_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "clips.pt")
    with pytest.raises(ValueError, match=r"clips\.pt"):
        load_dataset(tmp_path / "clips.pt")


def test_absent_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"clips\.pt does not exist"):
        load_dataset(tmp_path / "clips.pt")
