"""Videos of a training's moving average, as MP4 files beside its log."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from rfengine.ops import choose_ops
from rfengine.ops.reference import frame_pack
from rfengine.prompts import read_prompts
from rfengine.toy.captions import caption, sample_scenes
from rfengine.toy.data import negative_states
from rfengine.toy.world import WorldConfig
from rfengine.training.build import load_transformer, load_vae, text_states_of
from rfengine.training.config import TrainConfig
from rfengine.training.data import latent_prompt
from rfengine.training.lora import merged_weights
from rfengine.training.parallel import Ranks, full_tensors
from rfengine.training.rollout import decode_chunks, latent_shape, roll_out
from rfengine.training.stages import TrainingStage, seeded
from rfengine.training.trajectories import follow_flow
from rfengine.video import VideoWriter

_VIDEOS = 4
_MOST_CHUNKS = 9
_SCENE_SEED = 17


def averaged_state(stage: TrainingStage) -> dict[str, Tensor]:
    """The averaged weights of a training, adapters apart (lora.py); every rank has to call it."""
    average = next(iter(stage.averages.values()))
    return full_tensors(average.values)


class SampleWriter:
    """Trainer's `sample`: four videos of the same prompts and noise each time, step_00000100_0.mp4 and so
    on.

    A student streams chunks; a teacher's clip comes from its probability flow.
    """

    def __init__(self, config: TrainConfig, stage: TrainingStage, device: torch.device, ranks: Ranks) -> None:
        self.config, self.stage, self.device, self.ranks = config, stage, device, ranks
        self._states: Tensor | None = None

    def __call__(self, step: int, directory: Path) -> None:
        weights = merged_weights(averaged_state(self.stage))
        if self.ranks.rank:
            return
        directory.mkdir(parents=True, exist_ok=True)
        engine = self.config.engine
        paths = [directory / f"step_{step:08d}_{number}.mp4" for number in range(_VIDEOS)]
        with ExitStack() as stack:
            writers = [
                stack.enter_context(VideoWriter(path, engine.fps, engine.height, engine.width))
                for path in paths
            ]
            for pixels in self._pixels(weights):
                for writer, video in zip(writers, pixels.split(1), strict=True):
                    writer.write(frame_pack(video[0]).cpu().numpy())

    def _pixels(self, weights: dict[str, Tensor]) -> Iterator[Tensor]:
        config, engine = self.config, self.config.engine
        model = load_transformer("", engine.model, choose_ops("auto", self.device), self.device)
        model.requires_grad_(False).eval().load_state_dict(weights)
        vae = load_vae(config.base, engine, self.device)
        if self._states is None:
            self._states = text_states_of(config.base, engine, self.device)(_sample_prompts(config))
        states = self._states.to(self.device)
        if config.stage != "teacher":
            chunks = min(_MOST_CHUNKS, config.rollout.max_chunks if config.rollout else _MOST_CHUNKS)
            return decode_chunks(vae, roll_out(model, engine, states, chunks, config.seed))
        own = seeded(torch.device("cpu"), config.seed, "samples")
        noise = torch.randn(latent_shape(engine, len(states), config.clip_frames), generator=own)
        empty = negative_states(engine.model.text_len, engine.model.text_dim).to(self.device)
        clip = follow_flow(model, engine.schedule, noise.to(self.device), states, empty, guidance=1.0)[:, -1]
        return decode_chunks(vae, iter(clip.split(engine.cache.chunk_frames, dim=2)))


def _sample_prompts(config: TrainConfig) -> list[str]:
    """The first of what the training reads, again from its start where it is short; captions of held-out
    scenes in the toy world."""
    path = Path(config.data)
    if config.stage == "teacher" and path.is_dir():
        texts = [latent_prompt(file) for file in sorted(path.glob("*.safetensors"))[:_VIDEOS]]
    elif config.stage in ("dmd", "re-dmd") and config.data != "toy":
        texts = list(read_prompts(path, skip_empty_lines=False))
    else:
        scenes = sample_scenes(_VIDEOS, _SCENE_SEED, WorldConfig(), "held_out")
        texts = [caption(scene) for scene in scenes]
    return [texts[number % len(texts)] for number in range(_VIDEOS)]
