"""From a TrainConfig to its stage: loads what it starts from; and from weights to a checkpoint directory."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor, nn

from rfengine.checkpoint.loader import load_part, read_config, save_weights, write_config
from rfengine.config import EngineConfig, WanConfig
from rfengine.models.dit import WanDiT
from rfengine.models.text_encoder import ByteTokenizer, TextEncoder, build_umt5
from rfengine.models.vae import WanVAE
from rfengine.ops import Ops, choose_ops
from rfengine.training.differentiable_ops import DifferentiableOps
from rfengine.training.distillation import Distillation, DistillationModels
from rfengine.training.latent_dataset import load_dataset
from rfengine.training.parallel import Ranks
from rfengine.training.stages import DistillationStage, TeacherStage, TrainingStage
from rfengine.training.toy_data import ToyClips, ToyPrompts, negative_states
from rfengine.training.toy_reward import ToyReward
from rfengine.training.train_config import TrainConfig


def source_directory(source: str) -> Path:
    """Where the checkpoint `source` lies; "tiny" is in the package. Raises ValueError for no directory."""
    if source == "tiny":
        return Path(str(resources.files("rfengine"))) / "weights" / "tiny"
    directory = Path(source)
    if not directory.is_dir():
        raise ValueError(f"{source} is no directory; give 'tiny' or a checkpoint directory")
    return directory


def load_transformer(source: str, config: WanConfig, ops: Ops, device: torch.device) -> WanDiT:
    """A transformer in float32 from a checkpoint directory, or with fresh weights where source is ""."""
    if not source:
        with torch.device(device):
            return WanDiT(config, ops)
    with torch.device("meta"):
        model = WanDiT(config, ops)
    load_part(model, source_directory(source), "transformer", torch.float32, device)
    return model


def build_toy_stage(config: TrainConfig, device: torch.device, ranks: Ranks) -> TrainingStage:
    """A stage over the toy world, whose VAE and text encoder are those of the shipped model."""
    engine, plain = config.engine, choose_ops("auto", device)
    if config.stage == "teacher":
        model = load_transformer(config.student, engine.model, plain, device)
        clips = ToyClips(load_dataset(Path(config.data)), config.clip_frames, engine.cache.chunk_frames)
        return TeacherStage(config, model, clips, ranks)
    models = DistillationModels(
        student=load_transformer(config.student, engine.model, DifferentiableOps(plain.choice), device),
        teacher=load_transformer(config.teacher, engine.model, plain, device).requires_grad_(False),
        critic=load_transformer(config.critic, engine.model, plain, device),
        vae=toy_vae(engine, device),
        negative_states=negative_states(engine.model.text_len, engine.model.text_dim).to(device),
    )
    reward = ToyReward()

    def motion(frames: Tensor, prompts: tuple[str, ...]) -> Tensor:
        return reward(frames, prompts)["motion"].to(frames.device)

    score = motion if config.stage == "re-dmd" else None
    autocast = torch.bfloat16 if config.precision == "bfloat16" else None
    distillation = Distillation(engine, models, config.distillation, config.rollout, score, autocast)
    return DistillationStage(config, distillation, ToyPrompts(toy_text_encoder(engine)), ranks)


def toy_vae(engine: EngineConfig, device: torch.device) -> WanVAE:
    with torch.device("meta"):
        vae = WanVAE(engine.vae)
    load_part(vae, source_directory("tiny"), "vae", torch.float32, device)
    return vae.eval().requires_grad_(False)


def toy_text_encoder(engine: EngineConfig) -> Callable[[list[str]], Tensor]:
    """Texts to states [N, L, D]; what was encoded once is kept."""

    def load() -> nn.Module:
        with torch.device("meta"):
            umt5 = build_umt5(engine.text)
        load_part(umt5, source_directory("tiny"), "text_encoder", torch.float32, torch.device("cpu"))
        return umt5

    encoder = TextEncoder(load(), ByteTokenizer(), engine.model.text_len)
    known: dict[str, Tensor] = {}

    def encode(texts: list[str]) -> Tensor:
        missing = sorted({text for text in texts if text not in known})
        if missing:
            known.update(zip(missing, encoder.encode(missing), strict=True))
        return torch.stack([known[text] for text in texts])

    return encode


def toy_engine() -> EngineConfig:
    """The configuration of the shipped model, with the statistics of its latents."""
    return read_config(source_directory("tiny"))


def export_checkpoint(
    weights: Mapping[str, Tensor], engine: EngineConfig, base: str, destination: Path
) -> None:
    """Write a directory that Pipeline and load_transformer read: `weights` in float16 as the transformer, and
    the VAE and the text encoder of `base`."""
    destination.mkdir(parents=True, exist_ok=True)
    for path in source_directory(base).iterdir():
        if path.is_file() and not path.name.startswith("transformer"):
            shutil.copyfile(path, destination / path.name)
    write_config(destination, engine)
    halves = {name: value.detach().half().contiguous() for name, value in weights.items()}
    save_weights(destination / "transformer.safetensors", halves)
