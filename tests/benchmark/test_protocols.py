"""`rfengine bench --protocol`: figures and words of every protocol, refusals, and what stays on the disk."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rfengine import cli
from rfengine.benchmark import agreement, steady
from rfengine.benchmark.agreement import WrongEngineError, check_agreement, checked_chunks
from rfengine.benchmark.measured_engine import MeasuredEngine
from rfengine.benchmark.options import ThroughputOptions
from rfengine.benchmark.protocols import fresh_process, plan, repetition, session, streams, videos
from rfengine.benchmark.protocols.plan import planned
from rfengine.benchmark.protocols.protocol import Setting, Trial
from rfengine.benchmark.protocols.report import render
from rfengine.benchmark.protocols.table import PROTOCOLS
from rfengine.config import RuntimeConfig
from rfengine.presets import PRESETS
from rfengine.runtime.options import Switch

DOCS = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"
SMALLEST = ThroughputOptions(device="cpu", model="tiny", height=32, width=32, chunks=2)
LENGTHS = {"file": 25, "clip-cold": 9, "clip-warm": 21}
CHUNKS = {"frames_per_s", "chunk_ms_p50", "chunk_ms_p95", "chunk_ms_p99", "chunks"}
CLIP = {"frames_per_s", "seconds", "frames"}
FIGURES = {
    **dict.fromkeys(("dit-4-passes", "dit-context", "dit-window-9", "tiny-decoder", "full-decoder"), CHUNKS),
    "file": CLIP | {"writing_s", "file_bytes"},
    "clip-cold": CLIP | {"start_s", "load_s", "making_s", "first_frame_s"},
    "clip-warm": CLIP | {"seconds_least", "seconds_most"},
    "first-frame": {f"{text}_ms{end}" for text in ("given", "encoded") for end in ("", "_least", "_most")},
    "latency": CHUNKS | {"chunk_ms_longest", "jitter_ms", "late_chunks"},
    "repeat": {"compared_chunks", "in_one_process", "in_two_processes", "other_ops"},
}
ON_H100 = {
    "preset": "wan-1.3b", "height": 480, "width": 832, "denoising_steps": 4, "dtype": "bfloat16",
    "window_frames": 21, "vae_tier": None, "runtime": {"precision": "default"},
    "device": "NVIDIA H100 80GB HBM3",
}  # fmt: skip


def run_here(command: list[str], **named: Any) -> subprocess.CompletedProcess[str]:
    """What a process of its own does, in this one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command[2:])
        fresh_process.main()
    return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture(scope="module", autouse=True)
def few() -> Iterator[None]:
    """Shorter videos, each thing once, and one chunk before the clock starts or compared."""
    with pytest.MonkeyPatch.context() as patch:
        for name, frames in LENGTHS.items():
            patch.setitem(PROTOCOLS, name, replace(PROTOCOLS[name], frames=frames))
        patch.setattr(agreement, "checked_chunks", lambda pipeline: 1)
        patch.setattr(steady, "recorded_chunks", lambda cache: 1)
        patch.setattr(steady, "SETTLED_CHUNKS", 1)
        patch.setattr(streams, "FIRST_FRAMES", 1)
        patch.setattr(videos, "CLIPS", 1)
        yield


