"""The machine code of csrc/ for Hopper, as CMake builds it: registers, spills, shared memory, instructions."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EVICTIONS = {f"evict_and_rephase_{suffix}" for suffix in ("bf16", "f16", "f32")}
CONVOLUTIONS = {f"causal_conv3d_{columns}_{suffix}" for columns in (96, 192) for suffix in ("bf16", "f16")}
MOST_REGISTERS = 80  # of a thread, with which 3 blocks of 256 threads still share a multiprocessor
START_REGISTERS = 168  # of a thread, which 384 of a block can have
COPY_REGISTERS, PRODUCT_REGISTERS = 24, 240  # of a thread that copies, and of one that multiplies
