"""generate with a diffusion forcing model: its options, its errors, and what an interrupt leaves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy
import pytest
from PIL import Image

from rfengine import cli
from rfengine.checkpoint.checkpoint import Checkpoint
from rfengine.cli.forcing import ForcingArguments, ForcingVideo
from rfengine.cli.start import StartOptions
from rfengine.diffusion_forcing.options import DiffusionForcingOptions
from rfengine.diffusion_forcing.pipeline import DenoisedRow, DiffusionForcingPipeline
from rfengine.video import Video
from support.diffusion_forcing import forcing_pipeline
from support.models import write_pipeline
from support.outcome import fails, frame_count


@pytest.fixture(scope="module")
def forcing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint directory of random weights: 32 x 48 pixels, 21 frames at once, four steps."""
    return write_pipeline(tmp_path_factory.mktemp("forcing"), forcing_pipeline())


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A picture and a clip of five frames, of the size of the model."""
    folder = tmp_path_factory.mktemp("given")
    frames = numpy.full((5, 32, 48, 3), 200, numpy.uint8)
    Image.fromarray(frames[0]).save(folder / "a.png")
    Video(frames, 24).save(folder / "a.mp4")
    return {"picture": folder / "a.png", "clip": folder / "a.mp4"}


def test_generate_makes_a_video_of_the_length_of_the_model(
    forcing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], written: Callable[[], bytes]
) -> None:
    path = tmp_path / "a.mp4"
    assert cli.main(["generate", "a circle", "-o", str(path), "--model", str(forcing), "--seed", "3"]) == 0
    frames = written()
    assert frame_count(path) == 21
    shown = capsys.readouterr()
    assert f"{path}: 21 frames, 0.9 s of video; made at " in shown.out
    assert "frames/s, " in shown.out and "times as fast as it plays; full decoder, lossless" in shown.out
    assert "4/4" in shown.err and "row" in shown.err  # the bar
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.height, stream.width, stream.average_rate) == (32, 48, 24)
    assert cli.main(["generate", "a circle", "-o", str(path), "--model", str(forcing), "--seed", "3"]) == 0
    assert written() == frames


@pytest.mark.parametrize(
    ("options", "frames", "rows"),
    [
        (["--seconds", "0.5"], 12, 4),
        (["--num-frames", "30", "--ar-step", "2", "--causal-block-size", "2"], 30, 12),
        (["--num-frames", "30", "--overlap-history", "5", "--addnoise-condition", "20"], 30, 8),
        (["--num-frames", "30", "--overlap-history", "5", "--overlap-latents"], 30, 8),
        (["--steps", "2", "--shift", "3", "--guidance-scale", "1", "--negative-prompt", "blue"], 21, 2),
        (["--ar-step", "1", "--causal-block-size", "3", "--causal-attention"], 21, 5),
        (["--image", "{picture}", "--end-image", "{picture}", "--fps", "16", "--seconds", "1"], 16, 4),
        (["--video", "{clip}", "--height", "48", "--resize", "--num-frames", "13"], 13, 4),
        (["--end-image", "{picture}", "--width", "32", "--resize"], 21, 4),
    ],
)
def test_options_reach_the_video(
    options: list[str],
    frames: int,
    rows: int,
    forcing: Path,
    given: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "a.mp4"
    filled = [option.format(**given) for option in options]
    assert cli.main(["generate", "a circle", "-o", str(path), "--model", str(forcing), *filled]) == 0
    assert frame_count(path) == frames and f"{rows}/{rows}" in capsys.readouterr().err


def test_every_option_of_the_command_is_one_of_the_video(forcing: Path) -> None:
    given = {
        "num_frames": 30, "negative_prompt": "blue", "fps": 16, "guidance_scale": 2.5, "steps": 3,
        "shift": 4.0, "ar_step": 2, "causal_block_size": 2, "causal_attention": True, "overlap_history": 5,
        "overlap_latents": True, "addnoise_condition": 20,
    }  # fmt: skip
    assert given.keys() | {"end_image"} == {entry.name for entry in dataclasses.fields(ForcingArguments)}
    config = Checkpoint.open(forcing).config
    video = ForcingVideo.of(ForcingArguments(**given), config, StartOptions(), None, (64, 48))
    assert video.options == DiffusionForcingOptions(height=64, width=48, **given)


def test_a_file_of_prompts_gives_a_video_each(forcing: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a circle\na square\n")
    arguments = ["--prompts", str(tmp_path / "p.txt"), "-o", str(tmp_path), "--num-frames", "5"]
    assert cli.main(["generate", *arguments, "--model", str(forcing), "--steps", "1"]) == 0
    assert [frame_count(path) for path in sorted(tmp_path.glob("*.mp4"))] == [5, 5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-frames", "30"], "num_frames is 30 and the model sees 21 at once; give an overlap_history"),
        (["--seconds", "5"], "num_frames is 120 and the model sees 21 at once"),
        (["--seconds", "1", "--num-frames", "9"], "seconds is 1.0 and num_frames is 9; give one of them"),
        (["--steps", "0"], "steps is 0; it must be at least 1"),
        (["--causal-block-size", "2"], "causal_block_size is 2 and ar_step is 0"),
        (["--image", "{dir}/no.png"], "no.png cannot be read as a picture (No such file"),
        (["--end-image", "{clip}"], "cannot be read as a picture"),
        (
            ["--image", "{picture}", "--height", "64"],
            "is 48 x 32 pixels and the video 48 x 64; give",
        ),
        (["--image", "{picture}", "--video", "{clip}"], "--image and --video are given; give one of them"),
        (["--video", "{clip}", "--fps", "16"], "has 24 frames a second and the model 16"),
        (["--resize"], "--resize is given without --image or --video"),
        (
            ["--start-mode", "frames", "--image", "{picture}"],
            "--start-mode is for models that stream",
        ),
        (["--system", "longlive"], "--system is for models that stream and small-df is a diffusion forcing"),
        (["--lora", "a.safetensors"], "--lora is for models that stream and small-df is a diffusion forcing"),
        (["--graphs"], "graphs is asked for and is for streams alone"),
        (["--height", "70"], "height is 70 pixels; it must be a multiple of 16"),
        (["--seed", "-1"], "seed is -1; use an integer from 0"),
        (["--negative-prompt", " "], "the negative prompt ' ' is empty"),
        (["--negative-prompt", "&nbsp;"], "the negative prompt '&nbsp;' is empty"),
        (["--overlap-latents", "--num-frames", "9"], "overlap_latents is on and overlap_history, which says"),
        (["--allow-unmatched-lora"], "--allow-unmatched-lora is for models that stream"),
    ],
)
def test_wrong_input_is_one_sentence_and_leaves_nothing(
    options: list[str],
    message: str,
    forcing: Path,
    given: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Checkpoint, "load", lambda *_: 1 / 0)  # before the model is loaded
    filled = [option.format(dir=tmp_path, **given) for option in options]
    arguments = ["a circle", "-o", tmp_path / "a.mp4", "--model", forcing, *filled]
    assert message in fails(capsys, cli.CALLER_ERROR, "generate", *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "option", [["--ar-step", "0"], ["--causal-attention"], ["--num-frames", "9"], ["--end-image", "a.png"]]
)
def test_options_of_diffusion_forcing_are_refused_for_a_model_that_streams(
    option: list[str], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["a circle", "-o", tmp_path / "a.mp4", "--model", model, *option]
    message = fails(capsys, cli.CALLER_ERROR, "generate", *arguments)
    assert f"{option[0]} is for diffusion forcing models and small streams; leave it out" in message
    assert list(tmp_path.iterdir()) == []


def test_commands_of_streams_refuse_a_diffusion_forcing_model(
    forcing: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for model in (forcing, "skyreels-df-1.3b"):
        message = fails(capsys, cli.CALLER_ERROR, "bench", "--model", model)
        assert "is a diffusion forcing model, which makes whole videos and streams none; use" in message


def test_a_script_is_refused(forcing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "s.txt").write_text("1 start a circle\n")
    arguments = ["--script", tmp_path / "s.txt", "-o", tmp_path / "a.mp4", "--model", forcing]
    message = fails(capsys, cli.CALLER_ERROR, "generate", *arguments)
    assert "--script is for models that stream and small-df is a diffusion forcing model" in message


def interrupted_after(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run = DiffusionForcingPipeline.rows

    def interrupted(self: DiffusionForcingPipeline, *given: object, **named: object) -> Iterator[DenoisedRow]:
        for row in run(self, *given, **named):
            if row.index == rows:
                raise KeyboardInterrupt
            yield row

    monkeypatch.setattr(DiffusionForcingPipeline, "rows", interrupted)


def test_an_interrupt_leaves_the_pieces_that_are_whole(
    forcing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted_after(6, monkeypatch)
    path = tmp_path / "a.mp4"
    arguments = ["a", "-o", path, "--model", forcing, "--num-frames", 48, "--overlap-history", 5]
    message = fails(capsys, cli.INTERRUPTED, "generate", *arguments)
    assert message == f"interrupted; {path} holds the first 0.9 of 2.0 seconds (21 frames)"
    assert frame_count(path) == 21 and list(tmp_path.iterdir()) == [path]


def test_an_interrupt_before_the_first_piece_leaves_nothing(
    forcing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted_after(2, monkeypatch)
    message = fails(capsys, cli.INTERRUPTED, "generate", "a", "-o", tmp_path / "a.mp4", "--model", forcing)
    assert message == "interrupted; nothing was written" and list(tmp_path.iterdir()) == []
