"""Checkpoints of every layout, small; test_layouts.py has the full key sets of the published models."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import torch
from torch import Tensor

from rfengine.checkpoint.layouts import (
    diffusers_transformer_from_wan,
    transformers_text_from_wan,
    wan_vae_from_diffusers,
)
from rfengine.checkpoint.shapes import expected_shapes
from rfengine.checkpoint.tensor_file import StoredTensor, write_safetensors
from rfengine.config import TextConfig, VAEConfig, WanConfig
from support.checkpoints import diffusers_vae_names, original_text_names, random_tensors

Tensors = dict[str, Tensor]

MODEL = WanConfig(dim=128, ffn_dim=64, num_heads=1, num_layers=2, text_dim=32, freq_dim=32)
VAE = VAEConfig(base_dim=8)
TEXT = TextConfig(vocab_size=64, dim=32, attention_dim=16, ffn_dim=24, num_heads=2, num_layers=2)
CONFIGS = {"transformer": MODEL, "vae": VAE, "text_encoder": TEXT}


def write(path: Path, tensors: Tensors) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, {name: StoredTensor.of(tensor) for name, tensor in tensors.items()})
    return path


def write_tokenizer(folder: Path) -> None:
    """A tokenizer.json with UMT5's special tokens and the letters, fewer ids than TEXT has rows."""
    folder.mkdir(parents=True)
    letters = [(chr(ord("a") + index), -1.0) for index in range(26)]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters]
    tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary, 2)).save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="session")
def parts() -> dict[str, Tensors]:
    """The tensors of each part by the engine's names."""
    return {part: random_tensors(expected_shapes(config)) for part, config in CONFIGS.items()}


@pytest.fixture(scope="session")
def write_file() -> Callable[[Path, Tensors], Path]:
    return write


@pytest.fixture(scope="session")
def wan_directory(tmp_path_factory: pytest.TempPathFactory, parts: dict[str, Tensors]) -> Path:
    """The original Wan2.1 directory: VAE and text encoder are pickles."""
    directory = tmp_path_factory.mktemp("original") / "Wan2.1-T2V-1.3B"
    write(directory / "diffusion_pytorch_model.safetensors", parts["transformer"])
    settings = {
        "_class_name": "WanModel",
        "model_type": "t2v",
        "dim": MODEL.dim,
        "ffn_dim": MODEL.ffn_dim,
        "freq_dim": MODEL.freq_dim,
        "num_heads": MODEL.num_heads,
        "num_layers": MODEL.num_layers,
        "in_dim": MODEL.in_dim,
        "out_dim": MODEL.out_dim,
        "text_len": MODEL.text_len,
        "eps": MODEL.eps,
    }
    (directory / "config.json").write_text(json.dumps(settings))
    text = {
        name: parts["text_encoder"][transformers_text_from_wan(name)] for name in original_text_names(TEXT)
    }
    torch.save(parts["vae"], directory / "Wan2.1_VAE.pth")
    torch.save(text, directory / "models_t5_umt5-xxl-enc-bf16.pth")
    write_tokenizer(directory / "google" / "umt5-xxl")
    return directory


@pytest.fixture(scope="session")
def diffusers_directory(tmp_path_factory: pytest.TempPathFactory, parts: dict[str, Tensors]) -> Path:
    """The Diffusers directory: all safetensors, the transformer in two shards with an index."""
    directory = tmp_path_factory.mktemp("diffusers") / "Wan2.1-T2V-1.3B-Diffusers"
    transformer = {
        diffusers_transformer_from_wan(name): tensor for name, tensor in parts["transformer"].items()
    }
    names = sorted(transformer)
    weight_map = {}
    for number, half in enumerate((names[:30], names[30:]), start=1):
        shard = f"diffusion_pytorch_model-{number:05}-of-00002.safetensors"
        write(directory / "transformer" / shard, {name: transformer[name] for name in half})
        weight_map |= dict.fromkeys(half, shard)
    index = directory / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    ours = {name: wan_vae_from_diffusers(name) for name in diffusers_vae_names(VAE.num_res_blocks)}
    vae = {name: parts["vae"][original] for name, original in ours.items() if original in parts["vae"]}
    assert len(vae) == len(parts["vae"])
    write(directory / "vae" / "diffusion_pytorch_model.safetensors", vae)
    write(directory / "text_encoder" / "model.safetensors", parts["text_encoder"])
    settings = {
        "transformer": {
            "num_attention_heads": 1,
            "attention_head_dim": 128,
            "in_channels": 16,
            "text_dim": 32,
        },
        "vae": {"latents_mean": list(VAE.latents_mean), "latents_std": list(VAE.latents_std)},
        "text_encoder": {"relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6},
    }
    for part, values in settings.items():
        (directory / part / "config.json").write_text(json.dumps(values))
    write_tokenizer(directory / "tokenizer")
    return directory


def cache_links(directory: Path, repository: Path) -> Path:
    """A snapshot of `directory` as in the cache of Hugging Face: links to blobs with hashes for names."""
    snapshot = repository / "snapshots" / "ab12"
    for index, path in enumerate(sorted(path for path in directory.rglob("*") if path.is_file())):
        blob, link = repository / "blobs" / f"{index:064x}", snapshot / path.relative_to(directory)
        for folder in (blob.parent, link.parent):
            folder.mkdir(parents=True, exist_ok=True)
        os.link(path, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


@pytest.fixture(scope="session")
def cached() -> Callable[[Path, Path], Path]:
    return cache_links
