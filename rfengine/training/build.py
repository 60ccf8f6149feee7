"""From a TrainConfig to its stage: models, data and reward, loaded placed; and the directory it leaves."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

from rfengine.checkpoint.checkpoint import Checkpoint, write_config
from rfengine.checkpoint.directories import checkpoint_directory
from rfengine.checkpoint.loader import save_weights
from rfengine.checkpoint.manifest import MANIFEST_FILE, write_manifest
from rfengine.config import EngineConfig, WanConfig
from rfengine.files import new_directory
from rfengine.models.dit import WanDiT
from rfengine.models.vae import WanVAE
from rfengine.ops import Ops, choose_ops, default_choice
from rfengine.prompts import read_prompts
from rfengine.toy.data import LatentDataset, ToyClips, ToyPrompts, load_dataset, negative_states
from rfengine.toy.reward import ToyReward
from rfengine.training.arithmetic import casting
from rfengine.training.config import TrainConfig
from rfengine.training.data import Encode, FilePrompts, LatentClips
from rfengine.training.distillation import DistillationModels, DistillationStage
from rfengine.training.lora import add_adapters
from rfengine.training.memory import recompute_blocks
from rfengine.training.ops import DifferentiableOps
from rfengine.training.parallel import Ranks, shard
from rfengine.training.reward import TrainedScore, motion_reward
from rfengine.training.rollout import latent_shape
from rfengine.training.stages import Source, TeacherStage, TrainingStage, TrajectoryStage, seeded
from rfengine.training.trajectories import TrajectoryFile, follow_flow, save_trajectories
from rfengine.training.video_reward import VideoReward

_TRAJECTORIES = 512  # of the file that ode-init makes for itself
_KEPT_STATES = 1 << 28  # numbers of text states that stay in memory


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
    if config.data == "toy":
        prompts: Source[list[str]] = ToyPrompts(encode)
    else:
        prompts = FilePrompts(read_prompts(Path(config.data), skip_empty_lines=False), encode)
    score = trained_score(config, device) if config.stage == "re-dmd" else None
    return DistillationStage(config, models, prompts, ranks, score)


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


def _clips(config: TrainConfig, encode: Encode, device: torch.device) -> Source[Tensor]:
    path = Path(config.data)
    if path.is_dir():
        size = latent_shape(config.engine, 1, config.clip_frames)[1:]
        return LatentClips(path, size, encode, _negative_states(config, encode))
    if not path.is_file():
        raise ValueError(
            f"the clips {path} do not exist; give the toy world's file, which `python -m "
            "recipes.tiny.run --stage videos` makes, or a directory of latents"
        )
    return ToyClips(_toy_dataset(path, config), config.clip_frames, config.engine.cache.chunk_frames)


def _toy_dataset(path: Path, config: TrainConfig) -> LatentDataset:
    """The clips of a file. Raises ValueError where they are not of the size that is trained."""
    dataset, model = load_dataset(path), config.engine.model
    wanted = list(latent_shape(config.engine, 1, config.clip_frames)[1:])
    found, texts = list(dataset.latents.shape[1:]), list(dataset.texts.shape[1:])
    fits = [found[0], *found[2:]] == [wanted[0], *wanted[2:]] and found[1] >= config.clip_frames
    if not fits or texts != [model.text_len, model.text_dim]:
        raise ValueError(
            f"{path} has latents {found} with texts {texts}; this training has {wanted}, or more frames, "
            f"with {[model.text_len, model.text_dim]}: give clips of its size"
        )
    return dataset


def _trajectories(config: TrainConfig, encode: Encode, device: torch.device, ranks: Ranks) -> Source[Tensor]:
    """Those of the file config.data, which the first rank makes where it is absent."""
    path = Path(config.data)
    if not path.exists() and config.engine.text.tokenizer != "bytes":
        raise ValueError(
            f"the trajectories {path} do not exist, and only those of the toy world are made here; write the "
            "file with trajectories.save_trajectories"
        )
    if not path.exists() and ranks.rank == 0:
        save_trajectories(path, _followed(config, encode, device), config.engine.schedule)
    ranks.meet()
    return TrajectoryFile(path, config.engine)


def _followed(config: TrainConfig, encode: Encode, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields trajectories of the toy world's teacher, batch by batch, with their text states."""
    from tqdm import tqdm

    engine, own = config.engine, seeded(torch.device("cpu"), config.seed, "trajectories")
    ops, prompts = training_ops(device), ToyPrompts(encode)
    teacher = load_transformer(config.teacher, config.teacher_model or engine.model, ops, device)
    negative, guidance = _negative_states(config, encode).to(device), config.distillation.guidance
    for first in tqdm(range(0, _TRAJECTORIES, config.batch), unit="batch", disable=None):
        count = min(config.batch, _TRAJECTORIES - first)
        _, states = prompts.draw(count, own)
        noise = torch.randn(latent_shape(engine, count, config.clip_frames), generator=own).to(device)
        with casting(device, config.precision):
            found = follow_flow(teacher, engine.schedule, noise, states.to(device), negative, guidance)
        yield found, states


