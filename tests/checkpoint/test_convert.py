from __future__ import annotations

import dataclasses
import filecmp
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rfengine.checkpoint.checkpoint import Checkpoint, write_config
from rfengine.checkpoint.convert import _resolve_kind, convert
from rfengine.checkpoint.layouts import diffusers_transformer_from_wan
from rfengine.checkpoint.loader import save_weights
from rfengine.checkpoint.manifest import read_manifest, verify
from rfengine.checkpoint.shapes import expected_shapes
from rfengine.checkpoint.systems import SYSTEMS
from rfengine.config import CacheConfig, EngineConfig, TinyVAEConfig, VAEConfig, WanConfig
from rfengine.files import reserved
from rfengine.models.dit import WanDiT
from rfengine.models.tiny_vae import TinyVAE
from rfengine.presets import PRESETS
from support.checkpoints import random_tensors

Tensors = dict[str, Tensor]
Parts = dict[str, Tensors]
WriteFile = Callable[[Path, Tensors], Path]
CacheLinks = Callable[[Path, Path], Path]
Log = pytest.LogCaptureFixture
FILES = {
    "manifest.json", "transformer.safetensors", "vae.safetensors", "text_encoder.safetensors", "tokenizer",
    "rfengine.json",
}  # fmt: skip


def refused(message: str) -> pytest.RaisesExc[ValueError]:
    return pytest.raises(ValueError, match=message)


def config_of(directory: Path) -> EngineConfig:
    return Checkpoint.open(directory).config


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def ones(config: WanConfig) -> Tensors:
    return {name: torch.ones(shape) for name, shape in expected_shapes(config).items()}


def assert_holds(directory: Path, parts: Parts, dtype: torch.dtype = torch.bfloat16) -> None:
    for part, tensors in parts.items():
        found = load_file(directory / f"{part}.safetensors")
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == dtype and torch.equal(found[name], tensor.to(dtype)), name


def prefixed(tensors: Tensors, prefix: str = "model.") -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def noise(tensors: Tensors) -> Tensors:
    """Tensors of the same shapes that must not be taken."""
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def tokenizer_file(directory: Path) -> Path:
    return next(directory.rglob("tokenizer.json"))


@pytest.mark.parametrize("layout", ["wan_directory", "diffusers_directory"])
def test_whole_directory_is_converted(
    layout: str, request: pytest.FixtureRequest, parts: Parts, tmp_path: Path, caplog: Log
) -> None:
    source = request.getfixturevalue(layout)
    with caplog.at_level(logging.WARNING):
        convert(source, tmp_path / "out")
    assert names_in(tmp_path / "out") == FILES
    verify(tmp_path / "out")
    assert read_manifest(tmp_path / "out").keys() >= {"rfengine.json", "tokenizer/tokenizer.json"}
    assert_holds(tmp_path / "out", parts)
    assert filecmp.cmp(tmp_path / "out" / "tokenizer" / "tokenizer.json", tokenizer_file(source), False)
    config = config_of(tmp_path / "out")
    assert config.model == WanConfig(128, 64, 1, 2, text_dim=32, freq_dim=32)
    assert (config.vae, config.cache) == (VAEConfig(base_dim=8), CacheConfig())
    assert (config.text.num_heads, config.text.tokenizer) == (2, "sentencepiece")
    assert "is a teacher: it needs many steps" in caplog.text
    assert names_in(tmp_path) == {"out"}


