"""bench/throughput.py on the smallest video: figures, refusals, and what becomes of a profile."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rfengine import cli
from rfengine.benchmark import agreement, comparison, conditions, steady, throughput
from rfengine.benchmark import timing as chunk_times
from rfengine.benchmark.agreement import WrongEngineError, check_agreement
from rfengine.benchmark.options import ThroughputOptions
from rfengine.benchmark.parts import PARTS, UNASSIGNED
from rfengine.benchmark.report import check_plot, draw, render
from rfengine.benchmark.timing import ChunkTimes, time_chunks, time_flow
from rfengine.config import (
    EngineConfig,
    RuntimeConfig,
    ScheduleConfig,
    TextConfig,
    TinyVAEConfig,
    VAEConfig,
    WanConfig,
)
from rfengine.models.streaming_decoder import StreamingDecoder
from rfengine.presets import PRESETS
from rfengine.runtime.options import Switch

ROOT = Path(__file__).resolve().parents[2]
SMALL = EngineConfig(
    "small",
    WanConfig(
        dim=48, ffn_dim=64, num_heads=2, num_layers=2, text_dim=16, text_len=8, in_dim=4, out_dim=4
    ),
    VAEConfig(
        base_dim=4, z_dim=4, dim_mult=(1, 1, 2, 2), num_res_blocks=1, latents_mean=(0.1,) * 4,
        latents_std=(1.2,) * 4,
    ),
    TextConfig(dim=16),
    schedule=ScheduleConfig(denoising_steps=(1000, 500)),
    tiny_vae=TinyVAEConfig(z_dim=4, widths=(8, 8, 8, 8), memory_blocks=1),
)  # fmt: skip
SMALLEST = ThroughputOptions(device="cpu", model="wan-1.3b", height=32, width=32, chunks=3)
SMALLEST_ARGUMENTS = (
    "--model", "wan-1.3b", "--device", "cpu", "--height", "32", "--width", "32", "--chunks", "1"
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def small_preset() -> Iterator[None]:
    """Makes the preset with random weights a model of a few milliseconds a chunk; fewer chunks are enough."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "wan-1.3b", SMALL)
        patch.setattr(steady, "SETTLED_CHUNKS", 1)
        patch.setattr(throughput, "PROFILED_CHUNKS", 1)
        yield


@pytest.fixture(scope="module")
def figures(small_preset: None) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "ROUNDS", 2)
        return throughput.measure(replace(SMALLEST, compare="baseline"))


def broken_engine(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[throughput.MeasuredEngine], None]
) -> None:
    """Every engine that is loaded is changed; the reference it is compared with is not."""
    load = throughput.MeasuredEngine.load

    def load_broken(options: ThroughputOptions) -> throughput.MeasuredEngine:
        engine = load(options)
        change(engine)
        return engine

    monkeypatch.setattr(throughput.MeasuredEngine, "load", load_broken)


def test_figures_are_json_and_name_their_circumstances(figures: dict[str, Any]) -> None:
    assert json.loads(json.dumps(figures)) == figures
    assert figures["model"] == "small" and (figures["height"], figures["width"]) == (32, 32)
    assert figures["versions"]["torch"] == torch.__version__
    assert figures["versions"]["commit"]
    assert "load_average_1_min" in figures["before"] and "load_average_1_min" in figures["after"]
    assert figures["peak_memory_bytes"] > 0 and figures["first_frame_ms"] > 0


def test_rates_are_those_of_twelve_frames_a_chunk(figures: dict[str, Any]) -> None:
    # two of three chunks took the median or longer
    assert 0 < figures["frames_per_s"] <= 3 * 12e3 / (2 * figures["chunk_ms_p50"])
    assert figures["chunk_ms_p95"] is figures["chunk_ms_p99"] is None  # of three chunks
    assert figures["real_time_factor"] == figures["frames_per_s"] / 16
    assert figures["frames_per_s_without_vae"] > 0
    assert figures["flop_utilisation"] > 0
    assert figures["time_growth"] is None and isinstance(figures["memory_growth_bytes"], int)


