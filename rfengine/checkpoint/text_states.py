"""Text states on disk: the valid rows of each prompt, one safetensors file per prompt, with a checksum."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path

import torch
from torch import Tensor

from rfengine.checkpoint.tensor_file import StoredTensor, open_safetensors, read_header, write_safetensors

logger = logging.getLogger(__name__)


class TextStateFiles:
    """Valid rows [n, dim] of text states, one file in `directory` for each fingerprint, text_len, dtype and
    cleaned prompt."""

    def __init__(self, directory: str | Path, fingerprint: str, text_len: int, dim: int) -> None:
        """fingerprint: names the weights and the tokenizer; ValueError where it is empty. dim: of the states,
        known before the encoder is built; a file with another one counts as damaged."""
        if not fingerprint:
            raise ValueError(f"fingerprint is empty; states in {directory} need one that names their weights")
        self._directory = Path(directory)
        self._owner = (fingerprint, text_len)
        self._dim = dim
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            logger.warning(
                "text states cannot be kept in %s (%s); choose another directory", directory, error
            )

    def _path(self, text: str, dtype: torch.dtype) -> Path:
        key = hashlib.sha256(json.dumps([*self._owner, str(dtype), text]).encode()).hexdigest()
        return self._directory / f"{key}.safetensors"

    def load(self, text: str, length: int, dtype: torch.dtype) -> Tensor | None:
        """The `length` rows of `text` on the CPU, or None if they are absent or, with a warning, damaged."""
        path = self._path(text, dtype)
        if not os.path.lexists(path):
            return None
        try:
            metadata, found = read_header(path)[1], open_safetensors(path).get("states")
            # of another size it is not read
            if found is not None and (found.shape, found.dtype) == ((length, self._dim), dtype):
                states = found.read()
                if metadata.get("sha256") == _checksum(states) and states.isfinite().all():
                    return states
            reason = "are damaged"
        except (ValueError, RuntimeError) as error:
            reason = f"cannot be read ({error})"
        logger.warning("cached text states %s %s; they are computed again", path, reason)
        return None

    def store(self, text: str, states: Tensor) -> None:
        """Write the rows; the last of several concurrent writers wins. A failing disk is a warning."""
        rows = states.detach().cpu().contiguous()
        path = self._path(text, rows.dtype)
        try:
            write_safetensors(path, {"states": StoredTensor.of(rows)}, {"sha256": _checksum(rows)})
        except (OSError, RuntimeError) as error:
            logger.warning("text states cannot be kept at %s (%s); they are computed each time", path, error)


def _checksum(states: Tensor) -> str:
    return hashlib.sha256(states.contiguous().view(torch.uint8).numpy()).hexdigest()
