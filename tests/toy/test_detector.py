import pytest
import torch

from rfengine.toy.detector import ATTRIBUTES, accuracy, detect, score
from rfengine.toy.world import WorldConfig, ground_truth, render, sample_scenes

EVERY_MOTION = WorldConfig(motion_weights=(3, 1, 1, 1), pair_share=0.25)


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


def test_positions_and_speed_are_those_of_the_ground_truth():
    for scene in sample_scenes(12, 4, WorldConfig(motion_weights=(1, 0, 0, 0), pair_share=0.0)):
        found = detect(render(scene, 33)).objects[0]
        (track,) = ground_truth(scene, 33)
        error = (found.position - track.position + 32) % 64 - 32
        assert float(error.norm(dim=-1).max()) < (4.0 if scene.objects[0].shape == "triangle" else 1.0)
        assert found.speed_value == pytest.approx({"slowly": 1.0, "fast": 2.0}[scene.speed], abs=0.1)
        assert float(found.radius.mean()) == pytest.approx(
            float(track.radius[0]), abs=1.01
        )  # a template apart


def test_presence_shows_when_the_object_is_gone():
    (scene,) = sample_scenes(1, 2, WorldConfig(motion_weights=(1, 0, 0, 0), pair_share=0.0))
    clip = render(scene, 33)
    clip[20:25] = 0.5
    found = detect(clip).objects[0]
    assert found.presence.tolist() == [not 20 <= frame < 25 for frame in range(33)]
    assert bool(found.position[20:25].isnan().all())


def test_an_empty_video_has_no_objects_and_scores_nothing_but_the_background():
    (scene,) = sample_scenes(1, 2, WorldConfig(motion_weights=(1, 0, 0, 0), pair_share=0.0))
    detection = detect(torch.full((9, 64, 64, 3), 0.5))
    assert detection.objects == ()
    assert not any(value for name, value in score(scene, detection).items() if name != "background")


def test_a_still_video_does_not_move():
    (scene,) = sample_scenes(1, 2, WorldConfig(motion_weights=(1, 0, 0, 0), pair_share=0.0))
    found = detect(render(scene, 1).expand(33, -1, -1, -1)).objects[0]
    assert found.speed_value == 0.0
    assert not score(scene, detect(render(scene, 1).expand(33, -1, -1, -1)))["motion"]


def test_both_objects_of_a_pair_are_found():
    (scene,) = sample_scenes(1, 9, WorldConfig(motion_weights=(1, 0, 0, 0), pair_share=1.0))
    found = {entry.colour for entry in detect(render(scene, 33)).objects}
    assert found == {entry.colour for entry in scene.objects}


def test_frames_of_another_size_are_refused():
    with pytest.raises(ValueError, match="give \\[T >= 2, 64, 64, 3\\]"):
        detect(torch.zeros(9, 32, 64, 3))
    with pytest.raises(ValueError, match="1 scenes and 0 clips"):
        accuracy(sample_scenes(1, 0), [])
