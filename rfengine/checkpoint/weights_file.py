"""The tensors of one part of a checkpoint, from files of either format that is read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rfengine.checkpoint.file_format import weights_format
from rfengine.checkpoint.layouts import Part, engine_names
from rfengine.checkpoint.pickle_file import MODEL_KEYS, open_pickle
from rfengine.checkpoint.prefixes import EMA_WORDS
from rfengine.checkpoint.quantized import check_metadata, dequantized
from rfengine.checkpoint.tensor_file import StoredTensor, open_safetensors, read_header

VOCABULARY = "spiece_model"


def open_weights(files: Sequence[Path], keys: Sequence[str] = MODEL_KEYS) -> dict[str, StoredTensor]:
    """Every tensor of one file or of the shards of one model, by the names in it; none is read yet.

    keys: see open_pickle. Raises ValueError for a file that is damaged or of another format, and for a name
    that two shards both hold.
    """
    if all(weights_format(path) == "safetensors" for path in files):
        return open_safetensors(files)
    stored: dict[str, StoredTensor] = {}
    for path in files:
        is_pickle = weights_format(path) == "pickle"
        for name, tensor in (open_pickle(path, keys) if is_pickle else open_safetensors(path)).items():
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
    plain = dequantized(_without_vocabulary(tensors), label)
    try:
        return engine_names(plain, use_ema)
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from error


def _without_vocabulary(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """`tensors` without the vocabulary that ComfyUI keeps as bytes in the file of a text encoder."""
    return {name: stored for name, stored in tensors.items() if name.rpartition(".")[2] != VOCABULARY}
