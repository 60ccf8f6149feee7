"""`rfengine generate | convert | parity | doctor`: options are dataclasses, errors are one sentence each."""

from __future__ import annotations

import json
import logging
import math
import re
import signal
import sys
import threading
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from tyro.conf import Positional, arg

from rfengine.config import Backend, DTypeName
from rfengine.pipeline import Pipeline, check_seed, checkpoint_directory
from rfengine.video import VideoWriter, check_video_path

CALLER_ERROR, OTHER_ERROR, INTERRUPTED = 2, 1, 130  # exit statuses
_SLUG_LENGTH = 48
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_QUIET_INTERVAL = 15.0  # seconds between two lines of progress where no terminal shows them


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Make a video from a prompt, or one from each line of a file."""

    prompt: Positional[str | None] = None
    """What the video shows."""
    output: Annotated[Path, arg(aliases=("-o",))]
    """The MP4 to write; with --prompts the directory that gets one MP4 for each prompt."""
    prompts: Path | None = None
    """A text file with one prompt per line, instead of PROMPT; empty lines are skipped."""
    seconds: float = 5.0
    """Length of each video."""
    seed: int = 0
    """The same seed, model and prompt give the same video."""
    model: str = "tiny"
    """A checkpoint directory, or tiny, which comes with the package."""
    height: int | None = None
    """Pixels, a multiple of 16; the size the model was trained at where nothing is given."""
    width: int | None = None
    """Pixels, a multiple of 16."""
    device: str | None = None
    """cpu, cuda or cuda:N; cuda where there is one."""
    dtype: DTypeName | None = None
    """Precision of the weights; bfloat16 on CUDA, float32 on the CPU."""


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Convert a checkpoint of Wan2.1, Diffusers, Self-Forcing, LongLive or Reward Forcing for the engine."""

    source: Positional[Path]
    """A checkpoint directory, or one .pt or .safetensors file of a generator."""
    destination: Positional[Path]
    """The directory to make."""
    base: Path | None = None
    """A directory that gives the VAE, the text encoder and the tokenizer where SOURCE lacks them."""
    lora: Path | None = None
    """A LoRA to merge into the transformer."""
    dtype: DTypeName = "bfloat16"
    """Precision of the weights written."""
    use_ema: bool = True
    """Take the averaged weights where a file has both."""
    kind: Literal["auto", "wan", "reward-forcing", "self-forcing", "longlive"] = "auto"
    """Which cache the model was trained for; auto goes by the name of the source."""


@dataclass(frozen=True, kw_only=True)
class ParityOptions:
    """Replay golden files through the engine; one JSON line each, exit 1 if one is above its tolerance."""

    files: Positional[tuple[Path, ...]]
    """Golden files: recorded weights, inputs and results of one part of the engine."""
    backend: Backend = "auto"
    """The backend to replay with."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    dtype: DTypeName = "float32"
    """Precision of weights and activations."""


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Report versions, the GPU, backends and why each is on or off, and memory needed and free."""

    json: bool = False
    """Print JSON instead of text."""
    model: str = "tiny"
    """Whose memory is reckoned: tiny, wan-1.3b, wan-14b or a checkpoint directory."""
    height: int | None = None
    """Pixels; the model's own size where nothing is given."""
    width: int | None = None
    """Pixels."""
    dtype: DTypeName | None = None
    """bfloat16 on CUDA, float32 on the CPU where nothing is given."""


