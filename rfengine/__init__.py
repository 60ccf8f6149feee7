"""rfengine: streaming text-to-video in real time."""

from __future__ import annotations

import importlib

from rfengine.version import VERSION

TYPE_CHECKING = False  # as typing has it, which takes longer to import than all of this
if TYPE_CHECKING:
    from typing import Any

    from rfengine.checkpoint.lora import Lora
    from rfengine.config import EngineConfig, RuntimeConfig
    from rfengine.diffusion_forcing.options import DiffusionForcingOptions
    from rfengine.diffusion_forcing.pipeline import DiffusionForcingPipeline
    from rfengine.pipeline import Pipeline
    from rfengine.stream import VideoStream

__all__ = [
    "DiffusionForcingOptions", "DiffusionForcingPipeline", "EngineConfig", "Lora", "Pipeline",
    "RuntimeConfig", "VideoStream", "__version__",
]  # fmt: skip
__version__ = VERSION

_HOMES = {
    "DiffusionForcingOptions": "rfengine.diffusion_forcing.options",
    "DiffusionForcingPipeline": "rfengine.diffusion_forcing.pipeline",
    "EngineConfig": "rfengine.config",
    "Lora": "rfengine.checkpoint.lora",
    "Pipeline": "rfengine.pipeline",
    "RuntimeConfig": "rfengine.config",
    "VideoStream": "rfengine.stream",
}


def __getattr__(name: str) -> Any:
    """A public name, whose module, and torch with it, is imported when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = vars(importlib.import_module(_HOMES[name]))[name]
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