def test_parts_are_all_there_and_have_floors(figures: dict[str, Any]) -> None:
    parts = {row["part"]: row for row in figures["parts"]}
    assert tuple(parts) == (*PARTS, UNASSIGNED)
    assert all(row["ms"] > 0 for row in parts.values())
    for name in ("linears", "VAE"):
        assert parts[name]["share_of_floor"] == parts[name]["floor_ms"] / parts[name]["ms"]
    assert parts["copies"]["floor_ms"] is None and parts["unassigned"]["share_of_floor"] is None


def test_comparison_gives_ratios_with_their_spread(figures: dict[str, Any]) -> None:
    compared = figures["comparison"]
    assert compared["rounds"] == 2 and compared["attention"] == "SDPA"
    for name in ("end_to_end", "without_vae"):
        ratio = compared[name]["ratio"]
        assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
    end_to_end, without = (compared[name]["baseline_chunk_ms"] for name in ("end_to_end", "without_vae"))
    assert end_to_end["min"] > 0 and without["min"] > 0


def test_table_has_every_figure_of_the_json(figures: dict[str, Any]) -> None:
    shown = render(figures)
    for row in figures["parts"]:
        assert row["part"] in shown and f"{row['ms']:.3f}" in shown
    assert "p99" not in shown
    assert "p95 7.0, p99 9.0, jitter" in render(figures | {"chunk_ms_p95": 7.0, "chunk_ms_p99": 9.0})
    for words in ("frames/s end to end", "jitter", "peak memory", "FLOP utilisation", "alternating"):
        assert words in shown
    assert figures["versions"]["commit"] in shown
    assert figures["weights"] in shown


def test_agreement_reaches_a_chunk_that_evicts(figures: dict[str, Any]) -> None:
    latents, frames = figures["agreement"]
    assert latents["what"] == "latents" and frames["what"] == "frames"
    assert latents["chunks"] == frames["chunks"] == 4
    assert latents["error"] <= latents["allowed"] and frames["error"] <= frames["allowed"]


