"""The command line as a whole: its commands and their options."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import get_args

import pytest

from rfengine import cli
from rfengine.cli.commands import Options

RUNTIME = [
    "graphs", "overlap", "decode_device", "autotune", "vae", "vae_precision", "precision",
    "sixteen_bit_passes", "fp8_table", "tensorrt_directory", "preset", "text_encoder", "text_weights",
    "block_weights", "block_buffers",
]  # fmt: skip
LORAS = ["lora", "allow_unmatched_lora"]
FORCING = [
    "num_frames", "negative_prompt", "fps", "guidance_scale", "steps", "shift", "ar_step",
    "causal_block_size", "causal_attention", "end_image", "overlap_history", "overlap_latents",
    "addnoise_condition",
]  # fmt: skip
OPTIONS = {
    "generate": [
        "prompt", "output", "prompts", "script", "seconds", "seed", "image", "video", "start_mode", "resize",
        "model", "system", "height", "width", "device", "dtype", "backend", *LORAS, *RUNTIME, "verify",
        *FORCING,
    ],
    "serve": [
        "model", "system", "host", "port", "api_key_file", "insecure", "max_sessions",
        "connections_per_key", "max_connections", "memory_gb", "host_memory_gb", "data_directory", "disk_gb",
        "allow_origin", "allow_host", "device", "dtype",
        "backend", "replicas", "max_replicas", *LORAS, *RUNTIME, "log_json", "open_browser",
    ],
    "client": [
        "url", "prompt", "output", "seconds", "seed", "height", "width", "switch", "mode", "pace", "hls",
        "api_key_file",
    ],
    "convert": ["source", "destination", "base", *LORAS, "dtype", "use_ema", "kind"],
    "parity": ["files", "backend", "device", "dtype"],
    "doctor": ["json", "model", "height", "width", "dtype", *LORAS, "gpu_memory", "renew"],
    "bench": [
        "protocol", "model", "system", "height", "width", "chunks", "device", "dtype", "backend", *RUNTIME,
        "decode", "compare", "threads", "json", "plot",
    ],
    "calibrate": [
        "directory", "out", "limit", "prompt", "chunks", "height", "width", "device", "dtype",
    ],
    "export-vae": ["directory", "out", "height", "width", "latents", "precision", "onnx_only", "force"],
    "eval": [
        "paths", "out", "captions", "baseline", "first_chunk_frames", "chunk_frames", "flow_pairs", "plots",
        "vbench",
    ],
    "train": [
        "recipe", "directory", "resume", "device", "plan", "steps", "batch", "accumulation", "data",
        "student", "teacher", "critic", "base", "reward", "guard", "beta", "lora_rank", "precision",
        "parallel", "shard_ranks", "timeout", "offload_teacher", "save_every", "sample_every", "seed",
    ],
}  # fmt: skip


def option_names(kind: type) -> Iterator[str]:
    """Fields of a dataclass; those of a nested one stand in its place."""
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.default):
            yield from option_names(type(field.default))
        else:
            yield field.name


def test_commands_and_options_are_those_listed_here() -> None:
    """A new option is a change of this list."""
    commands = {}
    for command in get_args(Options):
        options, settings = get_args(command)
        commands[settings.name] = list(option_names(options))
    assert commands == OPTIONS


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in OPTIONS)
