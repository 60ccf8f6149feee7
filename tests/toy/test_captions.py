"""Sentences of the toy world, and what they mean."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest

from rfengine.toy.backgrounds import BACKGROUNDS
from rfengine.toy.captions import (
    COLOUR_WORDS,
    HELD_OUT_PATTERNS,
    LONGEST,
    MOTION_WORDS,
    PATTERNS,
    SHAPE_WORDS,
    SIZE_WORDS,
    caption,
    is_held_out,
    known_words,
    open_caption,
    opened,
    paraphrase,
    parse_caption,
    sample_scenes,
)
from rfengine.toy.world import (
    DIRECTIONS,
    MOTIONS,
    PALETTE,
    PANNING,
    RADII,
    SHAPES,
    SPEEDS,
    Scene,
    SceneObject,
    WorldConfig,
)

EVERY_KIND = WorldConfig(motion_weights=(1, 1, 1, 1), pair_share=0.5, pan_share=0.5)


def from_the_middle(scene: Scene) -> Scene:
    return dataclasses.replace(scene, start=(0.0, 0.0), view=0.0)


def test_caption_reads_as_a_sentence():
    scene = Scene((SceneObject("red", "circle", "large"),), "moving", "fast", "right", "grey wall")
    assert caption(scene) == "a large red circle moving fast to the right over a grey wall"
    panning = dataclasses.replace(scene, background="cloudy sky", camera="left", pan="slowly")
    assert caption(panning) == (
        "a large red circle moving fast to the right over a cloudy sky, the camera pans slowly to the left"
    )
    assert open_caption(scene) == "a large red circle moving to the right over a grey wall"
    assert (
        caption(dataclasses.replace(scene, background=None)) == "a large red circle moving fast to the right"
    )


def test_captions_differ_whenever_an_attribute_does():
    captions = {
        caption(Scene((SceneObject(colour, shape, size),), "moving", speed, direction, background))
        for colour, shape, size, speed, direction, background in itertools.product(
            PALETTE, SHAPES, RADII, SPEEDS, DIRECTIONS, BACKGROUNDS
        )
    }
    assert len(captions) == len(PALETTE) * len(SHAPES) * len(RADII) * len(SPEEDS) * len(DIRECTIONS) * len(
        BACKGROUNDS
    )


def test_sentences_fit_into_the_text_length_of_the_tiny_model():
    generator = random.Random(0)
    pairs = sample_scenes(500, 0, WorldConfig(motion_weights=(1, 0, 0, 0), pair_share=1.0, pan_share=1.0))
    texts = [caption(scene) for scene in pairs] + [paraphrase(scene, generator) for scene in pairs]
    assert max(len(text.encode()) for text in texts) <= LONGEST


@pytest.mark.parametrize("pattern", (*PATTERNS, *HELD_OUT_PATTERNS))
def test_every_paraphrase_means_its_scene(pattern):
    generator = random.Random(1)
    for number, scene in enumerate(sample_scenes(120, 2, EVERY_KIND)):
        said = opened(scene, generator, (0, 0.2, 0.6)[number % 3])
        text = paraphrase(said, generator, (pattern,))
        assert parse_caption(text) == from_the_middle(said), text


def test_captions_mean_their_scenes():
    for scene in sample_scenes(300, 0, EVERY_KIND):
        assert parse_caption(caption(scene)) == from_the_middle(scene)
        text = open_caption(scene)
        assert parse_caption(text) == dataclasses.replace(from_the_middle(scene), speed=None)


def test_there_are_ten_patterns_and_synonyms_for_every_attribute():
    assert len(PATTERNS) >= 10 and len(HELD_OUT_PATTERNS) >= 2
    assert not set(PATTERNS) & set(HELD_OUT_PATTERNS)
    for words in (COLOUR_WORDS, SHAPE_WORDS, SIZE_WORDS, MOTION_WORDS):
        assert all(len(phrases) >= 2 for phrases in words.values())


def test_every_attribute_is_left_open_at_times_and_none_where_nothing_is():
    generator = random.Random(3)
    scenes = sample_scenes(100, 4, EVERY_KIND)
    assert all(opened(scene, generator, 0.0) == scene for scene in scenes)
    parts = [opened(scene, generator, 0.5) for scene in scenes]
    for name in ("motion", "speed", "direction", "background"):
        assert sum(getattr(part, name) is None for part in parts) > 20
    assert any(part.camera == PANNING for part in parts)
    assert not any(part.camera is None for part in parts)  # a camera that is not named stands still


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        (
            "a red ball rolling left",
            Scene((SceneObject("red", "circle"),), "moving", None, "left", None),
        ),
        ("Something big", Scene((SceneObject(size="large"),), None, None, None, None)),
        ("moving fast", Scene((SceneObject(),), "moving", "fast", None, None)),
        (
            "a large red circle over a grey wall",
            Scene((SceneObject("red", "circle", "large"),), None, None, None, "grey wall"),
        ),
        (
            "a box spins; well, spinning quickly. The camera stands still",
            Scene((SceneObject(shape="square"),), "turning", "fast", None, None),
        ),
        (
            "the camera pans, a dog on grass",
            Scene((SceneObject(),), None, None, None, "grassy meadow", camera=PANNING),
        ),
    ],
)
def test_other_texts_mean_what_their_known_words_say(text: str, meant: Scene):
    assert parse_caption(text) == meant


@pytest.mark.parametrize("text", ["", "a dog", "once upon a time"])
def test_a_text_without_a_known_word_is_refused_with_those_there_are(text: str):
    with pytest.raises(ValueError, match="has no word of the toy world; it knows .*ball, .*to the left"):
        parse_caption(text)


def test_words_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="a turning shape has one of"):
        parse_caption("a box turning to the left")


def test_sampling_is_reproducible_and_the_split_is_by_caption():
    assert sample_scenes(20, 7) == sample_scenes(20, 7)
    assert sample_scenes(20, 7) != sample_scenes(20, 8)
    train = {caption(scene) for scene in sample_scenes(400, 1, split="train")}
    held_out = {caption(scene) for scene in sample_scenes(100, 1, split="held_out")}
    assert not train & held_out
    share = sum(is_held_out(scene) for scene in sample_scenes(2000, 2)) / 2000
    assert 0.05 < share < 0.16


def test_known_words_are_those_of_the_sentences():
    words = known_words()
    assert {"crimson", "box", "rolling", "leftwards", "polka dots", "camera"} <= words
    assert len(MOTIONS) == len(MOTION_WORDS) and "" not in words
