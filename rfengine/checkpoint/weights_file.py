"""The tensors of one part of a checkpoint, from files of either format that is read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rfengine.checkpoint.file_format import weights_format
from rfengine.checkpoint.layouts import EMA_WORDS, Part, engine_names
from rfengine.checkpoint.pickle_file import MODEL_KEYS, open_pickle
from rfengine.checkpoint.quantized import check_metadata, dequantized
from rfengine.checkpoint.tensor_file import StoredTensor, open_safetensors, read_header

VOCABULARY = "spiece_model"  # which ComfyUI keeps as bytes in the file of a text encoder


def open_weights(files: Sequence[Path], keys: Sequence[str] = MODEL_KEYS) -> dict[str, StoredTensor]:
    """Every tensor of one file or of the shards of one model, by the names in it; none is read yet.

    keys: see open_pickle. Raises ValueError for a file that is damaged or of another format, and for a name
    that two shards both hold.
    """
    stored: dict[str, StoredTensor] = {}
    for path in files:
        opened = open_pickle(path, keys) if weights_format(path) == "pickle" else open_safetensors(path)
        for name, tensor in opened.items():
            if name in stored:
                raise ValueError(
                    f"{path} holds {name}, which another shard holds as well; keep the shards of one model"
                )
            stored[name] = tensor
    return stored


def open_part(files: Sequence[Path], use_ema: bool = True) -> tuple[Part, dict[str, StoredTensor]]:
    """Which part the files hold, and its tensors by the engine's names, scaled FP8 multiplied back.

    use_ema: averaged weights go before the others. Raises ValueError as open_weights does, for a quantized
    form that is not read, and for files of no known layout.
    """
    keys = MODEL_KEYS if use_ema else tuple(key for key in MODEL_KEYS if key not in EMA_WORDS)
    tensors = open_weights(files, keys)
    for path in files:
        if weights_format(path) == "safetensors":
            check_metadata(read_header(path)[1], str(path))
    label = str(files[0])
    weights = {name: stored for name, stored in tensors.items() if name.rpartition(".")[2] != VOCABULARY}
    try:
        return engine_names(dequantized(weights, label), use_ema)
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from error
