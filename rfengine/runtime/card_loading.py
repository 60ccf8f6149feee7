"""Loading under a preset: the options of a named one, or, for auto, the first that fits and, where memory
runs out after all, the next smaller one in the same process."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from rfengine.checkpoint.checkpoint import Checkpoint
from rfengine.config import EngineConfig
from rfengine.memory import free_memory
from rfengine.runtime.card_presets import (
    GIB,
    Candidate,
    CardPreset,
    configurations,
    left_out,
    planned,
    too_small,
    with_preset,
)
from rfengine.runtime.loaded_models import Placement

logger = logging.getLogger(__name__)

_WORDS = ("out of memory", "OUT_OF_MEMORY", "ALLOC_FAILED", "can't allocate memory")
_HOST = torch.device("cpu")

Loaded = TypeVar("Loaded")
Options = list[tuple[CardPreset, EngineConfig]]


@dataclass(frozen=True, slots=True)
class PresetRequest:
    """What the choice of a preset depends on beside the configuration. may_shrink: no size is asked for, so
    that a smaller one can be the default."""

    checkpoint: Checkpoint
    place: Placement
    has_loras: bool
    may_shrink: bool

    @property
    def text_apart(self) -> bool:
        """Whether the text encoder has a device of its own."""
        device = self.place.device
        return self.place.text_device not in (device, torch.device(device.type))

    def candidate(self, number: int, options: Options) -> Candidate:
        return planned(*options[number], self.place.device.type, self.place.dtype, self.text_apart)


def load_under_preset(
    config: EngineConfig, request: PresetRequest, load: Callable[[EngineConfig], Loaded]
) -> Loaded:
    """load(config) with the options of config.runtime.preset.

    Where memory runs out in load, which with auto makes the first chunks too, everything that it made is
    freed and the next configuration that needs less is loaded, with one warning. Raises RuntimeError where
    none fits into what is free on the device and in host memory, with the numbers and before anything is
    read; torch.OutOfMemoryError where memory ran out in the smallest, and without auto.
    """
    name = config.runtime.preset
    if name is None:
        return load(config)
    if name != "auto":
        return load(_named(config, request))
    options = configurations(
        request.checkpoint, config, request.text_apart, request.has_loras, request.may_shrink
    )
    chosen, number = _first_fitting(request, options)
    _say_what_is_taken(chosen, config)
    while True:
        loaded, shortage = _attempt(load, chosen.config)
        if loaded is not None:
            return loaded
        _free(request.place.device)
        smaller = _next_smaller(request, options, number, chosen.plan.needed)
        if smaller is None:
            raise torch.OutOfMemoryError(
                f"memory ran out under {chosen}, the smallest preset ({shortage}); take a smaller model or "
                "size"
            )
        logger.warning("memory ran out under %s (%s); %s is loaded instead", chosen, shortage, smaller[0])
        chosen, number = smaller


def _named(config: EngineConfig, request: PresetRequest) -> EngineConfig:
    """`config` with what a preset that was named sets; what it cannot set is a warning."""
    name, apart = config.runtime.preset, request.text_apart
    changed = with_preset(config, name, request.checkpoint, apart, request.has_loras)
    if missing := left_out(config, changed, apart):
        logger.warning(
            "preset %s goes without its %s and needs more memory than its name says: LoRAs, FP8, CUDA "
            "graphs, a vae_precision or a checkpoint without the tiny decoder exclude that",
            name, ", ".join(missing),
        )  # fmt: skip
    return changed


def _first_fitting(request: PresetRequest, options: Options) -> tuple[Candidate, int]:
    """The first of options whose plan fits into what is free on the device and in host memory, and its
    number."""
    device, last = request.place.device, len(options) - 1
    free, host_free = free_memory(device), free_memory(_HOST)
    least = request.candidate(last, options)  # before the others, each of which takes seconds
    if free is not None and least.plan.needed > free:
        raise RuntimeError(
            too_small(f"{device} has {free / GIB:.2f} GiB free, which is", [least], lambda plan: plan.needed)
        )
    for number in range(len(options)):
        candidate = least if number == last else request.candidate(number, options)
        if (free is None or candidate.plan.needed <= free) and _fits_host(candidate, host_free):
            return candidate, number
    raise RuntimeError(
        f"{least} fits into {device} and keeps {_in_host(least) / GIB:.1f} GiB in host memory, of which "
        f"{host_free / GIB:.1f} GiB are free; end other programs, or keep weights on the device by "
        "text_encoder='stays' and block_buffers=0"
    )


def _in_host(candidate: Candidate) -> int:
    return sum(candidate.plan.host.values())


def _fits_host(candidate: Candidate, free: int | None) -> bool:
    return free is None or _in_host(candidate) <= free


def _say_what_is_taken(chosen: Candidate, config: EngineConfig) -> None:
    """A smaller size than that of `config` is a warning."""
    taken = f"preset auto takes {chosen}: {chosen.plan.needed / GIB:.2f} GiB by its plan"
    if (chosen.config.height, chosen.config.width) == (config.height, config.width):
        logger.info("%s", taken)
    else:
        logger.warning("%s; none fits at %d x %d", taken, config.height, config.width)


def _next_smaller(
    request: PresetRequest, options: Options, number: int, needed: int
) -> tuple[Candidate, int] | None:
    """The first after `number` that needs less than `needed`."""
    host_free = free_memory(_HOST)
    for following in range(number + 1, len(options)):
        candidate = request.candidate(following, options)
        if candidate.plan.needed < needed and _fits_host(candidate, host_free):
            return candidate, following
    return None


def _attempt(
    load: Callable[[EngineConfig], Loaded], config: EngineConfig
) -> tuple[Loaded, str] | tuple[None, str]:
    """What was loaded, or why memory ran out. The error goes no further: its traceback holds all that was
    made."""
    try:
        return load(config), ""
    except (RuntimeError, MemoryError) as error:
        if not _is_shortage(error):
            raise
        return None, " ".join(str(error).split())[:200] or type(error).__name__


def _is_shortage(error: BaseException | None) -> bool:
    """Whether an error is of memory that ran out, or came of one, as where it ends the recording of a graph;
    libraries and torch's allocator of the CPU say it in words."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
            word in str(error) for word in _WORDS
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def _free(device: torch.device) -> None:
    """Give back what is no longer referred to, on the device and in pinned memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch._C._host_emptyCache()  # pinned memory; torch.accelerator's call is not in 2.10
