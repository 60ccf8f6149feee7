"""The parts of a checkpoint in a directory of rfengine, Wan2.1, Diffusers, ComfyUI or a download cache.

The files of a part are one file, or shards with or without an index, in variants such as fp16.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from rfengine.checkpoint.file_format import PICKLE_SUFFIXES, SAFETENSORS_SUFFIXES, weights_format
from rfengine.checkpoint.layouts import Part, list_names
from rfengine.checkpoint.loader import open_part
from rfengine.checkpoint.tensor_file import StoredTensor, TensorEntry, read_header
from rfengine.files import absence, json_object, read_text

logger = logging.getLogger(__name__)

DirectoryLayout = Literal["rfengine", "wan", "diffusers", "comfyui"]

CONFIG_FILE = "rfengine.json"
EXPORT_FOLDER = "tensorrt"  # inside a checkpoint directory: decoders built for one machine
_SAMPLES = 16  # elements of each tensor that a fingerprint reads, evenly spread
MODEL_PARTS: tuple[Part, ...] = ("transformer", "vae", "text_encoder")  # what a whole checkpoint has
PARTS: tuple[Part, ...] = (*MODEL_PARTS, "tiny_vae")
_MOST_REFERENCE_BYTES = 1024  # of refs/main in a cache: a hash

SKYREELS_STEM = "model"  # of the transformer of SkyReels-V2, whose directory is otherwise one of Wan2.1

# Folder and stem of the files of each part.
_FILES: dict[DirectoryLayout, dict[Part, tuple[tuple[str, str], ...]]] = {
    "rfengine": {part: (("", part),) for part in PARTS},
    "wan": {
        "transformer": (("", "diffusion_pytorch_model"), ("", SKYREELS_STEM)),
        "vae": (("", "Wan2.1_VAE"),),
        "text_encoder": (("", "models_t5_umt5-xxl-enc-bf16"),),
        "tiny_vae": (("", "taew2_1"),),
    },
    "diffusers": {
        "transformer": (("transformer", "diffusion_pytorch_model"),),
        "vae": (("vae", "diffusion_pytorch_model"),),
        "text_encoder": (("text_encoder", "model"), ("text_encoder", "pytorch_model")),
        "tiny_vae": (("tiny_vae", "diffusion_pytorch_model"), ("tiny_vae", "taew2_1")),
    },
    "comfyui": dict.fromkeys(PARTS, ()),
}
_CACHE_FOLDERS = ("blobs", "refs", "snapshots")  # all that a cached repository has
_COMFYUI_ROOTS = ("split_files", "models")
# Where ComfyUI keeps each part, and how the names of its files start or go on, without case and signs.
_COMFYUI_FOLDERS: dict[Part, tuple[str, ...]] = {
    "transformer": ("diffusion_models", "unet"),
    "vae": ("vae",),
    "text_encoder": ("text_encoders", "clip"),
    "tiny_vae": ("vae_approx",),
}
_COMFYUI_NAMES: dict[Part, str] = {
    "transformer": "wan21t2v", "vae": "wan21vae", "text_encoder": "umt5", "tiny_vae": "taew21",
}  # fmt: skip
_COMFYUI_SUFFIXES = (*SAFETENSORS_SUFFIXES, *PICKLE_SUFFIXES, ".gguf")  # the last is there to be refused
_TOKENIZERS: dict[DirectoryLayout, tuple[str, ...]] = {
    "rfengine": ("tokenizer",),
    "wan": ("google/umt5-xxl", "tokenizer"),
    "diffusers": ("tokenizer", "google/umt5-xxl"),
    "comfyui": ("tokenizer", "google/umt5-xxl"),
}

MAX_JSON_BYTES = 4 << 20  # an index of the largest published models has less than 1 MB
_SUFFIX = "|".join(re.escape(suffix) for suffix in (*SAFETENSORS_SUFFIXES, *PICKLE_SUFFIXES))
_VARIANT = r"[A-Za-z]\w*"
# Variants stand in front of the shard's number, and in older files behind it.
_AFTER_STEM = (
    rf"(?:\.(?P<variant>{_VARIANT}))?(?:-(?P<number>\d{{5}})-of-(?P<total>\d{{5}}))?"
    rf"(?:\.(?P<late>{_VARIANT}))?(?P<suffix>{_SUFFIX})"
)
_INDEX_AFTER_STEM = rf"(?P<suffix>{_SUFFIX})\.index(?:\.(?P<variant>{_VARIANT}))?\.json"


def checkpoint_directory(source: str | Path) -> Path:
    """The directory of the checkpoint `source`; "tiny" is in the package. ValueError where it is none."""
    if str(source) == "tiny":
        return Path(str(resources.files("rfengine"))) / "weights" / "tiny"
    directory = Path(source)
    if not directory.is_dir():
        raise ValueError(
            f"{source} is no directory; give 'tiny' or a checkpoint directory (see rfengine convert)"
        )
    return inner_directory(directory)


def inner_directory(directory: Path) -> Path:
    """The directory inside `directory` that holds the checkpoint, or `directory` itself.

    A repository in the cache of Hugging Face (models--ORG--NAME) has it in snapshots/, ComfyUI in models/ and
    its repository of weights in split_files/. Raises ValueError where a cache has several snapshots and
    refs/main names none of them.
    """
    snapshots = [name for name in folder_names(directory / "snapshots") if name[:1] != "."]
    others = [name for name in folder_names(directory) if name[:1] != "." and name not in _CACHE_FOLDERS]
    if not snapshots or others:
        roots = (directory / name for name in _COMFYUI_ROOTS if _has_comfyui(directory / name))
        return next(roots, directory)
    main = directory / "refs" / "main"
    named = read_text(main, _MOST_REFERENCE_BYTES).strip() if main.is_file() else ""
    if named not in snapshots and len(snapshots) > 1:
        raise ValueError(
            f"{directory} has the snapshots {', '.join(snapshots)} and refs/main names none; give one of them"
        )
    return directory / "snapshots" / (named if named in snapshots else snapshots[0])


@dataclass(frozen=True, slots=True)
class CheckpointDirectory:
    """A directory of a known layout; it may lack parts."""

    path: Path
    layout: DirectoryLayout

    @classmethod
    def of(cls, path: Path) -> CheckpointDirectory:
        """Raises ValueError when `path` is no directory or has none of the known layouts."""
        if not path.is_dir():
            raise ValueError(f"{path} is not a directory on this machine; give one that holds a checkpoint")
        names = folder_names(path)
        if CONFIG_FILE in names:
            return cls(path, "rfengine")
        for directory in (cls(path, "diffusers"), cls(path, "wan")):
            if any(map(directory.files, MODEL_PARTS)):
                return directory
        if _has_comfyui(path):
            return cls(path, "comfyui")
        weights = ", ".join(name for name in names if _suffix(name) in _COMFYUI_SUFFIXES)
        held = f" (it holds {weights}: give that file itself to `rfengine convert`)" if weights else ""
        raise ValueError(
            f"{path} has no {CONFIG_FILE}, no transformer/ folder and no "
            f"diffusion_pytorch_model.safetensors{held}; give a directory of rfengine, Wan2.1, Diffusers or "
            "ComfyUI"
        )

    def files(self, part: Part) -> tuple[Path, ...]:
        """The files of `part`: safetensors, or pickles where there is nothing else; empty when absent.

        Raises ValueError when shards are incomplete, and where several files may be meant.
        """
        for folder, stem in _FILES[self.layout][part]:
            if files := model_files(self.path / folder, stem):
                return files
        if part == "tiny_vae":  # a folder of that name holds it under whatever name it came
            names = [name for name in folder_names(self.path / part) if _suffix(name) in SAFETENSORS_SUFFIXES]
            if names:
                return tuple(self.path / part / name for name in names)
        folders = _COMFYUI_FOLDERS[part] if self.layout == "comfyui" else ()
        if self.layout == "wan" and part != "transformer":  # files of ComfyUI beside those of Wan2.1
            folders = ("",)
        return next(filter(None, (_comfyui_files(self.path / folder, part) for folder in folders)), ())

    def settings(self, part: Part) -> dict[str, Any]:
        """The config.json of `part`; empty where the layout has none."""
        if self.layout == "diffusers":
            return read_json(self.path / part / "config.json")
        alone = self.layout == "wan" and part == "transformer"
        return read_json(self.path / "config.json") if alone else {}

    def class_names(self) -> tuple[str, ...]:
        """What model_index.json and the transformer's config.json call the pipeline and the model."""
        index = read_json(self.path / "model_index.json") if self.layout == "diffusers" else {}
        names = (values.get("_class_name") for values in (index, self.settings("transformer")))
        return tuple(name for name in names if isinstance(name, str))

    def tokenizer(self) -> Path | None:
        """The folder of the SentencePiece tokenizer, or None when there is none."""
        for name in _TOKENIZERS[self.layout]:
            refuse_dangling(self.path / name)
            if (self.path / name).is_dir():
                return self.path / name
        return None

    def open(self, part: Part, use_ema: bool = True) -> dict[str, StoredTensor]:
        """The tensors of `part` by the engine's names, none of them read yet; empty when it is absent.

        use_ema: take averaged weights where a file has others too. Raises ValueError for files that are
        damaged, of no known form, or of another part.
        """
        files = self.files(part)
        if not files:
            return {}
        found, tensors = open_part(files, use_ema)
        if found != part:
            raise ValueError(
                f"{files[0]} holds a {found}, not a {part}; the directory {self.path} is mixed up"
            )
        return tensors

    def pickle(self, part: Part) -> Path | None:
        """The first file of `part` that is a pickle, which convert alone reads."""
        return next((path for path in self.files(part) if weights_format(path) == "pickle"), None)

    def refuse_pickles(self, part: Part) -> None:
        """Raises ValueError for a part that has a pickle."""
        if path := self.pickle(part):
            raise ValueError(
                f"{path} is a pickle, which the engine does not load; run `rfengine convert {self.path} "
                "DST` and load DST"
            )

    def fingerprint(self, parts: Iterable[Part] = PARTS) -> str:
        """A sha256 of every name, shape and dtype of `parts` and of 16 evenly spread elements of each tensor.

        Training and casting change it, an edit between the sampled elements does not. Raises ValueError for
        pickles.
        """
        digest = hashlib.sha256()
        for part in parts:
            if part not in MODEL_PARTS and self.pickle(part):
                continue  # one that is never loaded
            self.refuse_pickles(part)
            for path in self.files(part):
                _hash_file(digest, part, path, read_header(path)[0])
        return digest.hexdigest()


