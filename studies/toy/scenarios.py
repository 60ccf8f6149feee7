"""What the streams of the study go through: a scene that stays, one that pans, one that switches twice.

A plan is the scenes of one stream with the chunk from which each of them is shown. All of them are held-out
captions, and each scene after a switch differs from those before it in colour and background, so that what
comes back of an old one is seen.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rfengine.evaluation.video_frames import ChunkGrid
from rfengine.toy.backgrounds import BACKGROUNDS, PLAIN
from rfengine.toy.captions import caption, sample_scenes
from rfengine.toy.detector import Detection, detect, score
from rfengine.toy.reward import named_motion
from rfengine.toy.world import DEFAULT_WORLD, Scene, complete, continued, render
from studies.toy.record import Values

SCENARIOS = ("stays", "pans", "switches")
CAPTION_SEED = 31
_WINDOW_CHUNKS = 3  # frames judged together: a bouncing shape has come back within them
_MOST_DELAY = 12  # chunks after a switch whose attributes are told one by one
_FRAMES_AT_ONCE = 480

Curves = dict[str, list[tuple[float, float]]]


@dataclass(frozen=True, slots=True)
class Plan:
    """scenes, and the first chunk of each, which is 0 for the first."""

    scenes: tuple[Scene, ...]
    chunks: tuple[int, ...]

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(caption(scene) for scene in self.scenes)

    def true_video(self, frames: int, grid: ChunkGrid, seed: int) -> Tensor:
        """uint8 [T, H, W, 3]: the plan as the world has it, from a start that the seed draws."""
        generator, parts = random.Random(seed), []
        scene: Scene | None = None
        starts = [place.start for place in grid.slices(frames)]
        firsts = [starts[chunk] for chunk in self.chunks]
        for said, first, end in zip(self.scenes, firsts, [*firsts[1:], frames], strict=True):
            drawn = complete(said, generator)
            scene = continued(drawn, scene, first) if scene else drawn
            pieces = range(first, end, _FRAMES_AT_ONCE)
            parts += [render(scene, min(_FRAMES_AT_ONCE, end - piece), piece) for piece in pieces]
        return (torch.cat(parts).clamp(0, 1) * 255).round().to(torch.uint8)


def scenario_plans(scenario: str, captions: int, chunks: int) -> list[Plan]:
    """The plans of one of SCENARIOS for streams of so many chunks."""
    if scenario == "switches":
        return [_switching(scene, chunks, index) for index, scene in enumerate(_scenes(captions, 0.0))]
    return [Plan((scene,), (0,)) for scene in _scenes(captions, float(scenario == "pans"))]


def _scenes(captions: int, pan_share: float) -> list[Scene]:
    walls = tuple(name for name in BACKGROUNDS if pan_share == 0 or name != PLAIN)
    world = dataclasses.replace(DEFAULT_WORLD, pan_share=pan_share, backgrounds=walls)
    return sample_scenes(captions, CAPTION_SEED, world, "held_out")


def _switching(first: Scene, chunks: int, index: int) -> Plan:
    scenes = [first]
    for candidate in sample_scenes(1000, CAPTION_SEED + 1 + index, split="held_out"):
        if len(scenes) < 3 and all(_differs(candidate, scene) for scene in scenes):
            scenes.append(candidate)
    return Plan(tuple(scenes), (0, chunks // 3, 2 * chunks // 3))


def _differs(one: Scene, other: Scene) -> bool:
    colours = [{entry.colour for entry in scene.objects} for scene in (one, other)]
    return colours[0].isdisjoint(colours[1]) and one.background != other.background


@dataclass(frozen=True, slots=True)
class Window:
    """What three chunks in a row show: the number of their scene, how many chunks after its first they begin,
    and what they say of it."""

    place: int
    delay: int
    found: Detection
    scores: dict[str, bool]
    motion: float

    @property
    def right(self) -> bool:
        return all(self.scores.values())


def plan_windows(video: Tensor, plan: Plan, grid: ChunkGrid) -> list[Window]:
    """The windows of a video that lie in one scene: every one soon after a switch, else every third."""
    slices, windows = grid.slices(len(video)), []
    ends = [*plan.chunks[1:], len(slices)]
    for place, (scene, first, end) in enumerate(zip(plan.scenes, plan.chunks, ends, strict=True)):
        for delay in range(end - first - _WINDOW_CHUNKS + 1):
            if delay % _WINDOW_CHUNKS and not (place and delay < _MOST_DELAY):
                continue
            last = first + delay + _WINDOW_CHUNKS - 1
            found = detect(video[slices[first + delay].start : slices[last].stop])
            windows.append(Window(place, delay, found, score(scene, found), named_motion(scene, found)))
    return windows


def plan_values(video: Tensor, plan: Plan, grid: ChunkGrid) -> tuple[Values, Curves]:
    """Values and curves of a video uint8 [T, H, W, 3] against its plan, over plan_windows.

    reward: the mean motion of what the scene names. right: the share of windows in which all that the scene
    says is right; camera: in which its camera is, where it pans. Behind switches: right_after_2 and
    right_after_4, the share of switches whose second and whose fourth window at the latest are right;
    old_scene, the share of windows that still or again show the colour or the background of a scene that is
    over. Curves: reward and right by chunk; by chunk after a switch old_scene and after_switch, the share of
    attributes that are right.
    """
    windows = plan_windows(video, plan, grid)
    chunks = [float(plan.chunks[window.place] + window.delay) for window in windows]
    values = {
        "reward": _mean([window.motion for window in windows]),
        "right": _mean([window.right for window in windows]),
    }
    curves: Curves = {
        "reward": [(chunk, window.motion) for chunk, window in zip(chunks, windows, strict=True)],
        "right": [(chunk, float(window.right)) for chunk, window in zip(chunks, windows, strict=True)],
    }
    if plan.scenes[0].camera != "still":
        values["camera"] = _mean([window.scores["camera"] for window in windows])
    later = [window for window in windows if window.place]
    if later:
        old = [any(_shows(entry.found, scene) for scene in plan.scenes[: entry.place]) for entry in later]
        values |= _delays(later, plan) | {"old_scene": _mean(old)}
        shares = [_mean([*entry.scores.values()]) for entry in later]
        curves["after_switch"] = _by_delay(later, shares)
        curves["old_scene"] = _by_delay(later, old)
    return values, curves


def _delays(windows: list[Window], plan: Plan) -> Values:
    """The shares of switches that are right by the second and by the fourth window behind them."""
    delays = []
    for place in range(1, len(plan.scenes)):
        right = [window.delay for window in windows if window.place == place and window.right]
        delays.append(min(right, default=_MOST_DELAY))
    return {f"right_after_{most}": _mean([delay < most for delay in delays]) for most in (2, 4)}


def _by_delay(windows: list[Window], values: Sequence[float]) -> list[tuple[float, float]]:
    """The mean of the values of windows that are as far behind a switch, for each delay there is."""
    found: dict[int, list[float]] = {}
    for window, value in zip(windows, values, strict=True):
        if window.delay < _MOST_DELAY:
            found.setdefault(window.delay, []).append(value)
    return [(float(delay), _mean(found[delay])) for delay in sorted(found)]


def _shows(found: Detection, scene: Scene) -> bool:
    """Whether a colour or the background of a scene is seen."""
    colours = {entry.colour for entry in scene.objects}
    return found.background == scene.background or any(entry.colour in colours for entry in found.objects)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