def generator_payloads(tensors: Tensors) -> dict[str, tuple[str, object, str]]:
    """File name, content and kind of every published generator file."""
    ema = {}
    for name, tensor in tensors.items():
        inner = re.sub(r"(ffn\.0|_attn)\.", r"\1._fsdp_wrapped_module.", name)
        ema[f"model._fsdp_wrapped_module.{inner}"] = tensor
    model = prefixed(tensors)
    diffusers = {diffusers_transformer_from_wan(name): tensor for name, tensor in tensors.items()}
    state_dict = {"state_dict": prefixed(tensors, "model.diffusion_model.")}
    both = {"generator": noise(model), "generator_ema": model}
    trainer = {"critic": noise(model), "generator_ema": ema}
    return {
        "flat": ("rewardforcing.pt", model, "reward-forcing"),
        "generator_ema first": ("self_forcing_dmd.pt", both, "self-forcing"),
        "generator": ("ode_init.pt", {"generator": model}, "self-forcing"),
        "model": ("ode_init.pt", {"model": model}, "self-forcing"),
        "longlive": ("longlive_base.pt", {"generator": model}, "longlive"),
        "trainer": ("self_forcing_dmd.pt", trainer, "self-forcing"),
        "state_dict": ("rewardforcing.pt", state_dict, "reward-forcing"),
        "diffusers names": ("Reward-Forcing.pth", diffusers, "reward-forcing"),
    }


@pytest.mark.parametrize("case", generator_payloads({}))
def test_generator_file_takes_the_rest_from_its_base(
    case: str, parts: Parts, wan_directory: Path, tmp_path: Path
) -> None:
    name, payload, kind = generator_payloads(parts["transformer"])[case]
    torch.save(payload, tmp_path / name)
    convert(tmp_path / name, tmp_path / "out", base=wan_directory)
    assert_holds(tmp_path / "out", parts)
    config = config_of(tmp_path / "out")
    assert config.cache == SYSTEMS[kind].cache and config.name == f"{kind}-dim128-layers2"