def _hash_file(digest: hashlib._Hash, part: Part, path: Path, entries: Mapping[str, TensorEntry]) -> None:
    with path.open("rb") as file:
        for name, entry in sorted(entries.items()):
            digest.update(f"{part} {name} {entry.shape} {entry.dtype}\n".encode())
            width = entry.dtype.itemsize
            step = max(1, (entry.end - entry.begin) // width // _SAMPLES) * width
            for position in range(entry.begin, entry.end, step)[:_SAMPLES]:
                file.seek(position)
                digest.update(file.read(width))


def _suffix(name: str) -> str:
    return Path(name).suffix.lower()


def _has_comfyui(directory: Path) -> bool:
    return any(
        _comfyui_names(directory / name, part) for part in MODEL_PARTS for name in _COMFYUI_FOLDERS[part]
    )


def _comfyui_files(folder: Path, part: Part) -> tuple[Path, ...]:
    """The file in `folder` whose name is that of `part` in ComfyUI's files; empty without one.

    One in FP8 is taken where there is no other. Raises ValueError when several are left.
    """
    ranks = _comfyui_names(folder, part)
    if not ranks:
        return ()
    best = ranks.pop(min(ranks))
    if len(best) > 1:
        raise ValueError(
            f"{folder} has {', '.join(best)}, and which of them is the {part} is not clear; keep one of them"
        )
    if ranks:
        others = ", ".join(name for names in ranks.values() for name in names)
        logger.info("%s: %s is the %s, and not %s", folder, best[0], part, others)
    refuse_dangling(folder / best[0])
    return (folder / best[0],)


def _comfyui_names(folder: Path, part: Part) -> dict[tuple[int, bool], list[str]]:
    """Names in `folder` that may be of `part`, by what goes first: the format, then other dtypes than FP8."""
    ranks: dict[tuple[int, bool], list[str]] = {}
    for name in folder_names(folder):
        plain = re.sub(r"[\W_]", "", name.lower())
        if _COMFYUI_NAMES[part] in plain and (suffix := _suffix(name)) in _COMFYUI_SUFFIXES:
            rank = 0 if suffix in SAFETENSORS_SUFFIXES else 1 if suffix in PICKLE_SUFFIXES else 2
            ranks.setdefault((rank, "fp8" in plain), []).append(name)
    return ranks


# What a folder has of one model in one format and one variant: the name of its "index", of its "single" file,
# and of each shard by their total and its number.
_Form = dict[str | tuple[int, int], str]


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
        return _files(path.parent, match["stem"], {"index": path.name})
    match = re.fullmatch(rf"(?P<stem>.+?){_AFTER_STEM}", path.name, re.IGNORECASE)
    if match is None or match["number"] is None:
        return (path,)
    found = _forms(path.parent, match["stem"])[_key(match)]
    form = {at: name for at, name in found.items() if at == "index" or at[0] == int(match["total"])}
    files = _files(path.parent, match["stem"], form)
    if path not in files:
        raise ValueError(
            f"{path} is no shard that {path.parent / form['index']} names; give the whole directory"
        )
    if len(files) > 1:
        logger.warning("%s is one of %d shards; all of them are read", path, len(files))
    return files


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when there is no such file.

    Raises ValueError when the file is something else.
    """
    return json_object(read_text(path, MAX_JSON_BYTES), path) if os.path.lexists(path) else {}


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
            forms.setdefault(key, {})["index"] = name
        elif match := file.fullmatch(name):
            at = (int(match["total"]), int(match["number"])) if match["number"] else "single"
            forms.setdefault(_key(match), {})[at] = name
    return forms


def _key(match: re.Match[str]) -> tuple[bool, str]:
    return match["suffix"].lower() in PICKLE_SUFFIXES, match["variant"] or match["late"] or ""


def _files(folder: Path, stem: str, form: _Form) -> tuple[Path, ...]:
    if "index" in form:
        names = _indexed(folder / form["index"])
    elif "single" in form:
        names = [form["single"]]
    else:
        names = _counted(folder, stem, form)
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


def _counted(folder: Path, stem: str, form: _Form) -> list[str]:
    """The names of the shards that belong to one total, absent ones included."""
    shards: dict[int, dict[int, str]] = {}
    for (total, number), name in form.items():
        shards.setdefault(total, {})[number] = name
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
