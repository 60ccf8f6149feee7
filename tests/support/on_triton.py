"""Models of a size that Triton's interpreter can run, and the same models on the Triton kernels."""

from __future__ import annotations

from rfengine.config import WanConfig
from rfengine.models.dit import WanDiT
from rfengine.ops import choose_ops
from support.bits import DEVICE

# the attention kernel has a head dim of 64 or 128
ONE_HEAD = WanConfig(64, 64, 1, 1, text_dim=16, text_len=8, freq_dim=16, in_dim=4, out_dim=4)


def on_triton(model: WanDiT) -> WanDiT:
    """A copy of the model on the Triton kernels."""
    copied = WanDiT(model.config, choose_ops("triton", DEVICE)).to(DEVICE).eval()
    copied.load_state_dict(model.state_dict())
    return copied
