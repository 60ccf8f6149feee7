"""Pipeline: loads a model once, then makes videos and streams from prompts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex

import torch
from torch import Tensor

from rfengine.checkpoint.checkpoint import Checkpoint
from rfengine.checkpoint.lora import Lora, load_loras
from rfengine.checkpoint.shapes import expected_shapes
from rfengine.checkpoint.systems import SystemName, configured
from rfengine.clip import ClipMode
from rfengine.config import Backend, CacheConfig, DTypeName, EngineConfig, RuntimeConfig
from rfengine.costs.memory import memory_needs, require_frames_fit, require_stream_fits, stream_bytes
from rfengine.costs.shapes import require_stream
from rfengine.diffusers_call import (
    Generators,
    OutputType,
    PipelineOutput,
    make_video,
    packed,
    refuse_guidance,
    requested_videos,
)
from rfengine.frame_chunk import FrameChunk
from rfengine.grid import LatentGrid
from rfengine.host_state import own_state
from rfengine.limits import as_integer, shown
from rfengine.models.dit import WanDiT
from rfengine.models.vae import WanVAE
from rfengine.prompts import Prompt, prompt_line
from rfengine.rehearsal import rehearse
from rfengine.runtime.card_loading import PresetRequest, load_under_preset
from rfengine.runtime.decoders import OpenDecoder, full_opener, tier_of
from rfengine.runtime.engine import Engine
from rfengine.runtime.loaded_models import Placement, load_models
from rfengine.runtime.loaded_transformer import refuse_loras
from rfengine.runtime.model_precision import products_left_out
from rfengine.runtime.ranks import (
    equal_loras,
    equal_ops,
    join,
    must_be_equal,
    on_all,
    rank_device,
    require_divisible,
)
from rfengine.schedule import as_seed
from rfengine.snapshot import Snapshot
from rfengine.stream import VideoStream
from rfengine.video import DEFAULT_NUM_FRAMES, Video, frame_count

if TYPE_CHECKING:
    from numpy import ndarray

    from rfengine.models.text_encoder import TextEncoder


class Pipeline:
    """The loaded models of one checkpoint, which make videos and streams.

    All streams share the models; each stream has its own cache, decoder state and noise. open_decoder returns
    the decoder of config.runtime.vae for one size; without it the full one is used, in the dtype that the
    decoder of `vae` has. Clips are encoded in its encoder's dtype: float32 from from_pretrained.

    Several threads may use a pipeline: calls take turns, a chunk of a stream each (VideoStream). On CUDA
    without overlap all of them must have the same current stream, as threads have by default. The models are
    freed as soon as the last reference to the pipeline and its streams goes.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: WanDiT,
        vae: WanVAE,
        text_encoder: TextEncoder,
        fingerprint: str,
        open_decoder: OpenDecoder | None = None,
    ) -> None:
        self.config = config
        self.model = model
        self.vae = vae
        with own_state():
            place = next(vae.parameters()).device
            open_decoder = open_decoder or full_opener(config, vae, place)
            self._engine = Engine.of(config, model, vae, text_encoder, fingerprint, open_decoder)

    @classmethod
    @own_state()
    def from_pretrained(
        cls,
        source: str | Path | Checkpoint = "tiny",
        device: str | torch.device | None = None,
        dtype: DTypeName | torch.dtype | None = None,
        *,
        text_device: str | torch.device | None = None,
        text_cache: str | Path | None = None,
        system: SystemName | None = None,
        cache: CacheConfig | None = None,
        backend: Backend | None = None,
        runtime: RuntimeConfig | None = None,
        loras: Sequence[Lora | str | Path] = (),
        tensor_parallel: int = 1,
        size: tuple[int, int] | None = None,
    ) -> Pipeline:
        """Load "tiny", which comes with the package, a checkpoint directory (README, published weights) or
        an open Checkpoint.

        device: "cuda" where there is one, else "cpu". dtype: bfloat16 on CUDA, else float32; that of the
        VAE's decoder follows runtime.vae_precision, and its encoder is in float32. text_device: of the text
        encoder; "cpu" keeps it off the GPU. text_cache: directory that keeps text states by prompt. system:
        the cache and the denoising steps of a published system, in place of the checkpoint's; cache, backend,
        runtime: replace its own. loras: see set_loras. tensor_parallel: the processes that torchrun started,
        which hold the transformer together (docs/several_cards.md). All make the same calls; the first one's
        chunks have the frames. size: height and width in place of the checkpoint's, which runtime.preset then
        may not make smaller.
        Raises ValueError when the directory, a file, a tensor or a setting is not what the engine needs, and
        for a diffusion forcing model, RuntimeError when the backend or a part of the runtime cannot run on
        the device, or no preset fits into its memory.
        """
        checkpoint = source if isinstance(source, Checkpoint) else Checkpoint.open(source)
        require_stream(checkpoint.config)
        config = checkpoint.config if system is None else configured(checkpoint.config, system)
        config = _with_given(config, cache, backend, runtime, size)
        count = require_divisible(tensor_parallel, config)
        place = Placement.of(config.runtime, rank_device(device, count), dtype, text_device)
        parallel = join(count, place.device)
        place = replace(place, decoding=place.device) if parallel.rank else place  # which decode nothing
        request = PresetRequest(checkpoint, place, bool(loras), size is None)

        def load(config: EngineConfig) -> Pipeline:
            with on_all(parallel) as equal:
                refuse_loras(config.runtime, loras)
                left_out = products_left_out(checkpoint, config.runtime)
                loaded = load_loras(loras, expected_shapes(config.model))
                if parallel.divides:
                    equal |= must_be_equal(checkpoint, config, place.dtype, place.device, left_out, loaded)
            ops = equal_ops(config, place.dtype, place.device, parallel)
            with on_all(parallel):
                models = load_models(checkpoint, config, ops, place, text_cache, left_out, parallel)
                parts = models.transformer, models.vae, models.text_encoder
                pipeline = cls(config, *parts, checkpoint.fingerprint(), models.open_decoder)
            pipeline._engine.adapted.apply(loaded)
            if is_auto:
                rehearse(pipeline._engine)
            return pipeline

        is_auto = config.runtime.preset == "auto"
        return load_under_preset(config, request, load)

    @property
    def text_encoder(self) -> TextEncoder:
        """The text encoder of streams that are opened from now on."""
        return self._engine.text_encoder

    @text_encoder.setter
    def text_encoder(self, text_encoder: TextEncoder) -> None:
        self._engine = replace(self._engine, text_encoder=text_encoder)

    @property
    def backend(self) -> str:
        """The backends that run the model's ops."""
        return ", ".join(sorted(set(self.model.ops.choice.values())))

    @property
    def has_frames(self) -> bool:
        """Whether its chunks have frames: of several ranks, those of the first."""
        return self.model.parallel.rank == 0

    @property
    def vae_tier(self) -> str:
        """Quality of the frames: "lossless" with the full decoder (in TensorRT too), "near-lossless" with
        its FP8 convolutions, "reduced" with tiny."""
        return tier_of(self.config.runtime)

    @property
    def vae_dtype(self) -> torch.dtype:
        """The dtype of the decoder's weights and states; an engine of TensorRT has its own."""
        return self._engine.decoder_dtype

    @property
    def loras(self) -> tuple[Lora, ...]:
        """The LoRAs in the transformer's weights, see set_loras."""
        return tuple(each.lora for each in self._engine.adapted.loras)

    def set_loras(self, loras: Sequence[Lora | str | Path]) -> None:
        """Merge these LoRAs into the transformer's weights, in place of those before; () removes all.

        Streams take them from their next chunk on, or the one after a chunk that is ahead; the window keeps
        its keys and values, unless set_prompt with the same prompt and "recache" recomputes them. A weight
        depends on the list alone (AdaptedWeights). A LoRA that stays is not read again, whatever its scale,
        unless its files are others now. After an error, ValueError or RuntimeError, all is as it was.
        """
        with on_all(self.model.parallel) as equal:
            refuse_loras(self.config.runtime, loras)
            loaded = self._engine.adapted.load(loras)
            equal["LoRAs"] = equal_loras(loaded)
        self._engine.adapted.apply(loaded)

    def to(self, device: str | torch.device) -> Pipeline:
        """The pipeline itself if it is on `device`, for scripts written for Diffusers; loaded weights do not
        move (ValueError)."""
        own = self.model.device
        if str(device) not in {own.type, str(own)}:
            raise ValueError(
                f"the pipeline is on {own} and does not move to {shown(device)}; load it with "
                "from_pretrained(source, device=...)"
            )
        return self

    def stream(
        self,
        prompt: Prompt,
        *,
        seed: SupportsIndex = 0,
        height: int | None = None,
        width: int | None = None,
        start_frames: ndarray | None = None,
        start_mode: ClipMode = "chunks",
    ) -> VideoStream:
        """An endless stream of `prompt`. start_frames, uint8 [T, H, W, 3]: a clip that it continues, or one
        picture, as VideoStream.continue_from does in start_mode.

        Raises ValueError for an impossible size or seed, RuntimeError where memory is too small.
        """
        with self._engine.turns, own_state():
            with on_all(self.model.parallel) as equal:
                number, line = as_seed(seed), prompt_line(prompt)
                grid = LatentGrid.of(self.config, height, width)
                devices = (self.model.device, self._engine.queue.device)
                require_stream_fits(self._own_config, grid, self.model.dtype, devices)
                equal |= {"prompt": line, "seed": number, "height": grid.height, "width": grid.width}
                equal["beginning"] = None if start_frames is None else "a clip"
            states = self._engine.encode_text(prompt)
            stream = VideoStream(self._engine, grid, line, states, number)
            if start_frames is not None:
                stream.continue_from(start_frames, start_mode)
        return stream

    def restore(self, snapshot: Snapshot, any_loras: bool = False) -> VideoStream:
        """The stream of `snapshot`, at the moment it was taken; several streams may continue one snapshot.

        any_loras: where they are others now, go on under those, as a running stream does. Raises ValueError
        where it is damaged, or of another model or setting, which without any_loras the LoRAs are too.
        """
        with on_all(self.model.parallel):
            info = snapshot.stream_info()
            grid = LatentGrid.of(self.config, info.height, info.width)
        with self._engine.turns, own_state():
            return VideoStream.from_snapshot(self._engine, grid, snapshot, any_loras)

    def synchronize(self) -> None:
        """Return once everything that was begun is done on the devices and decoded, as a clock needs it."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        self._engine.queue.synchronize()

    def settings(self) -> dict[str, Any]:
        """What two pipelines agree on that make the same video: fingerprint, dtypes, cache, steps, LoRAs."""
        return self._engine.settings()

    def stream_bytes(self, height: int | None = None, width: int | None = None) -> int:
        """Bytes that one more stream of that size keeps; nothing is allocated."""
        grid = LatentGrid.of(self.config, height, width)
        return stream_bytes(memory_needs(self._own_config, grid, self.model.dtype, self.vae_dtype))

    @property
    def _own_config(self) -> EngineConfig:
        """With the heads that this rank has."""
        return replace(self.config, model=self.model.parallel.own(self.config.model))

    def chunk_count(self, num_frames: int) -> int:
        """Chunks from the start of a video that have at least `num_frames` pixel frames."""
        count = as_integer("num_frames", num_frames)
        return self.config.cache.chunk_count(LatentGrid.of(self.config).latent_frames(count))

    def generate(
        self,
        prompt: Prompt,
        seconds: float | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        seed: SupportsIndex = 0,
        on_chunk: Callable[[FrameChunk], None] | None = None,
    ) -> Video:
        """A video of `prompt`, 81 frames long unless seconds or num_frames is given.

        on_chunk is called with each FrameChunk as it is made. Raises RuntimeError where the frames, which are
        all held, need more memory than is free.
        """
        import numpy

        with on_all(self.model.parallel):
            count = frame_count(self.config.fps, seconds, num_frames)
            require_frames_fit(count, LatentGrid.of(self.config, height, width))
        stream = self.stream(prompt, seed=seed, height=height, width=width)
        pieces = []
        for chunk in stream.take(self.chunk_count(count)):
            pieces.append(chunk.frames)
            if on_chunk is not None:
                on_chunk(chunk)
        return Video(numpy.concatenate(pieces)[:count], self.config.fps)

    def __call__(
        self,
        prompt: str | list[str],
        num_frames: int = DEFAULT_NUM_FRAMES,
        height: int | None = None,
        width: int | None = None,
        generator: Generators | None = None,
        seed: SupportsIndex | None = None,
        output_type: OutputType = "np",
        callback_on_step_end: Callable[[Pipeline, int, float, dict[str, Tensor]], Any] | None = None,
        *,
        num_videos_per_prompt: int = 1,
        negative_prompt: str | None = None,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        return_dict: bool = True,
    ) -> PipelineOutput:
        """Generate with the arguments and the result of a Diffusers pipeline.

        frames of the result, the videos of one prompt together: "np" float [B, T, H, W, 3] in [0, 1], "pt"
        float tensor [B, T, 3, H, W] in [0, 1], "pil" a list of lists of images, "latent" tensor [B, C, F, h,
        w], normalised.
        generator: draws the seeds and advances, or a list with one for each video; give it or seed, which
        counts up over the videos of one prompt.
        callback_on_step_end(pipeline, step, timestep, {"latents": ...}) is called after each denoising step,
        counted over all chunks; "latents" of a dictionary that it returns replace the step's.
        The model is distilled: guidance and another number of steps are refused (ValueError). return_dict
        changes nothing: the result is a tuple with a named entry.
        """
        if output_type not in ("np", "pt", "pil", "latent"):
            raise ValueError(f"output_type is {output_type!r}; use 'np', 'pt', 'pil' or 'latent'")
        own_steps = self._engine.runner.num_steps
        refuse_guidance(negative_prompt, guidance_scale, num_inference_steps, own_steps)
        count = frame_count(self.config.fps, num_frames=num_frames)
        wanted = requested_videos(prompt, num_videos_per_prompt, generator, seed)
        if output_type != "latent":
            with on_all(self.model.parallel):
                grid = LatentGrid.of(self.config, height, width)
                require_frames_fit(len(wanted) * count, grid, as_floats=output_type != "pil")
        on_step = None if callback_on_step_end is None else functools.partial(callback_on_step_end, self)
        videos = []
        for text, number in wanted:
            stream = self.stream(text, seed=number, height=height, width=width)
            chunks = self.chunk_count(count)
            videos.append(make_video(stream, count, chunks, output_type == "latent", on_step))
        return PipelineOutput(packed(videos, output_type))


def _with_given(
    config: EngineConfig,
    cache: CacheConfig | None,
    backend: Backend | None,
    runtime: RuntimeConfig | None,
    size: tuple[int, int] | None,
) -> EngineConfig:
    """`config` with what is given in place of its own."""
    height, width = size or (config.height, config.width)
    config = replace(config, cache=cache or config.cache, height=height, width=width)
    return replace(config, backend=backend or config.backend, runtime=runtime or config.runtime)
