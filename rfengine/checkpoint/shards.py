"""The files of one model in a folder: one file, shards with or without an index, variants such as fp16."""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rfengine.checkpoint.file_format import PICKLE_SUFFIXES, SAFETENSORS_SUFFIXES
from rfengine.checkpoint.layouts import list_names
from rfengine.files import absence, json_object, read_text

logger = logging.getLogger(__name__)

MAX_JSON_BYTES = 4 << 20  # an index of the largest published models has less than 1 MB
_SUFFIX = "|".join(re.escape(suffix) for suffix in (*SAFETENSORS_SUFFIXES, *PICKLE_SUFFIXES))
_VARIANT = r"[A-Za-z]\w*"
# Variants stand in front of the shard's number, and in older files behind it.
_AFTER_STEM = (
    rf"(?:\.(?P<variant>{_VARIANT}))?(?:-(?P<number>\d{{5}})-of-(?P<total>\d{{5}}))?"
    rf"(?:\.(?P<late>{_VARIANT}))?(?P<suffix>{_SUFFIX})"
)
_INDEX_AFTER_STEM = rf"(?P<suffix>{_SUFFIX})\.index(?:\.(?P<variant>{_VARIANT}))?\.json"


@dataclass(slots=True)
class _Form:
    """What a folder has of one model in one format and one variant."""

    single: str = ""
    index: str = ""
    shards: dict[int, dict[int, str]] = field(default_factory=dict)  # of each total, the names by number


def model_files(folder: Path, stem: str) -> tuple[Path, ...]:
    """The files of the model that `folder` calls `stem`; empty when there is none.

    Safetensors go before pickles, a plain file before a variant. Raises ValueError when shards or the files
    of links are absent, and where there are only variants, and several.
    """
    forms = _forms(folder, stem)
    if not forms:
        return ()
    is_pickle, variant = min(forms)
    rivals = [name for kind, name in forms if kind == is_pickle and name != variant]
    if variant and rivals:
        raise ValueError(
            f"{folder} has {stem} in the variants {', '.join(sorted([variant, *rivals]))} and not plain, so "
            "which is meant is not clear; keep one of them"
        )
    if rivals:
        logger.info("%s: %s is read, and not its variant %s", folder, stem, " or ".join(sorted(rivals)))
    return _files(folder, stem, forms[is_pickle, variant])


def all_shards(path: Path) -> tuple[Path, ...]:
    """The whole model of which `path` is a shard or the index, or `path` itself; by its name as given.

    Raises ValueError when shards are absent, which it lists.
    """
    if match := re.fullmatch(rf"(?P<stem>.+?){_INDEX_AFTER_STEM}", path.name, re.IGNORECASE):
        return _files(path.parent, match["stem"], _Form(index=path.name))
    match = re.fullmatch(rf"(?P<stem>.+?){_AFTER_STEM}", path.name, re.IGNORECASE)
    if match is None or match["number"] is None:
        return (path,)
    form = _forms(path.parent, match["stem"])[_key(match)]
    if match["total"] and int(match["total"]) in form.shards:
        form.shards = {int(match["total"]): form.shards[int(match["total"])]}
    files = _files(path.parent, match["stem"], _Form(index=form.index, shards=form.shards))
    if path not in files:
        raise ValueError(
            f"{path} is no shard that {path.parent / form.index} names; give the whole directory"
        )
    if len(files) > 1:
        logger.warning("%s is one of %d shards; all of them are read", path, len(files))
    return files


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when there is no such file.

    Raises ValueError when the file is something else.
    """
    if not os.path.lexists(path):
        return {}
    refuse_dangling(path)
    return json_object(read_text(path, MAX_JSON_BYTES), path)


def refuse_dangling(path: Path) -> None:
    """Raises ValueError for a link whose file is not there, which would otherwise count as absent."""
    if os.path.islink(path) and not os.path.exists(path):  # False for a name that no file can have
        raise ValueError(f"{path} {absence(path)}")


def folder_names(folder: Path) -> list[str]:
    """Names of everything in a folder, sorted; none where there is no folder.

    Raises ValueError when it cannot be listed or is a link to nothing.
    """
    refuse_dangling(folder)
    if not os.path.isdir(folder):
        return []
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise ValueError(f"{folder} cannot be listed ({error.strerror}); make it readable") from error


def _forms(folder: Path, stem: str) -> dict[tuple[bool, str], _Form]:
    """What `folder` has of `stem`, by whether it is a pickle and by its variant."""
    file, index = (
        re.compile(re.escape(stem) + rest, re.IGNORECASE) for rest in (_AFTER_STEM, _INDEX_AFTER_STEM)
    )
    forms: dict[tuple[bool, str], _Form] = {}
    for name in folder_names(folder):
        if match := index.fullmatch(name):
            key = match["suffix"].lower() in PICKLE_SUFFIXES, match["variant"] or ""
            forms.setdefault(key, _Form()).index = name
        elif match := file.fullmatch(name):
            form = forms.setdefault(_key(match), _Form())
            if match["number"] is None:
                form.single = name
            else:
                form.shards.setdefault(int(match["total"]), {})[int(match["number"])] = name
    return forms


def _key(match: re.Match[str]) -> tuple[bool, str]:
    return match["suffix"].lower() in PICKLE_SUFFIXES, match["variant"] or match["late"] or ""


def _files(folder: Path, stem: str, form: _Form) -> tuple[Path, ...]:
    if form.index:
        names = _indexed(folder / form.index)
    elif form.single:
        names = [form.single]
    else:
        names = _counted(folder, stem, form.shards)
    for name in names:
        refuse_dangling(folder / name)
    absent = [name for name in names if not os.path.lexists(folder / name)]
    if absent:
        raise ValueError(f"{folder} lacks {list_names(absent)} of {len(names)} shards; get the missing files")
    return tuple(folder / name for name in names)


def _indexed(index: Path) -> list[str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(map(_is_bare, weight_map.values())):
        raise ValueError(f"{index} has no weight_map of file names beside it; get the file again")
    return sorted(set(weight_map.values()))


def _is_bare(name: object) -> bool:
    return (
        isinstance(name, str) and name not in ("", ".", "..") and "\0" not in name and name == Path(name).name
    )


def _counted(folder: Path, stem: str, shards: dict[int, dict[int, str]]) -> list[str]:
    """The names of the shards that belong to one total, absent ones included."""
    whole = [total for total, found in shards.items() if set(found) == set(range(1, total + 1))]
    if len(shards) > 1 and len(whole) != 1:
        raise ValueError(
            f"{folder} has shards of {stem} that count {', '.join(map(str, sorted(shards)))}; keep those of "
            "one model"
        )
    total = whole[0] if whole else next(iter(shards))
    found = shards[total]
    number, name = next(iter(found.items()))
    return [
        found.get(each, name.replace(f"-{number:05}-of-", f"-{each:05}-of-")) for each in range(1, total + 1)
    ] or [name]