Options = (
    Annotated[GenerateOptions, tyro.conf.subcommand("generate")]
    | Annotated[ConvertOptions, tyro.conf.subcommand("convert")]
    | Annotated[ParityOptions, tyro.conf.subcommand("parity")]
    | Annotated[DoctorOptions, tyro.conf.subcommand("doctor")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 1 for a failure, 2 for wrong input, 130 after Ctrl-C."""
    options = tyro.cli(
        Options,
        prog="rfengine",
        description="Streaming text-to-video in real time.",
        args=arguments,
        config=(tyro.conf.DisallowNone,),  # a prompt may be the word None
    )
    commands: dict[type, Callable[[Any], int]] = {
        GenerateOptions: generate,
        ConvertOptions: convert,
        ParityOptions: parity,
        DoctorOptions: doctor,
    }
    with _one_line_warnings(), _termination_as_interrupt():
        try:
            return commands[type(options)](options)
        except ValueError as error:
            return _fail(error, CALLER_ERROR)
        except (RuntimeError, OSError) as error:
            return _fail(error, OTHER_ERROR)
        except KeyboardInterrupt as error:
            if arguments is None:  # the process ends here: a second Ctrl-C must not break its last words
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            return _fail(f"interrupted; {str(error) or 'nothing was written'}", INTERRUPTED)


def generate(options: GenerateOptions) -> int:
    jobs = _jobs(options)
    _check_request(options)
    pipeline = Pipeline.from_pretrained(options.model, _device(options.device), options.dtype)
    for done, (prompt, path) in enumerate(jobs):
        try:
            _write_video(pipeline, prompt, path, options)
        except KeyboardInterrupt as error:
            if not done:
                raise
            begun = str(error) or f"{path} was not begun"
            raise KeyboardInterrupt(f"{begun}; {done} of {len(jobs)} videos are whole") from None
    return 0


def _jobs(options: GenerateOptions) -> list[tuple[str, Path]]:
    """Every prompt and the file its video goes to."""
    if (options.prompt is None) == (options.prompts is None):
        given = "neither" if options.prompt is None else "both"
        raise ValueError(f"{given} of PROMPT and --prompts FILE is given; give one of them")
    if options.prompt is not None:
        _check_prompt(options.prompt)
        check_video_path(options.output)
        return [(options.prompt, options.output)]
    prompts = _read_prompts(options.prompts)
    if not options.output.is_dir():
        raise ValueError(
            f"{options.output} is no directory; create it first, --prompts writes its videos there"
        )
    return [(prompt, options.output / _file_name(number, prompt)) for number, prompt in enumerate(prompts, 1)]


def _check_prompt(prompt: str) -> None:
    from rfengine.models.text_encoder import clean_text

    if not clean_text(prompt):
        raise ValueError(f"the prompt {prompt!r} is empty; give it at least one word")


def _read_prompts(path: Path) -> list[str]:
    if not path.is_file():
        raise ValueError(f"the prompt file {path} does not exist; give a text file with one prompt per line")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {error.start}; save it as UTF-8 text") from error
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{path} has 0 prompts; write one per line")
    for prompt in prompts:
        _check_prompt(prompt)
    return prompts


def _file_name(number: int, prompt: str) -> str:
    """A name that any file system takes and no other prompt of the file has: 0001-a-red-circle.mp4."""
    plain = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:_SLUG_LENGTH].rstrip("-")
    return f"{number:04}-{slug or 'prompt'}.mp4"


def _check_request(options: GenerateOptions) -> None:
    """Refuse before the model is loaded, which can take minutes, what would be refused after it."""
    from rfengine.checkpoint.loader import read_config
    from rfengine.grid import LatentGrid

    if not math.isfinite(options.seconds) or options.seconds <= 0:
        raise ValueError(f"--seconds is {options.seconds}; give a positive length such as 5")
    check_seed(options.seed)
    LatentGrid.of(read_config(checkpoint_directory(options.model)), options.height, options.width)


def _write_video(pipeline: Pipeline, prompt: str, path: Path, options: GenerateOptions) -> None:
    from tqdm import tqdm

    fps = pipeline.config.fps
    count = pipeline.frame_count(seconds=options.seconds)
    num_chunks = pipeline.chunk_count(count)
    stream = pipeline.stream(prompt, seed=options.seed, height=options.height, width=options.width)
    made, busy = 0, 0.0
    interval = 0.1 if sys.stderr.isatty() else _QUIET_INTERVAL
    with (
        VideoWriter(path, fps, stream.grid.height, stream.grid.width) as writer,
        tqdm(total=num_chunks, desc=path.name, unit="chunk", mininterval=interval, file=sys.stderr) as bar,
    ):
        try:
            for _ in range(num_chunks):
                started = time.perf_counter()
                frames = next(stream).frames
                busy += time.perf_counter() - started
                made += len(frames)
                with _interrupt_waits():
                    writer.write(frames[: count - writer.frames_written])
                bar.update()
        except KeyboardInterrupt:
            if not writer.frames_written:
                raise
            with _interrupt_waits(then_raise=False):  # impatience must not cost the end of the file
                writer.close()
            written = writer.frames_written
            raise KeyboardInterrupt(
                f"{path} holds the first {written / fps:.1f} of {count / fps:.1f} seconds ({written} frames)"
            ) from None
    rate = made / busy
    print(
        f"{path}: {count} frames, {count / fps:.1f} s of video; streams at {rate:.1f} frames/s, "
        f"{rate / fps:.1f} times as fast as it plays"
    )


@contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does: the file up to there plays, and nothing half-written stays."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def _interrupt_waits(then_raise: bool = True) -> Iterator[None]:
    """Hold Ctrl-C back until the block is done: half a write would spoil the file."""
    if threading.current_thread() is not threading.main_thread():  # others never get the signal
        yield
        return
    pending: list[int] = []

    def note(number: int, frame: object) -> None:
        pending.append(number)

    previous = {number: signal.signal(number, note) for number in _STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if pending and then_raise:
        raise KeyboardInterrupt


def convert(options: ConvertOptions) -> int:
    from rfengine.checkpoint.convert import convert as convert_checkpoint

    convert_checkpoint(
        options.source,
        options.destination,
        base=options.base,
        lora=options.lora,
        dtype=options.dtype,
        use_ema=options.use_ema,
        kind=options.kind,
    )
    print(f"{options.destination}: converted from {options.source} in {options.dtype}")
    return 0


def parity(options: ParityOptions) -> int:
    from rfengine.evaluation.parity import replay
    from rfengine.ops import choose_ops

    if not options.files:
        raise ValueError("0 files are given; name at least one golden file")
    device = _device(options.device)
    choose_ops(options.backend, device)  # a backend that cannot run is one error, not one for each file
    passed = True
    for path in options.files:
        try:
            report = replay(path, options.backend, device, options.dtype)
        except (ValueError, RuntimeError, OSError) as error:
            passed = False
            message = _one_line(error)
            _fail(message if str(path) in message else f"{path}: {message}", OTHER_ERROR)
            failure = {"file": str(path), "kind": None, "dtype": options.dtype, "backend": options.backend}
            print(json.dumps({**failure, "max_rel_err": None, "errors": {}, "ok": False, "error": message}))
        else:
            passed = passed and report.ok
            print(report.to_json(), flush=True)
    return 0 if passed else OTHER_ERROR


def doctor(options: DoctorOptions) -> int:
    from rfengine.doctor import examine, render

    report = examine(options.model, options.height, options.width, options.dtype)
    print(json.dumps(report, indent=2) if options.json else render(report))
    return 0


def _device(name: str | None) -> torch.device | None:
    """The device of that name, which is there; None for None. Raises ValueError for any other."""
    if name is None:
        return None
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if match is None:
        raise ValueError(f"--device is {name!r}; use cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if name.startswith("cuda") else 0
    if name != "cpu" and int(match[1] or 0) >= count:
        raise ValueError(f"--device is {name} and torch finds {count} CUDA devices; use --device cpu")
    return torch.device(name)


def _one_line(error: object) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _fail(error: object, status: int) -> int:
    print(f"rfengine: error: {_one_line(error)}", file=sys.stderr)
    return status


class _OnceFilter(logging.Filter):
    """Lets each message through once: the configuration is read before and while a model is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        fresh = message not in self.seen
        self.seen.add(message)
        return fresh


@contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Show warnings of the engine and of libraries as one line on stderr, without their source location."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter("rfengine: warning: %(message)s"))
    handler.addFilter(_OnceFilter())
    logger = logging.getLogger("rfengine")
    logger.addHandler(handler)

    def show(message: Warning | str, *place: object) -> None:
        print(f"rfengine: warning: {_one_line(message)}", file=sys.stderr)

    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            yield
    finally:
        logger.removeHandler(handler)


if __name__ == "__main__":
    sys.exit(main())
