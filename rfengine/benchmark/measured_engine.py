"""What throughput.py measures: a pipeline at one size, with text states instead of a text encoder."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from rfengine.benchmark.options import ThroughputOptions
from rfengine.checkpoint.checkpoint import Checkpoint, GivenTextStates
from rfengine.costs.shapes import Shapes
from rfengine.grid import LatentGrid
from rfengine.models.tiny_vae import TinyVAE
from rfengine.pipeline import Pipeline
from rfengine.presets import PRESETS
from rfengine.stream import VideoStream

PROMPT = "a red circle moves right"
SEED = 7


@dataclass(frozen=True)
class MeasuredEngine:
    """What is measured: a pipeline whose text states are given, at one size.

    decoder: the plain module whose weights it decodes with; None where it does not decode. weights: where
    they are from.
    """

    pipeline: Pipeline
    grid: LatentGrid
    decoder: nn.Module | None
    weights: str

    @classmethod
    def load(cls, options: ThroughputOptions) -> MeasuredEngine:
        """Raises ValueError for a model, a device or a size that cannot be."""
        device = device_of(options.device)
        model = options.model or ("wan-1.3b" if device.type == "cuda" else "tiny")
        checkpoint = _checkpoint(model, options)
        pipeline = Pipeline.from_pretrained(
            checkpoint, device, options.dtype, system=options.system, backend=options.backend,
            runtime=options.runtime,
        )  # fmt: skip
        grid = LatentGrid.of(pipeline.config, options.height, options.width)
        decoder = _plain_decoder(pipeline, checkpoint) if options.decode else None
        states = pipeline.text_encoder.encode([PROMPT], device, pipeline.model.dtype)
        pipeline.text_encoder = GivenTextStates(states)
        if checkpoint.directory is None:
            weights = f"random, seed {checkpoint.seed}: the frames are noise"
        else:
            weights = "those that come with the package" if model == "tiny" else f"those in {model}"
        return cls(pipeline, grid, decoder, weights)

    @property
    def decodes(self) -> bool:
        return self.decoder is not None

    @property
    def device(self) -> torch.device:
        return self.pipeline.model.device

    @property
    def shapes(self) -> Shapes:
        return Shapes(replace(self.pipeline.config, height=self.grid.height, width=self.grid.width))

    def stream(self) -> VideoStream:
        return self.pipeline.stream(PROMPT, seed=SEED, height=self.grid.height, width=self.grid.width)


def _checkpoint(model: str, options: ThroughputOptions) -> Checkpoint:
    """A directory, or random weights for a preset at the size of `options`, so that it is tuned there."""
    if model == "tiny" or model not in PRESETS:
        return Checkpoint.open(model)
    if options.runtime.vae == "tensorrt":
        raise ValueError(f"vae is 'tensorrt' and {model} is a preset; give --model a checkpoint directory")
    grid = LatentGrid.of(PRESETS[model], options.height, options.width)
    return Checkpoint.random(replace(PRESETS[model], height=grid.height, width=grid.width))


def _plain_decoder(pipeline: Pipeline, checkpoint: Checkpoint) -> nn.Module:
    """The module whose weights the decoder of `pipeline` has."""
    config, model = pipeline.config, pipeline.model
    if config.runtime.vae != "tiny":
        return pipeline.vae
    return checkpoint.load(lambda: TinyVAE(config.tiny_vae), "tiny_vae", model.dtype, model.device).eval()


def device_of(name: str | None) -> torch.device:
    """The device of a name, with its index as tensors on it have; a GPU where there is one for None."""
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device
