"""eval: a table, JSON and plots of videos on disk."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cli_checks.outcome import fails
from evaluation_checks.distortions import SCENE, frozen, textured_clip, toy_clip
from rfengine import cli
from rfengine.training.toy_world import WorldConfig, caption
from rfengine.video import Video


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


def test_one_unreadable_file_is_told_and_the_others_are_measured(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    short = tmp_path / "short.mp4"
    Video(textured_clip(10).numpy(), 16).save(short)
    told = fails(capsys, 1, "eval", broken, short, "--out", tmp_path / "out", "--no-plots")
    assert "broken.mp4 cannot be read as a video" in told
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
    monkeypatch.setitem(sys.modules, "vbench", None)
    assert "VBench is not installed" in fails(capsys, 1, "eval", clip, "--vbench")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
