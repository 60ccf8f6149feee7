"""The picture of the README is what the reader gets, and what it shows does not decay."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image, ImageSequence
from torch.nn import functional

from rfengine.toy.world import WorldConfig

ROOT = Path(__file__).resolve().parents[1]
LARGEST_ERROR = 0.02  # mean of the difference of a frame, of 1; the 32 colours of the file cost 0.0163
LARGEST_SHARE = 0.005  # of a frame off its background; the circle over the grey wall reaches 0.057 in 8 s
OFF = 0.10  # of 1: further from the background than this is off it
REACH = 17  # pixels round a coloured one that belong to the shape and its edge


@pytest.fixture(scope="module")
def picture() -> object:
    import importlib.util

    spec = importlib.util.spec_from_file_location("demo_picture", ROOT / "docs" / "demo_picture.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo_picture"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def frames(picture: object) -> list[Image.Image]:
    return picture.picture_frames()


def test_the_picture_is_what_the_model_makes(picture: object, frames: list[Image.Image]) -> None:
    with Image.open(picture.PICTURE) as file:
        stored = [frame.convert("RGB") for frame in ImageSequence.Iterator(file)]
    assert len(stored) == len(frames)
    for found, expected in zip(stored, frames, strict=True):
        difference = numpy.abs(numpy.asarray(found, dtype=float) - numpy.asarray(expected, dtype=float))
        assert difference.mean() / 255 <= LARGEST_ERROR


def test_no_stream_of_the_picture_decays(picture: object, frames: list[Image.Image]) -> None:
    side = WorldConfig().width * picture.ENLARGED
    rows = numpy.stack([numpy.asarray(frame) for frame in frames])
    for place, prompt in enumerate(picture.prompts()):
        left = place * (side + picture.GAP)
        video = rows[:, :: picture.ENLARGED, left : left + side : picture.ENLARGED]
        share = share_off_background(torch.from_numpy(video))
        assert share.max() <= LARGEST_SHARE, f"{prompt}: {share.max():.4f} at frame {share.argmax()}"


def share_off_background(video: torch.Tensor) -> torch.Tensor:
    """Of every frame, uint8 [T, H, W, 3], the share that is neither near a colour nor as in most frames."""
    pixels = video.float() / 255
    coloured = (pixels.amax(-1) - pixels.amin(-1) > 0.3).float()[:, None]
    edge = REACH // 2
    near = functional.max_pool2d(functional.pad(coloured, (edge,) * 4, mode="circular"), REACH, stride=1)[
        :, 0
    ]
    truth = torch.where((near == 0)[..., None], pixels, torch.nan).nanmedian(0).values
    return (((pixels - truth).abs().amax(-1) > OFF) & (near == 0)).float().mean((1, 2))


def test_make_demo_makes_the_first_stream_of_the_picture(picture: object) -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^PROMPT\s+\?= (.+)$", makefile, re.MULTILINE)[1] == picture.prompts()[0]
    assert f"--seconds {picture.SECONDS} --seed {picture.SEED} -o demo.mp4" in makefile


def test_the_readme_generates_the_same_stream(picture: object) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f'prompt = "{picture.prompts()[0]}"' in readme
    assert f"pipe.generate(prompt, seconds={picture.SECONDS}, seed={picture.SEED})" in readme
