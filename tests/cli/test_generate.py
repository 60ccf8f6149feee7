"""generate: what it writes, and one clear sentence for each error."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from rfengine import Pipeline, VideoStream, cli
from rfengine.checkpoint.manifest import write_manifest
from rfengine.cli import generate
from rfengine.config import RuntimeConfig
from rfengine.frame_chunk import FrameChunk
from rfengine.video import VideoWriter
from support.command_forks import CommandForks
from support.loras import pairs, write_lora
from support.models import SMALL
from support.outcome import fails, frame_count
from support.video_files import chapters


@pytest.fixture(scope="module")
def command_forks() -> Iterator[CommandForks]:
    with CommandForks() as forks:
        yield forks


def test_generate_writes_the_length_asked_for(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.mp4"
    arguments = ["a circle", "-o", str(path), "--seconds", "1.5", "--seed", "7", "--model", str(model)]
    assert cli.main(["generate", *arguments]) == 0
    assert frame_count(path) == 24  # the last chunk gives 33 and is cropped
    shown = capsys.readouterr()
    assert f"{path}: 24 frames, 1.5 s of video; streams at " in shown.out
    assert "frames/s" in shown.out and "times as fast as it plays; full decoder, lossless" in shown.out
    assert "3/3" in shown.err  # the bar
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.mp4"]
    assert cli.main(["generate", *arguments, "--preset", "24gb"]) == 0
    assert "full decoder, lossless; preset 24gb\n" in capsys.readouterr().out


def test_same_seed_gives_the_same_frames_and_another_seed_others(
    model: Path, tmp_path: Path, written: Callable[[], bytes]
) -> None:
    def run(name: str, seed: int) -> bytes:
        path = tmp_path / name
        arguments = ["--seconds", "0.5", "--seed", str(seed), "--model", str(model), "-o", str(path)]
        assert cli.main(["generate", "a circle", *arguments]) == 0
        return written()

    first = run("a.mp4", 1)
    assert run("b.mp4", 1) == first and run("c.mp4", 2) != first


def test_size_and_dtype_are_those_asked_for(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, dtypes = Pipeline.from_pretrained, []

    def watched(*arguments: object, **options: object) -> Pipeline:
        pipeline = load(*arguments, **options)
        dtypes.append(pipeline.model.dtype)
        return pipeline

    monkeypatch.setattr(Pipeline, "from_pretrained", watched)
    path = tmp_path / "a.mp4"
    size = ["--height", "64", "--width", "32", "--dtype", "bfloat16", "--device", "cpu", "--seconds", "0.1"]
    assert cli.main(["generate", "a circle", "-o", str(path), "--model", str(model), *size]) == 0
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.height, stream.width) == (64, 32)
    assert dtypes == [torch.bfloat16]


def test_runtime_options_reach_the_pipeline(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: Callable[[], bytes]
) -> None:
    load, runtimes = Pipeline.from_pretrained, []

    def watched(*arguments: object, **options: object) -> Pipeline:
        runtimes.append(options["runtime"])
        return load(*arguments, **options)

    monkeypatch.setattr(Pipeline, "from_pretrained", watched)
    base = ["generate", "a circle", "--model", str(model), "--seconds", "0.6", "--device", "cpu"]
    assert cli.main([*base, "-o", str(tmp_path / "a.mp4")]) == 0
    plain = written()
    options = ["--no-graphs", "--overlap", "--no-autotune", "--decode-device", "cpu", "--vae", "full"]
    assert cli.main([*base, "-o", str(tmp_path / "b.mp4"), *options]) == 0
    assert runtimes == [
        RuntimeConfig(),
        RuntimeConfig(graphs=False, overlap=True, autotune=False, decode_device="cpu"),
    ]
    assert written() == plain


def test_verification_refuses_a_changed_checkpoint_before_anything_is_made(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, path = tmp_path / "model", tmp_path / "a.mp4"
    shutil.copytree(model, directory)
    request = ["generate", "a circle", "-o", path, "--seconds", "0.1", "--model", directory]
    assert "has no manifest.json to verify it by" in fails(capsys, 2, *request, "--verify")
    (directory / "notes.json").write_text("{}")
    write_manifest(directory)
    assert cli.main([*map(str, request), "--verify"]) == 0
    content = bytearray((directory / "vae.safetensors").read_bytes())
    content[-1] ^= 1
    (directory / "vae.safetensors").write_bytes(content)
    path.unlink()
    assert "vae.safetensors has another content (sha256)" in fails(capsys, 2, *request, "--verify")
    assert not path.exists()
    (directory / "notes.json").write_text("{ }")
    message = fails(capsys, 2, *request)  # sizes are looked at without being asked
    assert "notes.json has 3 bytes instead of 2" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize(
    ("status", "options", "message"),
    [
        (cli.CALLER_ERROR, ["--decode-device", "cuda:1"], "--decode-device is cuda:1 and torch finds 0 CUDA"),
        (cli.CALLER_ERROR, ["--vae", "tiny"], "z_dim of the tiny decoder is 16"),
        (cli.OTHER_ERROR, ["--graphs"], "graphs are asked for on cpu; CUDA graphs need a CUDA device"),
    ],
)
def test_runtime_that_cannot_be_had_is_one_sentence(
    status: int,
    options: list[str],
    message: str,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "a.mp4"
    assert message in fails(capsys, status, "generate", "a", "-o", path, "--model", model, *options)
    assert list(tmp_path.iterdir()) == []


def test_prompts_of_a_file_give_one_safely_named_video_each(model: Path, tmp_path: Path) -> None:
    prompts, videos = tmp_path / "prompts.txt", tmp_path / "videos"
    lines = ["a circle  ", "", "a circle", "../../etc/passwd", "円が動く", "   ", "x" * 300, "né: <b>?"]
    prompts.write_text("\n".join(lines), encoding="utf-8")
    videos.mkdir()
    arguments = ["--prompts", str(prompts), "-o", str(videos), "--model", str(model), "--seconds", "0.2"]
    assert cli.main(["generate", *arguments]) == 0
    assert sorted(path.name for path in videos.iterdir()) == [
        "0001-a-circle.mp4", "0002-a-circle.mp4", "0003-etc-passwd.mp4", "0004-prompt.mp4",
        f"0005-{'x' * 48}.mp4", "0006-ne-b.mp4",
    ]  # fmt: skip
    assert {frame_count(path) for path in videos.iterdir()} == {3}


def test_line_of_a_prompt_file_ends_where_editors_end_it(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    monkeypatch.setattr(Pipeline, "from_pretrained", lambda *_, **__: None)
    monkeypatch.setattr(
        generate, "_write_video", lambda _, plan, *rest, **named: made.append(plan.scenes[0].scene.prompt)
    )
    (tmp_path / "p.txt").write_bytes("a\u2028b\nc \x0b d\ne\x85 f\r\ng\x1ch\n".encode())
    request = ["generate", "--prompts", str(tmp_path / "p.txt"), "-o", str(tmp_path), "--model", str(model)]
    assert cli.main(request) == 0
    assert made == ["a\u2028b", "c \x0b d", "e\x85 f", "g\x1ch"]


@pytest.mark.parametrize("prompt", ["-5 degrees, a circle in the snow", "--neon red circle", "-", "--seed"])
def test_prompt_may_begin_with_a_dash_after_two(
    prompt: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    monkeypatch.setattr(Pipeline, "from_pretrained", lambda *_, **__: None)
    monkeypatch.setattr(
        generate, "_write_video", lambda _, plan, *rest, **named: made.append(plan.scenes[0].scene.prompt)
    )
    request = ["generate", "-o", str(tmp_path / "a.mp4"), "--model", str(model)]
    assert cli.main([*request, "--", prompt]) == 0
    assert made == [prompt]


@pytest.mark.slow
def test_batch_goes_on_where_the_terminal_cannot_print_a_name(
    command_forks: CommandForks, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "видео").mkdir()
    (tmp_path / "p.txt").write_text("a circle\na square\n")
    arguments = ["--prompts", "p.txt", "-o", "видео", "--seconds", "0.1", "--model", str(model)]
    command_forks.start(tmp_path, "generate", *arguments)
    assert command_forks.status() == 0, command_forks.errors()
    printed = (tmp_path / "stdout").read_text()
    assert printed.startswith("\\u0432\\u0438\\u0434\\u0435\\u043e/0001-a-circle.mp4: 2 frames")
    assert len(list((tmp_path / "видео").iterdir())) == 2


def test_prompt_that_is_too_long_is_cut_with_one_warning_that_says_where(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = "a red circle moves right " * 3
    arguments = ["-o", str(tmp_path / "a.mp4"), "--model", str(model), "--seconds", "0.2"]
    assert cli.main(["generate", prompt, *arguments]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(lines) == 1 and lines[0].startswith("rfengine: warning: ")
    assert "75 tokens and the limit is 64" in lines[0] and "'moves right'" in lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["", "-o", "{dir}/a.mp4"], "the prompt '' is empty"),
        (["&nbsp;\n", "-o", "{dir}/a.mp4"], "is empty; give it at least one word"),
        (["caf\udce9", "-o", "{dir}/a.mp4"], "the prompt is no UTF-8 at character 4"),
        (["--neon red circle", "-o", "{dir}/a.mp4"], "is no option; put -- before a prompt that does"),
        (["a", "-o", "{dir}/a.mp4", "--height", "70"], "height is 70 pixels; it must be a multiple of 16"),
        (["a", "-o", "{dir}/a.mp4", "--width", "0"], "width is 0 pixels; it must be a multiple of 16"),
        (["a", "-o", "{dir}/a.mp4", "--seconds", "-2"], "seconds is -2.0; give a positive length"),
        (["a", "-o", "{dir}/a.mp4", "--seconds", "nan"], "seconds is nan; it must be a finite number"),
        (
            ["a", "-o", "{dir}/a.mp4", "--seconds", "1e308"],
            "seconds is 1e+308; a video has at most 86400, a day",
        ),
        (
            ["a", "-o", "{dir}/a.mp4", "--seconds", "1e18"],
            "seconds is 1e+18; a video has at most 86400, a day",
        ),
        (["a", "-o", "{dir}/a.mp4", "--height", "65536"], "height is 65536 pixels; use at most 8192"),
        (
            ["a", "-o", "{dir}/a.mp4", "--seed", str(2**64)],
            "seed is 18446744073709551616; use an integer from 0",
        ),
        (["a", "-o", "{dir}/a.mp4", "--seed", "-1"], "seed is -1; use an integer from 0"),
        (["a", "-o", "{dir}/no/a.mp4"], "no of a.mp4 does not exist; create it first"),
        (["a", "-o", "{dir}/a.gif"], "does not end in .mp4"),
        (["a", "-o", "{dir}/a.mp4", "--device", "tpu"], "--device is 'tpu'; use cpu, cuda or cuda:N"),
        (["a", "-o", "{dir}/a.mp4", "--device", "cuda:99"], "--device is cuda:99 and torch finds"),
        (["a", "-o", "{dir}/a.mp4", "--model", "wan-9b"], "wan-9b is no directory"),
        (
            ["-o", "{dir}/a.mp4"],
            "none of PROMPT, --prompts FILE and --script FILE is given; give one of them",
        ),
        (
            ["a", "--prompts", "{dir}/p", "-o", "{dir}"],
            "PROMPT and --prompts FILE are given; give one of them",
        ),
        (["a", "--script", "{dir}/p", "-o", "{dir}"], "PROMPT and --script FILE are given; give one of them"),
        (
            ["--script", "{dir}/story.txt", "-o", "{dir}/a.mp4", "--seconds", "3"],
            "--seconds is 3.0 beside --script, whose scenes have their own",
        ),
        (["--script", "{dir}/p", "-o", "{dir}/a.mp4"], "p does not exist"),
        (["--script", "{dir}/latin.txt", "-o", "{dir}/a.mp4"], "is not UTF-8 at byte 1"),
        (["--script", "{dir}/empty.txt", "-o", "{dir}/a.mp4"], "empty.txt: the script has 0 scenes"),
        (
            ["--script", "{dir}/good.txt", "-o", "{dir}/a.mp4"],
            "line 1 of {dir}/good.txt, 'a circle': it has 2",
        ),
        (["--script", "{dir}/story.txt", "-o", "{dir}"], "does not end in .mp4"),
        (["--script", "{dir}/blank.txt", "-o", "{dir}/a.mp4"], "'1 cut &nbsp; | a': the prompt '&nbsp;' is"),
        (
            ["--script", "{dir}/short.txt", "-o", "{dir}/a.mp4"],
            "scene 2 on line 2, 'b', lasts 0.05 seconds and no chunk",
        ),
        (["--prompts", "{dir}/p", "-o", "{dir}"], "p does not exist; give a text file"),
        (["--prompts", "{dir}/empty.txt", "-o", "{dir}"], "has 0 prompts; write one per line"),
        (["--prompts", "{dir}/latin.txt", "-o", "{dir}"], "is not UTF-8 at byte 1"),
        (["--prompts", "/dev/zero", "-o", "{dir}"], "/dev/zero is a device; give an ordinary file"),
        (["--prompts", "{dir}", "-o", "{dir}"], "is a directory; give an ordinary file"),
        (["--prompts", "{dir}/many.txt", "-o", "{dir}"], "has 1000000 prompts; give at most 100000"),
        (["--prompts", "{dir}/good.txt", "-o", "{dir}/no"], "no is no directory; create it first"),
    ],
)
def test_wrong_input_is_one_sentence_and_leaves_nothing(
    arguments: list[str], message: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {
        "empty.txt": b"\n \n",
        "latin.txt": b"n\xe9",
        "good.txt": b"a circle",
        "story.txt": b"1 start a circle\n1 cut a square",
        "blank.txt": b"1 start a circle\n1 cut &nbsp; | a",
        "short.txt": b"0.5 start a\n0.05 cut b",
        "many.txt": b"a\n" * 10**6,
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    filled = [argument.format(dir=tmp_path) for argument in arguments]
    chosen = filled if "--model" in filled else [*filled, "--model", str(model)]
    refused = fails(capsys, cli.CALLER_ERROR, "generate", *chosen)
    assert message.replace("{dir}", str(tmp_path)) in refused
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files)


# Scripts


STORY = """\
# two scenes and a transition
1    start    a circle
1.5  cut      a square
2    soft:2   2 * a star | a much longer text of a dog
"""


def chapter_frames(path: Path) -> list[tuple[int, int, str]]:
    """First frame, the frame after the last, and title."""
    return [(round(16 * start), round(16 * end), title) for start, end, title in chapters(path)]


def test_script_gives_one_video_with_a_chapter_for_each_scene(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script, path = tmp_path / "story.txt", tmp_path / "story.mp4"
    script.write_text(STORY)
    arguments = ["--script", str(script), "-o", str(path), "--model", str(model), "--seed", "2"]
    assert cli.main(["generate", *arguments]) == 0
    assert frame_count(path) == 72
    texts = ["a circle", "a square", "2 * a star | 1 * a much longer text of a dog"]
    # chunks begin at 0, 9, 21 for the cut, then at 30, 42 for frame 40
    assert chapter_frames(path) == [(0, 21, texts[0]), (21, 42, texts[1]), (42, 72, texts[2])]
    shown = capsys.readouterr()
    assert f"{path}: 72 frames, 4.5 s of video in 3 scenes; streams at " in shown.out
    for number, text in enumerate((*texts[:2], f"{texts[2][:40]} ..."), 1):
        assert f"scene {number} of 3: {text}]" in shown.err
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["story.mp4", "story.txt"]


def test_script_of_one_scene_is_the_video_of_its_prompt(
    model: Path, tmp_path: Path, written: Callable[[], bytes]
) -> None:
    (tmp_path / "one.txt").write_text("1.2 start a circle")
    common = ["--model", str(model), "--seed", "5"]
    script = ["--script", str(tmp_path / "one.txt"), "-o", str(tmp_path / "a.mp4")]
    assert cli.main(["generate", *script, *common]) == 0
    scene = written()
    plain = ["a circle", "--seconds", "1.2", "-o", str(tmp_path / "b.mp4")]
    assert cli.main(["generate", *plain, *common]) == 0
    assert written() == scene
    assert chapter_frames(tmp_path / "a.mp4") == [(0, 19, "a circle")]
    assert chapter_frames(tmp_path / "b.mp4") == []


def test_wrong_script_is_refused_before_the_model_is_loaded(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pipeline, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    script, path = tmp_path / "story.txt", tmp_path / "a.mp4"
    for line, reason in (
        (
            "2 fade a square",
            "line 2 of {path}, '2 fade a square': no scene begins with 'fade'; write seconds",
        ),
        (
            "2 soft:9 a square",
            "scene 2 on line 2, 'a square', lasts 2 seconds, which is 3 chunks, and its transition takes 9",
        ),
        ("86400 cut a square", "the script lasts 86401 seconds; a video has at most 86400, a day"),
    ):
        script.write_text(f"1 start a circle\n{line}\n")
        message = fails(
            capsys, cli.CALLER_ERROR, "generate", "--script", script, "-o", path, "--model", model
        )
        assert reason.format(path=script) in message
        assert not path.exists()


def test_interrupted_script_keeps_the_chapters_of_what_was_written(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = VideoStream.advance

    def interrupted(self: VideoStream, ahead: bool = True) -> FrameChunk:
        chunk = advance(self, ahead=ahead)
        if chunk.index == 3:
            raise KeyboardInterrupt
        return chunk

    monkeypatch.setattr(VideoStream, "advance", interrupted)
    script, path = tmp_path / "story.txt", tmp_path / "a.mp4"
    script.write_text(STORY)
    message = fails(capsys, cli.INTERRUPTED, "generate", "--script", script, "-o", path, "--model", model)
    assert message == f"interrupted; {path} holds the first 1.9 of 4.5 seconds (30 frames)"
    assert frame_count(path) == 30
    assert chapter_frames(path) == [(0, 21, "a circle"), (21, 30, "a square")]


def test_wrong_size_is_refused_before_the_model_is_loaded(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pipeline, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    path = tmp_path / "a.mp4"
    assert "multiple of 16" in fails(
        capsys, cli.CALLER_ERROR, "generate", "a", "-o", path, "--model", model, "--width", 50
    )


def damage_truncated(directory: Path) -> None:
    path = directory / "transformer.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def damage_foreign(directory: Path) -> None:
    (directory / "vae.safetensors").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 64)


def damage_other_size(directory: Path) -> None:
    path = directory / "transformer.safetensors"
    tensors = load_file(path)
    tensors["blocks.0.ffn.0.weight"] = tensors["blocks.0.ffn.0.weight"][:-1].clone()
    save_file(tensors, path)


def damage_no_vae(directory: Path) -> None:
    (directory / "vae.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncated, "transformer.safetensors is truncated"),
        (damage_foreign, "vae.safetensors"),
        (damage_other_size, "blocks.0.ffn.0.weight (63, 48) instead of (64, 48)"),
        (damage_no_vae, "has no vae; run `rfengine convert"),
    ],
)
def test_damaged_checkpoint_is_one_sentence_and_leaves_nothing(
    damage: Callable[[Path], None],
    message: str,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy, out = tmp_path / "copy", tmp_path / "out"
    copy.mkdir()
    out.mkdir()
    for path in model.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    damage(copy)
    assert message in fails(
        capsys, cli.CALLER_ERROR, "generate", "a", "-o", out / "a.mp4", "--model", copy, "--seconds", 0.2
    )
    assert list(out.iterdir()) == []


def test_full_disk_is_one_sentence_and_leaves_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    try:
        arguments = ("generate", "a", "-o", tmp_path / "a.mp4", "--model", model, "--seconds", 3)
        message = fails(capsys, cli.OTHER_ERROR, *arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "a.mp4 could not be written (File too large" in message and "free space" in message
    assert list(tmp_path.iterdir()) == []


# Ctrl-C


def test_interrupted_generation_leaves_a_file_that_plays(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = VideoStream.advance

    def interrupted(self: VideoStream, ahead: bool = True) -> FrameChunk:
        chunk = advance(self, ahead=ahead)
        if chunk.index == 2:
            raise KeyboardInterrupt
        return chunk

    monkeypatch.setattr(VideoStream, "advance", interrupted)
    path = tmp_path / "a.mp4"
    message = fails(capsys, cli.INTERRUPTED, "generate", "a", "-o", path, "--model", model, "--seconds", 600)
    assert message == f"interrupted; {path} holds the first 1.3 of 600.0 seconds (21 frames)"
    assert frame_count(path) == 21
    assert list(tmp_path.iterdir()) == [path]


def test_interrupt_within_a_write_waits_for_its_end(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = VideoWriter.write

    def signalled(self: VideoWriter, frames: numpy.ndarray) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        write(self, frames)

    monkeypatch.setattr(VideoWriter, "write", signalled)
    path = tmp_path / "a.mp4"
    assert "(9 frames)" in fails(capsys, cli.INTERRUPTED, "generate", "a", "-o", path, "--model", model)
    assert frame_count(path) == 9
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_interrupt_before_the_first_frames_leaves_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: VideoStream, ahead: bool = True) -> FrameChunk:
        raise KeyboardInterrupt

    monkeypatch.setattr(VideoStream, "advance", interrupted)
    message = fails(capsys, cli.INTERRUPTED, "generate", "a", "-o", tmp_path / "a.mp4", "--model", model)
    assert message == "interrupted; nothing was written"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGTERM], [signal.SIGHUP], [signal.SIGINT] * 2])
def test_interrupted_process_exits_with_130_and_its_file_plays(
    command_forks: CommandForks, model: Path, tmp_path: Path, signals: list[signal.Signals]
) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    path = videos / "a.mp4"
    arguments = ["a", "-o", str(path), "--model", str(model), "--seconds", "36000"]
    process = command_forks.start(tmp_path, "generate", *arguments)
    deadline = time.monotonic() + 240
    while not any(entry.stat().st_size for entry in videos.iterdir()):
        assert not command_forks.has_ended() and time.monotonic() < deadline
        time.sleep(0.05)
    for number in signals:
        os.kill(process, number)
        time.sleep(0.01)
    assert command_forks.status() == 130
    errors = command_forks.errors()
    assert "Traceback" not in errors
    last = errors.splitlines()[-1]
    assert last.startswith(f"rfengine: error: interrupted; {path} holds the first ")
    assert f"({frame_count(path)} frames)" in last
    assert list(videos.iterdir()) == [path]


def test_loras_are_merged_at_their_scales_and_a_wrong_one_is_one_sentence(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], written: Callable[[], bytes]
) -> None:
    one, other = (write_lora(tmp_path / f"{seed}:30", pairs(SMALL, seed=seed)) for seed in range(2))
    path, merged = tmp_path / "a.mp4", tmp_path / "merged"
    request = ["generate", "a circle", "-o", str(path), "--seconds", "0.6", "--model"]
    loras = ["--lora", f"{one}:-0.5", "--lora", f"{other}:1"]

    def made(*arguments: str) -> bytes:
        assert cli.main([*request, *arguments]) == 0
        return written()

    found = made(str(model), *loras)
    assert cli.main(["convert", str(model), str(merged), "--dtype", "float32", *loras]) == 0
    assert made(str(merged)) == found and made(str(model)) != found

    path.unlink()
    wrong = [*request, model, "--lora"]
    assert "30 is a file, and what stands behind its last colon" in fails(capsys, 2, *wrong, one)
    assert "no.safetensors does not exist" in fails(capsys, 2, *wrong, tmp_path / "no.safetensors:0.5")
    strange = pairs(SMALL) | {"blocks.7.ffn.0": pairs(SMALL)["blocks.1.ffn.0"]}
    part = write_lora(tmp_path / "part.safetensors", strange)
    assert "--allow-unmatched-lora" in fails(capsys, 2, *wrong, part)
    assert not path.exists()
    first = made(str(model), "--lora", str(part), "--allow-unmatched-lora")
    assert "lora_unet_blocks_7_ffn_0.alpha" in capsys.readouterr().err  # the warning
    assert made(str(model), "--lora", f"{one}:1") == first
