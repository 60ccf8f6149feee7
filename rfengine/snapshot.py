"""Snapshot: a stream between two chunks, as tensors and JSON values, in memory or in one file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

SNAPSHOT_FORMAT = 2
_INFO = (
    "prompt", "seed", "height", "width", "index", "next_chunk", "slot_chunks", "decoded_frames"
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A stream between two chunks: tensors by name, and everything else as JSON values."""

    tensors: dict[str, Tensor]
    info: dict[str, Any]

    def save(self, path: str | Path) -> None:
        """Write one safetensors file whose metadata holds the JSON; it appears under its name when it is
        whole."""
        from rfengine.checkpoint.loader import save_weights

        save_weights(Path(path), self.tensors, {"snapshot": json.dumps(self.info)})

    @classmethod
    def load(cls, path: str | Path) -> Snapshot:
        """Read what save wrote. Raises ValueError when the file is none of ours or damaged."""
        from rfengine.checkpoint.loader import read_safetensors

        tensors, metadata = read_safetensors(Path(path))
        if "snapshot" not in metadata:
            raise ValueError(
                f"{path} is a safetensors file but holds no stream; give one that Snapshot.save wrote"
            )
        return cls(tensors, json.loads(metadata["snapshot"]))

    def check(self, expected: dict[str, Any]) -> None:
        """Raises ValueError unless info holds `expected` and all that a stream needs to go on."""
        for name, value in {"format": SNAPSHOT_FORMAT, **expected}.items():
            if self.info.get(name) != value:
                raise ValueError(
                    f"the snapshot's {name} is {self.info.get(name)!r}, this pipeline's is {value!r}; "
                    "restore it with the model and settings it was taken with"
                )
        missing = [name for name in _INFO if name not in self.info]
        missing += ["text_states"] * ("text_states" not in self.tensors)
        if missing:
            raise ValueError(f"the snapshot lacks {', '.join(missing)}; take it again")

    def group(self, name: str) -> dict[str, Tensor]:
        """The tensors called `name`.something, by that something."""
        prefix = f"{name}."
        return {key[len(prefix) :]: tensor for key, tensor in self.tensors.items() if key.startswith(prefix)}
