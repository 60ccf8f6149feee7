import dataclasses

import pytest
import torch

from rfengine.toy.backgrounds import PLAIN
from rfengine.toy.captions import sample_scenes
from rfengine.toy.detector import ATTRIBUTES, accuracy, background_off, detect, matched, score
from rfengine.toy.world import PANNING, Scene, SceneObject, WorldConfig, ground_truth, render

UNSEEN = ("background", "camera")  # what a video without a shape shows too
EVERY_MOTION = WorldConfig(motion_weights=(3, 1, 1, 1), pair_share=0.25, pan_share=0.5)
ALONE = WorldConfig(motion_weights=(1, 0, 0, 0), pair_share=0.0)


@pytest.fixture(scope="module")
def scenes():
    return sample_scenes(40, 11, EVERY_MOTION)


@pytest.fixture(scope="module")
def clips(scenes):
    return [render(scene, 33, start_frame=29 * index) for index, scene in enumerate(scenes)]


@pytest.fixture(scope="module")
def detections(clips):
    return [detect(clip) for clip in clips]


def test_true_clips_are_measured_without_error(scenes, clips, detections):
    assert all(all(score(*pair).values()) for pair in zip(scenes, detections, strict=True))
    assert accuracy(scenes[:4], clips[:4]) == {name: 1.0 for name in (*ATTRIBUTES, "all")}


def test_noise_and_eight_bits_do_not_matter(scenes, clips):
    generator = torch.Generator().manual_seed(0)
    noisy = [(clip + 0.04 * torch.randn(clip.shape, generator=generator)).clamp(0, 1) for clip in clips[:20]]
    bytes_ = [(clip * 255).to(torch.uint8) for clip in noisy]
    assert accuracy(scenes[:20], bytes_)["all"] == 1.0


def test_wrong_scenes_score_at_chance(scenes, detections):
    scores = [score(*pair) for pair in zip(scenes, detections[7:] + detections[:7], strict=True)]
    share = {name: sum(entry[name] for entry in scores) / len(scores) for name in ATTRIBUTES}
    assert sum(all(entry.values()) for entry in scores) / len(scores) < 0.05
    assert share["colour"] < 0.5 and share["shape"] < 0.6 and share["direction"] < 0.6
    assert share["background"] < 0.3 and share["camera"] < 0.7


@pytest.mark.slow
def test_three_hundred_true_clips_are_right_under_noise():
    scenes = sample_scenes(300, 12)
    generator = torch.Generator().manual_seed(2)
    clips = [render(scene, 33, start_frame=7 * index) for index, scene in enumerate(scenes)]
    noisy = [(clip + 0.04 * torch.randn(clip.shape, generator=generator)).clamp(0, 1) for clip in clips]
    assert accuracy(scenes, noisy)["all"] == 1.0


def test_positions_and_speed_are_those_of_the_ground_truth():
    for scene in sample_scenes(12, 4, ALONE):
        found = detect(render(scene, 33)).objects[0]
        (track,) = ground_truth(scene, 33)
        error = (found.position - track.position + 32) % 64 - 32
        assert float(error.norm(dim=-1).max()) < (4.0 if scene.objects[0].shape == "triangle" else 1.0)
        assert found.speed_value == pytest.approx({"slowly": 1.0, "fast": 2.0}[scene.speed], abs=0.1)
        assert float(found.radius.mean()) == pytest.approx(
            float(track.radius[0]), abs=1.01
        )  # a template apart


def test_presence_shows_when_the_object_is_gone():
    (scene,) = sample_scenes(1, 2, ALONE)
    clip = render(scene, 33)
    clip[20:25] = 0.5
    found = detect(clip).objects[0]
    assert found.presence.tolist() == [not 20 <= frame < 25 for frame in range(33)]
    assert bool(found.position[20:25].isnan().all())


def test_an_empty_video_has_no_objects_and_scores_nothing_but_what_is_behind_them():
    (scene,) = sample_scenes(1, 2, ALONE)
    detection = detect(torch.full((9, 64, 64, 3), 0.5))
    assert detection.objects == ()
    wrong = {name: value for name, value in score(scene, detection).items() if name not in UNSEEN}
    assert detection.background == PLAIN and not any(wrong.values())


def test_a_still_video_does_not_move():
    (scene,) = sample_scenes(1, 2, ALONE)
    found = detect(render(scene, 1).expand(33, -1, -1, -1)).objects[0]
    assert found.speed_value == 0.0
    assert not score(scene, detect(render(scene, 1).expand(33, -1, -1, -1)))["motion"]


def test_both_objects_of_a_pair_are_found():
    (scene,) = sample_scenes(1, 9, WorldConfig(motion_weights=(1, 0, 0, 0), pair_share=1.0))
    found = {entry.colour for entry in detect(render(scene, 33)).objects}
    assert found == {entry.colour for entry in scene.objects}


def test_what_a_scene_leaves_open_is_not_scored():
    (scene,) = sample_scenes(1, 2, ALONE)
    detection = detect(render(scene, 9))
    said = dataclasses.replace(scene, objects=(SceneObject(size=scene.objects[0].size),), background=None)
    assert set(ATTRIBUTES) - set(score(said, detection)) == {"colour", "shape", "background"}
    assert all(score(said, detection).values())
    assert matched(said, detection) == list(detection.objects)
    nothing = Scene((SceneObject(),), None, None, None, None, camera=None)
    assert score(nothing, detection) == {}


def test_a_pan_to_either_side_agrees_with_a_camera_that_is_said_to_pan():
    scene = next(s for s in sample_scenes(40, 3) if s.camera == "right" and s.pan == "fast")
    detection = detect(render(scene, 33))
    for camera, pan, right in ((PANNING, None, True), (PANNING, "slowly", False), ("left", "fast", False)):
        said = dataclasses.replace(scene, camera=camera, pan=pan)
        assert score(said, detection)["camera"] is right


def test_a_true_background_is_nowhere_off_and_specks_of_any_colour_are():
    for scene in sample_scenes(14, 6):
        clip = render(scene, 12)
        assert not background_off(clip, scene).any(), scene
        specks = clip.clone()
        (track, *_) = ground_truth(scene, 12)
        x, y = ((track.position[5] + 32) % 64).long().tolist()  # opposite the first shape
        specks[5, max(0, y - 4) : y + 4, max(0, x - 4) : x + 4] += torch.tensor([0.0, 0.0, 0.4])
        off = background_off(specks.clamp(0, 1), scene)
        assert off.nonzero().flatten().tolist() in ([5], []) and (off[5] > 0 or len(scene.objects) == 2)


def test_texture_on_a_plain_wall_is_seen_in_its_share():
    scene = Scene((SceneObject("red", "circle", "small"),), "moving", "fast", "right", PLAIN)
    clip = render(scene, 4)
    clip[2, :16] += 0.07  # a quarter of the rows, none of which the circle touches
    off = background_off(clip, scene)
    assert off[[0, 1, 3]].tolist() == [0, 0, 0] and 0.25 < float(off[2]) < 0.35


def test_frames_of_another_size_are_refused():
    with pytest.raises(ValueError, match="give \\[T >= 2, 64, 64, 3\\]"):
        detect(torch.zeros(9, 32, 64, 3))
    with pytest.raises(ValueError, match="1 scenes and 0 clips"):
        accuracy(sample_scenes(1, 0), [])
