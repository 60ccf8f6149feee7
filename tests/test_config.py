from __future__ import annotations

import dataclasses

import pytest

from rfengine.config import (
    CacheConfig,
    RuntimeConfig,
    ScheduleConfig,
    TextConfig,
    TinyVAEConfig,
    VAEConfig,
    WanConfig,
)
from rfengine.diffusion_forcing_config import DiffusionForcingConfig
from rfengine.presets import PRESETS

SMALL = {"dim": 24, "ffn_dim": 48, "num_heads": 2, "num_layers": 1}


def test_presets_carry_their_own_names() -> None:
    assert {name: config.name for name, config in PRESETS.items()} == {name: name for name in PRESETS}
    assert set(PRESETS) == {"tiny", "wan-1.3b", "wan-14b", "skyreels-df-1.3b"}


def test_published_models_have_heads_of_128_and_the_published_vae_strides() -> None:
    for name in ("wan-1.3b", "wan-14b"):
        config = PRESETS[name]
        assert config.model.head_dim == 128
        assert (config.vae.spatial_stride, config.vae.temporal_stride) == (8, 4)


def test_default_cache_is_the_published_one() -> None:
    cache = CacheConfig()
    assert (cache.chunk_frames, cache.window_frames, cache.sink_frames, cache.alpha) == (3, 9, 3, 0.999)
    assert (cache.past_frames, cache.filling_chunks, cache.first_chunk) == (6, 3, 3)


def test_configuration_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        CacheConfig().alpha = 0.5  # type: ignore[misc]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_heads": 5}, "dim 24 is not divisible by num_heads 5"),
        ({"num_heads": 6}, "head_dim is 4; rotation needs an even head_dim"),
        ({"dim": 21, "num_heads": 3}, "head_dim is 7; rotation needs an even head_dim"),
        ({"freq_dim": 255}, "freq_dim is 255"),
        ({"patch_size": (2, 2, 2)}, "exactly one latent frame"),
    ],
)
def test_model_of_impossible_shape_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WanConfig(**SMALL | change)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"chunk_frames": 0}, "chunk_frames is 0"),
        ({"window_frames": 0}, "window_frames is 0"),
        ({"alpha": 1.1}, "alpha is 1.1"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"sink": "mean"}, "sink is 'mean'"),
        ({"positions": "rope"}, "positions is 'rope'"),
        ({"sink_precision": "fp8"}, "sink_precision is 'fp8'"),
        ({"sink": "none"}, "sink_frames is 3 and sink is 'none'"),
        ({"sink": "frozen", "sink_frames": 0}, "sink_frames is 0 and sink is 'frozen'"),
        (
            {"sink": "frozen", "sink_frames": 7},
            "7 frames and a chunk of 3 do not fit into it, use at least 10",
        ),
        ({"sink": "frozen", "sink_frames": 9}, "do not fit into it, use at least 12"),
        (
            {"sink": "frozen", "memory_rates": (0.1, 0.5), "sink_frames": 5},
            "a sink of 5 frames, 2 of memory and a chunk of 3 do not fit into it, use at least 10",
        ),
        (
            {"sink_frames": 4},
            "window_frames is 9; a sink of 4 frames and two chunks of 3, past and present, do",
        ),
        ({"sink_frames": 4}, "use at least 10"),
        ({"positions": "absolute"}, "no absolute time"),
        ({"window_frames": 5}, "a sink of 3 frames and two chunks of 3, past and present, .* at least 9"),
        ({"sink_frames": 512, "window_frames": 512}, "do not fit into it, use a smaller sink or chunk"),
        (
            {"sink": "frozen", "window_frames": 12, "joint_frames": 6, "first_chunk_frames": 1},
            "first_chunk_frames is 1 and joint_frames 6; chunks that are denoised beside each other all have",
        ),
        ({"memory_rates": (0.1,)}, "memory_rates are given with sink='ema'"),
        (
            {"sink": "frozen", "memory_rates": (1.5,)},
            "memory_rates is \\(1.5,\\); each entry must be at most 1",
        ),
        ({"sink": "frozen", "memory_rates": (0.1,), "positions": "absolute"}, "has no absolute time"),
        ({"first_chunk_frames": 10}, "first_chunk_frames is 10; sink and past hold 9"),
        ({"joint_frames": 4}, "joint_frames is 4; use a multiple of chunk_frames, which is 3"),
        ({"sink": "frozen", "joint_frames": 6}, "3 frames, 6 denoised jointly and a chunk of 3 do not fit"),
        ({"eviction": "similarity"}, "eviction by similarity decides on the device"),
        ({"eviction": "similarity", "sink": "frozen", "sink_frames": 4}, "use at least 10"),
        ({"eviction": "score"}, "eviction is 'score'"),
    ],
)
def test_cache_that_cannot_work_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CacheConfig(**change)


