"""LiveMemory counts what is alive, once, with and without memory."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rfengine.costs.live_memory import LiveMemory

KIB = 1024


def zeros(kib: int) -> torch.Tensor:
    return torch.zeros(kib * KIB, dtype=torch.uint8, device="cpu")


@pytest.mark.parametrize("is_fake", [False, True])
def test_what_is_alive_is_counted_once(is_fake: bool) -> None:
    def program(live: LiveMemory) -> list[int]:
        seen = []
        first = zeros(4)
        view = first[:KIB].view(2, -1)
        seen.append(live.live)
        del first
        seen.append(live.live)  # the view keeps it
        second = view + 1
        view.add_(second)  # in place: nothing more
        seen.append(live.live)
        del view
        seen.append(live.live)
        return seen

    if is_fake:
        with FakeTensorMode(), LiveMemory() as live:
            seen = program(live)
    else:
        with LiveMemory() as live:
            seen = program(live)
    assert seen == [4 * KIB, 4 * KIB, 5 * KIB, KIB]
    assert live.live == 0 and live.peak == 5 * KIB


def test_what_was_there_before_is_not_counted_until_it_is_viewed() -> None:
    before = zeros(8)
    with LiveMemory() as live:
        kept = before + 1
        assert live.live == 8 * KIB == kept.numel()
        view = before[:KIB]
        assert live.live == 16 * KIB > view.numel()


def test_a_section_has_what_it_takes_beside_what_is_alive() -> None:
    peaks: dict[str, int] = {}
    with LiveMemory() as live:
        kept = [zeros(16)]
        with live.section(peaks, "work"):
            zeros(3)
            kept.append(zeros(2))
            zeros(3)
        with live.section(peaks, "rest"):
            zeros(1)
    assert peaks == {"work": 5 * KIB, "rest": KIB}


def test_one_operation_counts_by_its_result() -> None:
    def run(x: torch.Tensor) -> torch.Tensor:
        wide = torch.cat([x, x, x])
        return wide[:KIB].clone()

    with LiveMemory() as live:
        x = zeros(1)
        result = live.as_one(run, x)
        assert live.live == live.peak == 2 * KIB
        del result
        assert live.live == KIB
        with pytest.raises(ZeroDivisionError):
            live.as_one(lambda: 1 // 0)
        zeros(1)
        assert live.peak == 2 * KIB and live.live == KIB
