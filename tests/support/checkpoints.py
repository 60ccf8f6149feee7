"""Names in the files that people have."""

from __future__ import annotations

from rfengine.config import TextConfig


def original_text_names(config: TextConfig) -> list[str]:
    """Names of the text encoder in the published models_t5_umt5-xxl-enc-bf16.pth."""
    stems = ("norm1", "norm2", "pos_embedding.embedding", "ffn.gate.0", "ffn.fc1", "ffn.fc2",
             *(f"attn.{letter}" for letter in "qkvo"))  # fmt: skip
    blocks = [f"blocks.{block}.{stem}.weight" for block in range(config.num_layers) for stem in stems]
    return ["token_embedding.weight", "norm.weight", *blocks]
