"""A configuration as JSON values, and back."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar, get_args

from rfengine.limits import check_value, field_hints, shown

Config = TypeVar("Config")


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON values; from_dict is the way back."""
    return dataclasses.asdict(config)


def from_dict(kind: type[Config], values: Any, path: str | None = None) -> Config:
    """Build the configuration `kind` from a JSON value; lists become tuples, nested tables configurations.

    path: what the value is called in an error, such as engine.model; the name of `kind` where it is None.
    Raises ValueError when a key is not a field of `kind`, a field without default is missing, or a value is
    not what its field may hold.
    """
    path = kind.__name__ if path is None else path
    if not isinstance(values, dict):
        raise ValueError(f"{path} is {shown(values)}; it must be a table of its fields")
    hints = field_hints(kind)
    for key in values:
        if key not in hints:
            raise ValueError(f"{path} has no field {shown(key)}; it has {', '.join(hints)}")
    missing = [
        entry.name
        for entry in dataclasses.fields(kind)
        if entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        and entry.name not in values
    ]  # fmt: skip
    if missing:
        raise ValueError(f"{path} needs {', '.join(missing)}; add it")
    read = {name: _field_value(f"{path}.{name}", value, hints[name]) for name, value in values.items()}
    try:
        return kind(**read)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _field_value(path: str, value: Any, hint: Any) -> Any:
    tables = [
        each for each in (hint, *get_args(hint)) if isinstance(each, type) and dataclasses.is_dataclass(each)
    ]
    if tables and (value is not None or tables[0] is hint):
        return from_dict(tables[0], value, path)
    value = tuple(value) if isinstance(value, list) else value
    check_value(path, value, hint)
    return value
