"""A stream that nobody sees, through every phase of its plan: memory that runs out does so before a caller
has frames."""

from __future__ import annotations

from rfengine.config import EngineConfig
from rfengine.grid import LatentGrid
from rfengine.runtime.engine import Engine
from rfengine.stream import VideoStream

_STEADY_CHUNKS = 3  # once the window is full: the second of them records the graphs


def rehearse(engine: Engine) -> None:
    """Encode a prompt, make the first chunks at the size of the engine's configuration, and start anew with
    a prompt beside what the steady state keeps. Raises as a stream does, torch.OutOfMemoryError included."""
    prompt = longest_prompt(engine.config)
    with engine.turns:
        states = engine.encode_text(prompt)
        stream = VideoStream(engine, LatentGrid.of(engine.config), prompt, states, 0)
    for _ in stream.take(engine.config.cache.filling_chunks + _STEADY_CHUNKS):
        pass
    stream.set_prompt(prompt, "hard")
    stream.advance(ahead=False)
    stream.close()
    engine.queue.synchronize()


def longest_prompt(config: EngineConfig) -> str:
    """A prompt of as many tokens as the text encoder takes, or a few less, in a word that the model knows."""
    known = config.text.known_words
    word = min(known, key=len) if known else "a"
    tokens = len(word) + 1 if config.text.tokenizer == "bytes" else 1
    return " ".join([word] * max(1, (config.model.text_len - 1) // tokens))
