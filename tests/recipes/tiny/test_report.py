"""The report on a model: the true world reaches everything, and each fault costs its own figure."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping, Sequence

import pytest
import torch
from torch import Tensor

from recipes.tiny.report import (
    OPEN_ATTRIBUTES,
    report_accuracy,
    report_decay,
    report_open_attributes,
    report_paraphrases,
    report_starts,
    report_switches,
    switch_pairs,
)
from recipes.tiny.training import Switch, ToyModel
from rfengine.models.dit import WanDiT
from rfengine.toy.captions import parse_caption
from rfengine.toy.world import CHANGES, Scene, complete, continued, render


@dataclasses.dataclass
class TrueWorld:
    """Streams as the texts say. drawn: what a scene becomes; late: chunks by which it follows a switch late;
    spoilt: what the pixels of a chunk become."""

    drawn: Callable[[Scene, random.Random], Scene] = complete
    late: int = 0
    spoilt: Callable[[int, Tensor], Tensor] = lambda chunk, clip: clip

    def stream(
        self,
        texts: Sequence[str],
        chunks: int,
        seed: int,
        switches: Mapping[int, Switch] = {},  # noqa: B006
    ) -> Iterator[list[Tensor]]:
        generator = random.Random(seed)
        scenes = [self.drawn(parse_caption(text), generator) for text in texts]
        for chunk in range(chunks):
            first, count = (0, 9) if chunk == 0 else (12 * chunk - 3, 12)
            if chunk - self.late in switches:
                new, _ = switches[chunk - self.late]
                others = [self.drawn(parse_caption(text), generator) for text in new]
                scenes = [continued(other, scene, first) for other, scene in zip(others, scenes, strict=True)]
            yield [self.spoilt(chunk, render(scene, count, first)) for scene in scenes]


def test_true_videos_reach_everything() -> None:
    world = TrueWorld()
    assert set(report_accuracy(world, 6, [0, 1]).values()) == {1.0}
    assert report_paraphrases(world, 6, [0])["all"] == 1.0
    assert report_decay(world, 3, 4, 0) == {"worst": 0.0, "streams_off": 0.0, "late_mean": 0.0}
    assert report_starts(world, 40, 0) > 0.85


def test_what_is_drawn_wrong_is_counted() -> None:
    def slow(scene: Scene, generator: random.Random) -> Scene:
        return dataclasses.replace(complete(scene, generator), speed="slowly")

    found = report_accuracy(TrueWorld(slow), 20, [0])
    assert 0.2 < found["speed"] == found["all"] < 0.8
    assert {value for name, value in found.items() if name not in ("speed", "all")} == {1.0}


def test_decay_after_the_first_chunk_is_seen_and_in_the_first_one_is_not() -> None:
    def speckled(from_chunk: int) -> Callable[[int, Tensor], Tensor]:
        def spoil(chunk: int, clip: Tensor) -> Tensor:
            if chunk != from_chunk:
                return clip
            clip = clip.clone()
            clip[-1, ::4, ::4] += 0.1
            return clip

        return spoil

    assert report_decay(TrueWorld(spoilt=speckled(0)), 2, 3, 0)["worst"] == 0.0
    found = report_decay(TrueWorld(spoilt=speckled(2)), 2, 3, 0)
    assert 0.05 < found["worst"] < 0.07 and found["streams_off"] == 1.0
    assert found["late_mean"] == pytest.approx(found["worst"] / 24, rel=0.05)


def test_videos_that_begin_in_one_place_are_not_apart() -> None:
    def centred(scene: Scene, generator: random.Random) -> Scene:
        return dataclasses.replace(complete(scene, generator), start=(0.0, 0.0))

    assert report_starts(TrueWorld(centred), 10, 0) == 0.0


def test_open_attributes_are_counted_by_value() -> None:
    found = report_open_attributes(TrueWorld(), 12)
    assert tuple(found) == OPEN_ATTRIBUTES
    for counts in found.values():
        assert sum(counts.values()) == pytest.approx(1.0)
    assert set(found["speed"]) == {"slowly", "fast"} and len(found["colour"]) >= 3


@pytest.mark.parametrize(("late", "shares"), [(0, (1, 1, 1)), (3, (0, 0, 1)), (9, (0, 0, 0))])
def test_switches_are_counted_from_the_chunk_that_shows_them(late: int, shares: tuple[int, ...]) -> None:
    found = report_switches(TrueWorld(late=late), 1, True, 0)
    assert set(found) == {*CHANGES, "all"}
    expected = {f"after_{most}": share for most, share in zip((1, 2, 4), shares, strict=True)}
    for kind in ("colour", "shape", "size", "background", "direction", "camera"):
        assert found[kind] == expected, kind
    # three chunks judge a motion and its speed, and two of them may outvote the first
    for name in expected:
        assert found["all"][name] == pytest.approx(sum(found[kind][name] for kind in CHANGES) / len(CHANGES))


def test_pairs_of_a_switch_differ_in_its_kind() -> None:
    for before, after in switch_pairs("camera", 5, random.Random(0)):
        assert before.camera != after.camera and before.objects == after.objects


def test_an_untrained_model_scores_low() -> None:
    torch.manual_seed(0)
    shipped = ToyModel.load("tiny")
    untrained = dataclasses.replace(shipped, transformer=WanDiT(shipped.config.model).eval())
    assert report_accuracy(untrained, 2, [123])["all"] == 0.0