@pytest.mark.parametrize(
    "values",
    [
        {"sink": "none", "sink_frames": 0, "positions": "absolute"},
        {"sink": "frozen", "positions": "absolute"},
        {"sink": "frozen", "sink_frames": 6},
        {"chunk_frames": 1, "sink_frames": 1, "window_frames": 3},
        {"chunk_frames": 4, "window_frames": 18, "sink": "frozen", "sink_frames": 6},
        {"chunk_frames": 1, "window_frames": 7, "sink": "frozen", "sink_frames": 5},
        {"window_frames": 12, "sink": "frozen", "memory_rates": (0.01, 0.1)},
        {"window_frames": 21, "sink": "none", "sink_frames": 0, "first_chunk_frames": 1},
        {"window_frames": 10, "sink_frames": 1},
    ],
)
def test_caches_of_the_relatives_are_allowed(values: dict[str, object]) -> None:
    cache = CacheConfig(**values)
    parts = cache.sink_frames + cache.past_frames + len(cache.memory_rates) + cache.joint_frames
    assert parts == cache.window_frames and cache.past_frames >= cache.chunk_frames


def test_chunks_until_the_window_is_full_are_counted_from_the_first_one() -> None:
    assert CacheConfig(window_frames=12).filling_chunks == 4
    one_first = CacheConfig(3, 9, "none", 0, first_chunk_frames=1)
    assert one_first.filling_chunks == 4  # 1, 4, 7 and, one frame of which is evicted, 10
    assert [one_first.frames_before(chunk) for chunk in range(4)] == [0, 1, 4, 7]
    memory = CacheConfig(3, 12, "frozen", 3, memory_rates=(0.01, 0.1))
    assert (memory.past_frames, memory.filling_chunks) == (7, 4)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"shift": 0.0}, "shift is 0.0"),
        ({"denoising_steps": ()}, "denoising_steps has 0 entries; give at least 1"),
        ({"denoising_steps": (1001, 500)}, "from 1 to 1000"),
        ({"denoising_steps": (500, 0)}, "from 1 to 1000"),
        ({"denoising_steps": (500, 500)}, "must fall"),
        ({"first_steps": (500, 750)}, "first_steps is \\(500, 750\\); they must fall"),
        (
            {"first_steps": (1000,), "rolling": "joint"},
            "all chunks of a rolling schedule have the same steps",
        ),
        ({"rolling": "yes"}, "rolling is 'yes'"),
        ({"first_chunks": 0}, "first_chunks is 0"),
    ],
)
def test_schedule_that_cannot_run_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScheduleConfig(**change)


def test_vae_needs_one_temporal_choice_per_level_and_one_statistic_per_channel() -> None:
    with pytest.raises(ValueError, match="temporal_downsample has 1 entries for 4 levels"):
        VAEConfig(temporal_downsample=(True,))
    with pytest.raises(ValueError, match="latents_mean has 16 values; z_dim asks for 8"):
        VAEConfig(z_dim=8)