@pytest.mark.parametrize("kind", SYSTEMS)
def test_a_checkpoint_of_every_system_gets_its_cache_and_its_steps(
    kind: str, parts: Parts, wan_directory: Path, tmp_path: Path
) -> None:
    torch.save({"generator_ema": prefixed(parts["transformer"])}, tmp_path / "model.pt")
    convert(tmp_path / "model.pt", tmp_path / "out", base=wan_directory, kind=kind)
    config, system = config_of(tmp_path / "out"), SYSTEMS[kind]
    assert config.cache == system.cache
    assert config.schedule.denoising_steps == (system.steps or (1000, 750, 500, 250))
    assert (config.schedule.first_steps, config.schedule.rolling) == (system.first_steps, system.rolling)


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("chunkwise/causal_forcing.pt", "causal-forcing"),
        ("framewise/causal_forcing.pt", "causal-forcing-framewise"),
        ("causal-forcing++/framewise-2step.pt", "causal-forcing-2-step"),
        ("causal-forcing++/framewise-1step.pt", "causal-forcing-1-step"),
        ("chunkwise/longvideo.pt", "causal-forcing-long"),
        ("checkpoints/one_forcing.pt", "one-forcing"),
        ("rolling_forcing_dmd.pt", "rolling-forcing"),
        ("WaveForcing-1.3B/4step/model.safetensors", "wave-forcing-4-step"),
        ("WaveForcing-1.3B/5step/model.safetensors", "wave-forcing-5-step"),
        ("WaveForcing-T2V-1.3B-5step-Preview/model.safetensors", "wave-forcing-5-step"),
    ],
)
def test_a_system_is_told_by_the_published_names(file: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "downloads" / "here" / file
    path.parent.mkdir(parents=True)
    path.touch()
    assert _resolve_kind("auto", path) == kind


@pytest.mark.parametrize("file", ["causal_forcing.pt", "model.pt", "longlive/reward_forcing_longlive.pt"])
def test_a_name_that_tells_no_system_or_two_is_refused(file: str, tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    with refused("does not tell which system the checkpoint was trained for; give kind, one of wan, reward"):
        _resolve_kind("auto", tmp_path / file)


def test_generator_is_taken_when_ema_is_not_wanted(parts: Parts, wan_directory: Path, tmp_path: Path) -> None:
    model, path = prefixed(parts["transformer"]), tmp_path / "self_forcing_dmd.pt"
    torch.save({"generator": model, "generator_ema": noise(model)}, path)
    convert(path, tmp_path / "out", base=wan_directory, use_ema=False)
    assert_holds(tmp_path / "out", {"transformer": parts["transformer"]})
    torch.save({"generator_ema": model}, path)
    with refused("has generator_ema where tensors are expected"):
        convert(path, tmp_path / "again", base=wan_directory, use_ema=False)


def test_lora_is_merged_in_float32_before_the_cast_at_its_stated_scale(
    parts: Parts, write_file: WriteFile, wan_directory: Path, tmp_path: Path
) -> None:
    transformer, generator = parts["transformer"], torch.Generator().manual_seed(1)
    lora, merged = {}, dict(transformer)
    for name, weight in transformer.items():
        if not name.startswith("blocks.") or weight.ndim != 2:
            continue
        down = torch.randn(4, weight.shape[1], generator=generator)
        up = torch.randn(weight.shape[0], 4, generator=generator)
        lora[f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight"] = down
        lora[f"base_model.model.{name.removesuffix('.weight')}.lora_B.weight"] = up
        merged[name] = (weight.double() + up.double() @ down.double()).float()
    assert len(lora) == 40
    base, adapter = tmp_path / "longlive_base.pt", tmp_path / "lora.pt"
    torch.save({"generator": prefixed(transformer)}, base)
    torch.save({"generator_lora": lora, "critic_lora": {}, "step": 3}, adapter)
    convert(base, tmp_path / "out", base=wan_directory, loras=[adapter], dtype="float32")
    found = load_file(tmp_path / "out" / "transformer.safetensors")
    assert found.keys() == merged.keys()
    for name, tensor in merged.items():
        tolerance = 1e-5 if tensor is not transformer[name] else 0.0  # test_lora_file.py has the exact bound
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=tolerance)
    torch.save(lora, adapter)
    convert(base, tmp_path / "bare", base=wan_directory, loras=[adapter])
    assert_holds(tmp_path / "bare", {"transformer": found})
    write_file(tmp_path / "peft" / "adapter_model.safetensors", lora)
    stated = {"peft_type": "LORA", "r": 4, "lora_alpha": 16}
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(stated))
    convert(base, tmp_path / "scaled", base=wan_directory, loras=[tmp_path / "peft"], dtype="float32")
    scaled = load_file(tmp_path / "scaled" / "transformer.safetensors")
    for name, tensor in merged.items():
        quadruple = transformer[name] + 4 * (tensor - transformer[name])
        torch.testing.assert_close(scaled[name], quadruple, atol=1e-4, rtol=1e-4)


def test_generator_without_base_gives_the_transformer_alone(
    parts: Parts, write_file: WriteFile, tmp_path: Path, caplog: Log
) -> None:
    config = WanConfig(dim=128, ffn_dim=64, num_heads=1, num_layers=2)
    source = write_file(tmp_path / "rewardforcing.safetensors", prefixed(ones(config)))
    with caplog.at_level(logging.WARNING):
        convert(source, tmp_path / "out")
    assert "no vae or text_encoder was found and none is written" in caplog.text
    assert names_in(tmp_path / "out") == {"transformer.safetensors", "rfengine.json", "manifest.json"}
    assert config_of(tmp_path / "out").model == config
    with refused("has no vae; run `rfengine convert SRC DST --base WAN`"):
        Checkpoint.open(tmp_path / "out").load(lambda: WanDiT(config), "vae", torch.float32)
    small = write_file(tmp_path / "small" / "rewardforcing.safetensors", parts["transformer"])
    with refused("gives 4096; give a base whose VAE and text encoder belong to this"):
        convert(small, tmp_path / "other")


def test_converted_directory_is_a_base_and_a_source(
    parts: Parts, wan_directory: Path, tmp_path: Path, caplog: Log
) -> None:
    convert(wan_directory, tmp_path / "wan", dtype="float32")
    torch.save(prefixed(parts["transformer"]), tmp_path / "rewardforcing.pt")
    convert(tmp_path / "rewardforcing.pt", tmp_path / "student", base=tmp_path / "wan", dtype="float16")
    assert_holds(tmp_path / "student", parts, torch.float16)
    assert (tmp_path / "student" / "tokenizer" / "tokenizer.json").is_file()
    (tmp_path / "student").rename(tmp_path / "longlive")  # its own configuration counts, not its name
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        convert(tmp_path / "longlive", tmp_path / "copy")
    assert caplog.text == ""
    assert config_of(tmp_path / "copy") == config_of(tmp_path / "longlive")


def test_own_settings_of_a_base_are_kept(tmp_path: Path) -> None:
    tiny, base = PRESETS["tiny"], tmp_path / "base"
    base.mkdir()
    write_config(base, tiny)
    for part, config in (("transformer", tiny.model), ("vae", tiny.vae), ("text_encoder", tiny.text)):
        save_weights(base / f"{part}.safetensors", ones(config))
    torch.save(prefixed(ones(tiny.model)), tmp_path / "model.pt")
    convert(tmp_path / "model.pt", tmp_path / "out", base=base, kind="reward-forcing")
    config = config_of(tmp_path / "out")
    assert (config.model.num_heads, config.vae, config.text) == (tiny.model.num_heads, tiny.vae, tiny.text)
    assert (config.height, config.width) == (tiny.height, tiny.width)
    steps = SYSTEMS["reward-forcing"].steps  # they are the student's, which the base is not
    assert config.schedule == dataclasses.replace(tiny.schedule, denoising_steps=steps)
    assert not (tmp_path / "out" / "tokenizer").exists()


def test_head_count_comes_from_a_base_of_the_same_dim(
    write_file: WriteFile, wan_directory: Path, tmp_path: Path
) -> None:
    config = WanConfig(dim=96, ffn_dim=64, num_heads=4, num_layers=2, text_dim=32)
    source = write_file(tmp_path / "rewardforcing.safetensors", ones(config))
    with refused("dim 96, no multiple of 128, .* convert it with a base of the same dim"):
        convert(source, tmp_path / "out", base=wan_directory)
    for name, settings in (
        ("original", {"dim": 96, "num_heads": 4}),
        ("diffusers", {"num_attention_heads": 4, "attention_head_dim": 24}),
    ):
        base = tmp_path / name
        shutil.copytree(wan_directory, base)
        (base / "config.json").write_text(json.dumps(settings))
        convert(source, tmp_path / f"{name}-out", base=base)
        assert config_of(tmp_path / f"{name}-out").model.num_heads == 4


def test_kind_is_never_guessed(
    parts: Parts, write_file: WriteFile, wan_directory: Path, tmp_path: Path
) -> None:
    source = write_file(tmp_path / "model.safetensors", parts["transformer"])
    message = "the name model.safetensors does not tell .* one of wan, reward-forcing, self-forcing, longlive"
    with refused(message):
        convert(source, tmp_path / "out", base=wan_directory)
    both = write_file(tmp_path / "longlive-from-self-forcing.safetensors", parts["transformer"])
    with refused("does not tell which system"):
        convert(both, tmp_path / "out", base=wan_directory)
    with refused("kind is 'causvid'; use one of auto, wan, reward-forcing"):
        convert(source, tmp_path / "out", base=wan_directory, kind="causvid")
    convert(source, tmp_path / "out", base=wan_directory, kind="longlive")
    assert config_of(tmp_path / "out").cache == SYSTEMS["longlive"].cache


def test_wrong_tensors_and_values_are_listed_and_nothing_is_written(
    parts: Parts, write_file: WriteFile, wan_directory: Path, tmp_path: Path
) -> None:
    absent = sorted(name for name in parts["transformer"] if name.startswith("blocks.1.cross_attn."))
    assert len(absent) == 10
    tensors = {name: tensor for name, tensor in parts["transformer"].items() if name not in absent}
    tensors |= {"extra.weight": torch.ones(2), "head.head.bias": torch.ones(3)}
    source = write_file(tmp_path / "rewardforcing.safetensors", prefixed(tensors))
    with pytest.raises(ValueError) as caught:
        convert(source, tmp_path / "out", base=wan_directory)
    assert str(caught.value) == (
        f"the transformer is not that of Wan2.1: 10 missing: {', '.join(absent[:8])} and 2 more; "
        "1 unexpected: extra.weight; 1 mis-shaped: head.head.bias (3,) instead of (64,); "
        "get the file again or give the right one"
    )
    write_file(source, parts["transformer"] | {"head.head.bias": torch.full((64,), 1e5)})
    with refused(r"head.head.bias has values that are not finite in torch.float16; use a wider"):
        convert(source, tmp_path / "out", base=wan_directory, dtype="float16")
    with refused("dtype is 'fp8'; use one of float32, bfloat16, float16"):
        convert(source, tmp_path / "out", base=wan_directory, dtype="fp8")
    assert names_in(tmp_path) == {"rewardforcing.safetensors"}


def test_destination_that_is_in_use_reserved_or_not_writable_is_refused(
    wan_directory: Path, tmp_path: Path
) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    for used in (tmp_path / "used", tmp_path / "used" / "file"):
        with refused("exists and is not an empty directory; choose another or remove it"):
            convert(wan_directory, used)
    with pytest.raises(RuntimeError, match="cannot write .*out .*; free space or choose another place"):
        convert(wan_directory, tmp_path / "used" / "file" / "out")
    locked = pytest.raises(RuntimeError, match=r"\.out\.lock is locked: another process is converting into")
    with reserved(tmp_path / "out", "converting into out"), locked:
        convert(tmp_path / "rewardforcing.pt", tmp_path / "out")
    assert names_in(tmp_path) == {"used"}
    (tmp_path / "empty").mkdir()
    convert(wan_directory, tmp_path / "empty")
    assert (tmp_path / "empty" / "rfengine.json").is_file()


def test_links_of_a_cache_are_read_by_the_names_they_have(
    parts: Parts, wan_directory: Path, tmp_path: Path, cached: CacheLinks
) -> None:
    repository = tmp_path / "models--Wan-AI--Wan2.1-T2V-1.3B"
    snapshot = cached(wan_directory, repository)
    (files := tmp_path / "trained").mkdir()
    torch.save({"generator": prefixed(parts["transformer"])}, files / "self_forcing_dmd.pt")
    student = cached(files, tmp_path / "models--someone--students") / "self_forcing_dmd.pt"
    for base in (snapshot, repository):
        convert(student, tmp_path / "out", base=base)
        assert_holds(tmp_path / "out", parts)
        assert config_of(tmp_path / "out").cache == SYSTEMS["self-forcing"].cache
        shutil.rmtree(tmp_path / "out")


def test_a_snapshot_is_named_by_its_repository(
    tmp_path: Path, wan_directory: Path, cached: CacheLinks
) -> None:
    repository = tmp_path / "models--someone--LongLive-1.3B"
    snapshot = cached(wan_directory, repository)
    (tmp_path / "link").symlink_to(snapshot)
    for source, kind in ((snapshot, "longlive"), (repository, "longlive"), (tmp_path / "link", "wan")):
        assert _resolve_kind("auto", source) == kind


def test_a_source_that_is_no_file_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "link.pt").symlink_to("blobs/absent")
    named = {"pipe.pt": "is a pipe", "link.pt": "is a link to a", "x" * 300: "does not exist"}
    for name, message in named.items():
        with refused(f"{name} {message}"):
            convert(tmp_path / name, tmp_path / "out")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("google/umt5-xxl/tokenizer.json", {}, "google/umt5-xxl/tokenizer.json is damaged or no tokenizer"),
        ("config.json", {"num_heads": 1, "dim": 1536}, "json states dim 1536 and the tensors have 128"),
    ],
)
def test_a_damaged_tokenizer_or_config_stops_the_conversion_before_anything_is_written(
    wan_directory: Path, tmp_path: Path, file: str, content: dict[str, int], message: str
) -> None:
    source = tmp_path / "wan"
    shutil.copytree(wan_directory, source)
    (source / file).write_text(json.dumps(content))
    with refused(message):
        convert(source, tmp_path / "out")
    assert names_in(tmp_path) == {"wan"}


