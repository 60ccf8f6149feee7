"""Each layer of the streaming decoder: how long it takes, and its floor.

A layer is a residual block, the attention, or a doubling. The floor counts what vae_work.py counts for it,
but for the doubling of the size, which is done in 4 of 9 products and reads its input at the small size.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from vae_decoders import Setting

from rfengine.costs.chunk import Part
from rfengine.costs.rates import GPU, floor_ms
from rfengine.costs.vae import decode_work
from rfengine.models.streaming_decoder import StreamingDecoder
from rfengine.models.vae import Upsample

AHEAD_CYCLES = 50_000_000  # that the device waits for, about 30 ms: the host has launched everything by then
REST = "first and last convolution, frames"


@dataclass(frozen=True)
class LayerTime:
    """Median milliseconds of one layer in one chunk; its floor where the device's rates are known."""

    layer: str
    ms: float
    floor_ms: float | None
    gflop: float

    def to_dict(self) -> dict[str, Any]:
        share = self.floor_ms / self.ms if self.floor_ms and self.ms else None
        return {
            "layer": self.layer, "ms": self.ms, "floor_ms": self.floor_ms, "share_of_floor": share,
            "gflop": self.gflop,
        }  # fmt: skip


def layer_paths(setting: Setting) -> Iterator[str]:
    """Paths of the layers of StreamingDecoder, in the order they run."""
    decoder = setting.vae.decoder
    for group in ("middle", "upsamples"):
        for index, block in enumerate(getattr(decoder, group)):
            path = f"decoder.{group}.{index}"
            if not isinstance(block, Upsample):
                yield path
                continue
            if block.time_conv is not None:
                yield f"{path}.time_conv"
            yield f"{path}.resample"


def layer_parts(setting: Setting, frames: int, fp8: bool = False) -> dict[str, list[Part]]:
    """What each layer computes and moves for a chunk of `frames` latents later than the first; REST last."""
    work = decode_work(setting.config.vae, setting.grid, frames, False)
    item = setting.dtype.itemsize
    eights = fp8_paths(setting) if fp8 else frozenset()
    parts: dict[str, list[Part]] = {path: [] for path in (*layer_paths(setting), REST)}

    def add(path: str, flops: int, moved: int) -> None:
        layer = next((one for one in parts if path == one or path.startswith(f"{one}.")), REST)
        parts[layer].append(Part("VAE decode", layer, flops, moved, path in eights, decodes=True))

    for path, product in work.products.items():
        is_eight = path in eights
        if path.endswith("resample.1"):
            moved = item * (product.read_elements // 4 + product.written_elements)
            add(path, product.flops * 4 // 9, moved)
        else:
            moved = (1 if is_eight else item) * product.read_elements + item * product.written_elements
            add(path, product.flops, moved)
    for path, elements in work.norm_elements.items():
        add(path, 0, 2 * item * elements)
    return parts


def fp8_paths(setting: Setting) -> frozenset[str]:
    decoder = StreamingDecoder(setting.vae, setting.ops("fp8"), "fp8")
    return frozenset(f"decoder.{slot}" for slot in decoder.fp8_slots)


def floor_of(parts: list[Part], gpu: GPU | None) -> float | None:
    return None if gpu is None else sum(floor_ms(part, gpu) for part in parts)


def measure_layers(setting: Setting, latents: list[Tensor], gpu: GPU | None) -> list[LayerTime]:
    """Times of the layers over the chunks of `latents`, of which the first two only warm up."""
    decoder = StreamingDecoder(setting.vae, setting.ops())
    state = setting.state_of(decoder)
    marks = _Marks(setting.device)
    samples: list[list[float]] = []
    layers = [marks.around(layer) for layer in decoder._layers]
    with patch.object(decoder, "_layers", layers):
        for place, chunk in enumerate(latents):
            if setting.device.type == "cuda":
                torch.cuda._sleep(AHEAD_CYCLES)
            marks.start()
            decoder.decode_frames(chunk, state)
            times = marks.stop()
            if place >= 2:
                samples.append(times)
    medians = [statistics.median(values) for values in zip(*samples, strict=True)]
    parts = layer_parts(setting, latents[-1].shape[2])
    return [
        LayerTime(name, ms, floor_of(held, gpu), sum(part.flops for part in held) / 1e9)
        for (name, held), ms in zip(parts.items(), medians, strict=True)
    ]


class _Marks:
    """Times between marks on the device: of each layer, and of what is outside of all."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._pairs: list[tuple[Any, Any]] = []
        self._began: Any = None

    def around(self, layer: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            before = self._mark()
            result = layer(*arguments)
            self._pairs.append((before, self._mark()))
            return result

        return timed

    def start(self) -> None:
        self._pairs.clear()
        self._began = self._mark()

    def stop(self) -> list[float]:
        """Milliseconds of each layer since start, then of the rest."""
        ended = self._mark()
        if self._on_cuda:
            torch.cuda.synchronize()
        inside = [self._ms(before, after) for before, after in self._pairs]
        return [*inside, self._ms(self._began, ended) - sum(inside)]

    def _mark(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _ms(self, before: Any, after: Any) -> float:
        return before.elapsed_time(after) if self._on_cuda else (after - before) * 1e3
