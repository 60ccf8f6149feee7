"""What the decoder of the causal VAE computes and moves, counted from its own code on the meta device.

No table of layers is kept here: WanVAE.decode runs without data, every product that it dispatches is counted
by torch's FLOP formulas, and its place in the module tree gives the stage.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.module_tracker import ModuleTracker

from rfengine.config import VAEConfig
from rfengine.grid import LatentGrid
from rfengine.models.streaming_decoder import StreamingDecoder
from rfengine.models.vae import ChannelNorm, ResidualBlock, Upsample, WanVAE
from rfengine.ops import REFERENCE_OPS

aten = torch.ops.aten


@dataclass
class ProductWork:
    """One convolution or one attention of the VAE, or the sum of several.

    flops: two for each multiply-add. read_elements: inputs and weights once. written_elements: results once.
    """

    flops: int = 0
    read_elements: int = 0
    written_elements: int = 0

    @property
    def multiply_adds(self) -> int:
        return self.flops // 2


@dataclass
class VAEWork:
    """Work of one call. Paths are those of the modules, such as decoder.upsamples.3.time_conv.

    norm_elements: those a norm with its SiLU reads, and as many it writes, by path. copied_elements: read and
    written by torch.cat and copy_ for the history in front of temporal convolutions, and by upsampling.
    stages: the stage that a path belongs to, for every path. large: the paths that are in e4m3 with FP8
    convolutions: those that StreamingDecoder puts into it, and the norms before them.
    """

    products: dict[str, ProductWork] = field(default_factory=dict)
    norm_elements: Counter[str] = field(default_factory=Counter)
    copied_elements: int = 0
    stages: dict[str, str] = field(default_factory=dict)
    large: frozenset[str] = frozenset()

    @property
    def multiply_adds(self) -> int:
        return sum(work.multiply_adds for work in self.products.values())


@lru_cache(maxsize=8)
def decode_work(config: VAEConfig, grid: LatentGrid, frames: int, first: bool) -> VAEWork:
    """Work of decoding `frames` latent frames in one call; first: the video begins with them. All callers
    share the result: it is not to be changed."""
    size = (grid.latent_height, grid.latent_width)
    with torch.device("meta"):
        vae = WanVAE(config).requires_grad_(False)
    latents = torch.empty(1, config.z_dim, frames, *size, dtype=torch.float32, device="meta")
    state = vae.decoder_state(1, *size, torch.float32, "meta")
    state.frames = 0 if first else 1
    work, tracker = VAEWork(), ModuleTracker()

    def count_norm(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        work.norm_elements[_current(tracker)] += inputs[0].numel()

    for module in vae.decoder.modules():
        if isinstance(module, ChannelNorm):
            module.register_forward_pre_hook(count_norm)
    with torch.no_grad(), tracker, _Tally(work, tracker):
        vae.decode(latents, state)
    work.stages = {path: _stage(path, vae.decoder) for path in (*work.products, *work.norm_elements)}
    work.large = frozenset(_large_paths(vae))
    return work


def _large_paths(vae: WanVAE) -> Iterator[str]:
    slots = StreamingDecoder(vae, REFERENCE_OPS, "fp8").fp8_slots
    for name, block in vae.decoder.named_modules():
        if isinstance(block, ResidualBlock):
            for norm, convolution in (("0", "2"), ("3", "6")):
                if block.residual[convolution].slot in slots:
                    yield from (f"decoder.{name}.residual.{key}" for key in (norm, convolution))


def _current(tracker: ModuleTracker) -> str:
    """Path of the innermost module that runs; what is outside of the decoder is the 1x1 convolution."""
    inside = [path for path in tracker.parents if path.startswith("Decoder.")]
    return max(inside, key=len).replace("Decoder", "decoder", 1) if inside else "conv2"


class _Tally(TorchDispatchMode):
    """Adds every product and every copy that is dispatched to `work`."""

    def __init__(self, work: VAEWork, tracker: ModuleTracker) -> None:
        from torch.utils.flop_counter import flop_registry  # it imports triton

        super().__init__()
        self.work, self.tracker, self.formulas = work, tracker, flop_registry

    def __torch_dispatch__(
        self,
        func: Any,
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        op = func.overloadpacket
        if op in self.formulas:
            work = self.work.products.setdefault(_current(self.tracker), ProductWork())
            work.flops += self.formulas[op](*args, **kwargs, out_val=out)
            # the scores between the two products of an attention stay on chip: q and k go in, v in, out out
            attends = op == aten.bmm
            work.read_elements += (args[0].numel() if not attends else 0) + args[1].numel()
            work.written_elements += out.numel() if not attends else args[1].numel()
        elif op in (aten.cat, aten.copy_):
            self.work.copied_elements += 2 * out.numel()
        elif op == aten.upsample_nearest2d:
            self.work.copied_elements += args[0].numel() + out.numel()
        return out


def _stage(path: str, decoder: nn.Module) -> str:
    """The stage of a path: input, middle, head, or that of the resolution, counted from the latents."""
    if path in ("conv2", "decoder.conv1"):
        return "input"
    _, name, *rest = path.split(".")
    if name != "upsamples":
        return name
    return f"stage {sum(isinstance(module, Upsample) for module in list(decoder.upsamples)[: int(rest[0])])}"
