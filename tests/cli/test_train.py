"""train: a run, a resumed one, what it leaves, and what cannot be trained as one sentence."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from rfengine import cli
from rfengine.checkpoint.loader import read_safetensors, save_weights
from rfengine.cli import train
from rfengine.pipeline import Pipeline
from rfengine.training.reward_guard import RewardGuard
from support.outcome import fails, frame_count

SHORT = ["--device", "cpu", "--batch", "4", "--steps", "5", "--save-every", "5"]


def written_prompts(directory: Path) -> Path:
    path = directory / "prompts.txt"
    path.write_text("a cat\na dog\n")
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return written_prompts(tmp_path)


def arguments(recipe: str, model: Path, prompts: Path) -> list[str]:
    sources = [f"--{name}={model}" for name in ("student", "teacher", "critic", "base")]
    return ["train", recipe, *sources, *SHORT, "--data", str(prompts)]


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory) -> Path:
    """The directory of a run of five steps, with samples after the last."""
    place = tmp_path_factory.mktemp("finished")
    command = [*arguments("toy_dmd", model, written_prompts(place)), "--sample-every", "5"]
    assert cli.main([*command, "--directory", str(place / "run")]) == 0
    return place / "run"


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_run_leaves_log_samples_checkpoint_and_a_model_that_streams(finished):
    assert len((finished / "log.jsonl").read_text().splitlines()) == 5
    videos = sorted((finished / "samples").iterdir())
    assert [path.name for path in videos] == [f"step_00000005_{number}.mp4" for number in range(4)]
    assert frame_count(videos[0]) == 9 + 8 * 12  # nine chunks, the most of a sample
    pipeline = Pipeline.from_pretrained(finished / "checkpoint", "cpu")
    assert pipeline.generate("a cat", num_frames=9).frames.shape == (9, 32, 48, 3)


def test_resumed_run_goes_on_to_more_steps(model, finished, copied, capsys):
    command = arguments("toy_dmd", model, finished.with_name("prompts.txt"))
    command[command.index("--steps") + 1] = "7"
    assert cli.main([*command, "--resume", str(copied)]) == 0
    printed = capsys.readouterr()
    assert "the model of step 7" in printed.out and "torch.distributed" not in printed.err
    steps = [json.loads(line)["step"] for line in (copied / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 8))


def test_directory_that_holds_a_run_is_not_begun_anew(model, prompts, tmp_path, capsys):
    (tmp_path / "run" / "checkpoints" / "step_00000001").mkdir(parents=True)
    command = [*arguments("toy_dmd", model, prompts), "--directory", str(tmp_path / "run")]
    assert "add --resume" in fails(capsys, 2, *command)


def test_a_run_of_another_torchrun_is_refused_again_when_the_ranks_are_started_again(
    model, finished, copied, monkeypatch, capsys
):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    command = [*arguments("toy_dmd", model, finished.with_name("prompts.txt")), "--directory", str(copied)]
    assert "add --resume" in fails(capsys, 2, *command)
    (copied / ".agents.json").write_text('["elsewhere 1 2"]')
    assert "add --resume" in fails(capsys, 2, *command)
    resumed = [*command[:-2], "--resume", str(copied)]
    assert cli.main(resumed) == 0, "which makes it a run of this one"
    assert cli.main(command) == 0


def test_a_run_that_the_guard_has_stopped_is_not_begun_again(model, prompts, tmp_path, monkeypatch, capsys):
    def stopped(*arguments: object) -> RewardGuard:
        guard = RewardGuard(*arguments[2:])
        guard.warning = "exploited"
        return guard

    monkeypatch.setattr(RewardGuard, "from_log", stopped)
    command = [*arguments("toy_re_dmd", model, prompts), "--directory", str(tmp_path / "run")]
    sentence = fails(capsys, 1, *command, "--guard", "stop")
    assert "exploited; --guard warn goes on all the same" in sentence
    assert not (tmp_path / "run").exists()


def test_checkpoint_of_another_recipe_is_refused(model, finished, copied, capsys):
    command = arguments("toy_dmd", model, finished.with_name("prompts.txt"))
    message = fails(capsys, 2, *command, "--seed", "1", "--resume", str(copied))
    assert "seed 0, this run has 1" in message


def test_prompt_file_with_an_empty_line_is_refused(model, prompts, tmp_path, capsys):
    prompts.write_text("a cat\n\na dog\n")
    command = [*arguments("toy_dmd", model, prompts), "--directory", str(tmp_path / "run")]
    assert "empty line 2" in fails(capsys, 2, *command)


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        (["toy"], "use one of toy_teacher"),
        (["toy_teacher", "--beta", "2"], "has no reward"),
        (["toy_dmd", "--beta", "2"], "dmd none"),
        (["toy_teacher", "--steps", "0"], "steps is 0; it must be at least 1"),
        (["toy_teacher", "--batch", "9" * 30], "batch is 999999999999999999999999999999; it must be at most"),
        (["toy_teacher", "--seed", str(2**64)], "it must be at most 9223372036854775807"),
        (["toy_teacher", "--lora-rank", "1000000"], "lora_rank is 1000000; it must be at most 65536"),
        (["toy_re_dmd", "--beta", "nan"], "beta is nan; it must be a finite number"),
        (["toy_re_dmd", "--beta", "1e308"], "beta is 1e+308; it must be at most 1000000.0"),
        (["toy_dmd", "--resume", "nowhere"], "no checkpoint to resume from"),
        (["toy_dmd", "--shard-ranks", "2"], "shard_ranks is 2 and parallel 'replicated'"),
        (
            ["toy_dmd", "--parallel", "hybrid", "--shard-ranks", "2"],
            "1 rank(s) cannot be divided into groups of 2",
        ),
        (
            ["toy_dmd", "--parallel", "hybrid", "--shard-ranks", "0"],
            "shard_ranks is 0; it must be at least 1",
        ),
        (["toy_dmd", "--timeout", "0"], "--timeout is 0; it must be at least 1"),
        (["toy_dmd", "--resume", "nowhere", "--directory", "elsewhere"], "give --resume alone"),
        (["toy_dmd", "--teacher", "nowhere", "--device", "cpu", "--directory", "elsewhere"], "no directory"),
        (
            ["toy_teacher", "--data", "nowhere", "--device", "cpu", "--directory", "elsewhere"],
            "clips nowhere",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(extra, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert sentence in fails(capsys, 2, "train", *extra)
    assert not list(tmp_path.iterdir())


def test_trajectories_are_made_once_and_then_read(model, tmp_path, monkeypatch):
    monkeypatch.setattr("rfengine.training.build._TRAJECTORIES", 4)
    data = tmp_path / "paths.safetensors"
    command = arguments("toy_ode_init", model, data)
    assert cli.main([*command, "--directory", str(tmp_path / "one")]) == 0
    made = data.stat().st_mtime_ns
    assert cli.main([*command, "--directory", str(tmp_path / "two")]) == 0
    assert data.stat().st_mtime_ns == made
    first, second = (
        [
            json.loads(line)["student_loss"]
            for line in (tmp_path / name / "log.jsonl").read_text().splitlines()
        ]
        for name in ("one", "two")
    )
    assert first == second


@pytest.mark.parametrize("slow", [True, False])
@pytest.mark.parametrize("precision", [[], ["--precision", "float32"]])
def test_a_cpu_that_is_slow_in_bfloat16_is_a_warning(slow, precision, monkeypatch, capsys):
    monkeypatch.setattr(train, "multiplies_bfloat16", lambda: not slow)
    assert cli.main(["train", "toy_dmd", "--teacher", "tiny", "--plan", "--device", "cpu", *precision]) == 0
    warning = "warning: this CPU has no bfloat16 products; --precision float32 is several times as fast"
    assert (warning in capsys.readouterr().err) == (slow and not precision)


def test_plan_comes_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "wan_1_3b_reward_forcing", "--plan", "--device", "cpu"]) == 0
    assert "14.288 G" in capsys.readouterr().out
    command = [
        "train",
        "wan_1_3b_reward_forcing",
        "--device",
        "cpu",
        "--batch",
        "200",
        "--parallel",
        "replicated",
    ]
    assert "GiB on a rank and this machine has" in fails(capsys, 1, *command)
    assert not list(tmp_path.iterdir())


def test_adapters_are_exported_merged_and_as_a_lora_that_convert_reads(model, prompts, tmp_path):
    directory, converted = tmp_path / "run", tmp_path / "converted"
    command = [*arguments("toy_dmd", model, prompts), "--lora-rank", "2"]
    assert cli.main([*command, "--directory", str(directory)]) == 0
    lora = ["--lora", str(directory / "lora.safetensors"), "--dtype", "float32"]
    assert cli.main(["convert", str(model), str(converted), *lora]) == 0
    found, _ = read_safetensors(converted / "transformer.safetensors")
    exported, _ = read_safetensors(directory / "checkpoint" / "transformer.safetensors")
    base, _ = read_safetensors(model / "transformer.safetensors")
    name = "blocks.0.self_attn.q.weight"
    assert not torch.equal(found[name], base[name])
    for key, value in found.items():
        torch.testing.assert_close(exported[key].float(), value, atol=2e-3, rtol=2e-3)


def test_teacher_learns_from_a_directory_of_latents(model, tmp_path):
    data, directory = tmp_path / "latents", tmp_path / "run"
    data.mkdir()
    clip = {"latents": torch.randn(4, 9, 4, 6, generator=torch.Generator().manual_seed(0)).half()}
    save_weights(data / "one.safetensors", clip, {"prompt": "a cat"})
    command = [*arguments("toy_teacher", model, data), "--sample-every", "5"]
    assert cli.main([*command, "--directory", str(directory)]) == 0
    assert frame_count(directory / "samples" / "step_00000005_0.mp4") == 33
    assert (directory / "checkpoint" / "transformer.safetensors").is_file()


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
PRELOAD = ["rfengine.cli.train", "rfengine.training.trainer", "transformers.models.umt5.modeling_umt5"]


def launched(command: list[str], max_restarts: int = 0) -> dict[int, int]:
    """The exit status of each of two ranks that the agent of torchrun starts, which sets handlers of signals.

    They are forks of one process that has imported what takes seconds.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)
    config = LaunchConfig(
        1, 1, nproc_per_node=2, run_id="test", rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        max_restarts=max_restarts, start_method="forkserver",
    )  # fmt: skip
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        return elastic_launch(config, cli.main)(command)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def shared(model: Path, prompts: Path) -> list[str]:
    """The command of six steps that two ranks share out; the student learns in the fifth."""
    command = [*arguments("toy_dmd", model, prompts), "--accumulation", "2", "--parallel", "sharded"]
    command[command.index("--steps") + 1], command[command.index("--save-every") + 1] = "6", "2"
    return [*command, "--sample-every", "6"]


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory) -> Path:
    """The directory of a run of two ranks that was left alone."""
    place = tmp_path_factory.mktemp("whole")
    command = [*shared(model, written_prompts(place)), "--directory", str(place / "run")]
    assert launched(command) == {0: 0, 1: 0}
    return place / "run"


