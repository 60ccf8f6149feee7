"""Engine: the loaded models and what runs them, shared by all streams of a pipeline."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rfengine.config import EngineConfig
from rfengine.config_json import to_dict
from rfengine.memory import keep_freed_memory
from rfengine.models.dit import WanDiT
from rfengine.models.vae import WanVAE
from rfengine.prompt_blend import weighted_mean
from rfengine.prompts import Prompt, warn_of_unknown_words, weighted_texts
from rfengine.runtime.adapted_weights import AdaptedWeights
from rfengine.runtime.chunk_runner import ChunkRunner
from rfengine.runtime.decode_worker import DecodeQueue
from rfengine.runtime.decoder_precision import decoder_name, state_dtype
from rfengine.runtime.decoders import OpenDecoder
from rfengine.runtime.model_precision import precision_setting, require_settled
from rfengine.runtime.options import runtime_switches
from rfengine.runtime.rolling_runner import runner_of
from rfengine.runtime.turns import Turns

if TYPE_CHECKING:
    from rfengine.models.text_encoder import TextEncoder


@dataclass(frozen=True, slots=True)
class Engine:
    """The loaded models and what runs them, shared by all streams of a pipeline.

    open_decoder returns the decoder of one size; vae encodes; both are on the queue's device. queue.overlap:
    streams compute one chunk ahead. compute_stream: the CUDA stream of all denoising then, of a higher
    priority than the queue's. turns: held by the one stream that uses the engine; graphs, halos and the queue
    serve one at a time. adapted: the LoRAs in the transformer's weights. Nothing here may refer to the
    pipeline: a circle would keep the models until Python's collector runs.
    """

    config: EngineConfig
    model: WanDiT
    vae: WanVAE
    text_encoder: TextEncoder
    fingerprint: str
    open_decoder: OpenDecoder
    queue: DecodeQueue
    runner: ChunkRunner
    turns: Turns
    adapted: AdaptedWeights
    compute_stream: torch.cuda.Stream | None = None

    @classmethod
    def of(
        cls,
        config: EngineConfig,
        model: WanDiT,
        vae: WanVAE,
        text_encoder: TextEncoder,
        fingerprint: str,
        open_decoder: OpenDecoder,
    ) -> Engine:
        """The engine of loaded models, with the runtime options of `config` resolved for their devices.
        Raises ValueError for a model whose weights are not in the precision of `config`."""
        require_settled(config.runtime, model)
        keep_freed_memory()
        switches = runtime_switches(config.runtime, model.device)
        overlap, graphs = switches["overlap"].on, switches["graphs"].on
        queue = DecodeQueue(next(vae.parameters()).device, overlap, graphs)
        runner = runner_of(model, config.schedule, graphs, config.fp8_passes)
        beside = overlap and model.device.type == "cuda"
        stream = torch.cuda.Stream(model.device, priority=-1) if beside else None
        adapted = AdaptedWeights(runner, turns := Turns(), stream)
        return cls(
            config, model, vae, text_encoder, fingerprint, open_decoder, queue, runner, turns, adapted, stream
        )

    def encode_text(self, prompt: Prompt) -> Tensor:
        """Text states [1, text_len, text_dim] of one prompt. Raises ValueError for what is no prompt."""
        texts = weighted_texts(prompt)
        for each in texts:
            warn_of_unknown_words(each.text, self.config.text.known_words)
        states = self.text_encoder.encode([each.text for each in texts], self.model.device, self.model.dtype)
        return weighted_mean(states, [each.weight for each in texts])

    @property
    def decoder_dtype(self) -> torch.dtype:
        """Of the decoder's state; an engine of TensorRT has its own."""
        return state_dtype(self.config.runtime, self.vae, self.model.dtype)

    def settings(self) -> dict[str, Any]:
        """What a snapshot and the engine that restores it must agree on, as JSON values."""
        precision = precision_setting(self.config, self.model)
        return {
            "fingerprint": self.fingerprint,
            "dtype": str(self.model.dtype),
            "decoder": decoder_name(self.config.runtime.vae, self.decoder_dtype, self.model.dtype),
            "cache": json.loads(json.dumps(to_dict(self.config.cache))),
            "denoising_timesteps": list(self.runner.schedule.denoising_timesteps),
            "first_timesteps": list(self.runner.schedule.first_timesteps),
            "rolling": self.config.schedule.rolling,
            **({"precision": precision} if precision else {}),
            **({"loras": loras} if (loras := self.adapted.settings()) else {}),
        }
