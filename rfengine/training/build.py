"""From a TrainConfig to its stage: models, data and reward, loaded and placed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from rfengine.config import WanConfig
from rfengine.grid import LatentGrid
from rfengine.models.dit import WanDiT
from rfengine.ops import Ops, choose_ops, default_choice
from rfengine.prompts import read_prompts
from rfengine.toy.data import LatentDataset, ToyClips, ToyPrompts, load_dataset, negative_states
from rfengine.toy.reward import ToyReward
from rfengine.training.arithmetic import casting
from rfengine.training.checkpoint_parts import Encode, load_transformer, load_vae, text_states_of
from rfengine.training.config import TrainConfig
from rfengine.training.data import FilePrompts, LatentClips
from rfengine.training.distillation import (
    Distillation,
    DistillationModels,
    PromptBatch,
    StudentLoss,
)
from rfengine.training.learner import Figures
from rfengine.training.lora import add_adapters
from rfengine.training.memory import recompute_blocks
from rfengine.training.ops import DifferentiableOps
from rfengine.training.parallel import Ranks, shard
from rfengine.training.reward import MotionReward, TrainedScore
from rfengine.training.stages import (
    Clips,
    DistillationStage,
    Prompts,
    TeacherStage,
    TrainingStage,
    Trajectories,
    TrajectoryStage,
    seeded,
)
from rfengine.training.trajectories import TrajectoryFile, follow_flow, make_trajectories
from rfengine.training.video_reward import VideoReward

_TRAJECTORIES = 512  # of the file that ode-init makes for itself


def build_stage(config: TrainConfig, device: torch.device, ranks: Ranks) -> TrainingStage:
    """The stage of `config` on `device`, everything loaded."""
    encode = text_states_of(config.base, config.engine, device)
    if config.stage == "teacher":
        model = _trained(config, config.student, config.engine.model, device)
        return TeacherStage(config, model, _clips(config, encode, device), ranks)
    if config.stage == "ode-init":
        model = _trained(config, config.student, config.engine.model, device)
        return TrajectoryStage(config, model, _trajectories(config, encode, device, ranks), ranks)
    models = DistillationModels(
        student=_trained(config, config.student, config.engine.model, device, differentiable=True),
        teacher=_teacher(config, device),
        critic=_trained(config, config.critic, config.critic_model or config.engine.model, device),
        vae=load_vae(config.base, config.engine, device),
        negative_states=_negative_states(config, encode).to(device),
    )
    reward = build_reward(config, device) if config.stage == "re-dmd" else None
    distillation = Distillation(
        config.engine, models, config.distillation, config.rollout, reward, config.precision
    )

    def scores(result: StudentLoss, batch: PromptBatch) -> Figures:
        return {} if reward is None else {name: float(part.mean()) for name, part in reward.parts.items()}

    return DistillationStage(config, distillation, _prompts(config, encode), ranks, scores)


def _trained(
    config: TrainConfig, source: str, shape: WanConfig, device: torch.device, differentiable: bool = False
) -> WanDiT:
    """A model that learns: float32 weights, sharded, adapted and recomputed as the config says."""
    ops = training_ops(device)
    if differentiable:
        ops = DifferentiableOps(ops.choice)
    model = load_transformer(source, shape, ops, torch.device("cpu") if _shards(config) else device)
    if config.lora_rank is not None:
        add_adapters(model, config.lora_rank, config.seed)
    if config.checkpointing and not differentiable:  # the student's rollout has its own
        recompute_blocks(model)
    if _shards(config):
        shard(model, device.type, _compute_dtype(config, device))
    return model


def _teacher(config: TrainConfig, device: torch.device) -> WanDiT:
    """The frozen model: in the arithmetic's precision on CUDA, on the CPU between its uses where asked."""
    shape, dtype = config.teacher_model or config.engine.model, _compute_dtype(config, device)
    place = torch.device("cpu") if _shards(config) or config.offload_teacher else device
    ops = training_ops(device)
    model = load_transformer(config.teacher, shape, ops, place, dtype or torch.float32).requires_grad_(False)
    if _shards(config):
        shard(model, device.type, dtype, offload=config.offload_teacher)
    return model


def training_ops(device: torch.device) -> Ops:
    """The ops of a model in training: those of inference, and attention over clips by the kernel where Triton
    is."""
    on_triton = "triton" in default_choice(device).values()
    return choose_ops("auto", device, {"clip_attention": "triton"} if on_triton else None)


def _shards(config: TrainConfig) -> bool:
    return config.parallel == "sharded" and torch.distributed.is_initialized()