@pytest.mark.slow
def test_ranks_of_torchrun_make_the_run_of_one(model, whole, tmp_path):
    command = shared(model, whole.with_name("prompts.txt"))
    command[command.index("--steps") + 1] = "2"
    assert cli.main([*command, "--directory", str(tmp_path / "one")]) == 0
    one, two = (
        [json.loads(line)["critic_loss"] for line in (run / "log.jsonl").open()]
        for run in (tmp_path / "one", whole)
    )
    assert two[:2] == pytest.approx(one, rel=0.02)
    assert len(list((whole / "samples").iterdir())) == 4


ROOT = Path(__file__).resolve().parents[2]


def children(process: int) -> list[int]:
    """The processes that one has started, in their order."""
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def kill_second_rank(run: Path, parent: int) -> list[str]:
    """Kill it when the checkpoint of step 2 is finished; the first two lines of the log, as they are then."""
    path, deadline = run / "checkpoints" / "step_00000002", time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)
    lines = {child: Path(f"/proc/{child}/cmdline").read_bytes() for child in children(parent)}
    ranks = [child for child, line in lines.items() if b"resource_tracker" not in line]
    os.kill(ranks[1], signal.SIGKILL)
    return (run / "log.jsonl").read_text().splitlines()[:2]


def check_went_on(killed: Path, whole: Path, first_lines: list[str]) -> None:
    """That it went on from step 2 and ended as the run that was left alone, bit for bit."""
    lines = [(run / "log.jsonl").read_text().splitlines() for run in (killed, whole)]
    assert lines[0][:2] == first_lines, "with their times: these steps were not made again"
    logs = [[json.loads(line) | {"seconds": 0} for line in each] for each in lines]
    assert logs[0] == logs[1] and [line["step"] for line in logs[0]] == list(range(1, 7))
    for name in ("checkpoints/step_00000006/rank_00000.safetensors", "checkpoint/transformer.safetensors"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
def test_a_killed_rank_is_started_again_and_the_run_ends_as_one_that_never_stopped(
    model, whole, tmp_path, caplog
):
    """The agent of torchrun is in this process, and its ranks are forks."""
    run, command = tmp_path / "run", shared(model, whole.with_name("prompts.txt"))
    with ThreadPoolExecutor(1) as thread:
        first_lines = thread.submit(kill_second_rank, run, forkserver._forkserver._forkserver_pid)
        assert launched([*command, "--directory", str(run)], max_restarts=1) == {0: 0, 1: 0}
    check_went_on(run, whole, first_lines.result())
    assert "failed (exitcode: -9) local_rank: 1" in caplog.text


@pytest.mark.soak
def test_a_killed_rank_is_started_again_by_the_command_torchrun(model, whole, tmp_path):
    """The agent and its ranks are processes of their own, as a person starts them."""
    torchrun = (
        "-m torch.distributed.run --rdzv-backend c10d --rdzv-endpoint localhost:0 --nproc-per-node 2 "
        "--max-restarts 1 -m rfengine.cli"
    )
    run, command = tmp_path / "run", shared(model, whole.with_name("prompts.txt"))
    agent = subprocess.Popen(
        [sys.executable, *torchrun.split(), *command, "--directory", str(run)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        first_lines = kill_second_rank(run, agent.pid)
        _, errors = agent.communicate(timeout=180)
    finally:
        agent.terminate()
        agent.wait()
    assert agent.returncode == 0, errors
    assert "exitcode: -9" in errors and "has lost another rank" in errors
    check_went_on(run, whole, first_lines)