def test_unusable_sources_are_explained(
    parts: Parts, write_file: WriteFile, wan_directory: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with refused("absent.pt does not exist"):
        convert(tmp_path / "absent.pt", out)
    vae = write_file(tmp_path / "longlive.safetensors", parts["vae"])
    with refused("holds a vae; give the transformer's file"):
        convert(vae, out)
    lora = write_file(tmp_path / "lora.safetensors", {"blocks.0.ffn.0.lora_A.weight": torch.ones(1, 1)})
    with refused("holds a LoRA, not a whole model"):
        convert(lora, out, base=wan_directory)
    (rest := tmp_path / "rest").mkdir()
    shutil.copy(wan_directory / "Wan2.1_VAE.pth", rest)
    with refused("rest has no transformer; give the checkpoint as the source"):
        convert(rest, out)
    shutil.copy(wan_directory / "models_t5_umt5-xxl-enc-bf16.pth", rest)
    source = write_file(tmp_path / "rewardforcing.safetensors", parts["transformer"])
    with refused("rest has a text encoder and no tokenizer; add google/umt5-xxl/"):
        convert(source, out, base=rest)
    (rest / "google" / "umt5-xxl").mkdir(parents=True)
    with refused("umt5-xxl/tokenizer.json does not exist; copy tokenizer.json"):
        convert(source, out, base=rest)
    shutil.copy(tokenizer_file(wan_directory), rest / "google" / "umt5-xxl")
    convert(source, out, base=rest)
    assert_holds(out, {"vae": parts["vae"]})


TINY_VAE = TinyVAEConfig(widths=(8, 6, 4, 4))


def published_tiny_file(path: Path, config: TinyVAEConfig = TINY_VAE, *, without: str = "") -> Tensors:
    """Write a file as taew2_1.pth is: the decoder, and the encoder that the engine does without."""
    tensors = random_tensors(
        {name: shape for name, shape in expected_shapes(config).items() if name != without}
    )
    torch.save({"encoder.0.weight": torch.zeros(4, 3, 3, 3), **tensors}, path)
    return tensors


def test_a_tiny_decoder_alone_becomes_one_file(tmp_path: Path, caplog: Log) -> None:
    tensors = published_tiny_file(tmp_path / "taew2_1.pth")
    with caplog.at_level(logging.INFO):
        convert(tmp_path / "taew2_1.pth", tmp_path / "out", dtype="float16")
    assert names_in(tmp_path / "out") == {"tiny_vae.safetensors"}
    assert_holds(tmp_path / "out", {"tiny_vae": tensors}, torch.float16)
    assert "1 tensors of the tiny encoder are left out; the full VAE encodes" in caplog.text
    assert "only a tiny decoder was given: copy it" in caplog.text


def test_a_tiny_decoder_is_added_to_its_base_and_loads_by_name(
    tmp_path: Path, wan_directory: Path, parts: Parts
) -> None:
    tensors = published_tiny_file(tmp_path / "taew2_1.pth")
    convert(tmp_path / "taew2_1.pth", tmp_path / "out", base=wan_directory)
    assert names_in(tmp_path / "out") == FILES | {"tiny_vae.safetensors"}
    assert_holds(tmp_path / "out", parts)
    checkpoint = Checkpoint.open(tmp_path / "out")
    config = checkpoint.config
    assert (config.tiny_vae, config.cache) == (TINY_VAE, SYSTEMS["wan"].cache)
    decoder = checkpoint.load(lambda: TinyVAE(config.tiny_vae), "tiny_vae", torch.float32)
    for name, value in decoder.state_dict().items():
        assert torch.equal(value, tensors[name].bfloat16().float())


def test_a_tiny_decoder_in_a_base_comes_along(tmp_path: Path, wan_directory: Path, parts: Parts) -> None:
    base = tmp_path / "Wan2.1-T2V-1.3B"
    shutil.copytree(wan_directory, base)
    tensors = published_tiny_file(base / "taew2_1.pth")
    torch.save(prefixed(parts["transformer"]), tmp_path / "rewardforcing.pt")
    convert(tmp_path / "rewardforcing.pt", tmp_path / "out", base=base)
    assert_holds(tmp_path / "out", {"tiny_vae": tensors})
    assert config_of(tmp_path / "out").cache == SYSTEMS["reward-forcing"].cache
    convert(tmp_path / "out", tmp_path / "again")
    assert config_of(tmp_path / "again") == config_of(tmp_path / "out")
    assert_holds(tmp_path / "again", {"tiny_vae": tensors})


def test_a_tiny_decoder_of_other_latents_with_a_lora_or_incomplete_is_refused(
    tmp_path: Path, wan_directory: Path
) -> None:
    source, out = tmp_path / "tae.pth", tmp_path / "out"
    published_tiny_file(source, TinyVAEConfig(z_dim=12, widths=(8, 6, 4, 4)))
    with refused("z_dim of the tiny decoder is 12 and that of the VAE 16"):
        convert(source, out, base=wan_directory)
    with refused("which takes no LoRA"):
        convert(source, out, loras=[tmp_path / "lora.pt"])
    published_tiny_file(source, without="decoder.16.conv.2.bias")
    with refused("the tiny_vae is not that of Wan2.1: 1 missing: decoder.16.conv.2.bias"):
        convert(source, out)
    assert not out.exists()


FORCING = WanConfig(128, 64, 1, 2, text_dim=32, freq_dim=32, fps_embedding=True)
FORCING_CONFIG = PRESETS["skyreels-df-1.3b"].diffusion_forcing


def skyreels_tensors(parts: Parts) -> Tensors:
    return random_tensors(expected_shapes(FORCING)) | parts["transformer"]


def skyreels_directory(path: Path, tensors: Tensors, wan_directory: Path, write_file: WriteFile) -> Path:
    """The published directory: that of Wan2.1 with another file of the transformer."""
    shutil.copytree(wan_directory, path)
    (path / "diffusion_pytorch_model.safetensors").unlink()
    settings = json.loads((path / "config.json").read_text()) | {
        "inject_sample_info": "fps_embedding.weight" in tensors
    }
    (path / "config.json").write_text(json.dumps(settings))
    write_file(path / "model.safetensors", tensors)
    return path


def assert_forces(directory: Path, tensors: Tensors) -> None:
    assert_holds(directory, {"transformer": tensors})
    config = config_of(directory)
    assert config.diffusion_forcing == FORCING_CONFIG and config.name.startswith("skyreels-df-")
    assert (config.height, config.width, config.fps) == (544, 960, 24)


@pytest.mark.parametrize("kind", ["auto", "skyreels"])
def test_skyreels_is_known_by_its_tensors(
    kind: str, parts: Parts, wan_directory: Path, write_file: WriteFile, tmp_path: Path, caplog: Log
) -> None:
    tensors = skyreels_tensors(parts)
    source = skyreels_directory(tmp_path / "anything", tensors, wan_directory, write_file)
    with caplog.at_level(logging.WARNING):
        convert(source, tmp_path / "out", kind=kind)
    assert_forces(tmp_path / "out", tensors)
    assert config_of(tmp_path / "out").model == FORCING and "teacher" not in caplog.text
    assert names_in(tmp_path / "out") == FILES
    convert(tmp_path / "out", tmp_path / "again")  # its own configuration is kept
    assert config_of(tmp_path / "again") == config_of(tmp_path / "out")
    convert(source / "model.safetensors", tmp_path / "alone", base=wan_directory)
    assert_forces(tmp_path / "alone", tensors)


def test_skyreels_of_diffusers_is_converted_and_opened(
    parts: Parts, diffusers_directory: Path, write_file: WriteFile, tmp_path: Path, caplog: Log
) -> None:
    tensors, source = skyreels_tensors(parts), tmp_path / "diffusers"
    shutil.copytree(diffusers_directory, source)
    for path in (source / "transformer").glob("*.safetensors*"):
        path.unlink()
    theirs = {diffusers_transformer_from_wan(name): tensor for name, tensor in tensors.items()}
    assert {name for name in theirs if name.startswith("fps")} == {
        "fps_embedding.weight", "fps_projection.net.0.proj.weight", "fps_projection.net.0.proj.bias",
        "fps_projection.net.2.weight", "fps_projection.net.2.bias",
    }  # fmt: skip
    write_file(source / "transformer" / "diffusion_pytorch_model.safetensors", theirs)
    convert(source, tmp_path / "out")
    assert_forces(tmp_path / "out", tensors)
    with caplog.at_level(logging.WARNING):
        opened = config_of(source)
    assert opened.diffusion_forcing == FORCING_CONFIG and "names no cache" not in caplog.text
    for wrong in ("wan", "reward-forcing"):
        with refused(f"kind is '{wrong}' and .* has a table of frame rates"):
            convert(source, tmp_path / "no", kind=wrong)


def test_skyreels_without_a_table_of_frame_rates_is_told_by_its_files_or_by_kind(
    parts: Parts, wan_directory: Path, diffusers_directory: Path, write_file: WriteFile, tmp_path: Path
) -> None:
    tensors = parts["transformer"]
    unclear = skyreels_directory(tmp_path / "14B", tensors, wan_directory, write_file)
    for unsaid in (lambda: convert(unclear, tmp_path / "no"), lambda: config_of(unclear)):
        with refused("has the files of SkyReels-V2 and no table of frame rates, and nothing says whether it"):
            unsaid()
    assert not (tmp_path / "no").exists()
    convert(unclear, tmp_path / "said", kind="skyreels")
    assert_forces(tmp_path / "said", tensors)
    convert(unclear, tmp_path / "wan", kind="wan")
    assert config_of(tmp_path / "wan").diffusion_forcing is None
    named = unclear.rename(tmp_path / "SkyReels-V2-DF-14B-540P")
    convert(named, tmp_path / "named")
    assert_forces(tmp_path / "named", tensors)
    indexed = tmp_path / "indexed"
    shutil.copytree(diffusers_directory, indexed)
    (indexed / "model_index.json").write_text('{"_class_name": "SkyReelsV2DiffusionForcingPipeline"}')
    convert(indexed, tmp_path / "index")
    assert_forces(tmp_path / "index", tensors)
    (indexed / "model_index.json").write_text('{"_class_name": "SkyReelsV2Pipeline"}')
    assert config_of(indexed).diffusion_forcing is None
    (indexed / "model_index.json").unlink()
    settings = json.loads((indexed / "transformer" / "config.json").read_text())
    settings["_class_name"] = "SkyReelsV2Transformer3DModel"
    (indexed / "transformer" / "config.json").write_text(json.dumps(settings))
    with refused("nothing says whether it is a diffusion forcing model"):
        config_of(indexed)


def test_a_causal_model_with_the_base_of_skyreels_streams(
    parts: Parts, wan_directory: Path, write_file: WriteFile, tmp_path: Path
) -> None:
    source = skyreels_directory(tmp_path / "source", skyreels_tensors(parts), wan_directory, write_file)
    convert(source, tmp_path / "forcing")
    torch.save({"generator": prefixed(parts["transformer"])}, tmp_path / "self_forcing_dmd.pt")
    convert(tmp_path / "self_forcing_dmd.pt", tmp_path / "out", base=tmp_path / "forcing")
    config = config_of(tmp_path / "out")
    assert config.diffusion_forcing is None and config.cache == SYSTEMS["self-forcing"].cache
    assert (config.height, config.width, config.fps) == (480, 832, 16)
