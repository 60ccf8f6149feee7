"""The shipped weights draw what the prompt says, measured by the toy world's detectors through the MP4."""

from pathlib import Path

import numpy
import pytest
import torch

import rfengine
from rfengine import Pipeline, cli
from rfengine.cache.kv_cache import StreamingKVCache
from rfengine.config import RuntimeConfig
from rfengine.grid import LatentGrid
from rfengine.runtime.chunk_runner import ChunkRunner
from rfengine.schedule import FlowSchedule, chunk_noise
from rfengine.toy.captions import caption, sample_scenes
from rfengine.toy.detector import detect, score
from rfengine.toy.world import Scene, WorldConfig
from support.video_files import chapters, decoded
from support.work import Work

BATCH = 4
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
MOVING = WorldConfig(motion_weights=(1.0, 0.0, 0.0, 0.0), pair_share=0.0)


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_pretrained("tiny", device="cpu")


def scores_of(scene: Scene, frames: numpy.ndarray) -> dict[str, bool]:
    return score(scene, detect(torch.from_numpy(frames)))


def test_the_weights_are_small_enough_to_ship():
    folder = Path(rfengine.__file__).parent / "weights" / "tiny"
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 16 * 2**20


def test_held_out_prompts_give_their_colour_direction_and_shape_in_the_file(pipe, tmp_path):
    scenes = sample_scenes(10, 77, MOVING, "held_out")
    right = []
    for seed, scene in enumerate(scenes):
        pipe.generate(caption(scene), seconds=2.5, seed=seed).save(tmp_path / "out.mp4")
        right.append(scores_of(scene, decoded(tmp_path / "out.mp4")))
    for attribute, least in {"colour": 10, "direction": 9, "shape": 8}.items():
        assert sum(entry[attribute] for entry in right) >= least, attribute


@torch.no_grad()
def first_frames(pipe: Pipeline, prompts: list[str], seeds: range, chunks: int) -> torch.Tensor:
    """uint8 [B, T, H, W, 3]: the first chunks of a stream for each prompt and seed, computed as one batch."""
    config, grid = pipe.config, LatentGrid.of(pipe.config)
    runner = ChunkRunner(pipe.model, FlowSchedule(config.schedule))
    cache = StreamingKVCache(config.model, config.cache, grid, batch=len(prompts))
    text = pipe.model.text_keys_values(pipe.text_encoder.encode(prompts, torch.device("cpu"), torch.float32))
    size = (grid.latent_height, grid.latent_width)
    state = pipe.vae.decoder_state(len(prompts), *size, torch.float32, "cpu")
    shape = (1, config.model.in_dim, config.cache.chunk_frames, *size)
    pixels = []
    for chunk in range(chunks):
        steps = [
            torch.cat([chunk_noise(seed, chunk, step, shape) for seed in seeds])
            for step in range(runner.num_steps)
        ]
        latents = runner.advance(cache, cache.plan_chunk(), torch.stack(steps), text)
        pixels.append(pipe.vae.decode(latents, state))
    frames = (torch.cat(pixels, dim=2).clamp(-1, 1) + 1) * 127.5
    return frames.round().to(torch.uint8).permute(0, 2, 3, 4, 1)


@pytest.mark.slow
def test_a_hundred_held_out_captions_are_drawn_as_they_say(pipe):
    scenes = sample_scenes(100, 29, split="held_out")
    right = []
    for first in range(0, len(scenes), BATCH):
        part = scenes[first : first + BATCH]
        videos = first_frames(pipe, [caption(scene) for scene in part], range(first, first + len(part)), 2)
        right += [score(scene, detect(frames)) for scene, frames in zip(part, videos, strict=True)]
    # shapes are right in 98.2 % of many captions, and a hundred draws vary by 1.3
    for attribute, least in {"colour": 98, "shape": 93, "direction": 98}.items():
        assert sum(entry[attribute] for entry in right) >= least, attribute


def test_a_batch_is_drawn_as_its_streams_are(pipe):
    prompts = [caption(scene) for scene in sample_scenes(2, 29, split="held_out")]
    for seed, frames in enumerate(first_frames(pipe, prompts, range(2), 2)):
        stream = pipe.stream(prompts[seed], seed=seed)
        expected = numpy.concatenate([next(stream).frames for _ in range(2)])
        assert numpy.abs(frames.numpy().astype(int) - expected).max() <= 1


