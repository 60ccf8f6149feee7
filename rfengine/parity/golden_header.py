"""The header of a golden file, read strictly: a value that is damaged must not pass by being ignored.

Each name is known, of its type and in its range; what a replay cannot do without is there. Whether a value is
the right one is seen afterwards, by the tensors: the sizes by their shapes, the rest by the results.
"""

from __future__ import annotations

from collections.abc import Callable
from reprlib import repr as shortened
from typing import Any, get_args

from rfengine.config import Positions, SinkKind
from rfengine.files import strict_json

Check = Callable[[Any], str]  # what a value must be, or "" where it is that

_LARGEST_SIZE = 2**20  # of any axis, layer or chunk count
_STEPS = 1000  # of the schedule


def _whole(low: int, high: int = _LARGEST_SIZE) -> Check:
    wanted = f"a whole number from {low} to {high}"
    return lambda value: "" if type(value) is int and low <= value <= high else wanted


def _number(low: float, high: float) -> Check:
    wanted = f"a number from {low} to {high}"
    return lambda value: "" if type(value) in (int, float) and low <= value <= high else wanted


def _one_of(names: tuple[str, ...]) -> Check:
    wanted = f"one of {', '.join(names)}"
    return lambda value: "" if isinstance(value, str) and value in names else wanted


def _list_of(check: Check, longest: int) -> Check:
    def check_list(value: Any) -> str:
        if not isinstance(value, list) or not 1 <= len(value) <= longest:
            return f"a list of 1 to {longest} values"
        return next((f"a list, each {wanted}" for entry in value if (wanted := check(entry))), "")

    return check_list


def _truth(value: Any) -> str:
    return "" if isinstance(value, bool) else "true or false"


def _window(value: Any) -> str:
    wanted = _whole(-1)(value)  # -1 sees everything
    return wanted or ("-1 or at least 1" if value == 0 else "")


def _sizes(*names: str) -> dict[str, Check]:
    return dict.fromkeys(names, _whole(1))


_EPSILON = _number(1e-12, 1.0)
_CHECKS: dict[str, dict[str, Check]] = {
    "causal": {
        **_sizes("num_heads", "frames_per_chunk", "dim", "ffn_dim", "num_layers", "text_dim", "text_len"),
        **_sizes("freq_dim", "in_dim", "out_dim", "latent_height", "latent_width", "chunks"),
        "local_attn_size": _window,
        "sink_size": _whole(0),
        "sink": _one_of(get_args(SinkKind)),
        "positions": _one_of(get_args(Positions)),
        "alpha": _number(0, 1),
        "denoising_steps": _list_of(_whole(1, _STEPS), _STEPS),
        "warped_timesteps": _list_of(_number(0, _STEPS), _STEPS),
        "timestep_shift": _number(1e-3, 1e3),
        "context_timestep": _number(0, _STEPS),
        "eps": _EPSILON,
    },
    "vae": {
        **_sizes("base_dim", "z_dim", "num_res_blocks"),
        "dim_mult": _list_of(_whole(1), 16),
        "temporal_downsample": _list_of(_truth, 16),
        "latents_mean": _list_of(_number(-1e6, 1e6), _LARGEST_SIZE),
        "latents_std": _list_of(_number(1e-6, 1e6), _LARGEST_SIZE),
    },
    "umt5": {
        **_sizes("vocab", "dim", "dim_ffn", "num_heads", "num_layers", "num_buckets", "max_distance"),
        "layer_norm_epsilon": _EPSILON,
    },
}
_SEED = _whole(0, 2**64 - 1)  # of the recording; a replay draws nothing
_NEEDED = {  # what a replay cannot do without
    "causal": (
        *("num_heads", "frames_per_chunk", "local_attn_size", "sink_size", "sink", "positions", "alpha"),
        *("denoising_steps", "warped_timesteps", "timestep_shift"),
    )
}
KINDS = tuple(_CHECKS)


def parse_golden_header(text: str) -> dict[str, Any]:
    """The values of a header by name, of which only `kind` is checked yet. Raises ValueError."""
    try:
        header = strict_json(text)
    except ValueError as error:
        raise ValueError(
            f"its header has no JSON object under 'config' ({error}); give a golden file"
        ) from error
    if not isinstance(header, dict):
        raise ValueError("its header has no JSON object under 'config'; give a golden file")
    kind = header.get("kind")
    if not isinstance(kind, str):
        raise ValueError(f"its header has kind {shortened(kind)}; it must be one of {', '.join(KINDS)}")
    if kind not in KINDS:
        raise ValueError(f"its kind is {shortened(kind)}; the engine replays {', '.join(KINDS)}")
    return header


def check_golden_header(header: dict[str, Any]) -> None:
    """Raises ValueError for a value that is missing, unknown, of a wrong type or out of range, and for two
    that cannot be true at once."""
    kind = header["kind"]
    known = _CHECKS[kind] | {"seed": _SEED}
    for name in _NEEDED.get(kind, ()):
        if name not in header:
            raise ValueError(f"its header has no {name}, which a {kind} file needs; record it again")
    for name, value in header.items():
        if name == "kind":
            continue
        if name not in known:
            raise ValueError(
                f"its header has {shortened(name)}, which a {kind} file has not; record it again without"
            )
        wanted = known[name](value)
        if wanted:
            joint = "is " if isinstance(value, str) and wanted.startswith("one of") else ""
            raise ValueError(f"its header's {name} {joint}{shortened(value)}; it must be {wanted}")
    if kind == "causal":
        _check_causal(header)


def _check_causal(header: dict[str, Any]) -> None:
    """Raises ValueError where two values cannot be true at once."""
    steps, warped = header["denoising_steps"], header["warped_timesteps"]
    if len(warped) != len(steps):
        raise ValueError(f"its header has {len(warped)} warped_timesteps for {len(steps)} denoising_steps")
    if header["sink"] != "ema" and header["alpha"] != 1:
        raise ValueError(
            f"its header has alpha {header['alpha']} and sink {header['sink']!r}, which averages nothing; "
            "alpha is 1 there"
        )
