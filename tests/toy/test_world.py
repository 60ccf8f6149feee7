import dataclasses
import itertools
import math
import random

import pytest
import torch

from rfengine.toy.backgrounds import PERIODS, PLAIN
from rfengine.toy.captions import sample_scenes
from rfengine.toy.world import (
    CHANGES,
    DIRECTIONS,
    PALETTE,
    PANNING,
    PANS,
    SPEEDS,
    Scene,
    SceneObject,
    WorldConfig,
    as_clips,
    as_model_pixels,
    changed,
    complete,
    continued,
    draw_scene,
    ground_truth,
    render,
    render_background,
    render_switch,
    true_views,
)

EVERY_KIND = WorldConfig(motion_weights=(1, 1, 1, 1), pair_share=0.5, pan_share=0.5)


def moving_scene(
    direction: str = "right", speed: str = "fast", start: tuple[float, float] = (0.0, 0.0)
) -> Scene:
    return Scene((SceneObject("red", "circle", "large"),), "moving", speed, direction, "grey wall", start)


def panning_scene(camera: str = "left", pan: str = "fast") -> Scene:
    return dataclasses.replace(moving_scene(), background="cloudy sky", camera=camera, pan=pan, view=3.0)


def test_frames_are_float_pixels_with_colour_last():
    clip = render(moving_scene(), 5)
    assert clip.shape == (5, 64, 64, 3) and clip.dtype == torch.float32
    assert float(clip.min()) >= 0 and float(clip.max()) <= 1


def test_a_late_part_is_the_same_as_the_end_of_a_long_clip():
    for scene in sample_scenes(12, 3, EVERY_KIND):
        assert torch.equal(render(scene, 40)[30:], render(scene, 10, start_frame=30))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("speed", SPEEDS)
def test_moving_shape_advances_by_its_speed_and_wraps(direction: str, speed: str):
    (track,) = ground_truth(moving_scene(direction, speed), 200)
    step = torch.tensor(DIRECTIONS[direction]) * SPEEDS[speed]
    moved = (track.position[1:] - track.position[:-1] + 32) % 64 - 32
    assert torch.allclose(moved, step.double().expand_as(moved))
    assert float(track.position.min()) >= 0 and float(track.position.max()) < 64


def test_bouncing_shape_turns_back_and_stays_near_its_start():
    scene = dataclasses.replace(moving_scene(), motion="bouncing", start=(5.0, 0.0))
    (track,) = ground_truth(scene, 64)
    x = track.position[:, 0]
    assert float(x.min()) >= 29 and float(x.max()) <= 45
    assert bool((x.diff() > 0).any()) and bool((x.diff() < 0).any())


def test_the_middle_of_a_shape_has_its_colour_at_the_true_position():
    for scene in sample_scenes(20, 5, EVERY_KIND):
        clip = render(scene, 3, start_frame=17)
        for entry, track in zip(scene.objects, ground_truth(scene, 3, 17), strict=True):
            for frame in range(3):
                x, y = (int(value) for value in track.position[frame])
                assert clip[frame, y, x].tolist() == pytest.approx(PALETTE[entry.colour], abs=1e-6)


@pytest.mark.parametrize("camera", ["left", "right"])
@pytest.mark.parametrize("pan", PANS)
def test_a_camera_that_pans_moves_the_background_the_other_way_and_no_shape(camera: str, pan: str):
    scene = panning_scene(camera, pan)
    views = true_views(scene, 9)
    step = {"left": -1, "right": 1}[camera] * PANS[pan]
    assert torch.allclose(views, 3.0 + step * torch.arange(9.0, dtype=torch.float64))
    still = dataclasses.replace(scene, camera="still", pan=None)
    for one, other in zip(ground_truth(scene, 9), ground_truth(still, 9), strict=True):
        assert torch.equal(one.position, other.position)
    shift = int(4 * step)  # whole pixels in eight frames of 0.5, and in four of 1.25
    later = render_background(scene, 1, 4 if pan == "fast" else 8)[0]
    first = render_background(scene, 1)[0]
    shift = shift if pan == "fast" else 2 * shift
    pairs = (later[:, :-shift], first[:, shift:]) if shift > 0 else (later[:, -shift:], first[:, :shift])
    torch.testing.assert_close(*pairs, atol=1e-4, rtol=0)


