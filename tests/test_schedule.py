import pytest
import torch

from rfengine.config import ScheduleConfig
from rfengine.schedule import FlowSchedule, add_noise, chunk_noise


@pytest.fixture
def schedule() -> FlowSchedule:
    return FlowSchedule(ScheduleConfig())


def test_sigma_table_has_the_published_ends(schedule):
    expected_head = torch.tensor([1.0, 0.9997998, 0.9995994, 0.9993985])
    expected_tail = torch.tensor([0.0196850, 0.0148221, 0.0099206, 0.0049801])
    assert schedule.sigmas.dtype == torch.float32
    torch.testing.assert_close(schedule.sigmas[:4], expected_head, rtol=0, atol=6e-8)
    torch.testing.assert_close(schedule.sigmas[-4:], expected_tail, rtol=0, atol=6e-8)


def test_nominal_steps_are_warped_as_published(schedule):
    assert schedule.denoising_timesteps == (1000.0, 937.5, 833.3333129882812, 625.0)
    assert schedule.denoising_sigmas == pytest.approx((1.0, 0.9375, 0.8333333135, 0.625), abs=1e-8)


def test_timestep_zero_reads_the_last_sigma(schedule):
    assert schedule.sigma_at(torch.tensor(0.0)).item() == pytest.approx(0.0049801, abs=1e-7)
    assert schedule.sigma_at(torch.tensor([1000.0, 937.5])).tolist() == [1.0, 0.9375]


def test_shift_of_one_leaves_the_steps_as_they_are():
    flat = FlowSchedule(ScheduleConfig(shift=1.0, denoising_steps=(1000, 400)))
    assert flat.denoising_timesteps == pytest.approx((1000.0, 400.0), abs=1e-3)


def test_added_noise_interpolates_between_clean_and_noise():
    x0, noise = torch.full((2, 3), 2.0), torch.full((2, 3), -1.0)
    assert add_noise(x0, noise, 0.25).tolist() == [[1.25] * 3] * 2
    assert add_noise(x0, noise, torch.tensor([[0.0], [1.0]])).tolist() == [[2.0] * 3, [-1.0] * 3]


def test_noise_depends_on_seed_chunk_and_step_alone():
    first = chunk_noise(7, 40, 2, (3, 5))
    chunk_noise(8, 0, 0, (100,))
    assert torch.equal(first, chunk_noise(7, 40, 2, (3, 5)))
    for other in ((8, 40, 2), (7, 41, 2), (7, 40, 3)):
        assert not torch.equal(first, chunk_noise(*other, (3, 5)))


def test_noise_of_chunk_40_of_seed_7_never_changes():
    expected = torch.tensor([1.0107347965240479, -0.2693520486354828, 0.9696384072303772])
    assert torch.equal(chunk_noise(7, 40, 0, (3,)), expected)


def test_noise_is_standard_normal():
    draw = chunk_noise(1, 2, 3, (200_000,)).double()
    assert abs(draw.mean().item()) < 0.01
    assert abs(draw.std().item() - 1) < 0.01


def test_negative_seed_is_refused():
    with pytest.raises(ValueError, match="seed is -1"):
        chunk_noise(-1, 0, 0, (1,))
