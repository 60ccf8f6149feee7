"""Bootstrap intervals."""

from __future__ import annotations

import pytest
import torch

from rfengine.evaluation.confidence import bootstrap_mean


def test_interval_holds_the_true_mean_about_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(30, generator=generator).tolist() for _ in range(200)]
    held = 0
    for values in drawn:
        interval = bootstrap_mean(values)
        assert interval.low is not None and interval.high is not None
        assert interval.low < interval.mean < interval.high
        held += interval.low <= 0 <= interval.high
    assert 0.88 <= held / 200 <= 0.98


def test_interval_has_the_width_of_the_normal_one() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(1))
    interval = bootstrap_mean(values.tolist())
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * float(values.std()) / 20, rel=0.1)
    assert bootstrap_mean(values.tolist()) == interval


def test_one_value_has_no_interval_and_none_no_mean() -> None:
    assert (bootstrap_mean([2.0]).low, bootstrap_mean([2.0]).mean) == (None, 2.0)
    assert bootstrap_mean([3.0, 3.0]).low == bootstrap_mean([3.0, 3.0]).high == 3.0
    with pytest.raises(ValueError, match="0 values are given"):
        bootstrap_mean([])