def test_a_still_camera_shows_one_background():
    scene = dataclasses.replace(panning_scene(), camera="still", pan=None)
    assert torch.equal(*(render_background(scene, 1, frame) for frame in (0, 30)))


def test_open_scenes_are_completed_as_they_say():
    generator = random.Random(0)
    said = Scene((SceneObject(shape="square"),), None, "fast", None, None, camera=PANNING)
    drawn = [complete(said, generator) for _ in range(200)]
    assert {scene.objects[0].shape for scene in drawn} == {"square"} and {s.speed for s in drawn} == {"fast"}
    assert {scene.objects[0].colour for scene in drawn} == set(PALETTE)
    assert {scene.camera for scene in drawn} == {"left", "right"}
    assert not any(scene.background == PLAIN for scene in drawn)
    starts = torch.tensor([scene.start for scene in drawn])
    assert float(starts.min()) < -28 and float(starts.max()) > 28
    assert all(0 <= scene.view < PERIODS[scene.background] for scene in drawn)


def test_a_round_shape_never_turns_and_both_shapes_of_a_pair_differ_in_colour():
    generator = random.Random(1)
    circle = Scene((SceneObject(shape="circle"),), None, None, None, None)
    assert all(complete(circle, generator).motion != "turning" for _ in range(100))
    pair = Scene((SceneObject("red"), SceneObject()), None, None, None, None)
    drawn = [complete(pair, generator) for _ in range(50)]
    assert all(scene.objects[1].colour != "red" and scene.motion == "moving" for scene in drawn)


@pytest.mark.parametrize("attribute", CHANGES)
def test_a_changed_scene_differs_in_the_attribute_alone(attribute: str):
    generator = random.Random(2)
    alone = {"motion": {"direction"}, "camera": {"pan"}, "background": set()}.get(attribute, set())
    for scene in sample_scenes(60, 4, WorldConfig(pair_share=0.2)):
        try:
            other = changed(scene, attribute, generator)
        except ValueError as error:
            assert f"the {attribute} of" in str(error)
            continue
        names = {f.name for f in dataclasses.fields(scene)} - {"start", "view", "clock", "objects"}
        differ = {name for name in names if getattr(scene, name) != getattr(other, name)}
        ones, others = (dataclasses.astuple(each.objects[0]) for each in (scene, other))
        parts = ("colour", "shape", "size")
        differ |= {name for name, a, b in zip(parts, ones, others, strict=True) if a != b}
        assert attribute in differ and differ <= {attribute} | alone
        assert scene.objects[1:] == other.objects[1:]


def test_a_scene_goes_on_from_another_where_it_was():
    generator = random.Random(3)
    for first in sample_scenes(20, 6, EVERY_KIND):
        later = continued(draw_scene(generator, EVERY_KIND), first, 21)
        then, now = (ground_truth(scene, 1, 21)[0].position[0] for scene in (first, later))
        assert float(((now - then + 32) % 64 - 32).norm()) < 1e-9
        if later.background == first.background:
            period = PERIODS[first.background]
            apart = float(true_views(later, 1, 21) - true_views(first, 1, 21)) % period
            assert min(apart, period - apart) < 1e-9
        clip = render_switch([first, later], [0, 21], 30)
        assert torch.equal(clip[:21], render(first, 21)) and torch.equal(clip[21:], render(later, 9, 21))