def test_text_encoder_with_uneven_heads_is_refused() -> None:
    with pytest.raises(ValueError, match="attention_dim 4096 is not divisible by num_heads 60"):
        TextConfig(num_heads=60)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"vae": PRESETS["tiny"].vae}, "16 to 16 latent channels but the VAE has 8"),
        ({"text": PRESETS["tiny"].text}, "text_dim of the model is 4096, the text encoder gives 96"),
        ({"fps": 0}, "fps is 0"),
        (
            {"cache": CacheConfig(first_chunk_frames=1), "runtime": RuntimeConfig(vae="tensorrt")},
            "first_chunk_frames is 1 and chunk_frames 3; an engine of TensorRT decodes chunks of one length",
        ),
        (
            {"schedule": ScheduleConfig(rolling="joint")},
            "joint_frames is 0 and rolling is 'joint'; it must be 12",
        ),
        (
            {"cache": CacheConfig(3, 21, "frozen", 3, joint_frames=12)},
            "joint_frames is 12 and rolling is 'none'; it must be 12 in a rolling schedule, a chunk for each",
        ),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PRESETS["wan-1.3b"], **change)


def test_a_tiny_decoder_has_the_strides_of_its_vae_in_every_preset() -> None:
    for config in PRESETS.values():
        tiny, vae = config.tiny_vae, config.vae
        assert (tiny.z_dim, tiny.spatial_stride, tiny.temporal_stride) == (
            vae.z_dim, vae.spatial_stride, vae.temporal_stride
        )  # fmt: skip


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"time_factors": (1, 2)}, "time_factors has 2 entries for 4 widths"),
        ({"widths": (8,), "time_factors": ()}, "widths has 1 entries; give at least 2"),
        ({"memory_blocks": 0}, "memory_blocks is 0; it must be at least 1"),
        ({"widths": (8, 0, 8, 8)}, r"widths is \(8, 0, 8, 8\); each entry must be at least 1"),
    ],
)
def test_a_tiny_decoder_of_no_shape_is_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TinyVAEConfig(**values)


def test_only_a_tiny_decoder_that_is_used_must_fit_the_vae() -> None:
    config = dataclasses.replace(PRESETS["tiny"], tiny_vae=TinyVAEConfig())
    runtime = dataclasses.replace(config.runtime, vae="tiny")
    with pytest.raises(ValueError, match="z_dim of the tiny decoder is 16 and that of the VAE 8; use a tiny"):
        dataclasses.replace(config, runtime=runtime)
    other = dataclasses.replace(PRESETS["tiny"].tiny_vae, time_factors=(2, 2, 2))
    with pytest.raises(ValueError, match="temporal_stride of the tiny decoder is 8"):
        dataclasses.replace(config, tiny_vae=other, runtime=runtime)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"vae_precision": "int8"}, "vae_precision is 'int8'; use 'default', 'fp16', 'bf16' or 'fp8'"),
        (
            {"vae_precision": "fp8", "vae": "tiny"},
            "vae_precision is 'fp8' and vae is 'tiny'; it is for vae='full', leave it out",
        ),
        (
            {"vae_precision": "fp16", "vae": "tensorrt"},
            "it is for vae='full', an engine has that of `rfengine export-vae --precision`",
        ),
    ],
)
def test_a_precision_is_for_the_full_decoder(given, message):
    assert RuntimeConfig(vae_precision="fp8").vae == "full"
    with pytest.raises(ValueError, match=message):
        RuntimeConfig(**given)


def test_only_a_diffusion_forcing_model_is_told_its_frame_rate() -> None:
    preset = PRESETS["skyreels-df-1.3b"]
    assert (preset.height, preset.width, preset.fps) == (544, 960, 24)
    assert preset.diffusion_forcing.base_frames == 97
    with pytest.raises(ValueError, match="model.fps_embedding is true and diffusion_forcing is null"):
        dataclasses.replace(preset, diffusion_forcing=None)
    with pytest.raises(ValueError, match="is 96; whole latent frames are 1"):
        dataclasses.replace(preset, diffusion_forcing=DiffusionForcingConfig(base_frames=96))
