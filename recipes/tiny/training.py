"""What the stages of the recipe share: the description of a training, a run to its end, and the checkpoint
directory that the stages fill."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from rfengine.checkpoint.checkpoint import Checkpoint, write_config
from rfengine.checkpoint.directories import CONFIG_FILE
from rfengine.checkpoint.layouts import Part
from rfengine.checkpoint.loader import save_weights
from rfengine.config import EngineConfig, TinyVAEConfig, VAEConfig
from rfengine.limits import check_fields
from rfengine.models.dit import WanDiT
from rfengine.models.vae import WanVAE
from rfengine.ops import REFERENCE_OPS, Ops
from rfengine.presets import PRESETS
from rfengine.toy.captions import caption, known_words
from rfengine.toy.world import Scene, as_clips
from rfengine.training.build import load_transformer, load_vae, text_states_of
from rfengine.training.checkpoints import locked_run
from rfengine.training.config import Steps
from rfengine.training.data import Encode
from rfengine.training.parallel import Ranks
from rfengine.training.rollout import decode_chunks, roll_out
from rfengine.training.samples import averaged_state
from rfengine.training.stages import TrainingStage
from rfengine.training.trainer import RunConfig, Trainer

Switch = tuple[Sequence[str], bool]  # to other texts, and whether the window is recomputed under them

CPU = torch.device("cpu")


def with_plain_latents(config: VAEConfig, channels: int) -> VAEConfig:
    """The configuration of a VAE of so many latent channels, whose latents are used as they are."""
    mean, deviation = (0.0,) * channels, (1.0,) * channels
    return dataclasses.replace(config, z_dim=channels, latents_mean=mean, latents_std=deviation)


def _tiny_engine() -> EngineConfig:
    """What the recipe trains."""
    preset = PRESETS["tiny"]
    text = dataclasses.replace(preset.text, known_words=tuple(sorted(known_words())))
    return dataclasses.replace(preset, text=text)


TINY = _tiny_engine()
TRAINED_VAE = with_plain_latents(TINY.vae, 16)  # while it is trained; the first channels stay
_DECODED_AT_ONCE = 8  # videos
_FOREGROUND_WEIGHT = 3.0


@dataclass(frozen=True, slots=True)
class StageConfig:
    """One training: what is trained, for how many steps. keep: finished checkpoints that stay on disk."""

    name: str
    model: EngineConfig | VAEConfig | TinyVAEConfig
    steps: Steps
    seed: int
    save_every: Steps = 100
    keep: int = 1

    def __post_init__(self) -> None:
        check_fields(self)

    def step_seed(self, step: int) -> int:
        """The seed of what all passes of a step share."""
        return self.seed * 1_000_003 + step

    def pass_seed(self, step: int, index: int) -> int:
        """The seed of what pass `index` of a step draws."""
        return self.step_seed(step) * 64 + index


def train(config: RunConfig, stage: TrainingStage, directory: Path, ranks: Ranks) -> dict[str, Tensor]:
    """Train in `directory`/NAME, from the newest checkpoint there; returns the averaged weights.

    Raises KeyboardInterrupt after a signal: the same call continues.
    """
    place = directory / config.name
    with locked_run(place):
        Trainer(config, stage, place, ranks).finish("with the same command")
    return averaged_state(stage)


def cell_weight(foreground: Tensor) -> Tensor:
    """What the error of a cell counts, by whether a shape is there: shapes are small."""
    return 1 + (_FOREGROUND_WEIGHT - 1) * foreground.float()


def stored_engine(directory: Path) -> EngineConfig:
    """The configuration that the stages have left in a checkpoint directory so far, or TINY."""
    stored = (directory / CONFIG_FILE).exists()
    return Checkpoint.open(directory).config if stored else TINY


def save_part(directory: Path, engine: EngineConfig, part: Part, weights: Mapping[str, Tensor]) -> None:
    """Put the weights of one part into a checkpoint directory, which has the configuration `engine` then."""
    directory.mkdir(parents=True, exist_ok=True)
    write_config(directory, engine)
    own = {name: value.detach().clone() for name, value in weights.items()}  # tied ones share memory
    save_weights(directory / f"{part}.safetensors", own)


@dataclass(frozen=True, slots=True)
class ToyModel:
    """The frozen models of a checkpoint directory. encode: captions to text states on the CPU."""

    config: EngineConfig
    transformer: WanDiT
    vae: WanVAE
    encode: Encode

    @classmethod
    def load(
        cls,
        source: Path | str,
        device: torch.device = CPU,
        ops: Ops = REFERENCE_OPS,
        dtype: torch.dtype = torch.float32,
    ) -> ToyModel:
        """ops, dtype: of the transformer; the others are in float32 on the CPU and in bfloat16 on CUDA."""
        source, config = str(source), Checkpoint.open(source).config
        transformer = load_transformer(source, config.model, ops, device, dtype).eval().requires_grad_(False)
        vae, encode = load_vae(source, config, device), text_states_of(source, config, device)
        return cls(config, transformer, vae, encode)

    @torch.inference_mode()
    def stream(
        self,
        texts: Sequence[str],
        chunks: int,
        seed: int,
        switches: Mapping[int, Switch] = MappingProxyType({}),
    ) -> Iterator[list[Tensor]]:
        """Yields a clip [T, H, W, 3] from 0 to 1 for each text, chunk by chunk."""
        encoded = {chunk: (self._states(new), recached) for chunk, (new, recached) in switches.items()}
        latents = roll_out(self.transformer, self.config, self._states(texts), chunks, seed, encoded)
        dtype = self.vae.conv2.weight.dtype
        for pixels in decode_chunks(self.vae, (part.to(dtype) for part in latents)):
            yield as_clips(pixels.cpu())

    def _states(self, texts: Sequence[str]) -> Tensor:
        return self.encode(list(texts)).to(self.transformer.device, self.transformer.dtype)

    @torch.inference_mode()
    def latents(self, scenes: Sequence[Scene], chunks: int, seed: int) -> Tensor:
        """Latents [B, z, F, h, w] of streams of the scenes' captions."""
        states = self._states([caption(scene) for scene in scenes])
        return torch.cat(list(roll_out(self.transformer, self.config, states, chunks, seed)), dim=2)

    @torch.inference_mode()
    def pixels(self, latents: Tensor) -> Tensor:
        """What the full decoder makes of latents, clamped: [B, 3, T, H, W]."""
        return torch.cat([self.vae.decode(part) for part in latents.split(_DECODED_AT_ONCE)]).clamp(-1, 1)
