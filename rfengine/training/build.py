"""From a TrainConfig to its stage: models, data and reward, loaded placed; and the directory it leaves."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from rfengine.checkpoint.checkpoint import Checkpoint, write_config
from rfengine.checkpoint.directories import checkpoint_directory
from rfengine.checkpoint.loader import save_weights
from rfengine.checkpoint.manifest import MANIFEST_FILE, write_manifest
from rfengine.config import EngineConfig, WanConfig
from rfengine.files import appears, new_directory
from rfengine.models.dit import WanDiT
from rfengine.models.vae import WanVAE
from rfengine.ops import Ops, choose_ops, default_choice
from rfengine.prompts import read_prompts
from rfengine.toy.data import LatentDataset, ToyClips, ToyPrompts, load_dataset, negative_states
from rfengine.toy.reward import ToyReward
from rfengine.training.arithmetic import casting
from rfengine.training.config import SEEN_S, TrainConfig
from rfengine.training.data import Encode, FilePrompts, LatentClips
from rfengine.training.distillation import DistillationModels, DistillationStage
from rfengine.training.lora import add_adapters
from rfengine.training.memory import recompute_blocks
from rfengine.training.ops import DifferentiableOps
from rfengine.training.parallel import Ranks, shard
from rfengine.training.reward import TrainedScore, motion_reward
from rfengine.training.rollout import latent_shape
from rfengine.training.sharded_weights import fill_shares, fresh_model, unread_weights
from rfengine.training.stages import Source, TeacherStage, TrainingStage, TrajectoryStage, seeded
from rfengine.training.trajectories import TrajectoryFile, follow_flow, save_trajectories
from rfengine.training.video_reward import VideoReward

_TRAJECTORIES = 512  # of the file that ode-init makes for itself
_KEPT_STATES = 1 << 28  # numbers of text states that stay in memory


def build_stage(
    config: TrainConfig, device: torch.device, ranks: Ranks, mesh: DeviceMesh | None = None
) -> TrainingStage:
    """The stage of `config` on `device`, everything loaded. mesh: how the ranks share the weights
    (sharding_mesh), of which each reads its share alone; None where every rank has all."""
    encode = text_states_of(config.base, config.engine, device)
    place, shape = _Place(config, device, ranks, mesh), config.engine.model
    if config.stage == "teacher":
        model = place.trained("student", config.student, shape)
        return TeacherStage(config, model, _clips(config, encode, device), ranks)
    if config.stage == "ode-init":
        model = place.trained("student", config.student, shape)
        return TrajectoryStage(config, model, _trajectories(config, encode, device, ranks), ranks)
    models = DistillationModels(
        student=place.trained("student", config.student, shape, differentiable=True),
        teacher=place.teacher(),
        critic=place.trained("critic", config.critic, config.critic_model or shape),
        vae=load_vae(config.base, config.engine, device),
        negative_states=_negative_states(config, encode).to(device),
    )
    if config.data == "toy":
        prompts: Source[list[str]] = ToyPrompts(encode)
    else:
        prompts = FilePrompts(read_prompts(Path(config.data), skip_empty_lines=False), encode)
    score = trained_score(config, device) if config.stage == "re-dmd" else None
    return DistillationStage(config, models, prompts, ranks, score)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the models of a training are, and how the ranks share them."""

    config: TrainConfig
    device: torch.device
    ranks: Ranks
    mesh: DeviceMesh | None

    def trained(self, name: str, source: str, shape: WanConfig, differentiable: bool = False) -> WanDiT:
        """A model that learns: float32 weights, sharded, adapted and recomputed as the config says."""
        config, ops = self.config, training_ops(self.device)
        if differentiable:
            ops = DifferentiableOps(ops.choice)
        seed = _first_seed(config, name)
        if self.mesh is None:
            model = _whole_model(source, shape, ops, self.device, torch.float32, seed)
            self._adapt(model, differentiable)
            return model
        model = _unread_model(shape, ops, torch.float32)
        weights = unread_weights(source, model, seed)
        self._adapt(model, differentiable)
        shard(model, self.mesh, _compute_dtype(config, self.device))
        fill_shares(model, weights, self.device, self.ranks, config.seed)
        return model

    def _adapt(self, model: WanDiT, differentiable: bool) -> None:
        if self.config.lora_rank is not None:
            add_adapters(model, self.config.lora_rank, self.config.seed)
        if self.config.checkpointing and not differentiable:  # the student's rollout has its own
            recompute_blocks(model)

    def teacher(self) -> WanDiT:
        """The frozen model: in the arithmetic's precision on CUDA, on the CPU between its uses where
        asked."""
        config, dtype = self.config, _compute_dtype(self.config, self.device)
        shape, ops = config.teacher_model or config.engine.model, training_ops(self.device)
        home = torch.device("cpu") if config.offload_teacher else self.device
        seed = _first_seed(config, "teacher")
        if self.mesh is None:
            model = _whole_model(config.teacher, shape, ops, home, dtype or torch.float32, seed)
            return model.requires_grad_(False)
        model = _unread_model(shape, ops, dtype or torch.float32).requires_grad_(False)
        weights = unread_weights(config.teacher, model, seed)
        shard(model, self.mesh, dtype, offload=config.offload_teacher)
        fill_shares(model, weights, home, self.ranks, config.seed)
        return model


def _unread_model(shape: WanConfig, ops: Ops, dtype: torch.dtype) -> WanDiT:
    """A transformer without values, on the meta device."""
    with torch.device("meta"):
        return WanDiT(shape, ops).to(dtype)


def _whole_model(
    source: str, shape: WanConfig, ops: Ops, device: torch.device, dtype: torch.dtype, seed: int
) -> WanDiT:
    if source:
        return load_transformer(source, shape, ops, device, dtype)
    return fresh_model(_unread_model(shape, ops, dtype), device, seed)


def _first_seed(config: TrainConfig, name: str) -> int:
    """The seed of the fresh weights of a model, which are the same on every rank."""
    return seeded(torch.device("cpu"), config.seed, "weights", name).initial_seed()


def training_ops(device: torch.device) -> Ops:
    """The ops of a model in training: those of inference, and attention over clips by the kernel where Triton
    is."""
    on_triton = "triton" in default_choice(device).values()
    return choose_ops("auto", device, {"clip_attention": "triton"} if on_triton else None)


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
    ranks.meet(patient=True)
    appears(path, SEEN_S)
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
