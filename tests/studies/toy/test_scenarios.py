"""The scenarios of the toy study: their plans, the true videos of these, and what is measured of a video."""

from __future__ import annotations

import torch

from rfengine.evaluation.video_frames import ChunkGrid
from rfengine.toy.captions import is_held_out
from studies.toy.scenarios import Plan, plan_values, scenario_plans

GRID = ChunkGrid(9, 12)
CHUNKS = 21
FRAMES = 9 + 12 * (CHUNKS - 1)


def switching_plan() -> Plan:
    return scenario_plans("switches", 3, CHUNKS)[2]


def test_scenes_of_a_plan_are_held_out_and_differ_where_they_follow_each_other() -> None:
    plans = scenario_plans("switches", 4, CHUNKS)
    assert len(plans) == 4 and len({plan.texts for plan in plans}) == 4
    for plan in plans:
        assert plan.chunks == (0, 7, 14) and all(is_held_out(scene) for scene in plan.scenes)
        colours = [entry.colour for scene in plan.scenes for entry in scene.objects]
        assert len({scene.background for scene in plan.scenes}) == 3 and len(set(colours)) == len(colours)
    assert all(plan.scenes[0].camera == "still" for plan in scenario_plans("stays", 6, CHUNKS))
    assert all(plan.scenes[0].camera != "still" for plan in scenario_plans("pans", 6, CHUNKS))


def test_a_true_video_is_right_from_each_switch_on_and_shows_nothing_old() -> None:
    plan = switching_plan()
    video = plan.true_video(FRAMES, GRID, 1)
    assert video.shape == (FRAMES, 64, 64, 3) and video.dtype == torch.uint8
    assert not torch.equal(video, plan.true_video(FRAMES, GRID, 2))
    values, curves = plan_values(video, plan, GRID)
    assert values["right"] == values["right_after_2"] == 1 and values["old_scene"] == 0
    assert curves["after_switch"] == [(float(delay), 1.0) for delay in range(5)]
    assert curves["old_scene"] == [(float(delay), 0.0) for delay in range(5)]
    assert [chunk for chunk, _ in curves["right"]][:4] == [0, 3, 7, 8]


def test_a_video_that_keeps_its_first_scene_is_wrong_behind_the_switches() -> None:
    plan = switching_plan()
    kept = Plan(plan.scenes[:1], (0,)).true_video(FRAMES, GRID, 1)
    values, curves = plan_values(kept, plan, GRID)
    assert curves["old_scene"] == [(float(delay), 1.0) for delay in range(5)]
    assert values["old_scene"] == 1 and values["right_after_2"] == values["right_after_4"] == 0
    assert 0 < values["right"] < 0.5


def test_a_camera_that_stands_is_seen_where_it_should_pan() -> None:
    (plan,) = scenario_plans("pans", 1, CHUNKS)
    (still,) = scenario_plans("stays", 1, CHUNKS)
    right, _ = plan_values(plan.true_video(FRAMES, GRID, 3), plan, GRID)
    wrong, _ = plan_values(still.true_video(FRAMES, GRID, 3), plan, GRID)
    assert right["camera"] == right["right"] == 1 and wrong["camera"] == 0
