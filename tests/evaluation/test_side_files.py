"""Files that belong to videos are read strictly: captions, latents, scores that VBench wrote elsewhere."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rfengine.evaluation.side_files import read_captions, read_latents, read_vbench
from rfengine.evaluation.video_frames import as_frames

RED = "a large red square moving fast to the left over a grey wall"
BLUE = "a small blue circle moving slowly upwards over a dotted wall"


def written(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "captions.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_captions_and_switches_are_read(tmp_path: Path) -> None:
    path = written(tmp_path, {"a.mp4": RED, "b.mp4": [[0, RED], [48, BLUE]]})
    assert read_captions(path) == {"a.mp4": ((0, RED),), "b.mp4": ((0, RED), (48, BLUE))}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "is no JSON"),
        ([RED], "is no object with entries"),
        ({}, "is no object with entries"),
        ({"a.mp4": 3}, "says '3' for a.mp4"),
        ({"a.mp4": []}, r"says '\[\]' for a.mp4"),
        ({"a.mp4": [[4, RED]]}, "pairs of first frame, from 0 on"),
        ({"a.mp4": [[0, RED], [0, BLUE]]}, "pairs of first frame, from 0 on"),
        ('{"a.mp4": "x", "a.mp4": "y"}', "is no JSON .*'a.mp4' twice"),
        ("[" * 100_000, "is no JSON .*nested too deep"),
        ({"a.mp4": "a cat"}, "a.mp4: 'a cat' has no word of the toy world"),
    ],
)
def test_wrong_captions_are_named(tmp_path: Path, content: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_captions(written(tmp_path, content))


def test_missing_captions_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.json cannot be read"):
        read_captions(tmp_path / "none.json")


def test_file_that_never_ends_and_one_that_waits_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, kind in (
        (tmp_path / "pipe", "is a pipe"),
        (Path("/dev/zero"), "is a device"),
        (tmp_path, "is a directory"),
    ):
        with pytest.raises(ValueError, match=f"{kind}; give an ordinary file"):
            read_captions(path)


VIDEO = as_frames(torch.zeros(21, 32, 48, 3, dtype=torch.uint8))


def test_latents_are_read_and_a_batch_of_one_is_taken_off(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.safetensors"
    assert read_latents(path, VIDEO) is None
    latents = torch.randn(4, 6, 4, 6, generator=torch.Generator().manual_seed(0))
    for shape in (latents.shape, (1, *latents.shape)):
        save_file({"latents": latents.reshape(shape)}, path)
        assert torch.equal(read_latents(path, VIDEO), latents)
    assert not caplog.records


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"weight": torch.ones(3)}, "no tensor `latents`"),
        ({"latents": torch.ones(6, 4, 6)}, r"latents torch.float32 \(6, 4, 6\)"),
        ({"latents": torch.ones(2, 4, 6, 4, 6)}, r"\(2, 4, 6, 4, 6\)"),
        ({"latents": torch.ones(4, 0, 4, 6)}, r"\(4, 0, 4, 6\)"),
        ({"latents": torch.ones(4, 6, 4, 6, dtype=torch.int64)}, "torch.int64"),
        ({"latents": torch.full((4, 6, 4, 6), float("nan"))}, "not finite"),
    ],
)
def test_foreign_latents_are_named(tmp_path: Path, tensors: dict[str, torch.Tensor], reason: str) -> None:
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    with pytest.raises(ValueError, match=rf"a\.safetensors has .*{reason}"):
        read_latents(path, VIDEO)


@pytest.mark.parametrize("content", [b"", b"no tensors", b"\xff" * 64])
def test_damaged_latents_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.safetensors "):
        read_latents(path, VIDEO)


def test_pipes_and_links_to_nothing_are_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "link.safetensors").symlink_to("nothing")
    for name in ("pipe", "link"):
        with pytest.raises(ValueError, match=name):
            read_latents(tmp_path / f"{name}.safetensors", VIDEO)


def test_a_warning_names_latents_of_another_size(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"latents": torch.ones(4, 6, 8, 8)}, path)
    with caplog.at_level(logging.WARNING):
        assert read_latents(path, VIDEO) is not None
    assert "6 latent frames of 8 x 8, which are none of a video of 21 frames of 32 x 48" in caplog.text


VIDEOS = (Path("videos/a.mp4"), Path("videos/b.mp4"))


def scores(mean: object, *names: str) -> list[object]:
    return [mean, [{"video_path": f"./other/{name}", "video_results": 0.5} for name in names]]


def test_means_are_those_that_vbench_reports(tmp_path: Path) -> None:
    path = tmp_path / "results_eval_results.json"
    content = {"imaging_quality": scores(0.62, "a.mp4", "b.mp4"), "dynamic_degree": scores(1, "b.mp4")}
    path.write_text(json.dumps(content))
    assert read_vbench(path, VIDEOS) == {"imaging_quality": 0.62, "dynamic_degree": 1.0}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "cannot be read as JSON"),
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ('{"motion_smoothness": [NaN, []]}', "NaN as a score, so VBench found no video"),
        ("[]", "no object with dimensions"),
        ("{}", "no object with dimensions"),
        ('{"a b": [1, [1]]}', "'a b', which is no name"),
        ('{"scene": 0.5}', "0.5' for scene, not a mean"),
        ('{"scene": [true, [1]]}', "not a mean and the scored videos"),
        ('{"scene": ["1", [1]]}', "not a mean and the scored videos"),
        ('{"scene": [0.5, []]}', "not a mean and the scored videos"),
        ('{"scene": [1e999, [1]]}', "not a mean and the scored videos"),
        ('{"scene": [1' + "0" * 400 + ", [1]]}", "not a mean and the scored videos"),
        ('{"scene": [0.5, [1]]}', "not a video and its score"),
        ('{"scene": [0.5, [{"video_path": "a.mp4"}]]}', "not a video and its score"),
        ('{"scene": [0.5, [{"video_path": 1, "video_results": 1}]]}', "not a video and its score"),
        (json.dumps({"scene": scores(0.5, "a.mp4", "c.mp4")}), "scores c.mp4, which is none of the videos"),
    ],
)
def test_other_scores_are_one_sentence_with_the_file(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(ValueError) as caught:
        read_vbench(path, VIDEOS)
    assert str(caught.value).startswith(str(path)) and reason in str(caught.value)


def test_a_missing_file_and_a_pipe_are_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    for name in ("pipe.json", "none.json"):
        with pytest.raises(ValueError, match=name):
            read_vbench(tmp_path / name, VIDEOS)