@pytest.mark.slow
def test_a_stream_of_a_minute_neither_freezes_nor_explodes(pipe):
    scene = sample_scenes(1, 5, MOVING, "held_out")[0]
    stream = pipe.stream(caption(scene), seed=3)
    chunks = [next(stream).frames for _ in range(81)]
    last = numpy.concatenate(chunks[-4:])
    right = scores_of(scene, last)
    assert right["colour"] and right["direction"]
    early, late = (numpy.concatenate(part).astype(float) for part in (chunks[1:5], chunks[-4:]))
    assert numpy.abs(numpy.diff(late, axis=0)).mean() > 0.5 * numpy.abs(numpy.diff(early, axis=0)).mean()
    assert abs(late.mean() - early.mean()) < 10 and abs(late.std() - early.std()) < 10


def test_a_hard_switch_shows_the_new_prompt(pipe):
    stream = pipe.stream("a large red circle moving fast to the right over a grey wall", seed=1)
    next(stream)
    stream.set_prompt("a large blue square moving fast to the left over a grey wall", "hard")
    found = detect(torch.from_numpy(numpy.concatenate([next(stream).frames for _ in range(3)]))).objects[0]
    assert (found.colour, found.shape, found.direction) == ("blue", "square", "left")


@pytest.mark.parametrize("mode", ["soft", "recache"])
def test_a_switch_shows_the_new_prompt_within_four_chunks(pipe, mode):
    stream = pipe.stream("a large red circle moving fast to the right over a sandy beach", seed=1)
    for _ in range(4):
        next(stream)
    stream.set_prompt("a large blue square moving fast to the left over a sandy beach", mode)
    frames = [next(stream).frames for _ in range(7)][4:]
    found = detect(torch.from_numpy(numpy.concatenate(frames))).objects[0]
    assert (found.colour, found.shape, found.direction) == ("blue", "square", "left")


def test_the_example_script_shows_its_scenes(tmp_path):
    path = tmp_path / "story.mp4"
    assert (
        cli.main(["generate", "--script", str(EXAMPLES / "story.txt"), "-o", str(path), "--seed", "3"]) == 0
    )
    ends = [round(16 * end) for _, end, _ in chapters(path)]
    video = decoded(path)
    # chunks begin at 0, 9, ..., 33 for frame 32; at 33, 42, 54, 66 for 64; then every 12 up to 114 for 112
    assert ends == [33, 66, 114, 144] and len(video) == 144
    shown = [detect(torch.from_numpy(video[end - 16 : end])).objects[0] for end in ends]
    assert [(each.colour, each.shape, each.direction) for each in shown] == [
        ("red", "circle", "right"), ("blue", "square", "left"), ("green", "square", "left"),
        ("green", "square", "up"),
    ]  # fmt: skip


def test_other_words_and_another_order_are_understood(pipe):
    video = pipe.generate("a red ball rolling left", seconds=2.5, seed=3)
    found = detect(torch.from_numpy(video.frames)).objects[0]
    assert (found.colour, found.shape, found.direction) == ("red", "circle", "left")


def test_a_prompt_of_unknown_words_is_warned_of_and_still_gives_a_video(pipe, caplog):
    frames = next(pipe.stream("ein Hund im Regen", seed=1)).frames
    (record,) = caplog.records
    message = record.getMessage()
    assert "'ein Hund im Regen' has no word that this model knows" in message
    assert all(word in message for word in ("ball", "red", "slowly", "beach"))
    assert frames.shape == (9, 64, 64, 3)


def test_the_tiny_decoder_draws_the_same_stream_with_less_work(pipe):
    tiny = Pipeline.from_pretrained("tiny", device="cpu", runtime=RuntimeConfig(vae="tiny"))
    assert (tiny.vae_tier, pipe.vae_tier) == ("reduced", "lossless")
    scenes = sample_scenes(6, 91, MOVING, "held_out")
    right, errors = [], []
    for seed, scene in enumerate(scenes):
        streams = [part.stream(caption(scene), seed=seed) for part in (pipe, tiny)]
        full, small = (numpy.concatenate([next(stream).frames for _ in range(3)]) for stream in streams)
        assert full.shape == small.shape == (33, 64, 64, 3)
        errors.append((full.astype(float) - small.astype(float)) / 255)
        right.append(scores_of(scene, small))
    assert -10 * numpy.log10(numpy.square(numpy.stack(errors)).mean()) > 28
    for attribute, least in {"colour": 6, "direction": 6, "shape": 5}.items():
        assert sum(entry[attribute] for entry in right) >= least, attribute


@torch.no_grad()
@pytest.mark.parametrize(("decode", "most"), [(False, 2000), (True, 2800)])
def test_a_chunk_takes_few_operators(pipe, decode, most):
    """Half of the time of this model on a CPU is what an operator costs beside its arithmetic."""
    stream = pipe.stream("a red ball moves to the right", seed=0)
    for _ in range(5):  # until the window is full and frames leave
        stream.advance(decode=decode)
    with Work() as work:
        stream.advance(decode=decode)
    assert most / 2 < len(work.done) <= most
