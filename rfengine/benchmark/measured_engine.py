"""What `rfengine bench` measures: a pipeline at one size, with text states instead of a text encoder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from rfengine.benchmark.conditions import device_name
from rfengine.benchmark.options import ThroughputOptions
from rfengine.checkpoint.checkpoint import Checkpoint, GivenTextStates
from rfengine.costs.shapes import Shapes
from rfengine.grid import LatentGrid
from rfengine.models.dit import WanDiT
from rfengine.models.tiny_vae import TinyVAE
from rfengine.pipeline import Pipeline
from rfengine.presets import PRESETS
from rfengine.runtime.options import runtime_switches
from rfengine.stream import VideoStream

# leaves nothing open to the shipped model, where rounding would decide it
PROMPT = "a large red circle moving slowly to the right over a cloudy sky"
SEED = 7


@dataclass(frozen=True)
class MeasuredEngine:
    """What is measured: a pipeline whose text states are given, at one size.

    decoder: the plain module whose weights it decodes with; None where it does not decode. weights: where
    they are from. given: the text states of PROMPT. context_pass: False where chunks are made without it.
    """

    pipeline: Pipeline
    grid: LatentGrid
    decoder: nn.Module | None
    weights: str
    given: GivenTextStates
    context_pass: bool = True

    @classmethod
    def load(
        cls, options: ThroughputOptions, context_pass: bool = True, encodes_text: bool = False
    ) -> MeasuredEngine:
        """context_pass: see leave_out_context_pass. encodes_text: every stream encodes its prompt where the
        model has a text encoder, which random weights have not.

        Raises ValueError for a model, a device or a size that cannot be.
        """
        device = device_of(options.device)
        model = model_of(options, device)
        checkpoint = open_checkpoint(model, options)
        asked = LatentGrid.of(checkpoint.config, options.height, options.width)
        has_size = options.height is not None or options.width is not None
        pipeline = Pipeline.from_pretrained(
            checkpoint, device, options.dtype, system=options.system, backend=options.backend,
            runtime=options.runtime, size=(asked.height, asked.width) if has_size else None,
        )  # fmt: skip
        grid = LatentGrid.of(pipeline.config, options.height, options.width)
        decoder = _plain_decoder(pipeline, checkpoint) if options.decode else None
        given = GivenTextStates(pipeline.text_encoder.encode([PROMPT], device, pipeline.model.dtype))
        if not encodes_text:
            pipeline.text_encoder = given
        if not context_pass:
            leave_out_context_pass(pipeline.model)
        if checkpoint.directory is None:
            weights = f"random, seed {checkpoint.seed}: the frames are noise"
        else:
            weights = "those that come with the package" if model == "tiny" else f"those in {model}"
        return cls(pipeline, grid, decoder, weights, given, context_pass)

    @property
    def decodes(self) -> bool:
        return self.decoder is not None

    @property
    def encodes_text(self) -> bool:
        return not isinstance(self.pipeline.text_encoder, GivenTextStates)

    @property
    def device(self) -> torch.device:
        return self.pipeline.model.device

    @property
    def shapes(self) -> Shapes:
        return Shapes(replace(self.pipeline.config, height=self.grid.height, width=self.grid.width))

    def stream(self) -> VideoStream:
        return self.pipeline.stream(PROMPT, seed=SEED, height=self.grid.height, width=self.grid.width)


def leave_out_context_pass(model: WanDiT) -> None:
    """From now on chunks of `model` end with their last denoising step, whose keys and values later chunks
    see. For absolute positions alone: with relative ones that pass leaves the raw keys."""
    model.context_pass = lambda *given: None


def model_of(options: ThroughputOptions, device: torch.device) -> str:
    """The model that is asked for, or the default of the device."""
    return options.model or ("wan-1.3b" if device.type == "cuda" else "tiny")


def open_checkpoint(model: str, options: ThroughputOptions) -> Checkpoint:
    """A directory, or random weights for a preset at the size of `options`, so that it is tuned there. No
    tensor is read."""
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


def setting_of(engine: MeasuredEngine, options: ThroughputOptions) -> dict[str, Any]:
    """What is measured and on what, by the names of the JSON."""
    config, model = engine.pipeline.config, engine.pipeline.model
    switches = runtime_switches(config.runtime, engine.device)
    return {
        "model": config.name,
        "system": options.system,
        "weights": engine.weights,
        "height": engine.grid.height,
        "width": engine.grid.width,
        "denoising_steps": len(config.schedule.denoising_steps),
        "window_frames": config.cache.window_frames,
        "dtype": str(model.dtype).removeprefix("torch."),
        "backend": engine.pipeline.backend,
        "ops": model.ops.choice,
        "preset": config.runtime.preset,
        "block_weights": config.runtime.block_weights or "default",
        "block_buffers": config.runtime.block_buffers or 0,
        "vae": config.runtime.vae if options.decode else "none",
        "vae_precision": config.runtime.vae_precision,
        "vae_dtype": str(engine.pipeline.vae_dtype).removeprefix("torch."),
        "vae_tier": engine.pipeline.vae_tier if engine.decodes else None,
        **{name: switches[name].on for name in ("graphs", "overlap", "autotune")},
        "device": device_name(engine.device),
        "threads": torch.get_num_threads(),
        "chunks": options.chunks,
    }