@pytest.mark.parametrize(
    ("op", "scale"), [("rms_norm", 1.001), ("sink_window_attention", 1.001), ("linear", 1.0001)]
)
def test_an_engine_with_a_slightly_wrong_op_is_refused(
    op: str, scale: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(engine: throughput.MeasuredEngine) -> None:
        right = getattr(engine.pipeline.model.ops, op)
        monkeypatch.setattr(engine.pipeline.model.ops, op, lambda *given: right(*given) * scale)

    broken_engine(monkeypatch, change)
    assert cli.main(["bench", *SMALLEST_ARGUMENTS]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert (
        printed.err.count("\n") == 1
        and "the engine is wrong, so nothing was measured: its latents" in printed.err
    )


def test_an_engine_that_forgets_to_evict_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two chunks would not show it."""
    engine = throughput.MeasuredEngine.load(replace(SMALLEST, decode=False))
    monkeypatch.setattr(engine.pipeline.model.ops, "evict_and_rephase", lambda *given: None)
    with pytest.raises(WrongEngineError, match="its latents of the first 4 chunks"):
        check_agreement(engine.pipeline, engine.grid, None)


def test_an_engine_with_a_wrong_decoder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = StreamingDecoder.decode_frames

    def dim(decoder: StreamingDecoder, *given: Any, **named: Any) -> Tensor:
        return (right(decoder, *given, **named).float() * 0.98).to(torch.uint8)

    monkeypatch.setattr(StreamingDecoder, "decode_frames", dim)
    engine = throughput.MeasuredEngine.load(SMALLEST)
    with pytest.raises(WrongEngineError, match="its frames of the first 4 chunks"):
        check_agreement(engine.pipeline, engine.grid, engine.decoder)


def test_an_engine_that_gives_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = throughput.MeasuredEngine.load(SMALLEST)
    right = engine.pipeline.model.ops.flow_step
    monkeypatch.setattr(engine.pipeline.model.ops, "flow_step", lambda *given: right(*given) * float("nan"))
    with pytest.raises(WrongEngineError, match="are inf from the reference"):
        check_agreement(engine.pipeline, engine.grid, None)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp8", torch.float32)])
def test_a_precision_without_a_dtype_has_its_own(precision: str, dtype: torch.dtype) -> None:
    options = replace(SMALLEST, runtime=RuntimeConfig(precision=precision), decode=False)
    engine = throughput.MeasuredEngine.load(options)
    assert engine.pipeline.model.dtype == dtype
    assert (engine.pipeline.model.left_out_of_fp8 is None) == (precision == "bf16")


def test_float16_agrees_with_the_reference() -> None:
    engine = throughput.MeasuredEngine.load(replace(SMALLEST, dtype="float16"))
    latents, frames = check_agreement(engine.pipeline, engine.grid, engine.decoder)
    assert latents.error > 1e-4 and frames.holds  # it is a 16-bit engine that was looked at


@pytest.mark.parametrize(("dtype", "is_coarse"), [("bfloat16", True), ("float32", False)])
def test_engine_agrees_with_a_truth_that_for_sixteen_bits_alone_is_multiplied_in_tf32(
    monkeypatch: pytest.MonkeyPatch, dtype: str, is_coarse: bool
) -> None:
    """On a GPU plain float32 would take a minute or more, for a difference that nobody could see."""
    seen: dict[tuple[str, torch.dtype], tuple[bool, bool]] = {}

    def flags() -> tuple[bool, bool]:
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    def note(name: str) -> None:
        right = getattr(agreement, name)

        def noted(*given: Any, **named: Any) -> Any:
            seen[name, given[-1]] = flags()
            return right(*given, **named)

        monkeypatch.setattr(agreement, name, noted)

    note("reference_latents")
    note("_decoded")
    before = flags()
    engine = throughput.MeasuredEngine.load(replace(SMALLEST, dtype=dtype))
    latents, frames = check_agreement(engine.pipeline, engine.grid, engine.decoder)
    assert (latents.error > 1e-4) == is_coarse and frames.holds
    truth, own = (torch.float32, torch.bfloat16) if is_coarse else (torch.float64, torch.float32)
    assert seen["reference_latents", truth] == seen["_decoded", truth] == (is_coarse, is_coarse)
    assert seen["reference_latents", own] == before and flags() == before == (False, False)


def test_tf32_is_put_back_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), agreement.truth_precision(torch.bfloat16):
        assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
        _ = 1 / 0
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32


def test_without_a_vae_only_latents_are_measured() -> None:
    options = replace(SMALLEST, decode=False, chunks=1)
    figures = throughput.measure(options)
    assert figures["frames_per_s"] is None and figures["first_frame_ms"] is None
    assert [result["what"] for result in figures["agreement"]] == ["latents"]
    assert {row["part"]: row for row in figures["parts"]}["VAE"]["ms"] == 0
    assert "frames/s without the VAE" in render(figures)
    assert figures["vae_tier"] is None and "VAE none; weights" in render(figures)


def test_the_comparison_is_there_before_the_parts_which_no_goal_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def cut_short(*_: object) -> None:
        raise TimeoutError

    monkeypatch.setattr(throughput, "compare", lambda *_: {"end_to_end": {}})
    monkeypatch.setattr(throughput, "_time_parts", cut_short)
    made: list[set[str]] = []
    with pytest.raises(TimeoutError):
        made.extend(set(figures) for figures in throughput.stages(replace(SMALLEST, compare="baseline")))
    assert "comparison" not in made[0] and "comparison" in made[-1] and "parts" not in made[-1]


def test_the_quality_of_the_frames_is_named(figures: dict[str, Any]) -> None:
    assert "VAE full in float32 (lossless); weights" in render(figures)
    options = replace(SMALLEST, runtime=RuntimeConfig(vae="tiny"), chunks=1)
    reduced = next(throughput.stages(options)) | {"parts": figures["parts"]}
    assert "VAE tiny in float32 (reduced); weights" in render(reduced)
    eights = {**figures, "vae_tier": "near-lossless"}
    assert "VAE full in float32 (near-lossless); weights" in render(eights)


def test_a_preset_runs_with_random_weights_and_says_so() -> None:
    engine, again = (throughput.MeasuredEngine.load(SMALLEST) for _ in range(2))
    assert engine.weights.startswith("random, seed 0")
    chunk = engine.stream().advance()
    assert chunk.frames.shape == (9, 32, 32, 3) and chunk.frames.std() > 1
    assert (again.stream().advance().frames == chunk.frames).all()


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        (("--chunks", "0"), 2, "--chunks is 0; it must be at least 1"),
        (("--chunks", "1" + "0" * 30), 2, "--chunks is 1000000000000000000000000000000; it must be at most"),
        (("--threads", "1000000000"), 2, "--threads is 1000000000; it must be at most 1024"),
        (("--height", "65536"), 2, "height is 65536 pixels; use at most 8192"),
        (("--model", "wan-1.3b", "--device", "cpu", "--height", "0"), 2, "height is 0 pixels; it must be a"),
        (("--threads", "0"), 2, "--threads is 0; it must be at least 1"),
        (("--device", "cpu", "--graphs"), 1, "CUDA graphs need a CUDA device"),
        (("--device", "cpu", "--model", "wan-14b", "--vae", "tensorrt"), 2, "give --model a checkpoint dir"),
        (("--height", "33"), 2, "must be a multiple of 16"),
        (("--plot", "plot.txt"), 2, "end it in .png"),
        (("--plot", "no/such/folder/plot.png"), 2, "is no directory"),
        (("--device", "cpu", "--json", "."), 2, "--json is ., a directory; name an ordinary file"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_one_sentence(
    arguments: tuple[str, ...], status: int, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", *arguments]) == status
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and sentence in printed


def test_json_goes_to_a_file_beside_the_table_or_takes_its_place(
    tmp_path: Path,
    figures: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(throughput, "stages", lambda options: iter([figures]))
    path = tmp_path / "results" / "figures.json"
    assert cli.main(["bench", "--json", str(path)]) == 0
    assert json.loads(path.read_text()) == figures
    assert capsys.readouterr().out == render(figures) + "\n"
    assert cli.main(["bench", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == figures


def test_plot_is_an_image(tmp_path: Path, figures: dict[str, Any]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "parts.png"
    draw(figures, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_plot_without_matplotlib_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="pip install matplotlib"):
        check_plot(tmp_path / "parts.png")


def test_it_runs_where_only_a_bare_cuda_image_has_its_packages() -> None:
    absent = "; ".join(f"sys.modules[{name!r}] = None" for name in ("av", "tqdm", "ftfy", "matplotlib"))
    script = (
        f"import runpy, sys; {absent}; sys.argv[1:] = ['--help']; "
        "runpy.run_path('bench/throughput.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--compare" in done.stdout and "--no-autotune" in done.stdout


def test_a_file_has_the_figures_so_far_after_every_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stages(_: object) -> Iterator[dict[str, int]]:
        yield {"frames_per_s": 1}
        raise RuntimeError("the device is lost")

    path = tmp_path / "figures.json"
    monkeypatch.setattr(throughput, "stages", stages)
    with pytest.raises(RuntimeError, match="lost"):
        throughput.run(replace(SMALLEST, json=path))
    assert json.loads(path.read_text()) == {"frames_per_s": 1}


def test_times_are_ordered_shares_and_jitter_is_the_mean_step() -> None:
    times = ChunkTimes((0.1, 0.4, 0.2, 0.3), 48)
    assert times.frames_per_s == pytest.approx(48)
    assert times.percentile_ms(0.5) == pytest.approx(200)
    assert times.percentile_ms(0.75) == pytest.approx(300)
    assert times.percentile_ms(0.99) == pytest.approx(400)
    assert times.tail_ms(0.75) == pytest.approx(300) and times.tail_ms(0.76) is None
    for share, least in ((0.95, 20), (0.99, 100)):
        assert ChunkTimes((1.0,) * least, 12).tail_ms(share) == 1e3
        assert ChunkTimes((1.0,) * (least - 1), 12).tail_ms(share) is None
    assert times.jitter_ms == pytest.approx(200)
    assert ChunkTimes((0.1,), 12).jitter_ms == 0


def test_growth_is_that_of_the_last_tenth_over_the_first() -> None:
    assert ChunkTimes((1.0,) * 90 + (1.5,) * 10, 100).growth == pytest.approx(0.5)
    assert ChunkTimes((1.0,) * 5, 5).growth is None


@pytest.mark.parametrize(("waits", "expected"), [(True, "s.s.s.s"), (False, "s...s")])
def test_the_device_is_idle_before_and_after_and_waited_for_as_asked(waits: bool, expected: str) -> None:
    seen: list[str] = []

    def advance() -> int:
        seen.append(".")
        return 12

    times = time_chunks(advance, 3, lambda: seen.append("s"), waits)
    assert "".join(seen) == expected
    assert len(times.seconds) == 3 and times.frames == 36


def test_an_even_stream_that_goes_one_ahead_has_even_times_in_a_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that takes 1 s for each chunk, under way while the one before it is handed out. With the
    device idle at both ends the first chunk would take no time and the last that of two."""
    clock, ready = [0.0], [0.0]

    def advance() -> int:
        awaited = ready[0]  # of the chunk that the call before began
        ready[0] = max(ready[0], clock[0]) + 1.0
        clock[0] = max(clock[0], awaited)
        return 12

    def wait() -> None:
        clock[0] = max(clock[0], ready[0])

    monkeypatch.setattr(chunk_times.time, "perf_counter", lambda: clock[0])
    whole = time_chunks(advance, 10, wait, waits=False)
    assert whole.seconds[0] == 0 and whole.seconds[-1] == 2
    flow = time_flow(advance, 10)
    assert flow.seconds == (1.0,) * 10 and flow.frames_per_s == whole.frames_per_s == 12
    assert time_flow(advance, 5, lead_in=0).seconds == (1.0,) * 5


def test_what_nvidia_smi_does_not_report_is_unknown() -> None:
    printed = conditions.read_state("1980, 2619, 1980, 512.30, [N/A], 44, 0x0000000000000000")
    assert printed["sm_clock_mhz"] == 1980 and printed["power_w"] == 512.3
    assert printed["power_limit_w"] == "unknown" and printed["clock_reasons"] == "0x0000000000000000"
    assert set(conditions.read_state("").values()) == {"unknown"}


def test_the_graph_is_replayed_before_the_clock_starts_and_while_it_is_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three chunks fill the window; the next runs op by op, and the one after it is recorded and replayed."""
    engine = throughput.MeasuredEngine.load(SMALLEST)
    assert chunk_times.recorded_chunks(engine.pipeline.config.cache) == 5
    assert agreement.checked_chunks(engine.pipeline) == 4
    switches = {"graphs": Switch(True, "asked for")}
    monkeypatch.setattr(agreement, "runtime_switches", lambda runtime, device: switches)
    assert agreement.checked_chunks(engine.pipeline) == 5


def test_pipe_that_its_reader_closed_is_left_to_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(options: object) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(throughput, "run", closed)
    with pytest.raises(BrokenPipeError):
        cli.main(["bench"])


def test_an_engine_in_fp8_is_compared_with_the_same_engine_without() -> None:
    options = replace(SMALLEST, compare="default", runtime=RuntimeConfig(precision="fp8"), chunks=1)
    figures = throughput.measure(options)
    compared = figures["comparison"]
    assert compared["default"] == {"precision": "fp8", "vae_precision": "default"}
    assert all(compared[name]["ratio"]["median"] > 0 for name in ("end_to_end", "without_vae"))
    assert figures["agreement"][0]["error"] > 1e-3  # the engine that was looked at is in FP8
    told = render(figures)
    assert "the same engine without precision fp8, vae-precision default in the same process" in told