@pytest.fixture(scope="module")
def everything(few: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The records of all protocols by name, and what the terminal showed. A process of its own is the one of
    `repeat` alone."""
    path, shown = tmp_path_factory.mktemp("figures") / "new" / "figures.json", io.StringIO()
    start = subprocess.run

    def run(command: list[str], **named: Any) -> subprocess.CompletedProcess[str]:
        is_clip = "XDG_CACHE_HOME" in named.get("env", {}).keys() - os.environ.keys()
        return run_here(command) if is_clip else start(command, **named)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(shown):
        patch.delenv("XDG_CACHE_HOME", raising=False)
        patch.setattr(fresh_process.subprocess, "run", run)
        assert session.run(replace(SMALLEST, protocol=("all",), json=path)) == 0
    return {record["protocol"]: record for record in json.loads(path.read_text())}, shown.getvalue()


@pytest.fixture(scope="module")
def records(everything: tuple[dict[str, Any], str]) -> dict[str, Any]:
    return everything[0]


def figures_of(records: dict[str, Any], name: str) -> dict[str, Any]:
    (run,) = records[name]["runs"]
    assert run["graphs"] is False
    return run["figures"]


def test_every_protocol_has_its_words_and_its_figures(records: dict[str, Any]) -> None:
    assert list(records) == list(PROTOCOLS) == list(FIGURES)
    for name, record in records.items():
        protocol = PROTOCOLS[name]
        assert record["inside"] == list(protocol.inside) != [] != record["outside"] == list(protocol.outside)
        assert [rival["value"] for rival in record["rivals"]] == [rival.value for rival in protocol.rivals]
        figures = figures_of(records, name)
        assert set(figures) == FIGURES[name]
        numbers = {key: value for key, value in figures.items() if isinstance(value, float)}
        assert all(value > 0 for key, value in numbers.items() if key != "jitter_ms")


def test_every_record_names_its_circumstances(records: dict[str, Any]) -> None:
    for record in records.values():
        assert (record["model"], record["height"], record["width"]) == ("tiny", 32, 32)
        assert record["versions"]["torch"] == torch.__version__ and record["versions"]["commit"]
        assert record["runtime"]["vae_precision"] == "default" and record["device"]
        (run,) = record["runs"]
        assert "load_average_1_min" in run["before"] and "load_average_1_min" in run["after"]
        assert all(each["error"] <= each["allowed"] for each in run["agreement"])


def test_what_a_protocol_fixes_is_what_is_measured(records: dict[str, Any]) -> None:
    seen = {
        name: (record["system"], record["window_frames"], record["vae_tier"], record["text"])
        for name, record in records.items()
    }
    assert seen["dit-4-passes"] == seen["dit-context"] == ("self-forcing", 21, None, "states given")
    assert seen["dit-window-9"] == ("reward-forcing", 9, None, "states given")
    assert seen["tiny-decoder"] == ("reward-forcing", 9, "reduced", "states given")
    assert seen["full-decoder"] == ("reward-forcing", 9, "lossless", "states given")
    assert seen["file"] == seen["clip-cold"] == (None, 9, "lossless", "encoded")
    assert records["dit-4-passes"]["fixed"]["context_pass"] is False


def test_times_of_whole_videos_add_up(records: dict[str, Any]) -> None:
    for name, frames in LENGTHS.items():
        figures = figures_of(records, name)
        assert figures["frames"] == frames
        assert figures["frames_per_s"] == pytest.approx(frames / figures["seconds"])
    file, cold = figures_of(records, "file"), figures_of(records, "clip-cold")
    assert file["writing_s"] < file["seconds"] and file["file_bytes"] > 1000
    assert cold["start_s"] + cold["load_s"] + cold["making_s"] == pytest.approx(cold["seconds"])
    assert cold["start_s"] + cold["load_s"] < cold["first_frame_s"] <= cold["seconds"]


def test_a_stream_of_tiny_is_the_same_in_one_process_and_in_two(records: dict[str, Any]) -> None:
    figures, equal = figures_of(records, "repeat"), {"equal": True, "difference": None}
    assert figures["in_one_process"] == figures["in_two_processes"] == equal
    assert figures["compared_chunks"] == 7 and figures["other_ops"] == []


def test_rivals_of_another_model_and_machine_have_no_ratio(everything: tuple[dict[str, Any], str]) -> None:
    records, shown = everything
    for record in records.values():
        for rival in record["rivals"]:
            assert rival["ratios"] is None and {"model", "size", "machine"} <= set(rival["differences"])
    assert "344 ms a chunk on H100: not comparable: another model, size" in " ".join(shown.split())
    assert "times as fast" not in shown


def test_the_terminal_shows_every_protocol_once_and_the_machine_once(
    everything: tuple[dict[str, Any], str],
) -> None:
    records, shown = everything
    lines = shown.splitlines()
    assert [line for line in lines if line in records] == list(records)
    assert sum("commit" in line for line in lines) == 1
    assert all(len(line) <= 80 for line in lines)  # as wide as what is no terminal
    rate = figures_of(records, "full-decoder")["frames_per_s"]
    assert any(line.split() == ["frames", "a", "second", f"{rate:.1f}"] for line in lines)


def test_ratios_stand_where_all_that_counts_for_the_time_is_the_rivals() -> None:
    rival = PROTOCOLS["dit-4-passes"].rivals[0]
    assert rival.differences(ON_H100) == []
    assert rival.ratio({"chunk_ms_p50": 172.0}) == 2
    for changed, difference in (
        ({"preset": None}, "model"),
        ({"height": 464}, "size"),
        ({"denoising_steps": 2}, "number of steps"),
        ({"window_frames": 9}, "window"),
        ({"vae_tier": "lossless"}, "decoder"),
        ({"dtype": "float32"}, "precision"),
        ({"runtime": {"precision": "fp8"}}, "precision"),
        ({"device": "NVIDIA H200"}, "machine"),
    ):
        assert rival.differences(ON_H100 | changed) == [difference]
    unstated, rate = PROTOCOLS["full-decoder"].rivals[0], {"frames_per_s": 46.2}
    ours = ON_H100 | {"window_frames": 9, "vae_tier": "lossless"}
    assert unstated.differences(ours) == ["what is inside of its time"]
    assert unstated.ratio(rate) == 2


def test_a_smaller_window_or_decoder_is_never_faster_than_a_rival() -> None:
    on_gb200 = ON_H100 | {"device": "NVIDIA GB200", "window_frames": 9, "vae_tier": "reduced"}
    assert PROTOCOLS["tiny-decoder"].rivals[0].differences(on_gb200) == ["window"]
    on_h200 = ON_H100 | {"device": "NVIDIA H200", "window_frames": 9}
    for tier, differences in (("lossless", []), ("near-lossless", ["decoder"]), ("reduced", ["decoder"])):
        assert PROTOCOLS["file"].rivals[0].differences(on_h200 | {"vae_tier": tier}) == differences
    of_users = PROTOCOLS["clip-warm"].rivals
    assert all("what is inside of its time" in each.differences(ON_H100) for each in of_users)


def test_a_table_with_and_without_graphs_has_both_ratios(records: dict[str, Any]) -> None:
    record, (run,) = records["dit-4-passes"], records["dit-4-passes"]["runs"]
    runs = [
        run | {"graphs": on, "peak_memory_bytes": 2**30, "after": {"sm_clock_mhz": 1980.0}}
        for on in (True, False)
    ]
    rivals = [rival | {"differences": [], "ratios": [1.25, 1.125]} for rival in record["rivals"]]
    made = {"runs": runs, "rivals": rivals, "runtime": record["runtime"] | {"precision": "fp8"}}
    lines = render(record | made).splitlines()
    assert any(line.split() == ["graphs", "on", "graphs", "off"] for line in lines)
    assert any(line.split() == ["clock", "afterwards,", "MHz", "1980", "1980"] for line in lines)
    words = " ".join(" ".join(lines).split())
    assert "344 ms a chunk on H100: 1.25 times as fast (graphs on), 1.12 times as fast (graphs off)" in words
    assert "window 21, float32 (fp8); weights" in words


def test_both_are_measured_where_graphs_are_on_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    def switches(runtime: RuntimeConfig, device: torch.device) -> dict[str, Switch]:
        return {"graphs": Switch(runtime.graphs is not False, "")}

    def graphs(runtime: RuntimeConfig) -> list[bool | None]:
        (made,) = planned(replace(SMALLEST, protocol=("latency",), runtime=runtime))
        return [setting.options.runtime.graphs for setting in made.settings]

    monkeypatch.setattr(plan, "runtime_switches", switches)
    assert graphs(RuntimeConfig()) == [True, False]
    assert graphs(RuntimeConfig(graphs=True)) == [True]
    assert graphs(RuntimeConfig(graphs=False)) == [False]


def test_an_engine_is_compared_once_for_both_runs_of_a_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    monkeypatch.setattr(
        session, "check_agreement", lambda *given: compared.append(given) or check_agreement(*given)
    )
    protocol = replace(PROTOCOLS["dit-context"], measure=lambda trial: {"chunks": len(compared)})
    ((setting,),) = (made.settings for made in planned(replace(SMALLEST, protocol=("dit-context",))))
    runtime = replace(setting.options.runtime, graphs=None)  # which is the same on a CPU
    other = replace(setting, options=replace(setting.options, runtime=runtime))
    (record,) = session.measured([plan.Plan(protocol, (setting, other))])
    assert [run["figures"] for run in record["runs"]] == [{"chunks": 1}] * 2 and len(compared) == 1
    assert record["window_frames"] == 21 and "setting" not in record["runs"][1]


def test_options_of_the_user_stay() -> None:
    runtime = RuntimeConfig(vae="tiny", overlap=False)
    options = replace(
        SMALLEST, protocol=("latency,tiny-decoder", "dit-context"), runtime=runtime, dtype="float16"
    )
    for made in planned(options):
        (setting,) = made.settings
        same = replace(setting.options, system=options.system, decode=True)
        assert replace(same, runtime=replace(same.runtime, graphs=None)) == options


def test_chunks_without_their_context_pass_have_four_passes_and_are_compared_as_such(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Over a chunk more than fills the window of 21."""
    monkeypatch.setattr(agreement, "checked_chunks", checked_chunks)
    engine = Setting(replace(SMALLEST, system="self-forcing", decode=False), context_pass=False).load()
    passes = []
    right = engine.pipeline.model.forward_chunk
    engine.pipeline.model.forward_chunk = lambda *given, **named: passes.append(1) or right(*given, **named)
    stream = engine.stream()
    stream.advance(decode=False)
    assert len(passes) == 4
    (found,) = check_agreement(engine.pipeline, engine.grid, None, context_pass=False)
    assert found.chunks == 8 and found.holds
    with pytest.raises(WrongEngineError, match="its latents of the first 8 chunks"):
        check_agreement(engine.pipeline, engine.grid, None)


def test_random_weights_begin_with_given_text_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "wan-1.3b", replace(PRESETS["tiny"], name="small"))
    options = replace(SMALLEST, model="wan-1.3b", protocol=("first-frame",))
    (record,) = session.measured(planned(options))
    assert record["weights"].startswith("random, seed 0") and record["text"] == "states given"
    figures = figures_of({"first-frame": record}, "first-frame")
    assert figures["given_ms"] > 0 and figures["encoded_ms"] is figures["encoded_ms_most"] is None
    shown = render(record)
    assert "text given, median, ms" in shown and "text encoded, median" not in shown


