"""The parts of a checkpoint in a directory of rfengine, Wan2.1, Diffusers, ComfyUI or a download cache."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from rfengine.checkpoint.file_format import PICKLE_SUFFIXES, SAFETENSORS_SUFFIXES, weights_format
from rfengine.checkpoint.layouts import Part
from rfengine.checkpoint.loader import open_part
from rfengine.checkpoint.shards import folder_names, model_files, read_json, refuse_dangling
from rfengine.checkpoint.tensor_file import StoredTensor, TensorEntry, read_header
from rfengine.files import read_text

logger = logging.getLogger(__name__)

DirectoryLayout = Literal["rfengine", "wan", "diffusers", "comfyui"]

CONFIG_FILE = "rfengine.json"
EXPORT_FOLDER = "tensorrt"  # inside a checkpoint directory: decoders built for one machine
_SAMPLES = 16  # elements of each tensor that a fingerprint reads, evenly spread
MODEL_PARTS: tuple[Part, ...] = ("transformer", "vae", "text_encoder")  # what a whole checkpoint has
PARTS: tuple[Part, ...] = (*MODEL_PARTS, "tiny_vae")
_MOST_REFERENCE_BYTES = 1024  # of refs/main in a cache: a hash

# Folder and stem of the files of each part.
_FILES: dict[DirectoryLayout, dict[Part, tuple[tuple[str, str], ...]]] = {
    "rfengine": {part: (("", part),) for part in PARTS},
    "wan": {
        "transformer": (("", "diffusion_pytorch_model"),),
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
    "comfyui": {part: () for part in PARTS},
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
        return cls(path, _layout_of(path))

    def files(self, part: Part) -> tuple[Path, ...]:
        """The files of `part`: safetensors, or pickles where there is nothing else; empty when absent.

        Raises ValueError when shards are incomplete, and where several files may be meant.
        """
        return _files_of(self.path, self.layout, part)

    def settings(self, part: Part) -> dict[str, Any]:
        """The config.json of `part`; empty where the layout has none."""
        if self.layout == "diffusers":
            return read_json(self.path / part / "config.json")
        alone = self.layout == "wan" and part == "transformer"
        return read_json(self.path / "config.json") if alone else {}

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

    def is_pickled(self, part: Part) -> bool:
        """Whether a file of `part` is a pickle, which convert alone reads."""
        return any(weights_format(path) == "pickle" for path in self.files(part))

    def refuse_pickles(self, part: Part) -> None:
        """Raises ValueError for a part that is_pickled."""
        for path in self.files(part):
            if weights_format(path) == "pickle":
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
            if part not in MODEL_PARTS and self.is_pickled(part):
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


def _layout_of(directory: Path) -> DirectoryLayout:
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory on this machine; give one that holds a checkpoint")
    names = folder_names(directory)
    if CONFIG_FILE in names:
        return "rfengine"
    for layout in ("diffusers", "wan"):
        if any(_files_of(directory, layout, part) for part in MODEL_PARTS):
            return layout
    if _has_comfyui(directory):
        return "comfyui"
    weights = [name for name in names if Path(name).suffix.lower() in _COMFYUI_SUFFIXES]
    held = f" (it holds {', '.join(weights)}: give that file itself to `rfengine convert`)" if weights else ""
    raise ValueError(
        f"{directory} has no {CONFIG_FILE}, no transformer/ folder and no "
        f"diffusion_pytorch_model.safetensors{held}; give a directory of rfengine, Wan2.1, Diffusers or "
        "ComfyUI"
    )


def _files_of(directory: Path, layout: DirectoryLayout, part: Part) -> tuple[Path, ...]:
    for folder, stem in _FILES[layout][part]:
        if files := model_files(directory / folder, stem):
            return files
    if part == "tiny_vae":  # a folder of that name holds it under whatever name it came
        names = folder_names(directory / part)
        if files := tuple(directory / part / name for name in names if _suffix(name) in SAFETENSORS_SUFFIXES):
            return files
    if layout == "wan" and part != "transformer":  # files of ComfyUI beside those of Wan2.1
        return _comfyui_files(directory, part)
    if layout == "comfyui":
        for folder in _COMFYUI_FOLDERS[part]:
            if files := _comfyui_files(directory / folder, part):
                return files
    return ()


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
