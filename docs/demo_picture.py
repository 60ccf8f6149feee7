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
SEED = 3
SECONDS = 8
SWITCH_CHUNK = 6  # the first one under the second prompt of a stream that has two
EVERY = 3  # frames of the video for one of the picture
ENLARGED = 2  # pixels of the picture for one of the video
GAP = 8  # white pixels between two streams


def prompts() -> list[list[str]]:
    """The captions of the picture in the README: one for each stream, or one and the one that follows it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    listed = re.search(r"!\[Four streams of the tiny model: (.+?)\]\(docs/demo\.gif\)", text, re.DOTALL)[1]
    return [" ".join(caption.split()).split(", then ") for caption in listed.split(";")]


def stream_frames(pipeline: Pipeline, captions: list[str]) -> numpy.ndarray:
    """uint8 [T, H, W, 3]: the first seconds of a stream, its window recomputed under the second caption."""
    count = SECONDS * pipeline.config.fps
    stream, chunks = pipeline.stream(captions[0], seed=SEED), []
    while sum(map(len, chunks)) < count:
        if len(chunks) == SWITCH_CHUNK and len(captions) > 1:
            stream.set_prompt(captions[1], mode="recache")
        chunks.append(next(stream).frames)
    return numpy.concatenate(chunks)[:count]


def picture_frames() -> list[Image.Image]:
    """The frames of the picture, RGB, as the model of the package makes them."""
    pipeline = Pipeline.from_pretrained("tiny", device="cpu")
    square = numpy.ones((1, ENLARGED, ENLARGED, 1), "uint8")
    videos = [stream_frames(pipeline, captions)[::EVERY] for captions in prompts()]
    enlarged = [numpy.kron(video, square) for video in videos]
    gap = numpy.full((*enlarged[0].shape[:2], GAP, 3), 255, "uint8")
    row = [part for video in enlarged for part in (video, gap)][:-1]
    return [Image.fromarray(frame) for frame in numpy.concatenate(row, axis=2)]


def main() -> None:
    first, *others = [frame.quantize(128, dither=Image.Dither.NONE) for frame in picture_frames()]
    milliseconds = round(1000 * EVERY / Pipeline.from_pretrained("tiny", device="cpu").config.fps)
    first.save(PICTURE, save_all=True, append_images=others, duration=milliseconds, loop=0, optimize=True)


if __name__ == "__main__":
    main()