def test_a_stream_that_differs_is_noticed_and_what_differs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another seed the second time, and other frames in another process."""
    engine, streams_made = Setting(SMALLEST).load(), []

    def stream(engine: MeasuredEngine) -> Any:
        streams_made.append(1)
        return engine.pipeline.stream("a red circle", seed=len(streams_made), height=32, width=32)

    monkeypatch.setattr(MeasuredEngine, "stream", stream)
    monkeypatch.setattr(repetition, "recorded_chunks", lambda cache: 0)
    first, ops = fresh_process.first_chunks(engine, 2), engine.pipeline.model.ops.choice
    first["frames 1"][0, 0, 0, 0] += 3
    streams_made.clear()
    monkeypatch.setattr(repetition, "run_fresh", lambda task, folder: {"ops": ops | {"linear": "triton"}})
    monkeypatch.setattr(repetition, "kept_chunks", lambda folder: first)
    trial = Trial(Setting(SMALLEST), None, engine)
    figures = repetition.measure_repetition(trial)
    own = figures["in_one_process"]["difference"]
    assert (own["what"], own["chunk"]) == ("latents", 0) and own["values"] > own["of_values"] / 2
    assert figures["in_two_processes"] == {
        "equal": False,
        "difference": {
            "what": "frames",
            "chunk": 1,
            "values": 1,
            "of_values": 12 * 32 * 32 * 3,
            "largest": 3.0,
        },
    }
    assert figures["other_ops"] == ["linear"] and trial.engine is None


def test_every_bit_counts_where_runs_are_compared() -> None:
    one = {"latents 0": torch.tensor([0.0, 1.0, float("nan")]), "frames 0": torch.zeros(2, dtype=torch.uint8)}
    assert repetition.first_difference(one, {name: values.clone() for name, values in one.items()}) is None
    other = one | {"latents 0": torch.tensor([-0.0, 1.0, float("nan")])}
    found = repetition.first_difference(one, other)
    assert (found.what, found.chunk, found.values, found.of_values) == ("latents", 0, 1, 3)
    broken = one | {"latents 0": torch.tensor([0.0, float("nan"), float("nan")])}
    assert repetition.first_difference(one, broken).largest is None
    last = one | {"frames 0": torch.tensor([0, 7], dtype=torch.uint8)}
    assert repetition.first_difference(one, last) == repetition.Difference("frames", 0, 1, 2, 7.0)


def test_a_difference_is_shown_in_words(records: dict[str, Any]) -> None:
    difference = {"what": "latents", "chunk": 3, "values": 17, "of_values": 512, "largest": 0.25}
    record, (run,) = records["repeat"], records["repeat"]["runs"]
    figures = run["figures"] | {
        "in_two_processes": {"equal": False, "difference": difference}, "other_ops": ["linear"],
    }  # fmt: skip
    words = " ".join(render(record | {"runs": [run | {"figures": figures}]}).split())
    assert "in one process, graphs off: equal, bit for bit" in words
    assert "in two processes, graphs off: DIFFERS from chunk 3 on, 17 of 512 values of its latents" in words
    assert "by up to 0.25; other backends run linear" in words
    difference["largest"] = None
    assert "latents, some of them no numbers" in " ".join(
        render(record | {"runs": [run | {"figures": figures}]}).split()
    )


@pytest.mark.parametrize("name", ["in_one_process", "in_two_processes"])
def test_a_stream_that_differs_when_it_is_made_again_is_an_exit_status(
    name: str, records: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    record, (run,) = records["repeat"], records["repeat"]["runs"]
    difference = {"what": "latents", "chunk": 3, "values": 17, "of_values": 512, "largest": 0.25}
    other = run | {"figures": run["figures"] | {name: {"equal": False, "difference": difference}}}
    for runs, status in ([run], 0), ([run, other], 1):
        found = [records["latency"], record | {"runs": runs}]
        monkeypatch.setattr(session, "measured", lambda plans, found=found: iter(found))
        assert session.run(replace(SMALLEST, protocol=("latency", "repeat"))) == status


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            RuntimeError("the device is lost"),
            "the protocol latency failed: the device is lost; 1 of 2 protocols are in .*figures.json$",
        ),
        (KeyboardInterrupt(), "1 of 2 protocols are in"),
    ],
)
def test_what_was_measured_is_on_the_disk_when_the_next_protocol_stops(
    error: BaseException, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(trial: Trial) -> None:
        raise error

    path = tmp_path / "figures.json"
    monkeypatch.setitem(PROTOCOLS, "latency", replace(PROTOCOLS["latency"], measure=stop))
    monkeypatch.setitem(
        PROTOCOLS, "dit-window-9", replace(PROTOCOLS["dit-window-9"], measure=lambda trial: {})
    )
    with pytest.raises(type(error), match=message):
        session.run(replace(SMALLEST, protocol=("dit-window-9,latency",), json=path))
    assert [record["protocol"] for record in json.loads(path.read_text())] == ["dit-window-9"]
    assert list(tmp_path.iterdir()) == [path]


def test_figures_are_shown_where_the_disk_is_full(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    records: dict[str, Any],
) -> None:
    def fill(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(session, "write_text", fill)
    monkeypatch.setattr(session, "measured", lambda plans: iter([records["latency"]]))
    with pytest.raises(OSError, match="No space left"):
        session.run(replace(SMALLEST, protocol=("latency",), json=tmp_path / "figures.json"))
    assert "jitter, ms" in capsys.readouterr().out


def test_a_wrong_engine_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = MeasuredEngine.load

    def load_broken(*given: Any) -> MeasuredEngine:
        engine = load(*given)
        right = engine.pipeline.model.ops.rms_norm
        engine.pipeline.model.ops.rms_norm = lambda *given: right(*given) * 1.001
        return engine

    monkeypatch.setattr(MeasuredEngine, "load", load_broken)
    with pytest.raises(
        RuntimeError, match="dit-4-passes failed: the engine is wrong, so nothing was measured"
    ):
        session.run(replace(SMALLEST, protocol=("dit-4-passes",), json=tmp_path / "figures.json"))
    assert list(tmp_path.iterdir()) == []


def test_a_line_of_json_for_each_protocol_takes_the_place_of_the_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [{"protocol": name, "runs": []} for name in "ab"]
    monkeypatch.setattr(session, "measured", lambda plans: iter(records))
    assert cli.main(["bench", "--protocol", "latency", "--protocol", "repeat", "--json", "-"]) == 0
    assert [json.loads(line)["protocol"] for line in capsys.readouterr().out.splitlines()] == ["a", "b"]


def test_last_words_of_a_process_that_failed_are_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], **named: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "Traceback\nRuntimeError: no memory\n")

    monkeypatch.setattr(fresh_process.subprocess, "run", run)
    with pytest.raises(RuntimeError, match="anew failed: RuntimeError: no memory"):
        fresh_process.run_fresh(fresh_process.Task(Setting(SMALLEST), frames=9), tmp_path)


def test_a_fresh_clip_has_no_compiled_kernels_and_no_record_of_timed_backends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But the engines that lie where the record does, whatever makes the frames."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    engine = tmp_path / "rfengine" / "tensorrt" / "tiny-1" / "vae.engine"
    engine.parent.mkdir(parents=True)
    engine.write_text("an engine")
    (tmp_path / "rfengine" / "autotune.json").write_text("{}")
    seen: list[dict[str, str]] = []

    def run(task: fresh_process.Task, folder: Path, variables: dict[str, str]) -> dict[str, float]:
        seen.append(variables)
        assert all(
            Path(value) in (folder, *(folder / name for name in ("triton", "cuda")))
            for value in variables.values()
        )
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert files == [] and (folder / "rfengine/tensorrt/tiny-1/vae.engine").read_text() == "an engine"
        return dict.fromkeys(("imported", "loaded", "made", "first_frame"), 1e12)

    monkeypatch.setattr(videos, "run_fresh", run)
    for runtime in (RuntimeConfig(), RuntimeConfig(vae="tensorrt")):
        videos.measure_cold_clip(Trial(Setting(replace(SMALLEST, runtime=runtime)), 9, None))
    assert [set(each) for each in seen] == [{"TRITON_CACHE_DIR", "XDG_CACHE_HOME", "CUDA_CACHE_PATH"}] * 2
    assert engine.exists()


def test_the_page_has_every_protocol_with_its_rivals() -> None:
    page = DOCS.read_text(encoding="utf-8")
    for name, protocol in PROTOCOLS.items():
        assert f"| `{name}` |" in page
        for rival in protocol.rivals:
            assert f"{rival.value:g}" in page and rival.source in page


def test_every_rival_stands_beside_a_figure_that_its_protocol_has() -> None:
    for name, protocol in PROTOCOLS.items():
        assert {rival.figure for rival in protocol.rivals} <= FIGURES[name]
