"""How well a model draws the toy world: what it must reach, measured by the world's detectors."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from recipes.tiny.training import Switch
from rfengine.toy.captions import HELD_OUT_PATTERNS, caption, paraphrase, sample_scenes
from rfengine.toy.detector import ATTRIBUTES, background_off, detect, score
from rfengine.toy.world import CHANGES, DEFAULT_WORLD, Scene, SceneObject, changed

_BATCH = 16
_CHUNKS = 3  # of a clip whose attributes are judged: 33 frames
_SWITCH_CHUNK = 4  # the first one under the new text
_JUDGED_DELAYS = 5  # chunks after a switch from which all may be right
_SLOWLY_SEEN = ("motion", "direction", "speed", "size")  # of a shape that bounces, turns or grows
OPEN_ATTRIBUTES = ("colour", "shape", "size", "background", "direction", "speed")


class Streamer(Protocol):
    """What is judged: a ToyModel, or the true world in a test."""

    def stream(
        self, texts: Sequence[str], chunks: int, seed: int, switches: Mapping[int, Switch] = ...
    ) -> Iterator[list[Tensor]]:
        """As ToyModel.stream."""


def clips_of(model: Streamer, texts: Sequence[str], chunks: int, seed: int) -> list[Tensor]:
    """A clip [T, H, W, 3] from 0 to 1 for each text."""
    clips: list[Tensor] = []
    for first in range(0, len(texts), _BATCH):
        parts = model.stream(texts[first : first + _BATCH], chunks, seed + first)
        clips += [torch.cat(pieces) for pieces in zip(*parts, strict=True)]
    return clips


def report_accuracy(
    model: Streamer,
    videos: int,
    seeds: Sequence[int],
    say: Callable[[Scene, random.Random], str] = lambda scene, _: caption(scene),
) -> dict[str, float]:
    """The share of clips of held-out scenes in which each of ATTRIBUTES, and all of them, are right.

    say: the text of a scene; its caption by default.
    """
    scenes, generator = sample_scenes(videos, 29, split="held_out"), random.Random(29)
    scores = []
    for seed in seeds:
        texts = [say(scene, generator) for scene in scenes]
        for scene, clip in zip(scenes, clips_of(model, texts, _CHUNKS, 1_000_003 * seed), strict=True):
            scores.append(score(scene, detect(clip)))
    means = {name: _share([entry[name] for entry in scores if name in entry]) for name in ATTRIBUTES}
    return means | {"all": _share([all(entry.values()) for entry in scores])}


def report_paraphrases(model: Streamer, videos: int, seeds: Sequence[int]) -> dict[str, float]:
    """report_accuracy of paraphrases in the patterns that no training sees."""
    return report_accuracy(
        model, videos, seeds, lambda scene, generator: paraphrase(scene, generator, HELD_OUT_PATTERNS)
    )


def report_decay(model: Streamer, streams: int, chunks: int, seed: int) -> dict[str, float]:
    """Over streams of random captions: the largest share of background pixels that are off after the first
    chunk, the share of streams in which it passes 2 %, and its mean in the last part of the streams."""
    scenes = sample_scenes(streams, seed)
    worst, late = [], []
    for first in range(0, streams, _BATCH):
        part = scenes[first : first + _BATCH]
        offs: list[list[Tensor]] = [[] for _ in part]
        texts = [caption(scene) for scene in part]
        for number, clips in enumerate(model.stream(texts, chunks, seed + first)):
            for place, clip in enumerate(clips):
                if number:
                    offs[place].append(background_off(clip, part[place]))
        worst += [float(torch.cat(off).max()) for off in offs]
        late += [float(torch.cat(off[-2:]).mean()) for off in offs]
    return {
        "worst": max(worst),
        "streams_off": _share([value > 0.02 for value in worst]),
        "late_mean": sum(late) / len(late),
    }


def report_starts(model: Streamer, captions: int, seed: int) -> float:
    """The share of captions of a moving shape whose videos of two seeds begin 8 pixels or more apart."""
    world = dataclasses.replace(DEFAULT_WORLD, motion_weights=(1.0, 0.0, 0.0, 0.0), pair_share=0.0)
    texts = [caption(scene) for scene in sample_scenes(captions, seed, world, "held_out")]
    pairs = [clips_of(model, texts, 1, 1_000_003 * number) for number in (seed, seed + 1)]
    apart = []
    for one, other in zip(*pairs, strict=True):
        found = [detect(clip).objects for clip in (one, other)]
        if all(found):
            moved = found[0][0].position[0] - found[1][0].position[0]
            apart.append(float(((moved + 32) % 64 - 32).norm()) >= 8)
        else:
            apart.append(False)
    return _share(apart)


def report_open_attributes(model: Streamer, seeds: int) -> dict[str, dict[str, float]]:
    """How often each value of an attribute that a text leaves open is seen, over as many seeds."""
    whole = Scene((SceneObject("red", "square", "large"),), "moving", "fast", "right", "cloudy sky")
    results = {}
    for name in OPEN_ATTRIBUTES:
        if name in ("colour", "shape", "size"):
            said = dataclasses.replace(
                whole, objects=(dataclasses.replace(whole.objects[0], **{name: None}),)
            )
        else:
            said = dataclasses.replace(whole, **{name: None})
        counts: dict[str, float] = {}
        for clip in clips_of(model, [caption(said)] * seeds, _CHUNKS, 7):
            found = detect(clip)
            value = found.background if name == "background" else _of_object(found.objects, name)
            counts[value] = counts.get(value, 0) + 1 / seeds
        results[name] = counts
    return results


def _of_object(objects: Sequence, name: str) -> str:
    return str(getattr(objects[0], name)) if objects else "nothing"


def report_switches(model: Streamer, each: int, recached: bool, seed: int) -> dict[str, dict[str, float]]:
    """For each of CHANGES and for all: the share of switches after which everything that the new text says is
    right from the first, second, ... chunk on, judged over three chunks; "after_2" counts the second."""
    generator = random.Random(seed)
    pairs = [pair for kind in CHANGES for pair in switch_pairs(kind, each, generator)]
    delays: list[int] = []
    for first in range(0, len(pairs), _BATCH):
        part = pairs[first : first + _BATCH]
        old, new = ([caption(pair[place]) for pair in part] for place in (0, 1))
        chunks = _SWITCH_CHUNK + _JUDGED_DELAYS + _CHUNKS
        stream = model.stream(old, chunks, seed + first, {_SWITCH_CHUNK: (new, recached)})
        parts = list(stream)[_SWITCH_CHUNK:]
        for place, (_, scene) in enumerate(part):
            delays.append(_delay(scene, [clips[place] for clips in parts]))
    results = {}
    for name, kept in [*((kind, slice(n * each, (n + 1) * each)) for n, kind in enumerate(CHANGES)),
                       ("all", slice(None))]:  # fmt: skip
        of_kind = delays[kept]
        results[name] = {f"after_{most}": _share([delay < most for delay in of_kind]) for most in (1, 2, 4)}
    return results


def switch_pairs(kind: str, count: int, generator: random.Random) -> list[tuple[Scene, Scene]]:
    """Held-out scenes, each with one that differs in `kind` alone."""
    pairs: list[tuple[Scene, Scene]] = []
    while len(pairs) < count:
        (scene,) = sample_scenes(1, generator.randrange(2**32), split="held_out")
        try:
            pairs.append((scene, changed(scene, kind, generator)))
        except ValueError:  # this scene allows no other value
            continue
    return pairs


def _delay(scene: Scene, chunks: Sequence[Tensor]) -> int:
    """The first chunk that is right in all that it can show by itself, and with the two after it in all that
    the scene says: whether a shape bounces, turns or grows, and how large it is, takes longer to see."""
    for delay in range(_JUDGED_DELAYS):
        whole = score(scene, detect(torch.cat(list(chunks[delay : delay + _CHUNKS]))))
        alone = score(scene, detect(chunks[delay]))
        shown = alone if scene.motion == "moving" else {n: alone[n] for n in alone if n not in _SLOWLY_SEEN}
        if all(whole.values()) and all(shown.values()):
            return delay
    return _JUDGED_DELAYS


def _share(values: Sequence[bool]) -> float:
    return sum(values) / len(values)
