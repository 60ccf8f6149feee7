"""rfengine: streaming text-to-video in real time."""

from rfengine.config import EngineConfig, RuntimeConfig
from rfengine.pipeline import Pipeline
from rfengine.stream import VideoStream

__all__ = ["EngineConfig", "Pipeline", "RuntimeConfig", "VideoStream", "__version__"]
__version__ = "0.1.0"