def _compute_dtype(config: TrainConfig, device: torch.device) -> torch.dtype | None:
    """What weights are cast to before they are used; None where they stay as they are."""
    return torch.bfloat16 if config.precision == "bfloat16" and device.type == "cuda" else None


def _prompts(config: TrainConfig, encode: Encode) -> Prompts:
    if config.data == "toy":
        return ToyPrompts(encode)
    return FilePrompts(read_prompts(Path(config.data), skip_empty_lines=False), encode)


def _clips(config: TrainConfig, encode: Encode, device: torch.device) -> Clips:
    path = Path(config.data)
    if path.is_dir():
        negative = _negative_states(config, encode)
        return LatentClips(path, config.clip_frames, _latent_size(config), encode, negative)
    if not path.is_file():
        raise ValueError(
            f"the clips {path} do not exist; give the toy world's file, which `python -m "
            "recipes.tiny.run --stage videos` makes, or a directory of latents"
        )
    return ToyClips(_toy_dataset(path, config), config.clip_frames, config.engine.cache.chunk_frames)


def _toy_dataset(path: Path, config: TrainConfig) -> LatentDataset:
    """The clips of a file. Raises ValueError where they are not of the size that is trained."""
    dataset, model = load_dataset(path), config.engine.model
    channels, *sides = _latent_size(config)
    found, texts = list(dataset.latents.shape[1:]), list(dataset.texts.shape[1:])
    fits = [found[0], *found[2:]] == [channels, *sides] and found[1] >= config.clip_frames
    if not fits or texts != [model.text_len, model.text_dim]:
        wanted = f"{[channels, config.clip_frames, *sides]}, or more frames"
        raise ValueError(
            f"{path} has latents {found} with texts {texts}; this training has {wanted}, with "
            f"{[model.text_len, model.text_dim]}: give clips of its size"
        )
    return dataset


def _trajectories(config: TrainConfig, encode: Encode, device: torch.device, ranks: Ranks) -> Trajectories:
    """Those of the file config.data, which the first rank makes where it is absent."""
    path, engine = Path(config.data), config.engine
    if not path.exists() and engine.text.tokenizer != "bytes":
        raise ValueError(
            f"the trajectories {path} do not exist, and only those of the toy world are made here; write the "
            "file with trajectories.make_trajectories"
        )
    if not path.exists() and ranks.rank == 0:
        own = seeded(torch.device("cpu"), config.seed, "trajectories")
        teacher = load_transformer(
            config.teacher, config.teacher_model or engine.model, training_ops(device), device
        )
        channels, *sides = _latent_size(config)
        prompts, negative = _prompts(replace(config, data="toy"), encode), _negative_states(config, encode)

        def draw(count: int) -> tuple[Tensor, Tensor]:
            _, states = prompts.draw(count, own)
            return torch.randn(count, channels, config.clip_frames, *sides, generator=own), states

        def follow(noise: Tensor, states: Tensor) -> Tensor:
            with casting(device, config.precision):
                return follow_flow(
                    teacher,
                    engine.schedule,
                    noise.to(device),
                    states.to(device),
                    negative.to(device),
                    config.distillation.guidance,
                )

        make_trajectories(path, _TRAJECTORIES, draw, follow, engine.schedule, config.batch)
    ranks.meet()
    return TrajectoryFile(path, engine)


def _latent_size(config: TrainConfig) -> tuple[int, int, int]:
    """Channels, height and width of the latents."""
    grid = LatentGrid.of(config.engine)
    return config.engine.model.in_dim, grid.latent_height, grid.latent_width


def _negative_states(config: TrainConfig, encode: Encode) -> Tensor:
    if config.negative_prompt:
        return encode([config.negative_prompt])
    return negative_states(config.engine.model.text_len, config.engine.model.text_dim)


def build_reward(config: TrainConfig, device: torch.device) -> TrainedScore:
    """What the student's samples are weighted by: motion, as the toy world, the flow or a VideoReward has it.

    The other scores are computed as well, and logged for a RewardGuard (see held_out_score).
    """
    if config.reward == "toy":
        return TrainedScore(ToyReward(), "toy.motion")
    if config.reward == "flow":
        return TrainedScore(MotionReward(fps=config.engine.fps), "flow.motion")
    directory = Path(config.reward)
    if not directory.is_dir():
        raise ValueError(f"the reward {config.reward} is no directory; give 'toy', 'flow' or a VideoReward")
    video = VideoReward(directory, device, fps=config.engine.fps)
    return TrainedScore(video, "video.motion_quality")


def held_out_score(config: TrainConfig) -> str:
    """The figure that must not fall while the reward rises; "" where the reward has no second score."""
    return {"toy": "toy.agreement", "flow": ""}.get(config.reward, "video.text_alignment")
