"""The text encoder and the tokenizer of a checkpoint directory."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from rfengine.checkpoint.directories import part_files, tokenizer_directory
from rfengine.checkpoint.loader import load_part
from rfengine.checkpoint.text_states import TextStateFiles
from rfengine.config import EngineConfig, TextConfig
from rfengine.models.text_encoder import (
    ByteTokenizer,
    SentencePieceTokenizer,
    TextEncoder,
    Tokenizer,
    build_umt5,
)


def open_text_encoder(
    directory: Path,
    config: EngineConfig,
    device: torch.device,
    dtype: torch.dtype,
    cache: str | Path | None = None,
    fingerprint: str = "",
) -> TextEncoder:
    """The encoder of `directory`; its weights are read at the first prompt that the cache does not hold.

    cache: directory that keeps text states; it needs the checkpoint's fingerprint. Raises ValueError where
    the directory has no text encoder or no tokenizer.
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

    tokenizer, length = open_tokenizer(folder, config.text), config.model.text_len
    files = None if cache is None else TextStateFiles(cache, fingerprint, length, config.text.dim)
    return TextEncoder(load, tokenizer, length, device, dtype, files)


def open_tokenizer(folder: Path | None, config: TextConfig) -> Tokenizer:
    """The tokenizer of a text encoder; `folder` has its files, unless it takes bytes.

    Raises ValueError when they are damaged or foreign, and for ids that the encoder has no row for.
    """
    tokenizer = ByteTokenizer() if config.tokenizer == "bytes" else SentencePieceTokenizer(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} has ids up to {tokenizer.vocab_size - 1} and "
            f"the text encoder has {config.vocab_size} rows; use the two of one model"
        )
    return tokenizer
