"""The picture of the README is what the reader gets, and what it shows does not decay."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image, ImageSequence

from rfengine.evaluation.video_frames import DEFAULT_GRID
from rfengine.toy.captions import parse_caption
from rfengine.toy.detector import background_off, detect, score
from rfengine.toy.world import WorldConfig

ROOT = Path(__file__).resolve().parents[1]
LARGEST_ERROR = 0.01  # mean of the difference of a frame, of 1; the 128 colours of the file cost 0.0052
LARGEST_SHARE = 0.02  # of the background's pixels off by more than 0.06
DELAY = 2  # chunks after a switch that may be wrong


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


def test_no_stream_of_the_picture_decays_and_each_shows_what_is_said(
    picture: object, frames: list[Image.Image]
) -> None:
    side = WorldConfig().width * picture.ENLARGED
    rows = torch.from_numpy(numpy.stack([numpy.asarray(frame) for frame in frames]))
    for place, captions in enumerate(picture.prompts()):
        left = place * (side + picture.GAP)
        video = rows[:, :: picture.ENLARGED, left : left + side : picture.ENLARGED]
        for caption, part in zip(captions, parts_of(picture, video, len(captions)), strict=True):
            scene = parse_caption(caption)
            share = background_off(part, scene)
            assert share.max() <= LARGEST_SHARE, f"{caption}: {share.max():.4f} at frame {share.argmax()}"
            right = score(scene, detect(part))
            assert all(right[name] for name in ("colour", "shape", "size", "background")), (
                f"{caption}: {right}"
            )


def parts_of(picture: object, video: torch.Tensor, captions: int) -> list[torch.Tensor]:
    """The frames of a stream of the picture that each of its captions is responsible for, without the first
    chunk and without those that a switch takes."""
    begins = [-(-chunk.start // picture.EVERY) for chunk in DEFAULT_GRID.slices(len(video) * picture.EVERY)]
    if captions == 1:
        return [video[begins[1] :]]
    switch = picture.SWITCH_CHUNK
    return [video[begins[1] : begins[switch]], video[begins[switch + DELAY] :]]


def test_make_demo_makes_the_first_stream_of_the_picture(picture: object) -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^PROMPT\s+\?= (.+)$", makefile, re.MULTILINE)[1] == picture.prompts()[0][0]
    assert f"--seconds {picture.SECONDS} --seed {picture.SEED} -o demo.mp4" in makefile


def test_the_readme_generates_the_same_stream(picture: object) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f'prompt = "{picture.prompts()[0][0]}"' in readme
    assert f"pipe.generate(prompt, seconds={picture.SECONDS}, seed={picture.SEED})" in readme
