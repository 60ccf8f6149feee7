import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from rfengine import nvtx_ranges
from rfengine.config import CacheConfig
from support.models import small_model, small_runner
from support.streams import Stream


@pytest.fixture(autouse=True)
def decided_anew():
    nvtx_ranges._range_maker.cache_clear()
    yield
    nvtx_ranges._range_maker.cache_clear()


class Opened(list):
    def annotate(self, name: str):
        self.append(name)
        return nullcontext()


def use(monkeypatch, package, cuda: bool = True) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(nvtx_ranges.importlib.util, "find_spec", lambda name: package)
    monkeypatch.setitem(sys.modules, "nvtx", package)


def test_without_a_device_or_the_package_every_range_is_one_shared_nothing(monkeypatch):
    for cuda, package in ((False, SimpleNamespace()), (True, None)):
        use(monkeypatch, package, cuda)
        nvtx_ranges._range_maker.cache_clear()
        assert nvtx_ranges.nvtx_range("chunk") is nvtx_ranges.nvtx_range("evict") is nvtx_ranges._NOTHING


def test_ranges_that_are_switched_off_are_nothing(monkeypatch):
    use(monkeypatch, SimpleNamespace(enabled=lambda: False))
    assert nvtx_ranges.nvtx_range("chunk") is nvtx_ranges._NOTHING


def test_a_chunk_opens_its_ranges_in_order(monkeypatch):
    opened = Opened()
    use(monkeypatch, SimpleNamespace(enabled=lambda: True, annotate=opened.annotate))
    Stream(small_runner(small_model()), CacheConfig()).advance()
    assert opened == ["chunk", "evict", "step 0", "step 1", "context pass"]
