"""Eviction by a score on several ranks: every rank chooses what all heads together would."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rfengine.cache.eviction import least_similar
from rfengine.config import CacheConfig
from rfengine.tensor_parallel import TensorParallel


def test_ranks_choose_the_frames_that_all_heads_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    config, held = CacheConfig(3, 12, "frozen", 3, eviction="similarity"), torch.arange(12)
    keys = torch.randn(2, 1, 24, 4, 6, generator=torch.Generator().manual_seed(2))  # two tokens in a frame
    expected = least_similar(keys, held, config, 3)
    parts = keys.split(2, dim=3)
    assert not any(torch.equal(least_similar(part, held, config, 3), expected) for part in parts)

    scores: list[Tensor] = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: scores.append(x.clone()))
    for rank, part in enumerate(parts):
        least_similar(part, held, config, 3, TensorParallel(rank, 2))
    for rank, part in enumerate(parts):
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda x, other=scores[1 - rank]: x.add_(other))
        assert torch.equal(least_similar(part, held, config, 3, TensorParallel(rank, 2)), expected)
