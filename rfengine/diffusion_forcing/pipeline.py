"""DiffusionForcingPipeline: loads a diffusion forcing model (SkyReels-V2) once, then makes whole videos."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rfengine.checkpoint.checkpoint import Checkpoint
from rfengine.config import Backend, DTypeName, EngineConfig, RuntimeConfig
from rfengine.costs.memory import require_frames_fit
from rfengine.costs.window import require_window_fits
from rfengine.cuda_graph import made_current
from rfengine.diffusion_forcing.denoise import Conditions, Draw, GuidedFlow, denoise_video
from rfengine.diffusion_forcing.frames import PieceDecoder
from rfengine.diffusion_forcing.options import DiffusionForcingOptions
from rfengine.diffusion_forcing.plan import VideoPlan, check_given, plan_video, require_diffusion_forcing
from rfengine.host_state import own_state
from rfengine.models.dit import TextKeysValues, WanDiT
from rfengine.models.vae import WanVAE
from rfengine.ops import choose_ops
from rfengine.prompts import check_prompt, warn_of_unknown_words
from rfengine.runtime.decoder_precision import state_dtype
from rfengine.runtime.decoders import OpenDecoder, tier_of
from rfengine.runtime.loaded_models import Placement, load_models
from rfengine.runtime.model_precision import products_left_out, require_settled
from rfengine.schedule import chunk_noise
from rfengine.video import Video, check_frames, pixels_from_frames

if TYPE_CHECKING:
    from numpy import ndarray

    from rfengine.models.text_encoder import TextEncoder

_DEFAULTS = DiffusionForcingOptions()


@dataclass(frozen=True, slots=True)
class DenoisedRow:
    """One row of the schedule: its index from 0, how many there are, and the frames, uint8 [T, H, W, 3], RGB,
    that are whole with it and were not before; mostly none."""

    index: int
    total: int
    frames: ndarray


class DiffusionForcingPipeline:
    """The loaded models of one diffusion forcing checkpoint. They are offline models: a video is denoised as
    a whole, in many passes over all of its frames, and nothing streams.

    vae: encodes given frames, in float32 from from_pretrained. open_decoder: returns the decoder for a size.
    A pipeline makes one video at a time, in one thread.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: WanDiT,
        vae: WanVAE,
        text_encoder: TextEncoder,
        open_decoder: OpenDecoder,
    ) -> None:
        require_diffusion_forcing(config)
        require_settled(config.runtime, model)
        self.config = config
        self.model = model
        self.vae = vae
        self.text_encoder = text_encoder
        self._open_decoder = open_decoder

    @classmethod
    @own_state()
    def from_pretrained(
        cls,
        source: str | Path | Checkpoint,
        device: str | torch.device | None = None,
        dtype: DTypeName | torch.dtype | None = None,
        *,
        text_device: str | torch.device | None = None,
        text_cache: str | Path | None = None,
        backend: Backend | None = None,
        runtime: RuntimeConfig | None = None,
    ) -> DiffusionForcingPipeline:
        """Load a checkpoint directory or an open Checkpoint; the arguments are those of Pipeline.

        Raises ValueError for a model that streams, and where a file, a tensor or a setting is not what the
        engine needs; RuntimeError when the backend or the decoder cannot run on the device.
        """
        checkpoint = source if isinstance(source, Checkpoint) else Checkpoint.open(source)
        config = checkpoint.config
        require_diffusion_forcing(config)
        config = replace(config, runtime=runtime or config.runtime, backend=backend or config.backend)
        _refuse_options_of_streams(config.runtime)
        place = Placement.of(config.runtime, device, dtype, text_device)
        left_out = products_left_out(checkpoint, config.runtime)
        ops = choose_ops(config.backend, place.device, dtype=place.dtype)
        models = load_models(checkpoint, config, ops, place, text_cache, left_out)
        return cls(config, models.transformer, models.vae, models.text_encoder, models.open_decoder)

    @property
    def backend(self) -> str:
        """The backends that run the model's ops."""
        return ", ".join(sorted(set(self.model.ops.choice.values())))

    @property
    def vae_tier(self) -> str:
        """Quality of the frames, as Pipeline.vae_tier names it."""
        return tier_of(self.config.runtime)

    def generate(
        self,
        prompt: str,
        options: DiffusionForcingOptions = _DEFAULTS,
        *,
        start_frames: ndarray | None = None,
        end_frame: ndarray | None = None,
    ) -> Video:
        """A video of `prompt`; the arguments are those of rows. Raises RuntimeError where the frames, which
        are all held, need more memory than is free."""
        import numpy

        plan = self.plan(options, start_frames, end_frame)
        require_frames_fit(plan.num_frames, plan.grid, instead="take those of rows() one by one")
        rows = self.rows(prompt, options, start_frames=start_frames, end_frame=end_frame)
        return Video(numpy.concatenate([row.frames for row in rows]), plan.fps)

    def plan(
        self,
        options: DiffusionForcingOptions,
        start_frames: ndarray | None = None,
        end_frame: ndarray | None = None,
    ) -> VideoPlan:
        """What rows would do, in host numbers; its row_count is how many there are. Raises ValueError for
        what the model cannot make and for given frames that do not fit."""
        count = 0
        if start_frames is not None:
            check_frames(start_frames)
            count = len(start_frames)
            if not count:
                raise ValueError("start_frames has 0 frames; give at least one, or none at all")
        plan = plan_video(self.config, options, count, end_frame is not None)
        check_given(plan, start_frames, end_frame)
        return plan

    def rows(
        self,
        prompt: str,
        options: DiffusionForcingOptions = _DEFAULTS,
        *,
        start_frames: ndarray | None = None,
        end_frame: ndarray | None = None,
    ) -> Iterator[DenoisedRow]:
        """Make a video of `prompt` row by row; the frames of all rows are its frames, in order.

        start_frames: uint8 [T, H, W, 3], T = 1 + a multiple of 4, a picture or a clip that the video begins
        with and that counts. end_frame: uint8 [H, W, 3], the picture it comes to, which is not part of it.
        Raises ValueError for what the model cannot make, RuntimeError where memory is too small.
        """
        check_prompt(prompt)
        plan = self.plan(options, start_frames, end_frame)
        if plan.guidance_scale > 1:
            check_prompt(plan.negative_prompt, "the negative prompt")
        longest, window = (
            max(counts) + (end_frame is not None)
            for counts in zip(*((piece.sizes.frames, piece.window) for piece in plan.pieces), strict=True)
        )
        require_window_fits(self.config, plan.grid, longest, window, self.model.dtype, self.model.device)
        warn_of_unknown_words(prompt, self.config.text.known_words)
        return self._in_own_state(self._rows(prompt, options, plan, start_frames, end_frame))

    def _in_own_state(self, rows: Iterator[DenoisedRow]) -> Iterator[DenoisedRow]:
        """The rows, computed under torch's own settings; between them the caller's are there."""
        while True:
            with own_state(), made_current(self.model.device):
                row = next(rows, None)
            if row is None:
                return
            yield row

    def _rows(
        self,
        prompt: str,
        options: DiffusionForcingOptions,
        plan: VideoPlan,
        start_frames: ndarray | None,
        end_frame: ndarray | None,
    ) -> Iterator[DenoisedRow]:
        flow = self._flow(prompt, plan)
        conditions = Conditions(
            None if start_frames is None else self._encode(pixels_from_frames(start_frames)),
            None if end_frame is None else self._encode(pixels_from_frames(end_frame[None])),
            options.addnoise_condition,
        )
        reencodes = len(plan.pieces) > 1 and not options.overlap_latents
        number = state_dtype(self.config.runtime, self.vae, self.model.dtype)
        place = torch.empty(0, dtype=number, device=next(self.vae.parameters()).device)
        decoder = PieceDecoder(
            self._open_decoder(plan.grid), plan.grid, place, self.config.cache.chunk_frames,
            plan.overlap_frames if reencodes else 0,
        )  # fmt: skip

        def next_prefix(latents: Tensor) -> Tensor:
            if reencodes:
                prefix = self._encode(decoder.tail)
                decoder.restart(plan.overlap_frames)
                return prefix
            repeated = plan.pieces[1].repeated
            decoder.continue_at(repeated)
            return latents[:, :, -repeated:]

        denoised, made = denoise_video(plan, flow, self._draw(options.seed, plan), conditions, next_prefix), 0
        for done, (index, row, latents) in enumerate(denoised):
            frames = decoder.decode(latents, row.finished, row is plan.pieces[index].rows[-1])
            frames = frames[: plan.num_frames - made]
            made += len(frames)
            yield DenoisedRow(done, plan.row_count, frames)

    def _flow(self, prompt: str, plan: VideoPlan) -> GuidedFlow:
        guided = plan.guidance_scale > 1
        return GuidedFlow(
            self.model,
            self._text(prompt),
            self._text(plan.negative_prompt) if guided else None,
            plan.guidance_scale,
            plan.fps,
            plan.block_frames,
        )

    def _text(self, prompt: str) -> TextKeysValues:
        states = self.text_encoder.encode([prompt], self.model.device, self.model.dtype)
        return self.model.text_keys_values(states)

    def _encode(self, pixels: Tensor) -> Tensor:
        """Latents, float32 on the model's device, of pixels [1, 3, T, H, W]."""
        latents = self.vae.encode_in_groups(pixels, self.config.cache.chunk_frames)
        return latents.float().to(self.model.device)

    def _draw(self, seed: int, plan: VideoPlan) -> Draw:
        """Noise from (seed, piece, step) alone; that of a frame does not depend on how many follow it."""
        sizes = (self.model.config.in_dim, plan.grid.latent_height, plan.grid.latent_width)

        def draw(piece: int, step: int, frames: int) -> Tensor:
            noise = chunk_noise(seed, piece, step, (frames, *sizes)).to(self.model.device)
            return noise.transpose(0, 1).unsqueeze(0).contiguous()

        return draw


def _refuse_options_of_streams(runtime: RuntimeConfig) -> None:
    """Raises ValueError for what is asked for and would change nothing, or cannot be."""
    for name in ("graphs", "overlap", "preset"):
        if getattr(runtime, name):
            raise ValueError(f"{name} is asked for and is for streams alone; leave it out")
    if runtime.precision == "fp8-attention":
        raise ValueError("precision is 'fp8-attention', which is for the window of a stream; use 'fp8'")
    if runtime.vae == "tensorrt":
        raise ValueError(
            "vae is 'tensorrt', whose engines decode the chunks of a stream; use 'full' or 'tiny'"
        )
