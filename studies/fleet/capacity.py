"""What one card carries and what a fleet costs, computed: memory, compute, network, storage, money."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

import torch

from rfengine.cache.kv_cache import StreamingKVCache
from rfengine.config import EngineConfig
from rfengine.costs.chunk import Precision
from rfengine.costs.memory import memory_needs, stream_bytes
from rfengine.grid import LatentGrid
from rfengine.presets import PRESETS
from studies.fleet.service_times import CHUNK_FRAMES, CHUNK_SECONDS

PRECISIONS: tuple[Precision, ...] = ("bf16", "fp8", "fp8-attention")
CARDS_GB = (80, 141)  # of an H100 and an H200, as their data sheets say it
SHARE_OF_FREE_MEMORY = 0.8  # that the server's admission gives to sessions
LEAST_POINTS = 4  # that must fit for the server to keep points by itself
VIEWERS = 10_000


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes on one card of wan-1.3b at 832 x 480: shared by all sessions, of each, and of a snapshot."""

    shared_bytes: int
    session_bytes: int
    snapshot_bytes: int

    def budget_bytes(self, card_gb: int) -> int:
        """What admission gives to sessions by default."""
        return int((card_gb * 10**9 - self.shared_bytes) * SHARE_OF_FREE_MEMORY)

    def sessions(self, card_gb: int) -> int:
        return self.budget_bytes(card_gb) // self.session_bytes


@cache
def memory_plan(precision: Precision) -> MemoryPlan:
    """With the full decoder in float16 and the text encoder on the card."""
    config = PRESETS["wan-1.3b"]
    config = replace(config, runtime=replace(config.runtime, precision=precision))
    grid, dtype = LatentGrid.of(config), torch.bfloat16
    needs = memory_needs(config, grid, dtype, torch.float16)
    own = stream_bytes(needs)
    return MemoryPlan(needs["total"] - own, own, snapshot_bytes(config, grid, needs, dtype))


def snapshot_bytes(
    config: EngineConfig, grid: LatentGrid, needs: dict[str, int], dtype: torch.dtype, ahead: bool = True
) -> int:
    """Of a stream in the steady state, by its memory_needs: the cache, the clean latents and the text states
    of what a prompt switch recomputes, the decoder's state, and the frames of the chunk that is `ahead`."""
    model, cache_config = config.model, config.cache
    cache_tensors = StreamingKVCache(model, cache_config, grid, dtype=dtype, device="meta").tensors()
    latents = cache_config.past_frames * model.in_dim * grid.latent_height * grid.latent_width
    text = model.text_len * model.text_dim
    frames = CHUNK_FRAMES * grid.height * grid.width * 3 if ahead else 0
    cached = sum(tensor.nbytes for tensor in cache_tensors.values())
    return cached + needs["vae_state"] + dtype.itemsize * (latents + text) + frames


def points_bytes(session_bytes: int, max_sessions: int) -> int:
    """Host memory with which a server keeps points of its sessions by itself: half of it is for points, in
    equal shares, and a point counts as a session's size there."""
    return 2 * max_sessions * LEAST_POINTS * session_bytes


def streams(floor_s: float, efficiency: float) -> int:
    """Sessions that a card can keep playing, by its compute alone."""
    return int(CHUNK_SECONDS * efficiency / floor_s)


@dataclass(frozen=True, slots=True)
class Prices:
    """Assumptions of 2026-11-30 in dollars, and not offers: of a rented H100 with its share of a host an
    hour, of a GB to the internet through a CDN, and of a GB kept for a month."""

    card_hour: float = 2.50
    egress_gb: float = 0.02
    stored_gb_month: float = 0.02


@dataclass(frozen=True, slots=True)
class Load:
    """What is to be served. streams: videos that are made at once; viewers: who watch, at least one each.

    places: sessions a card by compute. filled: share of all places that are taken, at most.
    """

    streams: int
    viewers: int
    places: int
    filled: float = 0.9
    bits_a_second: float = 2.5e6

    @property
    def cards(self) -> int:
        return math.ceil(round(self.streams / (self.places * self.filled), 9))

    @property
    def egress_gbit_s(self) -> float:
        return self.viewers * self.bits_a_second / 1e9

    @property
    def egress_gb_hour(self) -> float:
        return self.egress_gbit_s / 8 * 3600

    def recorded_gb(self, hours: float) -> float:
        """Of recordings of every stream that are kept for so long."""
        return self.streams * self.bits_a_second / 8e9 * 3600 * hours

    def cost_hour(self, prices: Prices, recorded_hours: float = 0.0) -> dict[str, float]:
        """Dollars an hour: of the cards, the network, and recordings that are kept so many hours."""
        month = 730
        return {
            "cards": self.cards * prices.card_hour,
            "egress": self.egress_gb_hour * prices.egress_gb,
            "storage": self.recorded_gb(recorded_hours) * prices.stored_gb_month / month,
        }
