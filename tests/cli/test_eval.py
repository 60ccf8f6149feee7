"""eval: a table, JSON and plots of videos on disk."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rfengine import cli
from rfengine.cli import eval as evaluate
from rfengine.evaluation import video_report
from rfengine.files import locked
from rfengine.toy.captions import caption
from rfengine.toy.world import WorldConfig
from rfengine.video import Video
from support.distortions import SCENE, frozen, textured_clip, toy_clip
from support.outcome import fails
from support.video_files import corner_clip, encode


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("videos")
    clip = textured_clip(57)
    for name, frames in (
        ("moving", clip),
        ("still", frozen(textured_clip(57, seed=3))),
        ("toy", toy_clip(57, SCENE, WorldConfig())),
    ):
        Video(frames.numpy(), 16).save(directory / f"{name}.mp4")
    save_file({"latents": torch.ones(1, 4, 6, 8, 8)}, directory / "moving.safetensors")
    (directory / "captions.json").write_text(json.dumps({"toy.mp4": caption(SCENE)}))
    return directory


def test_eval_writes_table_json_and_plots(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["eval", str(videos), "--out", str(out), "--captions", str(videos / "captions.json")]
    assert cli.main([*arguments, "--flow-pairs", "8"]) == 0
    table = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in table.splitlines()}
    assert rows["speed"][-12] != "-" and "exposure_drift" in rows and rows["toy_colour"][1] == "1"
    found = json.loads((out / "metrics.json").read_text())
    values = {Path(video["name"]).stem: video["values"] for video in found["videos"]}
    assert values["still"]["speed"] == 0 and values["still"]["freeze_fraction"] == 1
    assert values["moving"]["mean_flow"] == pytest.approx(100 / 48, rel=0.2)
    assert values["moving"]["latent_drift"] == 0 and "latent_drift" not in values["toy"]
    assert values["still"]["copying_excess"] > 0.7 > values["moving"]["copying_excess"]
    assert found["settings"]["flow_pairs"] == 8 and found["means"]["speed"]["count"] == 3
    if "matplotlib" in sys.modules:
        assert (out / "consistency.png").is_file() and (out / "motion_and_drift.png").is_file()


def test_one_unreadable_file_is_named_and_the_others_are_measured(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    short = tmp_path / "short.mp4"
    Video(textured_clip(10).numpy(), 16).save(short)
    message = fails(capsys, 1, "eval", broken, short, "--out", tmp_path / "out", "--no-plots")
    assert "broken.mp4 cannot be read as a video" in message
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [Path(video["name"]).name for video in found["videos"]] == ["short.mp4"]
    assert found["videos"][0]["values"] == {} and "drift needs 21" in str(found["videos"][0]["absent"])


def test_wrong_input_is_one_sentence_and_writes_nothing(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    clip = videos / "moving.mp4"
    assert "no video was found in nothing" in fails(capsys, 2, "eval")
    assert "none.mp4 does not exist" in fails(capsys, 2, "eval", "none.mp4")
    assert "chunk is 0" in fails(capsys, 2, "eval", clip, "--first-chunk-frames", 0)
    assert "chunk is 1" in fails(capsys, 2, "eval", clip, "--chunk-frames", 10**30)
    assert "flow_pairs is 0" in fails(capsys, 2, "eval", clip, "--flow-pairs", 0)
    assert "it must be at most 100000" in fails(capsys, 2, "eval", clip, "--flow-pairs", 10**30)
    assert "names none of the videos" in fails(
        capsys, 2, "eval", clip, "--captions", videos / "captions.json"
    )
    (tmp_path / "file").touch()
    assert "is no directory" in fails(capsys, 2, "eval", clip, "--out", "file")
    assert "results.json does not exist" in fails(capsys, 2, "eval", clip, "--vbench", "results.json")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def measured(out: Path) -> tuple[list[str], dict[str, str]]:
    """Names of the videos that metrics.json has, and the reason of every file left out by its name."""
    found = json.loads((out / "metrics.json").read_text())
    names = [Path(video["name"]).name for video in found["videos"]]
    return names, {Path(entry["file"]).name: entry["reason"] for entry in found["failed"]}


def test_every_bad_file_of_a_directory_is_named_and_the_others_are_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in ("a.mp4", "z.mp4", "b.mp4"):
        encode(folder / name, corner_clip(4))
    parts = [encode(tmp_path / f"{width}.ts", corner_clip(4, width=width)) for width in (48, 64)]
    (folder / "joined.mp4").write_bytes(b"".join(part.read_bytes() for part in parts))
    (folder / "list.mp4").write_text(f"ffconcat version 1.0\nfile '{folder / 'a.mp4'}'\n")
    (folder / "cut.mp4").write_bytes((folder / "a.mp4").read_bytes()[:-200])
    (folder / "empty.mp4").touch()
    os.mkfifo(folder / "pipe.mp4")
    (folder / "zero.mp4").symlink_to("/dev/zero")
    (folder / "b.safetensors").write_bytes(b"no tensors")
    assert cli.main(["eval", str(folder), "--out", str(tmp_path / "out"), "--no-plots"]) == 1
    names, failed = measured(tmp_path / "out")
    assert names == ["a.mp4", "b.mp4", "z.mp4"]
    bad = ["b.safetensors", "cut.mp4", "empty.mp4", "joined.mp4", "list.mp4", "pipe.mp4", "zero.mp4"]
    assert sorted(failed) == bad and "changes its size at frame 4" in failed["joined.mp4"]
    shown = capsys.readouterr()
    assert all(f"left out: {reason}" in shown.out for reason in failed.values())
    assert shown.err.splitlines() == [f"rfengine: error: {reason}" for reason in failed.values()]


def test_a_report_is_written_even_when_nothing_could_be_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.mp4").touch()
    assert "is empty" in fails(capsys, 1, "eval", tmp_path / "empty.mp4", "--out", tmp_path / "out")
    assert measured(tmp_path / "out")[0] == []


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("no room"), KeyError("torch"), OSError(5, "Input")]
)
def test_an_error_of_any_library_about_one_video_does_not_end_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    for name in ("a.mp4", "b.mp4"):
        encode(tmp_path / name, corner_clip(4))
    measure = video_report.measure_video

    def failing(name: str, *rest: object, **named: object) -> object:
        if name.endswith("a.mp4"):
            raise error
        return measure(name, *rest, **named)

    monkeypatch.setattr(video_report, "measure_video", failing)
    message = fails(capsys, 1, "eval", tmp_path, "--out", tmp_path / "out", "--no-plots")
    assert "a.mp4 cannot be measured" in message and measured(tmp_path / "out")[0] == ["b.mp4"]


def test_a_bad_baseline_is_left_out_and_without_any_left_it_is_an_error(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    clip = encode(tmp_path / "clip.mp4", corner_clip(42))
    common = ["eval", str(clip), "--out", str(tmp_path / "out"), "--no-plots", "--flow-pairs", "1"]
    both = [*common, "--baseline", str(tmp_path / "bad.mp4"), str(videos / "moving.mp4")]
    assert cli.main(both) == 1
    assert list(measured(tmp_path / "out")[1]) == ["bad.mp4"]
    content = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert "copying_baseline" in content["videos"][0]["values"]
    capsys.readouterr()
    assert cli.main([*common, "--baseline", str(tmp_path / "bad.mp4")]) == 2
    assert "no video of --baseline can be used" in capsys.readouterr().err


def test_captions_that_belong_to_no_video_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = encode(tmp_path / "clip.mp4", corner_clip(4))
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"clip.mp4": caption(SCENE), "other.mp4": caption(SCENE)}))
    message = fails(capsys, 1, "eval", clip, "--captions", path, "--out", tmp_path / "out", "--no-plots")
    assert "captions for other.mp4, not among the videos" in message
    assert measured(tmp_path / "out") == (["clip.mp4"], {"captions.json": message})


def test_scores_of_vbench_stand_in_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip = encode(tmp_path / "clip.mp4", corner_clip(4))
    results = tmp_path / "a_eval_results.json"
    scored = [{"video_path": "clip.mp4", "video_results": 0.5}]
    results.write_text(json.dumps({"aesthetic_quality": [0.5, scored]}))
    out = tmp_path / "out"
    assert cli.main(["eval", str(clip), "--vbench", str(results), "--out", str(out), "--no-plots"]) == 0
    assert json.loads((out / "metrics.json").read_text())["vbench"] == {"aesthetic_quality": 0.5}
    assert "vbench aesthetic_quality" in capsys.readouterr().out


def test_a_second_evaluation_into_one_directory_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip, out = encode(tmp_path / "clip.mp4", corner_clip(4)), tmp_path / "out"
    out.mkdir()
    with locked(out / ".evaluation.lock", "writing"):
        assert "another process is writing" in fails(capsys, 1, "eval", clip, "--out", out)
    assert list(out.iterdir()) == []


def test_a_directory_that_cannot_be_written_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = encode(tmp_path / "clip.mp4", corner_clip(4))
    assert "/proc/none cannot be written" in fails(capsys, 1, "eval", clip, "--out", "/proc/none")
    full = OSError(errno.ENOSPC, "No space left on device")

    def failing(path: Path, text: str) -> None:
        raise full

    monkeypatch.setattr(evaluate, "write_text", failing)
    message = fails(capsys, 1, "eval", clip, "--out", tmp_path / "out", "--no-plots")
    assert "out cannot be written (No space left on device); free space or choose another --out" in message
