"""A stream that nobody sees, up to the steady state: memory that runs out does so before a caller has
frames."""

from __future__ import annotations

from rfengine.grid import LatentGrid
from rfengine.runtime.engine import Engine
from rfengine.stream import VideoStream

_STEADY_CHUNKS = 3  # once the window is full: the second of them records the graphs
_PROMPT = "a"


def rehearse(engine: Engine) -> None:
    """Encode a prompt and make the first chunks at the size of the engine's configuration. Raises as a stream
    does, torch.OutOfMemoryError included."""
    with engine.turns:
        states = engine.text_encoder.encode([_PROMPT], engine.model.device, engine.model.dtype)
        stream = VideoStream(engine, LatentGrid.of(engine.config), _PROMPT, states, 0)
    for _ in stream.take(engine.config.cache.filling_chunks + _STEADY_CHUNKS):
        pass
    stream.close()
    engine.queue.synchronize()
