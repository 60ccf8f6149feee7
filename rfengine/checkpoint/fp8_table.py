"""FP8Table: what `rfengine calibrate` found of the products of one checkpoint, a JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated

from rfengine.files import read_text, strict_json, write_text
from rfengine.limits import Range, check_value, shown

TABLE_FILE = "fp8.json"  # in a checkpoint directory
FORMAT = 1
_MOST_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class FP8Table:
    """The error of every product in FP8, and which of them are left out.

    fingerprint: of the weights that were measured. errors: by product, the error of its result over its
    size, in the worst pass. limit: the largest error that a product in FP8 has. settings: what was
    measured, in words.
    """

    fingerprint: str
    limit: float
    left_out: tuple[str, ...]
    errors: Mapping[str, float]
    settings: str

    def __post_init__(self) -> None:
        kinds = {
            "fingerprint": str,
            "limit": Annotated[float, Range(0)],
            "left_out": tuple[str, ...],
            "settings": str,
        }
        for name, kind in kinds.items():
            check_value(name, getattr(self, name), kind)
        if not isinstance(self.errors, Mapping) or not all(isinstance(name, str) for name in self.errors):
            raise ValueError(f"errors is {shown(self.errors)}; it must be a table of numbers by product")
        for name, error in self.errors.items():
            check_value(f"the error of {name}", error, Annotated[float, Range(0)])

    @classmethod
    def read(cls, path: Path) -> FP8Table:
        """Raises ValueError where the file is absent or is no such table."""
        if not path.is_file():
            raise ValueError(f"{path} is no file; `rfengine calibrate` writes one")
        try:
            stored = strict_json(read_text(path, _MOST_BYTES))
            if not isinstance(stored, dict) or stored.pop("format", None) != FORMAT:
                raise ValueError(f"it is not of format {FORMAT}")
            names = [field.name for field in fields(cls)]
            if stored.keys() != set(names):
                raise ValueError(
                    f"it has {', '.join(stored) or 'nothing'}, where a table has {', '.join(names)}"
                )
            left_out = stored.pop("left_out")
            return cls(left_out=tuple(left_out) if isinstance(left_out, list) else left_out, **stored)
        except ValueError as error:
            raise ValueError(
                f"{path} is no table of FP8 products: {error}; run `rfengine calibrate`"
            ) from error

    def write(self, path: Path) -> None:
        """The file appears under its name when it is whole."""
        write_text(path, json.dumps({"format": FORMAT} | asdict(self), indent=1) + "\n")

    def require_weights(self, path: Path, fingerprint: str) -> None:
        """Raises ValueError unless the table is of the weights of this fingerprint."""
        if self.fingerprint != fingerprint:
            raise ValueError(
                f"{path} was measured on weights {self.fingerprint[:12]} and these are {fingerprint[:12]}; "
                "run `rfengine calibrate` on these"
            )
