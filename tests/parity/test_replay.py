"""Replays the golden files, and checks that the comparison is sharp enough to see the known mistakes."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rfengine.cache.eviction import Evictor
from rfengine.cache.kv_cache import StreamingKVCache
from rfengine.cache.sink_policy import Fold
from rfengine.config import CacheConfig, ScheduleConfig, WanConfig
from rfengine.grid import LatentGrid
from rfengine.models.dit import WanDiT
from rfengine.models.vae import ChannelNorm
from rfengine.ops import reference
from rfengine.parity.replay import ParityReport, replay, tolerance
from rfengine.runtime.chunk_runner import ChunkRunner
from rfengine.schedule import FlowSchedule

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
FILES = sorted(GOLDEN.glob("*.safetensors"))
EMA, VAE, UMT5 = (GOLDEN / f"{name}.safetensors" for name in ("ema_sink", "vae", "umt5"))
GRID = LatentGrid(32, 48)


def read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["config"]), load_file(path)


@functools.cache
def replayed(path: Path) -> ParityReport:
    """An untouched golden file in float32; several tests read it."""
    return replay(path)


def changed(source: Path, directory: Path, change: Callable[[dict, dict[str, Tensor]], None]) -> Path:
    """A copy of a golden file whose header and tensors went through `change`."""
    header, tensors = read(source)
    change(header, tensors)
    path = directory / f"changed-{source.name}"
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"config": json.dumps(header)}
    )
    return path


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden_file_replays_within_its_tolerance(path: Path) -> None:
    report = replayed(path)
    assert report.ok, report.to_json()
    kind = read(path)[0]["kind"]
    assert (report.file, report.kind, report.dtype) == (str(path), kind, "float32")
    assert report.tolerance == {"causal": 3e-6, "vae": 3e-6, "umt5": 5e-6}[kind]


def test_there_are_golden_files() -> None:
    assert len(FILES) == 5


def test_every_recorded_result_is_compared() -> None:
    assert set(replayed(EMA).errors) == {
        "latents", "first_flow", "cache_k", "cache_v", "sink_k_last", "sink_v_last", "timesteps",
    }  # fmt: skip
    assert set(replayed(VAE).errors) == {
        *(f"{name}_by_{frames}" for name in ("video", "video_streamed", "encoded") for frames in (1, 2, 3)),
        "video_whole", "encoded",
    }  # fmt: skip


def shorten(_: dict, tensors: dict[str, Tensor]) -> None:
    """The first two calls of a causal VAE; CPUs are slow at convolutions in bfloat16."""
    for name, frames in (("latents", 4), ("encoded", 4), ("video", 13), ("pixels", 13)):
        tensors[f"t.{name}"] = tensors[f"t.{name}"][:, :, :frames]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden_file_replays_in_bfloat16_within_the_stated_tolerance(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rfengine.parity.replay._CALL_FRAMES", (2,))  # float32 has the other lengths
    report = replay(changed(path, tmp_path, shorten) if path == VAE else path, dtype="bfloat16")
    assert report.ok, report.to_json()
    assert report.max_rel_err > 1e-4  # 16 bits were really used


def test_half_tolerances_are_twice_what_was_measured_in_epsilons() -> None:
    for path in (EMA, UMT5):
        report = replay(path, dtype="float16")
        assert report.ok and report.max_rel_err > report.tolerance / 4, report.to_json()
    assert tolerance("vae", "bfloat16") == 4 * torch.finfo(torch.bfloat16).eps


# The mistakes that a looser comparison would let pass


def test_alpha_off_by_two_hundredths_is_seen(tmp_path: Path) -> None:
    report = replay(changed(EMA, tmp_path, lambda header, _: header.update(alpha=0.88)))
    assert not report.ok
    assert report.errors["latents"] == pytest.approx(5e-4, rel=0.5)
    assert report.errors["sink_k_last"] > 1e-3


def test_average_applied_one_forward_late_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[Callable[[], None]] = []
    forward = WanDiT.forward_chunk

    def hold(
        self: Evictor, raw: Tensor, rotated: Tensor, values: Tensor, rotation: Tensor, folds: tuple[Fold, ...]
    ) -> None:
        reference.rephase_keys(raw, rotated, rotation)
        (fold,) = folds
        sink, source = (
            slice(first * self.frame_tokens, (first + fold.count) * self.frame_tokens)
            for first in (fold.target, fold.source)
        )
        left = (raw[:, :, source].clone(), values[:, :, source].clone())  # overwritten meanwhile

        def evict() -> None:
            reference.ema_evict(raw[:, :, sink], values[:, :, sink], *self.low, *left, fold.keep)
            reference.rephase_keys(raw, rotated, rotation)

        held.append(evict)

    def forward_then_evict(self: WanDiT, *arguments: object, **options: object) -> Tensor:
        tokens = forward(self, *arguments, **options)
        if held:
            held.pop()()
        return tokens

    monkeypatch.setattr(Evictor, "evict", hold)
    monkeypatch.setattr(WanDiT, "forward_chunk", forward_then_evict)
    report = replay(EMA)
    assert not report.ok
    assert report.errors["first_flow"] > 5e-4
    assert report.errors["latents"] > report.tolerance


def test_layer_norm_epsilon_of_1e_5_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = WanDiT.forward_chunk

    def with_other_epsilon(self: WanDiT, *arguments: object, **options: object) -> Tensor:
        for block in self.blocks:
            block.eps = 1e-5
        return forward(self, *arguments, **options)

    monkeypatch.setattr(WanDiT, "forward_chunk", with_other_epsilon)
    assert not replay(EMA).ok


def test_exact_gelu_in_the_text_embedding_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    text_keys_values = WanDiT.text_keys_values

    def with_exact_gelu(self: WanDiT, text_states: Tensor) -> object:
        self.text_embedding[1] = nn.GELU()
        return text_keys_values(self, text_states)

    monkeypatch.setattr(WanDiT, "text_keys_values", with_exact_gelu)
    assert not replay(EMA).ok


def test_variance_in_place_of_the_norm_is_seen_in_the_vae(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_variance(self: ChannelNorm, x: Tensor) -> Tensor:
        return x * (x.pow(2).mean(dim=1, keepdim=True) + 1e-6).rsqrt() * self.gamma

    monkeypatch.setattr("rfengine.parity.replay._CALL_FRAMES", (3,))
    monkeypatch.setattr(ChannelNorm, "forward", by_variance)
    assert not replay(VAE).ok


def test_epsilon_of_the_text_encoder_is_seen(tmp_path: Path) -> None:
    assert not replay(changed(UMT5, tmp_path, lambda header, _: header.update(layer_norm_epsilon=1e-5))).ok


@pytest.mark.parametrize(
    "name", ["latents", "first_flow", "cache_k", "cache_v", "sink_k_last", "sink_v_last"]
)
def test_one_corrupted_value_is_seen(name: str, tmp_path: Path) -> None:
    def corrupt(_: dict, tensors: dict[str, Tensor]) -> None:
        tensors[f"t.{name}"].view(-1)[7] += 0.1

    report = replay(changed(EMA, tmp_path, corrupt))
    assert not report.ok
    assert [key for key, error in report.errors.items() if error > report.tolerance] == [name]


# Files of other sizes and settings


def record(
    path: Path, cache_config: CacheConfig, num_chunks: int, steps: tuple[int, ...], **header: object
) -> None:
    """Write a golden file of a small random model, recorded step by step."""
    torch.manual_seed(3)
    config = WanConfig(48, 80, 2, 2, text_dim=16, text_len=24, freq_dim=32, in_dim=4, out_dim=4)
    model, schedule = WanDiT(config).eval(), FlowSchedule(ScheduleConfig(3.0, 1000, steps))
    frames, side = cache_config.chunk_frames, (GRID.latent_height, GRID.latent_width)
    noise = torch.randn(1, num_chunks * frames, 4, *side)
    renoise = torch.randn(num_chunks, len(steps) - 1, 1, frames, 4, *side)
    prompt = torch.randn(1, 24, 16)
    runner, cache = ChunkRunner(model, schedule), StreamingKVCache(config, cache_config, GRID)
    latents, flows = [], []
    with torch.no_grad():
        text = model.text_keys_values(prompt)
        for index in range(num_chunks):
            plan = cache.plan_chunk()
            cache.begin_chunk(plan)
            first = noise[:, index * frames : (index + 1) * frames].transpose(1, 2)
            tokens = model.forward_chunk(first, runner.steps[0].modulation, text, cache, plan)
            flows.append(model.ops.unpatchify(tokens, first))
            draws = torch.cat([first[None], renoise[index].transpose(2, 3)])
            latents.append(runner.advance(cache, plan, draws, text))
    keys = cache.keys if cache.raw_keys is None else cache.raw_keys
    tensors = {
        "t.noise": noise, "t.renoise": renoise, "t.prompt_embeds": prompt,
        "t.latents": torch.cat(latents, 2).transpose(1, 2),
        "t.first_flow": torch.cat(flows, 2).transpose(1, 2),
        "t.cache_k": cache.chronological(keys)[:, 0], "t.cache_v": cache.chronological(cache.values)[:, 0],
        **{f"w.{name}": weight for name, weight in model.state_dict().items()},
    }  # fmt: skip
    values = {
        "kind": "causal", "num_heads": 2, "frames_per_chunk": frames, "sink": cache_config.sink,
        "local_attn_size": cache_config.window_frames, "sink_size": cache_config.sink_frames,
        "alpha": cache_config.alpha, "positions": cache_config.positions, "denoising_steps": list(steps),
        "timestep_shift": 3.0, "warped_timesteps": list(schedule.denoising_timesteps), **header,
    }  # fmt: skip
    save_file(
        {name: value.contiguous() for name, value in tensors.items()}, path, {"config": json.dumps(values)}
    )


@pytest.mark.parametrize(
    ("cache_config", "num_chunks", "steps", "header"),
    [
        (CacheConfig(2, 6, "ema", 2, 0.7, "relative"), 6, (1000, 500), {}),
        (CacheConfig(1, 4, "ema", 1, 0.9, "relative"), 7, (900, 600, 300), {}),
        (CacheConfig(1, 5, "frozen", 2, 1.0, "absolute"), 8, (1000,), {}),
        (CacheConfig(3, 9, "frozen", 3, 1.0, "relative"), 5, (1000, 250), {}),
        (CacheConfig(2, 4, "none", 0, 1.0, "relative"), 5, (1000, 250), {}),
        (CacheConfig(2, 6, "none", 0, 1.0, "absolute"), 3, (1000, 250), {"local_attn_size": -1}),
        (CacheConfig(4, 12, "ema", 4, 0.5, "relative"), 2, (1000, 250), {"local_attn_size": -1}),
    ],
    ids=lambda value: (
        f"{value.sink}-{value.chunk_frames}-{value.window_frames}" if hasattr(value, "sink") else ""
    ),
)
def test_file_of_other_sizes_replays(
    cache_config: CacheConfig, num_chunks: int, steps: tuple[int, ...], header: dict, tmp_path: Path
) -> None:
    path = tmp_path / "other.safetensors"
    record(path, cache_config, num_chunks, steps, **header)
    report = replay(path)
    assert report.ok, report.to_json()


def test_wrong_window_of_such_a_file_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    record(path, CacheConfig(2, 6, "ema", 2, 0.7), 6, (1000, 500), local_attn_size=8)
    with pytest.raises(ValueError, match="recorded"):
        replay(path)


def test_window_that_is_not_full_may_be_recorded_with_zeros_behind_it(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    record(path, CacheConfig(2, 8, "none", 0, 1.0), 2, (1000,))

    def pad(_: dict, tensors: dict[str, Tensor]) -> None:
        for name in ("t.cache_k", "t.cache_v"):
            tensors[name] = torch.cat([tensors[name], torch.zeros_like(tensors[name])], dim=1)

    assert replay(changed(path, tmp_path, pad)).ok


# Damaged files


@pytest.mark.parametrize(
    ("source", "change", "message"),
    [
        (EMA, lambda header, _: header.update(kind="clip"), "kind is 'clip'"),
        (EMA, lambda header, _: header.pop("kind"), "kind None"),
        (EMA, lambda header, _: header.update(sink="mean"), "sink is 'mean'"),
        (EMA, lambda header, _: header.update(frames_per_chunk="3"), "frames_per_chunk '3'"),
        (EMA, lambda header, _: header.update(frames_per_chunk=4), "t.renoise"),
        (EMA, lambda header, _: header.update(local_attn_size=21), "216 tokens of the cache are recorded"),
        (EMA, lambda header, _: header.update(num_layers=2), "num_layers 2"),
        (EMA, lambda header, _: header.update(denoising_steps=[1000, 750, 500, "x"]), "denoising_steps"),
        (EMA, lambda _, tensors: tensors.pop("t.first_flow"), "no tensor t.first_flow"),
        (EMA, lambda _, tensors: tensors.pop("w.blocks.0.self_attn.q.weight"), "blocks.0.self_attn.q.weight"),
        (VAE, lambda header, _: header.update(kind="causal"), "weights are those of a vae"),
        (VAE, lambda header, _: header.update(base_dim=16), "base_dim 16"),
        (EMA, lambda _, tensors: tensors.update({"t.prompt_embeds": torch.ones(2, 9, 32)}), "t.prompt"),
        (UMT5, lambda _, tensors: tensors["t.mask"].fill_(2), "it must be 0 or 1"),
        (UMT5, lambda _, tensors: tensors["t.ids"].fill_(5000), "ids up to 5000"),
        (UMT5, lambda header, _: header.update(num_heads=8), "num_heads 8"),
    ],
)  # fmt: skip
def test_damaged_file_is_one_clear_error(
    source: Path, change: Callable, message: str, tmp_path: Path
) -> None:
    path = changed(source, tmp_path, change)
    with pytest.raises(ValueError, match=message) as caught:
        replay(path)
    assert str(path) in str(caught.value)


def test_file_without_config_foreign_file_and_truncated_file_are_errors(tmp_path: Path) -> None:
    plain, cut = tmp_path / "plain.safetensors", tmp_path / "cut.safetensors"
    save_file({"w.x": torch.zeros(1)}, plain)
    cut.write_bytes(EMA.read_bytes()[:-100])
    for path, message in (
        (plain, "config"),
        (cut, "truncated"),
        (Path(__file__), "neither safetensors nor a torch pickle"),
        (tmp_path / "no", "exist"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            replay(path)
        assert str(path) in str(caught.value)


def test_backend_that_cannot_run_is_refused() -> None:
    with pytest.raises(RuntimeError, match="'native' cannot run"):
        replay(EMA, backend="native")


def test_result_that_is_no_number_fails_and_stays_valid_json(tmp_path: Path) -> None:
    def spoil(_: dict, tensors: dict[str, Tensor]) -> None:
        tensors["t.latents"][0, 0, 0, 0, 0] = float("nan")

    report = replay(changed(EMA, tmp_path, spoil))
    line = json.loads(report.to_json(), parse_constant=pytest.fail)
    assert not report.ok and line["ok"] is False
    assert line["max_rel_err"] is None and line["errors"]["latents"] is None


def test_report_says_what_the_command_line_promises() -> None:
    line = json.loads(
        ParityReport("a", "vae", "float32", "reference", {"x": 1e-7, "y": 2e-7}, 3e-6).to_json()
    )
    assert line == {
        "file": "a", "kind": "vae", "dtype": "float32", "backend": "reference", "max_rel_err": 2e-7,
        "tolerance": 3e-6, "errors": {"x": 1e-7, "y": 2e-7}, "ok": True,
    }  # fmt: skip
