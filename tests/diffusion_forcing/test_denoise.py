"""The denoising of whole videos, compared with the pipelines of Diffusers from the same noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rfengine.accuracy import relative_error
from rfengine.checkpoint.layouts import wan_vae_from_diffusers
from rfengine.diffusion_forcing.denoise import Conditions, Draw, GuidedFlow, denoise_video
from rfengine.diffusion_forcing.options import DiffusionForcingOptions
from rfengine.diffusion_forcing.plan import VideoPlan, plan_video
from rfengine.models.vae import WanVAE
from support.diffusion_forcing import BASE_FRAMES, diffusers_parts, forcing_config, forcing_model
from support.models import GRID, SMALL, SMALL_VAE

SCALE, STEPS = 3.0, 5
NOTHING_GIVEN = Conditions()
Options = DiffusionForcingOptions


def texts() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return tuple(torch.randn(1, 8, SMALL.text_dim, generator=generator) for _ in range(2))


@torch.no_grad()
def own_latents(plan: VideoPlan, draw: Draw, conditions: Conditions = NOTHING_GIVEN) -> Tensor:
    """All latents, the overlap taken as latents."""
    model = forcing_model(forcing_config().model)
    positive, negative = (model.text_keys_values(states) for states in texts())
    flow = GuidedFlow(model, positive, negative, plan.guidance_scale, plan.fps, plan.block_frames)
    repeated = plan.pieces[-1].repeated
    parts = []
    for index, row, latents in denoise_video(
        plan, flow, draw, conditions, lambda done: done[:, :, -repeated:]
    ):
        if row is plan.pieces[index].rows[-1]:
            parts.append(latents[:, :, plan.pieces[index].repeated :].clone())
    return torch.cat(parts, dim=2)


def same_draws() -> Draw:
    """What the pipelines of Diffusers draw: the noise of a piece from a generator, that of a row from torch's
    own, which has a seed of its own too."""
    of_pieces, of_rows = (torch.Generator().manual_seed(seed) for seed in (1, 5))

    def draw(piece: int, step: int, frames: int) -> Tensor:
        shape = (1, SMALL.in_dim, frames, GRID.latent_height, GRID.latent_width)
        return torch.randn(shape, generator=of_rows if step else of_pieces)

    return draw


def diffusers_latents(name: str, shift: float, **options: Any) -> Tensor:
    """What the pipeline `name` of Diffusers makes, of the same text and the same draws."""
    import diffusers

    parts = options.pop("parts", None) or diffusers_parts(forcing_model(forcing_config().model), shift)
    pipeline = getattr(diffusers, name)(**parts)
    pipeline.set_progress_bar_config(disable=True)
    positive, negative = (
        torch.nn.functional.pad(states, (0, 0, 0, 64 - states.shape[1])) for states in texts()
    )
    torch.manual_seed(5)
    return pipeline(
        prompt=None, prompt_embeds=positive, negative_prompt_embeds=negative, height=GRID.height,
        width=GRID.width, num_inference_steps=STEPS, guidance_scale=SCALE, base_num_frames=BASE_FRAMES,
        generator=torch.Generator().manual_seed(1), output_type="latent", **options,
    ).frames  # fmt: skip


def planned(start_frames: int = 0, has_end: bool = False, **options: Any) -> VideoPlan:
    """As Diffusers plans it, but for `options`."""
    own = {"steps": STEPS, "guidance_scale": SCALE, "sigmas": "diffusers"}
    chosen = Options(**own | {"overlap_latents": "overlap_history" in options} | options)
    return plan_video(forcing_config(), chosen, start_frames, has_end)


CASES: dict[str, dict[str, Any]] = {
    "synchronous": {"num_frames": 21},
    "asynchronous": {"num_frames": 21, "ar_step": 2},
    "asynchronous, 16 a second": {"num_frames": 21, "ar_step": 2, "fps": 16},
    "block-causal": {"num_frames": 21, "ar_step": 2, "causal_block_size": 2, "causal_attention": True},
    "overlap": {"num_frames": 37, "overlap_history": 9},
    "overlap, asynchronous": {"num_frames": 33, "overlap_history": 9, "ar_step": 2},
    "overlap, noise on it": {"num_frames": 37, "overlap_history": 9, "addnoise_condition": 20},
    "overlap, cut to blocks": {
        "num_frames": 37, "overlap_history": 9, "ar_step": 2, "causal_block_size": 2,
        "causal_attention": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_video_agrees_with_diffusers(case: str) -> None:
    options = CASES[case]
    theirs = {key: value for key, value in options.items() if key != "causal_attention"}
    expected = diffusers_latents("SkyReelsV2DiffusionForcingPipeline", 8.0, **theirs)
    found = own_latents(
        planned(**options), same_draws(), Conditions(addnoise=options.get("addnoise_condition", 0))
    )
    assert found.shape == expected.shape
    assert relative_error(found, expected) <= 1e-5
    assert (found - expected).abs().max() <= 1e-4


@pytest.fixture(scope="module")
def block_causal() -> Tensor:
    return own_latents(planned(**CASES["block-causal"]), same_draws())


@pytest.mark.parametrize(
    "change",
    [
        {"ar_step": 3},
        {"causal_block_size": 3},
        {"causal_attention": False},
        {"sigmas": "skyreels"},
        {"shift": 7.5},
        {"fps": 16},
        {"guidance_scale": 2.5},
    ],
    ids=str,
)
def test_another_setting_is_seen(block_causal: Tensor, change: dict[str, Any]) -> None:
    other = planned(**CASES["block-causal"] | change)
    assert relative_error(own_latents(other, same_draws()), block_causal) > 1e-3


@pytest.fixture(scope="module")
def pictures() -> tuple[Tensor, Tensor]:
    """Two pictures [1, 3, H, W] in [0, 1]."""
    generator = torch.Generator().manual_seed(9)
    return tuple(torch.rand(1, 3, GRID.height, GRID.width, generator=generator) for _ in range(2))


@torch.no_grad()
@pytest.mark.parametrize("has_end", [False, True])
@pytest.mark.parametrize("addnoise", [0, 20])
def test_given_pictures_agree_with_diffusers(
    pictures: tuple[Tensor, Tensor], has_end: bool, addnoise: int
) -> None:
    parts = diffusers_parts(forcing_model(forcing_config().model), 5.0)
    options = {"addnoise_condition": addnoise, "num_frames": 17}
    expected = diffusers_latents(
        "SkyReelsV2DiffusionForcingImageToVideoPipeline", 5.0, parts=parts, image=pictures[0],
        last_image=pictures[1] if has_end else None, **options,
    )  # fmt: skip
    expected = expected[:, :, :5]  # it leaves the end frame on latents
    vae = WanVAE(SMALL_VAE).eval()
    vae.load_state_dict(
        {wan_vae_from_diffusers(name, 1): value for name, value in parts["vae"].state_dict().items()}
    )
    start, end = (vae.encode(2 * picture.unsqueeze(2) - 1) for picture in pictures)
    plan = planned(1, has_end, **options)
    found = own_latents(plan, same_draws(), Conditions(start, end if has_end else None, addnoise))
    assert torch.allclose(found[:, :, :1], start, atol=1e-5)
    assert relative_error(found, expected) <= 1e-5 and found.shape == expected.shape
    without = own_latents(plan, same_draws(), Conditions(start, None if has_end else end, addnoise))
    assert (without - expected).abs().max() > 1e-2


def recorded(
    options: Options, conditions: Conditions, start_frames: int = 0
) -> tuple[VideoPlan, list[tuple[Tensor, tuple[int, ...]]], Tensor]:
    """What a model is shown in each row of a video, which finds no flow, and the last latents."""
    plan = plan_video(forcing_config(), options, start_frames, conditions.end is not None)
    seen = []

    def flow(latents: Tensor, timesteps: tuple[int, ...]) -> Tensor:
        seen.append((latents.clone(), tuple(timesteps)))
        return torch.zeros_like(latents)

    def draw(piece: int, step: int, frames: int) -> Tensor:
        return torch.full((1, 4, frames, 4, 6), 100.0 * (piece + 1) + step)

    def next_prefix(latents: Tensor) -> Tensor:
        return latents[:, :, -plan.pieces[1].repeated :]

    latents = torch.empty(0)
    for _, _, current in denoise_video(plan, flow, draw, conditions, next_prefix):
        latents = current
    return plan, seen, latents


def clean(value: float, frames: int) -> Tensor:
    return torch.full((1, 4, frames, 4, 6), value)


def test_clean_prefix_stays_and_is_shown_at_timestep_0() -> None:
    _, seen, latents = recorded(Options(num_frames=21), Conditions(start=clean(7, 2)), start_frames=5)
    for shown, timesteps in seen:
        assert timesteps[:2] == (0, 0) and 0 not in timesteps[2:]
        assert torch.equal(shown[:, :, :2], clean(7, 2))
    assert torch.equal(latents[:, :, :2], clean(7, 2)) and len(seen) == 4


def test_noise_on_the_prefix_is_fresh_in_each_row_and_leaves_the_latents_clean() -> None:
    options = Options(num_frames=21, addnoise_condition=20)
    _, seen, latents = recorded(options, Conditions(clean(7, 2), addnoise=20), start_frames=5)
    for number, (shown, timesteps) in enumerate(seen):
        assert timesteps[:2] == (20, 20)
        expected = 0.98 * clean(7, 2) + 0.02 * clean(101 + number, 2)
        assert torch.allclose(shown[:, :, :2], expected, rtol=1e-6)
    assert torch.equal(latents[:, :, :2], clean(7, 2))


def test_remainder_is_cut_from_the_end_of_the_prefix() -> None:
    start = torch.cat([clean(1, 1), clean(2, 1), clean(3, 1)], dim=2)
    options = Options(num_frames=21, ar_step=2, causal_block_size=2)
    _, seen, _ = recorded(options, Conditions(start), start_frames=9)
    shown, timesteps = seen[0]
    assert timesteps[:2] == (0, 0) and timesteps[2] > 0
    assert torch.equal(shown[:, :, :2], start[:, :, :2]) and torch.equal(shown[:, :, 2:], clean(100, 4))


def test_end_frame_is_seen_by_the_last_piece_alone() -> None:
    options = Options(num_frames=49, overlap_history=9)
    plan, seen, latents = recorded(options, Conditions(end=clean(9, 1)))
    assert [len(piece.rows) for piece in plan.pieces] == [4, 4, 4, 4]
    for number, (shown, timesteps) in enumerate(seen):
        is_last = number >= 12
        assert (timesteps[-1] == 0) is is_last and (shown[0, 0, -1, 0, 0] == 9) == is_last
    frames = plan.pieces[-1].sizes.frames
    assert seen[-1][0].shape[2] == frames + 1 and latents.shape[2] == frames


def test_window_is_all_that_a_row_is_shown() -> None:
    options = Options(
        num_frames=45, ar_step=2, causal_block_size=2
    )  # twelve latent frames in a window of six
    plan, seen, _ = recorded(options, Conditions())
    assert [shown.shape[2] for shown, _ in seen] == [6] * plan.row_count
    assert plan.row_count == 4 + 5 * 2


def test_prefix_of_a_window_that_has_moved_on_is_not_noised() -> None:
    options = Options(num_frames=45, ar_step=2, causal_block_size=2, addnoise_condition=20)
    plan, seen, _ = recorded(options, Conditions(clean(7, 4), addnoise=20), start_frames=13)
    for row, (_, timesteps) in zip(plan.pieces[0].rows, seen, strict=True):
        left = max(0, 4 - row.start)
        assert timesteps[:left] == (20,) * left and 20 not in timesteps[left:]
