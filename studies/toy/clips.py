"""Short clips of one model under held-out captions, each with and without its speed: what they show, how it
moves, and how far they are from the teacher's.

The teacher's clips are from the middle of a video, whose beginning they do not have (CLIP in
recipes/tiny/transformer.py). So a student's are the end of a short stream, and of all clips what is seen is
judged without the first chunk, which the VAE decodes without a past in the teacher's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recipes.tiny.training import ToyModel
from rfengine.evaluation.dynamics import measure_dynamics
from rfengine.ops import choose_ops
from rfengine.ops.reference import frame_pack
from rfengine.toy.captions import caption, open_caption, parse_caption, sample_scenes
from rfengine.toy.data import negative_states
from rfengine.toy.detector import detect, score
from rfengine.toy.reward import named_motion
from rfengine.toy.world import Scene, WorldConfig, as_clips
from rfengine.training.recipes import toy_dmd
from rfengine.training.rollout import decode_chunks, latent_shape, roll_out
from rfengine.training.stages import seeded
from rfengine.training.trajectories import follow_flow
from studies.toy.record import Unit, Values, unit, write_record
from studies.toy.setting import Setting

CAPTION_SEED = 29
_BATCH = 20
_CHUNKS = 3  # of a clip, as long as the teacher's
_STREAM_CHUNKS = 5  # of a student's stream, whose last ones are the clip
_TEACHER_SUBSTEPS = 6  # Euler steps for each of the student's four
_FLOW_PAIRS = 8
_FAST = 0.75  # of the top speed: halfway from slow to fast
KINDS = ("full", "open")


def measure_clips(setting: Setting, model: str) -> None:
    """Write the record clips_<model>; the teacher's has to be there before any other's."""
    settings = {
        "weights": setting.fingerprint(model),
        "captions": setting.size.captions,
        "flow_clips": setting.size.flow_clips,
        "student_steps": setting.size.student_steps,
    }
    toy = ToyModel.load(setting.checkpoint(model), setting.device, choose_ops("auto", setting.device))
    videos, fidelity = [], {}
    for kind in KINDS:
        units = [
            unit(
                setting.directory / "units" / f"clips_{model}",
                f"{kind}_{seed}",
                settings,
                lambda kind=kind, seed=seed: _measure(setting, toy, model == "teacher", kind, seed),
            )
            for seed in setting.size.sampling_seeds
        ]
        videos += _with_mixed([made["videos"] for made in units])
        fidelity[kind] = _fidelity(setting, model, kind, [made["latents"].float() for made in units])
    record = {"kind": "clips", "model": model, "settings": settings, "fidelity": fidelity, "videos": videos}
    write_record(setting.records / f"clips_{model}.json", record)


def _with_mixed(seeds: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The videos of all seeds; those of a moving scene with `mixed`, whether some seeds of its caption move
    fast and others do not, so that a reward has something to choose."""
    for same in zip(*seeds, strict=True):
        if "fast" in same[0]["values"]:
            fast = {video["values"]["fast"] for video in same}
            for video in same:
                video["values"]["mixed"] = float(len(fast) > 1)
    return [video for videos in seeds for video in videos]


def _latents(setting: Setting, toy: ToyModel, is_teacher: bool, texts: list[str], seed: int) -> Tensor:
    """Clean latents [B, C, F, h, w] of streams of captions, by rollout, or of clips along the teacher's
    probability flow; the students of one study get the same noise for the same texts and seed."""
    engine, device = toy.config, setting.device
    states = toy.encode(texts).to(device)
    if not is_teacher:
        return torch.cat(list(roll_out(toy.transformer, engine, states, _STREAM_CHUNKS, seed)), dim=2)
    size = latent_shape(engine, len(texts), _CHUNKS * engine.cache.chunk_frames)
    noise = torch.randn(size, generator=seeded(torch.device("cpu"), "clips", seed)).to(device)
    empty = negative_states(engine.model.text_len, engine.model.text_dim).to(device)
    guidance, schedule = toy_dmd(engine).distillation.guidance, engine.schedule
    with setting.casting():
        flow = follow_flow(toy.transformer, schedule, noise, states, empty, guidance, _TEACHER_SUBSTEPS)
    return flow[:, -1]


@torch.no_grad()
def _measure(setting: Setting, toy: ToyModel, is_teacher: bool, kind: str, seed: int) -> Unit:
    scenes = sample_scenes(setting.size.captions, CAPTION_SEED, WorldConfig(), "held_out")
    first_seed = seed == setting.size.sampling_seeds[0]
    videos, kept = [], []
    for first in range(0, len(scenes), _BATCH):
        drawn = scenes[first : first + _BATCH]
        texts = [open_caption(scene) if kind == "open" else caption(scene) for scene in drawn]
        latents = _latents(setting, toy, is_teacher, texts, seed * 1_000_003 + first)
        chunks = latents.split(toy.config.cache.chunk_frames, dim=2)
        with setting.casting():
            decoded = list(decode_chunks(toy.vae, iter(chunks)))
        pixels = torch.cat(decoded[1 - _CHUNKS :], dim=2).float().cpu()
        kept.append(torch.cat(chunks[-_CHUNKS:], dim=2).half().cpu())
        for place, (scene, text) in enumerate(zip(drawn, texts, strict=True)):
            values = _clip_values(scene, text, pixels[place])
            if first_seed and first + place < setting.size.flow_clips:
                frames = frame_pack(pixels[place]).cpu().numpy()
                values["flow_speed"] = measure_dynamics(frames, most_pairs=_FLOW_PAIRS).values["speed"]
            videos.append({"prompt": first + place, "seed": seed, "captions": kind, "values": values})
    return {"videos": videos, "latents": torch.cat(kept)}


def _clip_values(scene: Scene, text: str, pixels: Tensor) -> Values:
    """pixels: [3, T, H, W]. What is right of that which the text says, and how what it names moves."""
    said, found = parse_caption(text), detect(as_clips(pixels[None])[0])
    values = {name: float(value) for name, value in score(said, found).items()}
    shares = list(values.values())
    values |= {"agreement": sum(shares) / len(shares), "all": float(all(shares))}
    values["reward"] = named_motion(said, found)
    if scene.motion == "moving":
        values["fast"] = float(values["reward"] > _FAST)
    return values


def _fidelity(setting: Setting, model: str, kind: str, latents: list[Tensor]) -> list[float]:
    """The energy distance to the teacher's clips, one for each sampling seed; the teacher's own is that to
    its clips of the next seed."""
    seeds = setting.size.sampling_seeds
    folder = setting.directory / "units" / "clips_teacher"
    teachers = [
        torch.load(folder / f"{kind}_{seed}.pt", weights_only=True)["unit"]["latents"].float()
        for seed in seeds
    ]
    shift = int(model == "teacher")
    return [energy_distance(own, teachers[(place + shift) % len(seeds)]) for place, own in enumerate(latents)]


def energy_distance(first: Tensor, second: Tensor) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| of two sets [N, ...] under the same N captions, per root of the
    dimension (Szekely and Rizzo, 2013).

    0 for equal distributions, up to the noise of the samples. Only samples of different captions are
    compared, within a set and between them.
    """
    one, two = first.flatten(1), second.flatten(1)

    def mean(left: Tensor, right: Tensor) -> Tensor:
        distances = torch.cdist(left, right)
        return (distances.sum() - distances.diagonal().sum()) / (len(left) * (len(left) - 1))

    return float((2 * mean(one, two) - mean(one, one) - mean(two, two)) / one.shape[1] ** 0.5)
