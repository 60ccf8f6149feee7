"""The published systems, all of one architecture: the cache and the schedule that their checkpoints are for.

A row is one system. Those without steps of their own are training-free: they are caches for the checkpoints
of others, which keep their schedule.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from rfengine.config import CacheConfig, EngineConfig, Rolling, ScheduleConfig

SystemName = Literal[
    "wan", "reward-forcing", "self-forcing", "longlive", "causal-forcing", "causal-forcing-framewise",
    "causal-forcing-2-step", "causal-forcing-1-step", "causal-forcing-long", "one-forcing",
    "rolling-forcing", "wave-forcing-4-step", "wave-forcing-5-step", "memrope", "deep-sink",
]  # fmt: skip

_FOUR = (1000, 750, 500, 250)
_FIVE = (1000, 800, 600, 400, 200)
_CLIP = CacheConfig(3, 21, "none", 0, positions="absolute")  # a clip of five seconds is the whole window
_FRAMEWISE = replace(_CLIP, chunk_frames=1)


@dataclass(frozen=True, slots=True)
class System:
    """One published system.

    steps: nominal, of every chunk; empty where the checkpoint's own stay, and with them the length of its
    chunks. first_steps: of the first chunk, where they differ. names: parts of file names that tell the
    system, without marks.
    """

    cache: CacheConfig
    steps: tuple[int, ...] = ()
    first_steps: tuple[int, ...] = ()
    rolling: Rolling = "none"
    names: tuple[tuple[str, ...], ...] = ()


SYSTEMS: dict[SystemName, System] = {
    # a teacher: it needs many steps
    "wan": System(CacheConfig(), _FOUR),
    # arXiv 2512.04678
    "reward-forcing": System(CacheConfig(), _FOUR, names=(("rewardforcing",),)),
    # arXiv 2506.08009
    "self-forcing": System(_CLIP, _FOUR, names=(("selfforcing",), ("odeinit",))),
    # arXiv 2509.22622
    "longlive": System(CacheConfig(3, 12, "frozen", 3, positions="absolute"), _FOUR, names=(("longlive",),)),
    # arXiv 2602.02214; the two- and one-step models are those of Causal Forcing++, arXiv 2605.15141
    "causal-forcing": System(_CLIP, _FOUR, names=(("causalforcing", "chunkwise"),)),
    "causal-forcing-framewise": System(_FRAMEWISE, _FOUR, names=(("causalforcing", "framewise"),)),
    "causal-forcing-2-step": System(
        _FRAMEWISE, (1000, 500), _FOUR,
        names=(("framewise", "2step"), ("causalforcing", "framewise", "2step")),
    ),
    "causal-forcing-1-step": System(
        _FRAMEWISE, (1000,), _FOUR,
        names=(("framewise", "1step"), ("causalforcing", "framewise", "1step")),
    ),
    # its long video model, on the schedule of Rolling Forcing
    "causal-forcing-long": System(
        CacheConfig(3, 21, "frozen", 3, joint_frames=12), _FOUR, rolling="joint",
        names=(("longvideo",), ("causalforcing", "chunkwise", "longvideo")),
    ),
    # arXiv 2605.23458
    "one-forcing": System(_FRAMEWISE, (1000,), _FOUR, names=(("oneforcing",),)),
    # arXiv 2509.25161: at most 21 frames are seen, the first chunk is the sink, five chunks are in flight
    "rolling-forcing": System(
        CacheConfig(3, 21, "frozen", 3, joint_frames=15), _FIVE, rolling="joint", names=(("rollingforcing",),)
    ),
    # arXiv 2611.00859
    "wave-forcing-4-step": System(
        CacheConfig(3, 21, "frozen", 3, joint_frames=12), _FOUR, rolling="causal",
        names=(("waveforcing", "4step"),),
    ),
    "wave-forcing-5-step": System(
        CacheConfig(3, 21, "frozen", 3, joint_frames=15), _FIVE, rolling="causal",
        names=(("waveforcing", "5step"),),
    ),
    # arXiv 2603.12513, for Self-Forcing and LongLive: two averages of all that left, at two rates
    "memrope": System(CacheConfig(3, 12, "frozen", 3, memory_rates=(0.01, 0.1))),
    # the sink of Deep Forcing, arXiv 2512.05081, for Self-Forcing: half of the window, its time moved along
    "deep-sink": System(CacheConfig(3, 21, "frozen", 10)),
}  # fmt: skip


def configured(config: EngineConfig, name: str) -> EngineConfig:
    """`config` with the cache and the denoising steps of a system; the shift of its schedule stays.

    Raises ValueError for a name that is none, and where a system that is a cache alone does not fit the
    schedule.
    """
    if name not in SYSTEMS:
        raise ValueError(f"system is {name!r}; use one of {', '.join(get_args(SystemName))}")
    system, schedule = SYSTEMS[name], config.schedule
    if not system.steps:
        return replace(config, cache=_of_chunks(name, system.cache, config))
    schedule = ScheduleConfig(
        schedule.shift, schedule.num_train_timesteps, system.steps, system.first_steps, rolling=system.rolling
    )
    return replace(config, cache=system.cache, schedule=schedule)


def _of_chunks(name: str, cache: CacheConfig, config: EngineConfig) -> CacheConfig:
    """The cache of a system without steps of its own, for the chunks of the checkpoint."""
    if config.schedule.rolling != "none":
        raise ValueError(
            f"system {name} is a cache for checkpoints whose chunks are denoised one after another, and the "
            f"schedule of {config.name} is rolling; use it with one of Self-Forcing or LongLive"
        )
    own = config.cache
    return replace(cache, chunk_frames=own.chunk_frames, first_chunk_frames=own.first_chunk_frames)


def named_system(name: str) -> SystemName | None:
    """The system that the path of a checkpoint tells: that of all whose names it holds which says most; None
    where none does, or two do. name: its last parts, such as framewise/causal_forcing.pt."""
    plain = name.lower().replace("-", "").replace("_", "").replace("+", "")
    found = {
        system: max(map(len, held))
        for system, row in SYSTEMS.items()
        if (held := [parts for parts in row.names if all(part in plain for part in parts)])
    }
    most = [system for system, length in found.items() if length == max(found.values())]
    return most[0] if len(most) == 1 else None
