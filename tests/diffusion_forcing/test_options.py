from __future__ import annotations

import pytest

from rfengine.diffusion_forcing.options import DiffusionForcingOptions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"causal_block_size": 5},
            "causal_block_size is 5 and ar_step is 0, which denoises all frames together",
        ),
        ({"num_frames": 0}, "num_frames is 0; it must be at least 1"),
        ({"num_frames": 10**6}, "num_frames is 1000000; it must be at most 86400"),
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"shift": float("inf")}, "shift is inf; it must be a finite number"),
        ({"guidance_scale": 0.5}, "guidance_scale is 0.5; it must be at least 1"),
        ({"addnoise_condition": 61}, "addnoise_condition is 61; it must be at most 60"),
        ({"addnoise_condition": 2.5}, "addnoise_condition is 2.5; it must be an integer"),
        ({"ar_step": -1}, "ar_step is -1; it must be at least 0"),
        ({"seed": -1}, "seed is -1; it must be at least 0"),
        ({"sigmas": "karras"}, "sigmas is 'karras'; use 'skyreels' or 'diffusers'"),
        ({"overlap_history": "17"}, "overlap_history is '17'; it must be an integer"),
    ],
)
def test_an_option_that_cannot_be_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiffusionForcingOptions(**options)