def _negative_states(config: TrainConfig, encode: Encode) -> Tensor:
    if config.negative_prompt:
        return encode([config.negative_prompt])
    return negative_states(config.engine.model.text_len, config.engine.model.text_dim)


def trained_score(config: TrainConfig, device: torch.device) -> TrainedScore:
    """What the student's samples are weighted by: motion, as the toy world, the flow or a VideoReward has it.

    The other scores are computed as well, and logged for a RewardGuard.
    """
    if config.reward == "toy":
        return TrainedScore(ToyReward(), "toy.motion", "toy.agreement")
    if config.reward == "flow":
        return TrainedScore(partial(motion_reward, fps=config.engine.fps), "flow.motion")
    directory = Path(config.reward)
    if not directory.is_dir():
        raise ValueError(f"the reward {config.reward} is no directory; give 'toy', 'flow' or a VideoReward")
    video = VideoReward(directory, device, fps=config.engine.fps)
    return TrainedScore(video, "video.motion_quality", "video.text_alignment")


def load_transformer(
    source: str, config: WanConfig, ops: Ops, device: torch.device, dtype: torch.dtype = torch.float32
) -> WanDiT:
    """A transformer from a checkpoint directory, or with fresh weights where source is ""."""
    if not source:
        with torch.device(device):
            return WanDiT(config, ops).to(dtype)
    return Checkpoint.open(source).load(lambda: WanDiT(config, ops), "transformer", dtype, device)


def load_vae(base: str, engine: EngineConfig, device: torch.device) -> WanVAE:
    """The frozen VAE: bfloat16 on CUDA, as in inference, else float32."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    vae = Checkpoint.open(base).load(lambda: WanVAE(engine.vae), "vae", dtype, device)
    return vae.eval().requires_grad_(False)


def text_states_of(base: str, engine: EngineConfig, device: torch.device) -> Encode:
    """Texts to states [N, L, D] on the CPU, by the text encoder of `base`; the last ones are kept.

    Raises ValueError where `base` has no text encoder or no tokenizer.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    encoder = replace(Checkpoint.open(base), config=engine).text_encoder(device, dtype)
    limit = max(1, _KEPT_STATES // (engine.model.text_len * engine.model.text_dim))

    @lru_cache(maxsize=limit)
    def states(text: str) -> Tensor:
        return encoder.encode([text], "cpu", torch.float32)[0]

    return lambda texts: torch.stack([states(text) for text in texts])


def base_engine(base: str = "tiny") -> EngineConfig:
    """The configuration of a checkpoint directory, with the statistics of its latents."""
    return Checkpoint.open(base).config


def export_checkpoint(
    weights: Mapping[str, Tensor], engine: EngineConfig, base: str, destination: Path
) -> None:
    """Write a directory that Pipeline and load_transformer read: `weights` in float16 as the transformer, and
    the VAE, the text encoder and the tokenizer of `base`, with a manifest of all.

    It is whole or not there: what `destination` held stays until the new one is. RuntimeError when it cannot
    be written.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    halves = {name: value.detach().half().contiguous() for name, value in weights.items()}
    with new_directory(destination) as directory:
        for path in checkpoint_directory(base).iterdir():
            if path.is_file() and path.name != MANIFEST_FILE and not path.name.startswith("transformer"):
                shutil.copyfile(path, directory / path.name)
            elif path.is_dir() and path.name == "tokenizer":
                shutil.copytree(path, directory / path.name)
        write_config(directory, engine)
        save_weights(directory / "transformer.safetensors", halves)
        write_manifest(directory)
