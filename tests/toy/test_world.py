import dataclasses
import itertools

import pytest
import torch

from rfengine.toy.world import (
    BACKGROUNDS,
    DIRECTIONS,
    PALETTE,
    RADII,
    SHAPES,
    SPEEDS,
    Scene,
    SceneObject,
    WorldConfig,
    as_clips,
    as_model_pixels,
    background_image,
    caption,
    ground_truth,
    is_held_out,
    render,
    sample_scenes,
)


def moving_scene(
    direction: str = "right", speed: str = "fast", start: tuple[float, float] = (0.0, 0.0)
) -> Scene:
    return Scene((SceneObject("red", "circle", "large"),), "moving", speed, direction, "grey wall", start)


def test_frames_are_float_pixels_with_colour_last():
    clip = render(moving_scene(), 5)
    assert clip.shape == (5, 64, 64, 3) and clip.dtype == torch.float32
    assert float(clip.min()) >= 0 and float(clip.max()) <= 1


def test_a_late_part_is_the_same_as_the_end_of_a_long_clip():
    for scene in sample_scenes(12, 3, WorldConfig(motion_weights=(1, 1, 1, 1), pair_share=0.5)):
        assert torch.equal(render(scene, 40)[30:], render(scene, 10, start_frame=30))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("speed", SPEEDS)
def test_moving_shape_advances_by_its_speed_and_wraps(direction: str, speed: str):
    (track,) = ground_truth(moving_scene(direction, speed), 200)
    step = torch.tensor(DIRECTIONS[direction]) * SPEEDS[speed]
    moved = (track.position[1:] - track.position[:-1] + 32) % 64 - 32
    assert torch.allclose(moved, step.double().expand_as(moved))
    assert float(track.position.min()) >= 0 and float(track.position.max()) < 64


def test_bouncing_shape_turns_back_and_stays_near_the_middle():
    scene = dataclasses.replace(moving_scene(), motion="bouncing")
    (track,) = ground_truth(scene, 64)
    x = track.position[:, 0]
    assert float(x.min()) >= 24 and float(x.max()) <= 40
    assert bool((x.diff() > 0).any()) and bool((x.diff() < 0).any())


def test_the_middle_of_a_shape_has_its_colour_at_the_true_position():
    for scene in sample_scenes(20, 5, WorldConfig(motion_weights=(1, 1, 1, 1), pair_share=0.5)):
        clip = render(scene, 3, start_frame=17)
        for entry, track in zip(scene.objects, ground_truth(scene, 3, 17), strict=True):
            for frame in range(3):
                x, y = (int(value) for value in track.position[frame])
                assert clip[frame, y, x].tolist() == pytest.approx(PALETTE[entry.colour], abs=1e-6)


def test_backgrounds_are_grey_and_differ():
    images = [background_image(name, WorldConfig()) for name in BACKGROUNDS]
    for image in images:
        assert torch.equal(image[..., 0], image[..., 1]) and torch.equal(image[..., 0], image[..., 2])
    for one, other in itertools.combinations(images, 2):
        assert float((one - other).abs().mean()) > 0.02


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


def test_caption_reads_as_a_sentence():
    scene = moving_scene()
    assert caption(scene) == "a large red circle moving fast to the right over a grey wall"


def test_captions_fit_into_the_text_length_of_the_tiny_model():
    pairs = sample_scenes(500, 0, WorldConfig(motion_weights=(1, 0, 0, 0), pair_share=1.0))
    assert max(len(caption(scene).encode()) for scene in pairs) < 128


def test_sampling_is_reproducible_and_the_split_is_by_caption():
    assert sample_scenes(20, 7) == sample_scenes(20, 7)
    assert sample_scenes(20, 7) != sample_scenes(20, 8)
    train = {caption(scene) for scene in sample_scenes(400, 1, split="train")}
    held_out = {caption(scene) for scene in sample_scenes(100, 1, split="held_out")}
    assert not train & held_out
    share = sum(is_held_out(scene) for scene in sample_scenes(2000, 2)) / 2000
    assert 0.05 < share < 0.16


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
        ({"direction": None}, "direction is None"),
        ({"motion": "turning"}, "a turning shape has one of"),
        ({"background": "blue sky"}, "use one of"),
        ({"objects": ()}, "0 objects"),
        ({"objects": (SceneObject("red", "circle", "small"),) * 2}, "have one colour"),
    ],
)
def test_impossible_scenes_are_refused(changes: dict, words: str):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(moving_scene(), **changes)


def test_impossible_worlds_are_refused():
    with pytest.raises(ValueError, match="height is 60"):
        WorldConfig(height=60)
    with pytest.raises(ValueError, match="motion_weights"):
        WorldConfig(motion_weights=(1.0,))
    with pytest.raises(ValueError, match="pair_share is 2"):
        WorldConfig(pair_share=2)
    with pytest.raises(ValueError, match="frames is 0"):
        ground_truth(moving_scene(), 0)


def test_model_pixels_and_clips_are_inverse():
    clips = [torch.rand(3, 16, 32, 3) for _ in range(2)]
    for one, other in zip(as_clips(as_model_pixels(clips)), clips, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
