"""The teacher's trajectories: they pass through the student's noise levels and end where the flow ends."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from rfengine.checkpoint.loader import save_weights
from rfengine.config import ScheduleConfig
from rfengine.config_json import to_dict
from rfengine.schedule import FlowSchedule, add_noise
from rfengine.training.trajectories import TrajectoryFile, follow_flow, save_trajectories
from support.models import small_model, text_states
from support.small_training import ENGINE

SCHEDULE = ScheduleConfig(denoising_steps=(1000, 750, 500, 250))


class StraightTeacher:
    """The exact flow towards one clean clip: every trajectory is a straight line in sigma."""

    def __init__(self, clean: torch.Tensor) -> None:
        self.clean, self.seen = clean, []

    def forward_clip(self, x_t, timesteps, states):
        sigma = timesteps.view(-1, 1, 1, 1, 1) / 1000
        self.seen.append(float(timesteps[0]))
        return (x_t - self.clean) / sigma


def test_states_are_the_noisy_clips_of_the_students_own_noise_levels():
    noise, clean = torch.randn(2, 3, 4, 2, 2), torch.randn(2, 3, 4, 2, 2)
    states = follow_flow(StraightTeacher(clean), SCHEDULE, noise, text_states(), text_states(), 0.0, 12)
    for index, sigma in enumerate(FlowSchedule(SCHEDULE).denoising_sigmas):
        torch.testing.assert_close(states[:, index], add_noise(clean, noise, sigma), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(states[:, -1], clean, atol=1e-4, rtol=1e-4)


def test_forty_eight_steps_visit_the_levels_of_the_shifted_table():
    teacher = StraightTeacher(torch.zeros(1, 1, 1, 1, 1))
    follow_flow(teacher, SCHEDULE, torch.randn(1, 1, 1, 1, 1), text_states(), text_states(), 0.0)
    assert len(teacher.seen) == 48 and teacher.seen == sorted(teacher.seen, reverse=True)
    sigmas = FlowSchedule(SCHEDULE).denoising_timesteps
    assert [teacher.seen[index] for index in (0, 12, 24, 36)] == pytest.approx(sigmas)


def test_guidance_moves_the_trajectory_by_the_difference_of_two_texts():
    model, noise = small_model(), torch.randn(1, 4, 3, 4, 6)
    schedule = ScheduleConfig(denoising_steps=(1000,))
    paths = {
        guidance: follow_flow(model, schedule, noise, text_states(1), text_states(2), guidance, 1)
        for guidance in (0.0, 1.0, 2.0)
    }
    once, twice = paths[1.0][:, -1] - paths[0.0][:, -1], paths[2.0][:, -1] - paths[0.0][:, -1]
    torch.testing.assert_close(twice, 2 * once, atol=1e-4, rtol=1e-3)
    assert once.abs().max() > 1e-3


def write(path, schedule) -> None:
    def batches():
        for count in (2, 2, 1):
            noise = torch.randn(count, 4, 3, 4, 6)
            yield torch.stack([noise, noise / 2, 0 * noise], dim=1), text_states().expand(count, -1, -1)

    save_trajectories(path, batches(), schedule)


def test_file_gives_back_what_was_made(tmp_path):
    path = tmp_path / "new" / "paths.safetensors"
    write(path, ENGINE.schedule)
    states, texts = TrajectoryFile(path, ENGINE).draw(7, torch.Generator().manual_seed(0))
    assert states.shape == (7, 3, 4, 3, 4, 6) and texts.shape == (7, 8, 16)
    assert states[:, 0].abs().amax(dim=(1, 2, 3, 4)).min() > 0 and not states[:, 2].any()


def test_file_of_another_schedule_is_refused(tmp_path):
    path = tmp_path / "paths.safetensors"
    write(path, dataclasses.replace(ENGINE.schedule, shift=8.0))
    with pytest.raises(ValueError, match="8.0.*remove the file"):
        TrajectoryFile(path, ENGINE)


STATES, TEXTS = torch.zeros(5, 3, 4, 3, 4, 6), torch.zeros(5, 8, 16)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"states": STATES}, "the tensors {'states'"),
        ({"states": STATES, "texts": TEXTS, "more": TEXTS}, "'more'"),
        ({"states": STATES[:, :2], "texts": TEXTS}, r"states \[5, 2, 4, 3, 4, 6\] where this training has"),
        ({"states": STATES[..., :5], "texts": TEXTS}, r"has \[5, 3, 4, 3, 4, 6\]"),
        ({"states": STATES, "texts": TEXTS[:4]}, r"texts \[4, 8, 16\] where"),
        ({"states": STATES[:0], "texts": TEXTS[:0]}, "states"),
        ({"states": STATES + torch.nan, "texts": TEXTS}, "states that are not all finite"),
        ({"states": STATES, "texts": TEXTS.long()}, "texts that are not all finite"),
    ],
)
def test_file_of_other_tensors_is_refused(tmp_path, tensors, message):
    path = tmp_path / "paths.safetensors"
    save_weights(path, tensors, {"schedule": json.dumps(to_dict(ENGINE.schedule))})
    with pytest.raises(ValueError, match=rf"paths.safetensors has .*{message}.*; remove the file"):
        TrajectoryFile(path, ENGINE)


@pytest.mark.parametrize("schedule", ["", "{", "NaN", "[" * 100_000])
def test_file_without_a_schedule_is_refused(tmp_path, schedule):
    path = tmp_path / "paths.safetensors"
    save_weights(path, {"states": STATES, "texts": TEXTS}, {"schedule": schedule})
    with pytest.raises(ValueError, match="paths.safetensors names no schedule .*; remove the file"):
        TrajectoryFile(path, ENGINE)