@pytest.mark.parametrize(
    ("motion", "speed"), [("turning", "fast"), ("growing", "slowly"), ("bouncing", "fast")]
)
def test_a_motion_that_stays_keeps_its_phase_at_another_speed(motion: str, speed: str):
    direction = {"bouncing": "right"}.get(motion)
    first = Scene((SceneObject("red", "square", "large"),), motion, speed, direction, "sandy beach", view=7.0)
    second = dataclasses.replace(first, speed={"fast": "slowly", "slowly": "fast"}[speed])
    second = continued(second, first, 21)
    third = continued(first, second, 45)
    for later, earlier, frame in ((second, first, 21), (third, second, 45)):
        then, now = (ground_truth(scene, 1, frame)[0] for scene in (earlier, later))
        for one, other in zip(
            (then.position, then.radius, then.angle), (now.position, now.radius, now.angle), strict=True
        ):
            torch.testing.assert_close(one, other, atol=1e-9, rtol=0)
    if motion == "turning":
        angle = ground_truth(second, 1, 22)[0].angle - ground_truth(second, 1, 21)[0].angle
        assert float(angle) == pytest.approx(torch.pi / 60)


def test_a_motion_and_a_background_that_are_new_begin_at_their_origin():
    first = Scene((SceneObject("red", "square", "large"),), "turning", "fast", None, "sandy beach", view=7.0)
    second = dataclasses.replace(first, motion="growing", background="cloudy sky", camera="left", pan="fast")
    second = continued(second, first, 21)
    track = ground_truth(second, 2, 21)[0]
    assert track.radius.tolist() == pytest.approx([18.0, 18 * (1 + 0.3 * math.sin(torch.pi / 12))])
    assert float(true_views(second, 1, 21)) % PERIODS["cloudy sky"] == pytest.approx(0)


def test_another_size_is_drawn_to_scale():
    world = WorldConfig(height=96, width=128)
    clip = render(moving_scene(), 2, config=world)
    assert clip.shape == (2, 96, 128, 3)
    area = float((clip[0, ..., 0] - clip[0, ..., 1] > 0.5).sum())
    assert area == pytest.approx(torch.pi * (18 * 1.5) ** 2, rel=0.05)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"motion": "flying"}, "use one of"),
        ({"direction": "in"}, "direction is 'in'"),
        ({"motion": None}, "a shape whose motion is open has one of"),
        ({"motion": "turning"}, "a turning shape has one of"),
        ({"background": "blue sky"}, "use one of"),
        ({"camera": "left"}, "which looks the same everywhere"),
        ({"pan": "slowly"}, "a camera that stands still has no speed"),
        ({"objects": ()}, "0 objects"),
        ({"objects": (SceneObject("red", "circle", "small"),) * 2}, "have one colour"),
    ],
)
def test_impossible_scenes_are_refused(changes: dict, words: str):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(moving_scene(), **changes)


@pytest.mark.parametrize(
    "open_values",
    [
        {"motion": None, "direction": None},
        {"speed": None},
        {"direction": None},
        {"background": None},
        {"camera": None},
        {"camera": PANNING, "background": "cloudy sky", "pan": "fast"},
        {"objects": (SceneObject("red", "circle"),)},
    ],
)
def test_what_is_open_is_not_drawn(open_values: dict):
    with pytest.raises(ValueError, match="leaves something open"):
        render(dataclasses.replace(moving_scene(), **open_values), 2)


def test_impossible_worlds_are_refused():
    with pytest.raises(ValueError, match="height is 60"):
        WorldConfig(height=60)
    with pytest.raises(ValueError, match="motion_weights"):
        WorldConfig(motion_weights=(1.0,))
    for name in ("pair_share", "pan_share"):
        with pytest.raises(ValueError, match=f"{name} is 2"):
            WorldConfig(**{name: 2})
    with pytest.raises(ValueError, match="backgrounds is"):
        WorldConfig(backgrounds=("sea",))
    with pytest.raises(ValueError, match="frames is 0"):
        ground_truth(moving_scene(), 0)


def test_every_attribute_is_drawn():
    scenes = sample_scenes(400, 8, EVERY_KIND)
    seen = {name: {getattr(scene, name) for scene in scenes} for name in ("motion", "camera", "background")}
    assert [len(values) for values in seen.values()] == [4, 3, 7]
    assert {len(scene.objects) for scene in scenes} == {1, 2}
    assert len(set(itertools.chain(*(scene.start for scene in scenes)))) == 800


def test_model_pixels_and_clips_are_inverse():
    clips = [torch.rand(3, 16, 32, 3) for _ in range(2)]
    for one, other in zip(as_clips(as_model_pixels(clips)), clips, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
