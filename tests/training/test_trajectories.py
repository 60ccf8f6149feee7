"""The teacher's trajectories: they pass through the student's noise levels and end where the flow ends."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from inputs import small_model, text_states
from rfengine.config import ScheduleConfig
from rfengine.schedule import FlowSchedule, add_noise
from rfengine.training.trajectories import TrajectoryFile, follow_flow, make_trajectories
from training_checks.small_distillation import ENGINE

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
    def draw(count):
        return torch.randn(count, 4, 3, 2, 2), text_states().expand(count, -1, -1)

    def follow(noise, states):
        return torch.stack([noise, 0 * noise], dim=1)

    make_trajectories(path, 5, draw, follow, schedule, batch=2)


def test_file_gives_back_what_was_made(tmp_path):
    path = tmp_path / "new" / "paths.safetensors"
    write(path, ENGINE.schedule)
    states, texts = TrajectoryFile(path, ENGINE).draw(7, torch.Generator().manual_seed(0))
    assert states.shape == (7, 2, 4, 3, 2, 2) and texts.shape == (7, 8, 16)
    assert states[:, 0].abs().amax(dim=(1, 2, 3, 4)).min() > 0 and not states[:, 1].any()


def test_file_of_another_schedule_is_refused(tmp_path):
    path = tmp_path / "paths.safetensors"
    write(path, dataclasses.replace(ENGINE.schedule, shift=8.0))
    with pytest.raises(ValueError, match="8.0.*remove the file"):
        TrajectoryFile(path, ENGINE)
