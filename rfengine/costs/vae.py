"""What the causal VAE computes and moves, counted from its own code: it is run once on the meta device.

No table of layers is kept here: WanVAE.decode and WanVAE.encode run without data, every product that they
dispatch is counted by torch's FLOP formulas, and its place in the module tree tells the stage.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.module_tracker import ModuleTracker

from rfengine.config import VAEConfig
from rfengine.grid import LatentGrid
from rfengine.models.decoder import CausalState
from rfengine.models.vae import RGB_CHANNELS, ChannelNorm, Downsample, Upsample, WanVAE

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
    stages: the stage that a path belongs to, for every path.
    """

    products: dict[str, ProductWork] = field(default_factory=dict)
    norm_elements: Counter[str] = field(default_factory=Counter)
    copied_elements: int = 0
    stages: dict[str, str] = field(default_factory=dict)

    @property
    def multiply_adds(self) -> int:
        return sum(work.multiply_adds for work in self.products.values())

    def stage_multiply_adds(self) -> dict[str, int]:
        """Multiply-adds of each stage, in the order they run."""
        sums: Counter[str] = Counter()
        for path, work in self.products.items():
            sums[self.stages[path]] += work.multiply_adds
        return dict(sums)


def decode_work(config: VAEConfig, grid: LatentGrid, frames: int, first: bool) -> VAEWork:
    """Work of decoding `frames` latent frames in one call; first: the video begins with them."""
    vae = _meta_vae(config)
    latents = torch.empty(
        1, config.z_dim, frames, grid.latent_height, grid.latent_width, dtype=torch.float32, device="meta"
    )
    state = vae.decoder_state(1, grid.latent_height, grid.latent_width, torch.float32, "meta")
    return _count(partial(vae.decode, latents), state, vae.decoder, first)


def encode_work(config: VAEConfig, grid: LatentGrid, frames: int, first: bool) -> VAEWork:
    """Work of encoding to `frames` latent frames in one call; first: the video begins with them."""
    vae = _meta_vae(config)
    pixel_frames = grid.pixel_frames(frames) if first else frames * grid.temporal_stride
    pixels = torch.empty(
        1, RGB_CHANNELS, pixel_frames, grid.height, grid.width, dtype=torch.float32, device="meta"
    )
    state = vae.encoder_state(1, grid.latent_height, grid.latent_width, torch.float32, "meta")
    return _count(partial(vae.encode, pixels), state, vae.encoder, first)


def _meta_vae(config: VAEConfig) -> WanVAE:
    with torch.device("meta"):
        return WanVAE(config).requires_grad_(False)


def _count(run: Callable[..., Tensor], state: CausalState, half: nn.Module, first: bool) -> VAEWork:
    state.frames = 0 if first else 1
    work = VAEWork()
    paths = _Paths(half)

    def count_norm(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        work.norm_elements[paths.current()] += inputs[0].numel()

    hooks = [
        module.register_forward_pre_hook(count_norm)
        for module in half.modules()
        if isinstance(module, ChannelNorm)
    ]
    with torch.no_grad(), paths.tracker, _Tally(work, paths):
        run(state)
    for hook in hooks:
        hook.remove()
    work.stages = {path: _stage(path, half) for path in (*work.products, *work.norm_elements)}
    return work


class _Paths:
    """Path of the innermost module that runs; what is outside of encoder and decoder is the 1x1 conv."""

    def __init__(self, half: nn.Module) -> None:
        self.tracker = ModuleTracker()
        self.root = type(half).__name__
        self.outside = "conv1" if self.root == "Encoder" else "conv2"

    def current(self) -> str:
        inside = [path for path in self.tracker.parents if path.startswith(f"{self.root}.")]
        return max(inside, key=len).replace(self.root, self.root.lower(), 1) if inside else self.outside


class _Tally(TorchDispatchMode):
    """Adds every product and every copy that is dispatched to `work`."""

    def __init__(self, work: VAEWork, paths: _Paths) -> None:
        from torch.utils.flop_counter import flop_registry  # it imports triton

        super().__init__()
        self.work, self.paths, self.formulas = work, paths, flop_registry

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
            work = self.work.products.setdefault(self.paths.current(), ProductWork())
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


def _stage(path: str, half: nn.Module) -> str:
    """The stage of a path: input, middle, head, or that of the resolution, counted from the inner end."""
    if path in ("conv1", "conv2"):
        return "output" if path == "conv1" else "input"
    _, name, *rest = path.split(".")
    if name not in ("upsamples", "downsamples"):
        return "input" if name == "conv1" else name
    before = list(getattr(half, name))[: int(rest[0])]
    return f"stage {sum(isinstance(module, Upsample | Downsample) for module in before)}"
