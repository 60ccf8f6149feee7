"""A LoRA on disk: a file of either format, or the directory that PEFT or Diffusers saved it in."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from rfengine.checkpoint.directories import inner_directory
from rfengine.checkpoint.file_format import weights_format
from rfengine.checkpoint.layouts import list_names
from rfengine.checkpoint.lora_scale import (
    CONFIG_FILE,
    ScaleStatement,
    header_statements,
    read_adapter_config,
)
from rfengine.checkpoint.pickle_file import LORA_KEYS
from rfengine.checkpoint.shards import folder_names, refuse_dangling
from rfengine.checkpoint.tensor_file import StoredTensor, read_header
from rfengine.checkpoint.weights_file import open_weights

logger = logging.getLogger(__name__)

# What PEFT and Diffusers call an adapter; of two formats of one adapter the first is taken.
_STEMS = ("adapter_model", "pytorch_lora_weights")
_SUFFIXES = (".safetensors", ".bin")


@dataclass(frozen=True, slots=True)
class LoraFile:
    """The tensors of a LoRA by the names in its file, and what is stated of its scale."""

    label: str  # what it is called in errors
    tensors: dict[str, StoredTensor]
    statements: tuple[ScaleStatement, ...] = ()


def open_lora(path: Path) -> LoraFile:
    """Open a LoRA; no matrix is read yet. An adapter_config.json beside the file belongs to it.

    Raises ValueError where there is none or several, for a damaged file, and for a statement about it that is
    damaged or that the engine does not follow.
    """
    if path.is_dir():
        path = _file_in(path)
    tensors = open_weights([path], LORA_KEYS)
    statements = []
    config = path.with_name(CONFIG_FILE)
    refuse_dangling(config)
    if os.path.lexists(config):
        statements.append(read_adapter_config(config))
    if weights_format(path) == "safetensors":
        has_alphas = any(name.endswith(".alpha") for name in tensors)
        statements += header_statements(read_header(path)[1], str(path), has_alphas)
    return LoraFile(str(path), tensors, tuple(statements))


def _file_in(folder: Path) -> Path:
    folder = inner_directory(folder)
    names = folder_names(folder)
    found = [
        next(f"{stem}{suffix}" for suffix in _SUFFIXES if f"{stem}{suffix}" in names)
        for stem in _STEMS
        if any(f"{stem}{suffix}" in names for suffix in _SUFFIXES)
    ]
    if len(found) == 1:
        return folder / found[0]
    if found:
        raise ValueError(f"{folder} holds {' and '.join(found)}; give the one that is meant")
    raise ValueError(
        f"{folder} has no {' and no '.join(f'{stem}.safetensors' for stem in _STEMS)} (it holds "
        f"{list_names(names) or 'nothing'}); give the file of the LoRA itself"
    )
