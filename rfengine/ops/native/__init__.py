"""The kernels of csrc/, each with its checks and its launch. Importing this needs torch alone."""

from __future__ import annotations

from rfengine.ops.native import convolution
from rfengine.ops.native.convolution import causal_conv3d
from rfengine.ops.native.driver import FATBIN, Driver, absence, load_driver
from rfengine.ops.native.eviction import evict_and_rephase

__all__ = [
    "FATBIN", "Driver", "absence", "causal_conv3d", "convolution", "evict_and_rephase", "load_driver",
]  # fmt: skip
