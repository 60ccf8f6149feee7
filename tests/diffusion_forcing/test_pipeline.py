"""DiffusionForcingPipeline: whole videos of a small model, from a directory too."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import rfengine
from rfengine import memory
from rfengine.checkpoint.checkpoint import Checkpoint, write_config
from rfengine.checkpoint.loader import save_weights
from rfengine.config import RuntimeConfig
from rfengine.diffusion_forcing.options import DiffusionForcingOptions
from rfengine.diffusion_forcing.pipeline import DiffusionForcingPipeline
from rfengine.models import vae as vae_module
from rfengine.presets import PRESETS
from rfengine.video import Video, pixels_from_frames
from support.diffusion_forcing import forcing_config, forcing_model, forcing_pipeline
from support.models import write_pipeline

Options = DiffusionForcingOptions


@pytest.fixture(scope="module")
def pipeline() -> DiffusionForcingPipeline:
    return forcing_pipeline()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, pipeline: DiffusionForcingPipeline) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("forcing"), pipeline)


def picture(seed: int = 0) -> numpy.ndarray:
    return numpy.random.default_rng(seed).integers(0, 256, (32, 48, 3), dtype=numpy.uint8)


def made(pipeline: DiffusionForcingPipeline, prompt: str = "a circle", **options: Any) -> numpy.ndarray:
    given = {name: options.pop(name) for name in ("start_frames", "end_frame") if name in options}
    video = pipeline.generate(prompt, Options(**options), **given)
    assert isinstance(video, Video) and video.fps == options.get("fps", 24)
    assert video.frames.shape == (options.get("num_frames", 21), 32, 48, 3)
    assert video.frames.dtype == numpy.uint8
    return video.frames


def test_a_seed_gives_one_video_and_everything_asked_for_counts(pipeline: DiffusionForcingPipeline) -> None:
    first = made(pipeline)
    assert numpy.array_equal(made(pipeline), first)
    for change in (
        {"seed": 1}, {"steps": 3}, {"shift": 2.0}, {"guidance_scale": 1.0}, {"negative_prompt": "blue"},
        {"fps": 16}, {"causal_attention": True}, {"prompt": "a square"},
    ):  # fmt: skip
        assert not numpy.array_equal(made(pipeline, **change), first), change


def test_rows_hold_the_frames_of_the_video_as_they_come(pipeline: DiffusionForcingPipeline) -> None:
    # three blocks of two, four steps each, two rows behind one another
    options = Options(num_frames=19, ar_step=2, causal_block_size=2)
    rows = list(pipeline.rows("a circle", options))
    assert [(row.index, row.total) for row in rows] == [(number, 8) for number in range(8)]
    assert [len(row.frames) for row in rows] == [0, 0, 0, 0, 0, 9, 0, 10]
    frames = numpy.concatenate([row.frames for row in rows])
    assert numpy.array_equal(frames, pipeline.generate("a circle", options).frames)


def test_a_growing_window_makes_a_video_of_any_length(pipeline: DiffusionForcingPipeline) -> None:
    options = {"num_frames": 61, "ar_step": 2, "causal_block_size": 2}
    longer = made(pipeline, **options)
    rows = list(pipeline.rows("a circle", Options(**options)))
    assert max(len(row.frames) for row in rows) <= 16
    # noise does not depend on what follows, and the first window sees nothing of it
    assert numpy.array_equal(made(pipeline, **options | {"num_frames": 81})[:9], longer[:9])


@pytest.mark.parametrize("overlap_latents", [False, True])
def test_long_videos_go_on_from_piece_to_piece(
    pipeline: DiffusionForcingPipeline, overlap_latents: bool
) -> None:
    options = {"overlap_history": 9, "overlap_latents": overlap_latents}
    long = made(pipeline, num_frames=40, **options)
    assert numpy.array_equal(long[:21], made(pipeline, num_frames=21))
    assert not numpy.array_equal(long[21:29], long[13:21])
    noised = made(pipeline, num_frames=40, addnoise_condition=20, **options)
    assert numpy.array_equal(noised[:21], long[:21]) and not numpy.array_equal(noised[21:], long[21:])


def test_an_overlap_in_latents_that_is_no_whole_blocks_is_made_anew_and_shown_once(
    pipeline: DiffusionForcingPipeline,
) -> None:
    """Three latent frames, of which two fill a block."""
    options = {"overlap_history": 9, "ar_step": 2, "causal_block_size": 2}
    long = made(pipeline, num_frames=37, overlap_latents=True, **options)
    assert numpy.array_equal(long[:21], made(pipeline, num_frames=21, ar_step=2, causal_block_size=2))
    assert not numpy.array_equal(long[21:], made(pipeline, num_frames=37, **options)[21:])


def test_a_clip_that_is_longer_than_the_window_is_continued(pipeline: DiffusionForcingPipeline) -> None:
    clip = numpy.stack([picture(seed) for seed in range(29)])
    video = made(pipeline, start_frames=clip, num_frames=61, ar_step=2)
    latents = pipeline.vae.encode(pixels_from_frames(clip))
    assert abs(video[:29].astype(int) - pipeline.vae.decode_frames(latents).numpy()).max() <= 1
    assert not numpy.array_equal(video[29:], made(pipeline, num_frames=61, ar_step=2)[29:])


def test_every_piece_and_row_has_noise_of_its_own(pipeline: DiffusionForcingPipeline) -> None:
    draw = pipeline._draw(3, pipeline.plan(Options()))
    places = ((0, 0), (0, 1), (1, 0), (1, 1))
    drawn = [draw(*place, 4) for place in places]
    assert torch.equal(draw(1, 0, 6)[:, :, :4], drawn[2])
    others = [pipeline._draw(4, pipeline.plan(Options()))(0, 0, 4), *drawn]
    assert all(not torch.equal(one, other) for number, one in enumerate(others) for other in others[:number])


def test_given_frames_are_not_encoded_in_tf32(
    pipeline: DiffusionForcingPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, seen = vae_module.WanVAE.encode, []

    def watched(*given: Any) -> torch.Tensor:
        seen.append(torch.backends.cudnn.allow_tf32)
        return encode(*given)

    monkeypatch.setattr(vae_module.WanVAE, "encode", watched)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    made(pipeline, start_frames=picture()[None], num_frames=40, overlap_history=9)
    assert seen and not any(seen)


def test_the_overlap_is_decoded_and_encoded_again(
    pipeline: DiffusionForcingPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, seen = vae_module.WanVAE.encode_in_groups, []

    def watched(self: vae_module.WanVAE, pixels: torch.Tensor, group: int) -> torch.Tensor:
        seen.append(pixels)
        return encode(self, pixels, group)

    monkeypatch.setattr(vae_module.WanVAE, "encode_in_groups", watched)
    frames = made(pipeline, num_frames=40, overlap_history=9)
    assert [tuple(pixels.shape) for pixels in seen] == [(1, 3, 9, 32, 48)] * 2
    # the pixels of the first piece's last nine frames, before they are rounded to bytes
    difference = (seen[0] - pixels_from_frames(frames[12:21])).abs()
    assert difference.max() <= 0.51 / 127.5 and difference.max() > 0
    made(pipeline, num_frames=40, overlap_history=9, overlap_latents=True)
    assert len(seen) == 2


def test_given_frames_begin_and_end_the_video(pipeline: DiffusionForcingPipeline) -> None:
    plain, start = made(pipeline), picture()[None]
    begun = made(pipeline, start_frames=start)
    latents = pipeline.vae.encode(pixels_from_frames(start))
    expected = pipeline.vae.decode_frames(latents).numpy()
    assert abs(begun[:1].astype(int) - expected).max() <= 1
    ended = made(pipeline, end_frame=picture(1))
    assert not numpy.array_equal(ended, plain) and not numpy.array_equal(begun[1:], plain[1:])
    clip = numpy.stack([picture(seed) for seed in range(5)])
    continued = made(pipeline, start_frames=clip, end_frame=picture(9), overlap_history=9, num_frames=40)
    assert not numpy.array_equal(continued[:5], begun[:5])


def test_what_a_program_has_set_in_torch_changes_nothing(pipeline: DiffusionForcingPipeline) -> None:
    expected, found = made(pipeline), []
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for row in pipeline.rows("a circle"):
            assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
            found.append(row.frames)
    assert numpy.array_equal(numpy.concatenate(found), expected)


def test_a_directory_is_loaded_and_makes_the_same_latents(
    directory: Path, pipeline: DiffusionForcingPipeline
) -> None:
    loaded = rfengine.DiffusionForcingPipeline.from_pretrained(directory, "cpu")
    assert loaded.config == forcing_config() and loaded.vae_tier == "lossless"
    assert loaded.backend == "cpu, reference" and loaded.model.dtype == torch.float32
    loaded.text_encoder = pipeline.text_encoder  # a directory has another one of the shape
    difference = made(loaded).astype(int) - made(pipeline)
    assert abs(difference).max() <= 1
    half = DiffusionForcingPipeline.from_pretrained(directory, "cpu", "bfloat16")
    assert half.model.dtype == torch.bfloat16 and half.vae.conv1.weight.dtype == torch.float32
    assert made(half, start_frames=picture()[None]).std() > 0


@pytest.mark.parametrize("in_weights", [True, False])
def test_a_directory_whose_weights_are_of_another_kind_is_refused(
    pipeline: DiffusionForcingPipeline, tmp_path: Path, in_weights: bool
) -> None:
    write_pipeline(tmp_path, pipeline)
    model = dataclasses.replace(pipeline.config.model, fps_embedding=not in_weights)
    config = dataclasses.replace(pipeline.config, model=model)
    if in_weights:
        config = dataclasses.replace(config, diffusion_forcing=None)
    else:
        tensors = forcing_model(dataclasses.replace(model, fps_embedding=False)).state_dict()
        save_weights(tmp_path / "transformer.safetensors", tensors)
    write_config(tmp_path, config)
    has = "the" if in_weights else "no"
    with pytest.raises(ValueError, match=f"safetensors has {has} tensors of the frame rate that SkyReels-V2"):
        Checkpoint.open(tmp_path)


def test_random_weights_of_the_preset_are_no_stream(directory: Path) -> None:
    checkpoint = Checkpoint.random(PRESETS["skyreels-df-1.3b"])
    for source in (directory, checkpoint):
        with pytest.raises(ValueError, match="is a diffusion forcing model, which makes whole videos"):
            rfengine.Pipeline.from_pretrained(source, "cpu")
    with pytest.raises(ValueError, match="tiny is no diffusion forcing model; use rfengine.Pipeline"):
        DiffusionForcingPipeline.from_pretrained("tiny", "cpu")


@pytest.mark.parametrize(
    ("runtime", "message"),
    [
        (RuntimeConfig(graphs=True), "graphs is asked for and is for streams alone"),
        (RuntimeConfig(overlap=True), "overlap is asked for and is for streams alone"),
        (RuntimeConfig(vae="tensorrt"), "vae is 'tensorrt', whose engines decode the chunks of a stream"),
    ],
)
def test_options_of_streams_are_refused(directory: Path, runtime: RuntimeConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiffusionForcingPipeline.from_pretrained(directory, "cpu", runtime=runtime)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": " "}, "the prompt ' ' is empty"),
        ({"options": Options(negative_prompt=" ")}, "the negative prompt ' ' is empty"),
        ({"start_frames": picture()}, r"frames are uint8 \(32, 48, 3\); give uint8 \[T"),
        (
            {"start_frames": picture()[None, :16]},
            r"frames are uint8 \(1, 16, 48, 3\); give uint8 \[T, 32, 48, 3\]",
        ),
        ({"start_frames": picture()[None][:0]}, "start_frames has 0 frames"),
        ({"start_frames": torch.zeros(1, 32, 48, 3)}, "frames are a torch tensor"),
        ({"end_frame": picture()[None]}, r"give uint8 \[T, 32, 48, 3\]"),
        ({"end_frame": picture().tolist()}, "frames are of type list"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_made(
    pipeline: DiffusionForcingPipeline, arguments: dict[str, Any], message: str
) -> None:
    prompt, options = arguments.pop("prompt", "a circle"), arguments.pop("options", Options())
    with pytest.raises(ValueError, match=message):
        pipeline.rows(prompt, options, **arguments)


def test_without_guidance_the_negative_prompt_is_not_looked_at(pipeline: DiffusionForcingPipeline) -> None:
    plain = made(pipeline, guidance_scale=1.0)
    assert numpy.array_equal(made(pipeline, guidance_scale=1.0, negative_prompt=" "), plain)


def test_a_window_that_no_memory_holds_is_refused(pipeline: DiffusionForcingPipeline) -> None:
    model = dataclasses.replace(pipeline.config.model, dim=12288, num_heads=2)
    config = dataclasses.replace(pipeline.config, model=model)
    other = DiffusionForcingPipeline(
        config, pipeline.model, pipeline.vae, pipeline.text_encoder, lambda grid: pipeline.vae
    )
    with pytest.raises(RuntimeError, match="a piece of 6 latent frames of 8192 x 8192 pixels needs"):
        other.rows("a circle", Options(height=8192, width=8192))


def test_frames_that_no_memory_holds_are_refused(
    pipeline: DiffusionForcingPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: 100_000)
    message = "holding 21 frames of 32 x 48 pixels needs .* ask for fewer, or take those of rows.. one by one"
    with pytest.raises(RuntimeError, match=message):
        pipeline.generate("a circle")
