from __future__ import annotations

import pytest

from rfengine.diffusion_forcing_config import DiffusionForcingConfig


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"guidance_scale": 0.5}, "guidance_scale is 0.5; it must be at least 1"),
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"shift": float("nan")}, "shift is nan; it must be a finite number"),
        ({"negative_prompt": ""}, "negative_prompt has 0 characters"),
    ],
)
def test_a_setting_beyond_its_limits_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiffusionForcingConfig(**change)
