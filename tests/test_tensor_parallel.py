"""Several ranks that hold one transformer: their streams equal those of one."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rfengine.cache.kv_cache import StreamingKVCache
from rfengine.checkpoint.loader import save_weights
from rfengine.cli import main
from rfengine.config import EngineConfig
from rfengine.grid import LatentGrid
from rfengine.models.dit import WanDiT
from rfengine.pipeline import Pipeline
from rfengine.presets import PRESETS
from rfengine.runtime import ranks as ranks_file
from rfengine.snapshot import Snapshot
from rfengine.tensor_parallel import TensorParallel
from rfengine.version import VERSION
from support.loras import write_lora
from support.models import SMALL, small_config, small_model, vae_and_text_encoder, write_pipeline
from support.ranks import run_ranks
from support.systems import SYSTEMS
from support.tensor_parallel import (
    cut_stream,
    int8_streams,
    latents_of,
    pipeline_of,
    run_int8,
    run_streams,
    run_variants,
    variants,
)
from support.video_files import decoded

TWELVE_HEADS = dataclasses.replace(SMALL, dim=96, num_heads=12, ffn_dim=128)
ON_TWO = ["ema", "similarity", "memory", "frozen absolute", "rolling with memory", "wave"]
ON_FOUR = ["ema"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    config = dataclasses.replace(small_config(), model=TWELVE_HEADS)
    torch.manual_seed(0)  # of the text encoder that write_pipeline makes
    vae, encoder = vae_and_text_encoder(config, 0)
    pipe = Pipeline(config, model_of_unequal_heads(), vae, encoder, "small")
    return write_pipeline(tmp_path_factory.mktemp("checkpoint"), pipe)


def model_of_unequal_heads() -> WanDiT:
    """Its first heads have three times the queries and keys, so that the mean squares of a part of them are
    far from those of all."""
    model = small_model(TWELVE_HEADS)
    for block in model.blocks:
        for attention in (block.self_attn, block.cross_attn):
            for layer in (attention.q, attention.k):
                layer.weight.data[: TWELVE_HEADS.dim // 4].mul_(3)
                layer.bias.data[: TWELVE_HEADS.dim // 4].mul_(3)
    return model


@pytest.fixture(scope="module")
def one(directory: Path) -> dict[str, dict[str, torch.Tensor]]:
    """By system, what one rank makes; it has left its snapshots in the directory."""
    return {
        name: cut_stream(pipeline_of(directory, name, 1), directory / f"1 {name}.safetensors")
        for name in ON_TWO
    }


@pytest.fixture(scope="module")
def ranks(directory: Path, one) -> dict[tuple[int, str], list[dict[str, torch.Tensor]]]:
    """By number of ranks and system, what each rank has made."""
    found = {}
    for count, systems in ((2, ON_TWO), (4, ON_FOUR)):
        run_ranks(run_streams, count, directory, count, systems)
        for name in systems:
            files = [directory / f"{count} {name} {rank}.pt" for rank in range(count)]
            found[count, name] = [torch.load(file, weights_only=True) for file in files]
    return found


CASES = [*((2, name) for name in ON_TWO), *((4, name) for name in ON_FOUR)]


@pytest.mark.parametrize(("count", "system"), CASES)
def test_ranks_make_the_latents_of_one(one, ranks, count: int, system: str) -> None:
    expected = one[system]
    for rank, made in enumerate(ranks[count, system]):
        torch.testing.assert_close(made["latents"], expected["latents"], rtol=0, atol=1e-5)
        assert torch.equal(made["latents"], ranks[count, system][0]["latents"])
        if rank:
            assert made["frames"].shape == (0, *expected["frames"].shape[1:])
        else:
            difference = made["frames"].int() - expected["frames"].int()
            assert made["frames"].shape == expected["frames"].shape and difference.abs().max() <= 1


@pytest.mark.parametrize(("count", "system"), CASES)
def test_a_snapshot_of_ranks_continues_on_one_and_back(
    directory: Path, one, ranks, count: int, system: str
) -> None:
    frames = one[system]["latents"].shape[2]
    pipe = pipeline_of(directory, system, 1)
    stream = pipe.restore(Snapshot.load(directory / f"{count} {system}.safetensors"))
    found = latents_of(stream, 2)
    chunk = found.shape[3]
    expected = one[system]["latents"][:, :, frames - 2 * chunk :]
    expected = torch.stack(expected.split(chunk, dim=2))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    for made in ranks[count, system]:
        torch.testing.assert_close(made["continued"], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("preset", "counts"), [("wan-1.3b", (2, 4)), ("wan-14b", (2, 4))])
def test_a_rank_has_its_share_of_weights_and_cache(preset: str, counts: tuple[int, ...]) -> None:
    """Within 5 % of an even share at the published sizes: only embeddings, modulations and the head are whole
    on every rank."""
    config = PRESETS[preset]
    whole = weights_and_cache(config, TensorParallel())
    for count in counts:
        own = weights_and_cache(config, TensorParallel(count - 1, count))
        assert 1 <= own * count / whole < 1.05, (count, own * count / whole)


def weights_and_cache(config: EngineConfig, parallel: TensorParallel) -> int:
    with torch.device("meta"):
        model = WanDiT(config.model, parallel=parallel).to(torch.bfloat16)
    grid = LatentGrid.of(config)
    cache = StreamingKVCache(
        config.model, config.cache, grid, dtype=torch.bfloat16, device="meta", parallel=parallel
    )
    tensors = [*model.parameters(), *cache.tensors().values()]
    return sum(each.nbytes for each in tensors)


def test_ranks_hold_what_is_reckoned_for_them(ranks) -> None:
    config = dataclasses.replace(small_config(SYSTEMS["ema"][0]), model=TWELVE_HEADS)
    for count in (2, 4):
        for rank, made in enumerate(ranks[count, "ema"]):
            parallel = TensorParallel(rank, count)
            with torch.device("meta"):
                model = WanDiT(config.model, parallel=parallel)
            cache = StreamingKVCache(
                config.model, config.cache, LatentGrid.of(config), device="meta", parallel=parallel
            )
            weights = sum(each.nbytes for each in model.parameters())
            assert made["bytes"].tolist() == [
                weights, sum(each.nbytes for each in cache.tensors().values())
            ]  # fmt: skip


def lora_of_pairs(path: Path) -> Path:
    layers = {}
    for name in ("self_attn.q", "self_attn.o", "cross_attn.k", "ffn.0", "ffn.2"):
        generator = torch.Generator().manual_seed(len(layers))
        outputs = 128 if name == "ffn.0" else 96
        inputs = 128 if name == "ffn.2" else 96
        down, up = torch.randn(4, inputs, generator=generator), torch.randn(outputs, 4, generator=generator)
        layers[f"blocks.1.{name}"] = (down / 10, up / 10)
    return write_lora(path, layers)


def lora_of_sums(path: Path) -> Path:
    """What is added to weights, biases and norms: of parts of every kind, and of what all ranks have."""
    generator, sizes = torch.Generator().manual_seed(7), {
        "self_attn.v.diff": (96, 96), "self_attn.k.diff_b": (96,), "self_attn.o.diff_b": (96,),
        "cross_attn.o.diff": (96, 96), "cross_attn.norm_q.diff": (96,), "ffn.0.diff_b": (128,),
        "ffn.2.diff_b": (96,), "norm3.diff_b": (96,),
    }  # fmt: skip
    save_weights(path, {
        f"diffusion_model.blocks.0.{name}": torch.randn(size, generator=generator) / 10
        for name, size in sizes.items()
    })  # fmt: skip
    return path


@pytest.mark.slow
def test_loras_precisions_and_switches_are_those_of_one_rank(directory: Path) -> None:
    loras = [lora_of_pairs(directory / "lora.safetensors"), lora_of_sums(directory / "sums.safetensors")]
    expected = variants(directory, 1, loras)
    run_ranks(run_variants, 2, directory, 2, loras)
    for rank in range(2):
        made = torch.load(directory / f"variants {rank}.pt", weights_only=True)
        assert torch.equal(made["again"], made["plain"])
        for name, latents in expected.items():
            if not name.startswith("fp8"):
                torch.testing.assert_close(made[name], latents, rtol=0, atol=2e-5, msg=name)
        assert (expected["with LoRAs"] - expected["again"][3]).abs().max() > 0.01
        for name in ("fp8", "fp8-attention"):  # each rank has units of its own part of a row
            one_rank, plain = expected[name][3], expected["plain"][3]  # the first chunk of a full window
            between, of_rounding = (made[name][3] - one_rank).norm(), (one_rank - plain).norm()
            assert 0 < between < 1.2 * of_rounding, name


@pytest.mark.slow
def test_weights_in_int8_are_those_of_one_rank(directory: Path) -> None:
    expected = int8_streams(directory, 1)
    run_ranks(run_int8, 2, directory, 2)
    for rank in range(2):
        made = torch.load(directory / f"int8 {rank}.pt", weights_only=True)
        for name, latents in expected.items():
            torch.testing.assert_close(made[name], latents, rtol=0, atol=2e-5, msg=name)
    assert torch.equal(expected["int8"], expected["int8 from host memory"])


def refused(rank: int, directory: Path, others: Path) -> None:
    """What each rank is told where they differ."""
    said = []
    for case in ("version", "weights", "prompt", "size"):
        try:
            if case == "version":
                ranks_file.VERSION = f"0.{rank}"
            source = others if case == "weights" and rank else directory
            pipe = pipeline_of(source, "ema", 2)
            size = {"height": 48} if case == "size" and rank else {}
            pipe.stream("a square" if case == "prompt" and rank else "a circle", **size)
        except ValueError as error:
            said.append(str(error))
        ranks_file.VERSION = VERSION
    (directory / f"refused {rank}").write_text("\n".join(said))


def test_ranks_that_differ_are_refused_on_every_rank(directory: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(small_config(), model=TWELVE_HEADS)
    other = Pipeline(config, small_model(TWELVE_HEADS, 1), *vae_and_text_encoder(config, 0), "other")
    run_ranks(refused, 2, directory, write_pipeline(tmp_path, other))
    for rank in range(2):
        version, weights, prompt, size = (directory / f"refused {rank}").read_text().splitlines()
        assert version.startswith("the version of rfengine and of torch of rank 0 is ('0.0'")
        assert "('0.1'" in version
        assert weights.startswith("the weights of rank 0 is '") and "that of rank 1 is '" in weights
        assert "a circle" in prompt and "a square" in prompt and "all ranks need the same" in prompt
        assert "32" in size and "48" in size


def test_heads_that_do_not_divide_are_refused_before_anything_is_loaded(directory: Path) -> None:
    with pytest.raises(ValueError, match="5 ranks cannot share 12 heads evenly; start 1 or 2 or 4"):
        pipeline_of(directory, "ema", 5)
    with pytest.raises(
        ValueError, match="3 ranks cannot share 128 feed-forward columns evenly; start 1 or 2 or 4"
    ):
        pipeline_of(directory, "ema", 3)
    with pytest.raises(ValueError, match="tensor_parallel is 0"):
        pipeline_of(directory, "ema", 0)


def run_torchrun(count: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "-m"]
    return subprocess.run(
        [*launcher, "rfengine.cli", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip


def test_torchrun_generates_the_video_of_one_process(tmp_path: Path, capsys) -> None:
    given = ["generate", "a red circle", "--seconds", "1", "--seed", "3", "-o"]
    finished = run_torchrun(3, *given, str(tmp_path / "three.mp4"))
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("frames/s") == 1
    assert main([*given, str(tmp_path / "one.mp4")]) == 0
    three, one = (decoded(tmp_path / name).astype(int) for name in ("three.mp4", "one.mp4"))
    assert three.shape == one.shape and abs(three - one).mean() < 4  # x264 differs from run to run


def test_a_command_of_one_process_refuses_several(monkeypatch, capsys) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["doctor"]) == 2
    assert "torchrun started 2 processes and this command is one" in capsys.readouterr().err


def test_one_process_is_not_two_ranks(directory: Path) -> None:
    with pytest.raises(ValueError, match="tensor_parallel is 2 and 1 process is started; run `torchrun"):
        pipeline_of(directory, "ema", 2)
