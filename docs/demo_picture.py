"""Draws demo.gif: the first eight seconds of the streams that the README names, with the seed of `make demo`.

`python docs/demo_picture.py` writes the file again; tests/test_demo_picture.py compares it with the model.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy
from PIL import Image

from rfengine import Pipeline

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "demo.gif"
SEED = 7
SECONDS = 8
EVERY = 3  # frames of the video for one of the picture
ENLARGED = 2  # pixels of the picture for one of the video
GAP = 8  # white pixels between two streams


def prompts() -> list[str]:
    """The captions of the picture in the README."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    listed = re.search(r"!\[Four streams of the tiny model: (.+?)\]\(docs/demo\.gif\)", text, re.DOTALL)[1]
    return [" ".join(caption.split()) for caption in listed.split(";")]


def picture_frames() -> list[Image.Image]:
    """The frames of the picture, RGB, as the model of the package makes them."""
    pipeline = Pipeline.from_pretrained("tiny", device="cpu")
    videos = [pipeline.generate(prompt, seconds=SECONDS, seed=SEED) for prompt in prompts()]
    square = numpy.ones((1, ENLARGED, ENLARGED, 1), "uint8")
    enlarged = [numpy.kron(video.frames[::EVERY], square) for video in videos]
    gap = numpy.full((*enlarged[0].shape[:2], GAP, 3), 255, "uint8")
    row = [part for video in enlarged for part in (video, gap)][:-1]
    return [Image.fromarray(frame) for frame in numpy.concatenate(row, axis=2)]


def main() -> None:
    first, *others = [frame.quantize(32, dither=Image.Dither.NONE) for frame in picture_frames()]
    milliseconds = round(1000 * EVERY / Pipeline.from_pretrained("tiny", device="cpu").config.fps)
    first.save(PICTURE, save_all=True, append_images=others, duration=milliseconds, loop=0, optimize=True)


if __name__ == "__main__":
    main()
