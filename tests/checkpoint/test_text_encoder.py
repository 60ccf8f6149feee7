from __future__ import annotations

from pathlib import Path

import pytest

from rfengine.checkpoint.directories import tokenizer_directory
from rfengine.checkpoint.text_encoder import open_tokenizer
from rfengine.config import TextConfig

SIZES = {"dim": 32, "attention_dim": 16, "ffn_dim": 24, "num_heads": 2, "num_layers": 1}


def test_ids_that_the_encoder_has_no_row_for_are_refused(wan_directory: Path) -> None:
    folder = tokenizer_directory(wan_directory)
    assert open_tokenizer(folder, TextConfig(29, **SIZES)).vocab_size == 29
    with pytest.raises(ValueError, match=r"umt5-xxl has ids up to 28 and the text encoder has 28 rows; use"):
        open_tokenizer(folder, TextConfig(28, **SIZES))
    assert open_tokenizer(None, TextConfig(259, **SIZES, tokenizer="bytes")).vocab_size == 259
