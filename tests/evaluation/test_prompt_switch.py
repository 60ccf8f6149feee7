"""Prompt switches: the delay is from the switch to the window from which the new prompt wins for good."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rfengine.evaluation.prompt_switch import measure_switches
from rfengine.evaluation.toy_accuracy import toy_window_score
from rfengine.evaluation.video_frames import NotMeasurableError
from rfengine.toy.captions import caption
from rfengine.toy.world import Scene, SceneObject, render
from support.distortions import as_frames

OLD = Scene((SceneObject("red", "square", "large"),), "moving", "slowly", "right", "grey wall")
NEW = Scene((SceneObject("blue", "circle", "large"),), "moving", "slowly", "right", "grey wall")


def level(window: Tensor, prompt: str) -> float:
    """The video is as bright as the new prompt says."""
    return float(window.float().mean()) / 255 if prompt == "bright" else 0.5


def video_of_levels(levels: list[int]) -> Tensor:
    return torch.tensor(levels, dtype=torch.uint8)[:, None, None, None].expand(-1, 4, 4, 3)


@pytest.mark.parametrize("late", [0, 8, 20])
def test_delay_grows_with_the_frames_that_show_the_old_prompt(late: int) -> None:
    video = as_frames(torch.cat((render(OLD, 24 + late), render(NEW, 60, start_frame=24 + late))))
    found = measure_switches(video, [(0, caption(OLD)), (24, caption(NEW))], toy_window_score).values
    assert found["switch_failures"] == 0 and max(0, late - 8) <= found["switch_delay"] <= late + 4


def test_a_first_win_that_does_not_last_does_not_count() -> None:
    video = video_of_levels([0] * 12 + [255] * 12 + [0] * 12 + [255] * 24)
    found = measure_switches(video, [(0, "dark"), (0, "bright")], level, window_frames=4)
    assert found.values == {"switch_delay": 36, "switch_failures": 0}
    assert [start for start, margin in found.curves["switch_margin"] if margin > 0][:3] == [12, 16, 20]


def test_a_prompt_that_never_wins_counts_as_long_as_its_frames() -> None:
    found = measure_switches(video_of_levels([0] * 40), [(0, "dark"), (8, "bright")], level)
    assert found.values == {"switch_delay": 32, "switch_failures": 1}
    assert all(margin < 0 for _, margin in found.curves["switch_margin"])


def test_a_switch_at_the_end_cannot_be_judged() -> None:
    with pytest.raises(NotMeasurableError, match="5 frames follow the switch at 35; its delay needs 12"):
        measure_switches(video_of_levels([0] * 40), [(0, "dark"), (35, "bright")], level)
