"""The text encoder and the tokenizer of a checkpoint directory."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from rfengine.checkpoint.directories import part_files, tokenizer_directory
from rfengine.checkpoint.loader import load_part
from rfengine.config import EngineConfig
from rfengine.models.text_encoder import ByteTokenizer, SentencePieceTokenizer, TextEncoder, build_umt5


def open_text_encoder(
    directory: Path,
    config: EngineConfig,
    device: torch.device,
    dtype: torch.dtype,
    cache: str | Path | None = None,
    mark: str = "",
) -> TextEncoder:
    """The encoder of `directory`; its weights are read at the first prompt that no cache holds.

    cache, mark: see TextEncoder. Raises ValueError where the directory has no text encoder or no tokenizer.
    """
    folder = tokenizer_directory(directory)
    by_bytes = config.text.tokenizer == "bytes"
    if not part_files(directory, "text_encoder") or (folder is None and not by_bytes):
        raise ValueError(
            f"{directory} has no text encoder or no tokenizer; run `rfengine convert SRC DST --base WAN` "
            "where WAN is a directory that has them"
        )

    def load() -> nn.Module:
        with torch.device("meta"):
            umt5 = build_umt5(config.text)
        load_part(umt5, directory, "text_encoder", dtype, device)
        return umt5

    tokenizer = ByteTokenizer() if by_bytes else SentencePieceTokenizer(folder)
    return TextEncoder(load, tokenizer, config.model.text_len, device, dtype, cache, mark)
