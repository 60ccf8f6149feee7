"""Every cache policy and schedule of the engine, at small sizes."""

from __future__ import annotations

import dataclasses

from rfengine.config import CacheConfig, ScheduleConfig
from support.models import TWO_STEPS

ONE = ScheduleConfig(denoising_steps=(1000,))
ONE_AFTER_FOUR = dataclasses.replace(ONE, first_steps=(1000, 750, 500, 250))
FOUR_FIRST = dataclasses.replace(ONE_AFTER_FOUR, first_chunks=4)
MEMORY = CacheConfig(3, 12, "frozen", 3, memory_rates=(0.01, 0.1))
SYSTEMS = {
    "none": (CacheConfig(sink="none", sink_frames=0), TWO_STEPS),
    "frozen absolute": (CacheConfig(sink="frozen", positions="absolute"), TWO_STEPS),
    "ema": (CacheConfig(alpha=0.8), TWO_STEPS),
    "ema over a wrap": (CacheConfig(3, 10, "ema", 3, alpha=0.8), TWO_STEPS),
    "ema of one sink frame": (CacheConfig(3, 9, "ema", 1, alpha=0.8), TWO_STEPS),
    "ema of a sink longer than the chunk": (CacheConfig(2, 11, "ema", 5, alpha=0.8), TWO_STEPS),
    "ema frame by frame": (CacheConfig(1, 7, "ema", 3, alpha=0.8), ONE),
    "memory": (MEMORY, TWO_STEPS),
    "memory without sink": (CacheConfig(2, 8, "none", 0, memory_rates=(0.2,)), TWO_STEPS),
    "deep sink": (CacheConfig(3, 12, "frozen", 7), TWO_STEPS),
    "window 18, sink 6, chunk 4": (CacheConfig(4, 18, "frozen", 6), ONE),
    "sink 5, window 7": (CacheConfig(1, 7, "frozen", 5), ONE),
    "similarity": (CacheConfig(3, 12, "frozen", 3, eviction="similarity"), TWO_STEPS),
    "similarity without sink": (CacheConfig(1, 6, "none", 0, eviction="similarity"), ONE),
    "first chunk of one frame": (CacheConfig(3, 9, "frozen", 3, first_chunk_frames=1), TWO_STEPS),
    "ema after a first chunk of one frame": (CacheConfig(alpha=0.8, first_chunk_frames=1), TWO_STEPS),
    "first chunk of four frames": (CacheConfig(1, 7, "none", 0, first_chunk_frames=4), TWO_STEPS),
    "one step": (CacheConfig(1, 6, "none", 0, positions="absolute"), ONE),
    "four steps first": (CacheConfig(1, 6, "none", 0, positions="absolute"), ONE_AFTER_FOUR),
    "four chunks of four steps": (CacheConfig(1, 7, "none", 0, positions="absolute"), FOUR_FIRST),
    "rolling": (
        CacheConfig(2, 13, "frozen", 3, joint_frames=4),
        dataclasses.replace(TWO_STEPS, rolling="joint"),
    ),
    "wave": (
        CacheConfig(1, 8, "frozen", 1, positions="absolute", joint_frames=4),
        ScheduleConfig(denoising_steps=(1000, 750, 500, 250), rolling="causal"),
    ),
    "rolling with memory": (
        CacheConfig(2, 14, "frozen", 2, memory_rates=(0.1, 0.5), joint_frames=4),
        dataclasses.replace(TWO_STEPS, rolling="joint"),
    ),
    "rolling with ema": (
        CacheConfig(1, 8, "ema", 1, alpha=0.7, joint_frames=2),
        dataclasses.replace(TWO_STEPS, rolling="causal"),
    ),
}
