"""Where the parts of a checkpoint lie in a directory of rfengine, of Wan2.1 or of Diffusers."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from rfengine.checkpoint.layouts import Part

DirectoryLayout = Literal["rfengine", "wan", "diffusers"]

CONFIG_FILE = "rfengine.json"
EXPORT_FOLDER = "tensorrt"  # inside a checkpoint directory: decoders built for one machine
MODEL_PARTS: tuple[Part, ...] = ("transformer", "vae", "text_encoder")  # what a whole checkpoint has
PARTS: tuple[Part, ...] = (*MODEL_PARTS, "tiny_vae")
PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")

# Stem of the safetensors file (or of its shards) of each part, then of the pickle that may stand in its
# place.
_FILES: dict[DirectoryLayout, dict[Part, tuple[str, str]]] = {
    "rfengine": {part: (part, "") for part in PARTS},
    "wan": {
        "transformer": ("diffusion_pytorch_model", "diffusion_pytorch_model.bin"),
        "vae": ("Wan2.1_VAE", "Wan2.1_VAE.pth"),
        "text_encoder": ("models_t5_umt5-xxl-enc-bf16", "models_t5_umt5-xxl-enc-bf16.pth"),
        "tiny_vae": ("taew2_1", "taew2_1.pth"),
    },
    "diffusers": {
        "transformer": ("transformer/diffusion_pytorch_model", "transformer/diffusion_pytorch_model.bin"),
        "vae": ("vae/diffusion_pytorch_model", "vae/diffusion_pytorch_model.bin"),
        "text_encoder": ("text_encoder/model", "text_encoder/pytorch_model.bin"),
        "tiny_vae": ("tiny_vae/diffusion_pytorch_model", "tiny_vae/taew2_1.pth"),
    },
}
_TOKENIZERS: dict[DirectoryLayout, str] = {
    "rfengine": "tokenizer", "wan": "google/umt5-xxl", "diffusers": "tokenizer",
}  # fmt: skip


def checkpoint_directory(source: str | Path) -> Path:
    """Where the checkpoint `source` lies; "tiny" is in the package. Raises ValueError for no directory."""
    if str(source) == "tiny":
        return Path(str(resources.files("rfengine"))) / "weights" / "tiny"
    directory = Path(source)
    if not directory.is_dir():
        raise ValueError(
            f"{source} is no directory; give 'tiny' or a checkpoint directory (see rfengine convert)"
        )
    return directory


def directory_layout(directory: Path) -> DirectoryLayout:
    """Which of the known layouts `directory` has.

    Raises ValueError when it does not exist or has none of them.
    """
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory on this machine; give one that holds a checkpoint")
    if (directory / CONFIG_FILE).is_file():
        return "rfengine"
    for layout in ("diffusers", "wan"):
        if any(_files_of(directory, layout, part) for part in MODEL_PARTS):
            return layout
    pickles = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLE_SUFFIXES)
    held = f" (it holds {', '.join(pickles)}: give that file itself to `rfengine convert`)" if pickles else ""
    raise ValueError(
        f"{directory} has no {CONFIG_FILE}, no transformer/ folder and no "
        f"diffusion_pytorch_model.safetensors{held}; give a directory of rfengine, Wan2.1 or Diffusers"
    )


def part_files(directory: Path, part: Part) -> tuple[Path, ...]:
    """The files of `part`: safetensors, or one pickle where there is nothing else; empty when absent.

    Raises ValueError when shards are incomplete.
    """
    return _files_of(directory, directory_layout(directory), part)


def part_settings(directory: Path, part: Part) -> dict[str, Any]:
    """The config.json that belongs to `part`; empty where the layout has none."""
    layout = directory_layout(directory)
    if layout == "diffusers":
        return read_json(directory / part / "config.json")
    return read_json(directory / "config.json") if layout == "wan" and part == "transformer" else {}


def tokenizer_directory(directory: Path) -> Path | None:
    """The folder of the SentencePiece tokenizer, or None when there is none."""
    folder = directory / _TOKENIZERS[directory_layout(directory)]
    return folder if folder.is_dir() else None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when there is no such file.

    Raises ValueError when the file is something else.
    """
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); get the file again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, not a JSON object; get the file again")
    return values


def _files_of(directory: Path, layout: DirectoryLayout, part: Part) -> tuple[Path, ...]:
    stem, pickle = _FILES[layout][part]
    files = _safetensors_files(directory / stem)
    if not files and part == "tiny_vae":  # a folder of that name holds it under whatever name it came
        files = tuple(sorted((directory / part).glob("*.safetensors")))
    if files or not pickle:
        return files
    return (directory / pickle,) if (directory / pickle).is_file() else ()


def _safetensors_files(stem: Path) -> tuple[Path, ...]:
    """`stem`.safetensors, or its shards as the index or their own names count them."""
    index = stem.with_name(f"{stem.name}.safetensors.index.json")
    single = stem.with_name(f"{stem.name}.safetensors")
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(_is_bare(name) for name in weight_map.values()):
            raise ValueError(f"{index} has no weight_map of file names beside it; get the file again")
        names = sorted(set(weight_map.values()))
    elif single.is_file():
        return (single,)
    else:
        shard = re.compile(rf"{re.escape(stem.name)}-\d{{5}}-of-(\d{{5}})\.safetensors")
        found = [
            match
            for path in sorted(stem.parent.glob("*.safetensors"))
            if (match := shard.fullmatch(path.name))
        ]
        totals = {match[1] for match in found}
        names = [
            f"{stem.name}-{number + 1:05}-of-{total}.safetensors"
            for total in totals
            for number in range(int(total))
        ]
    absent = [name for name in names if not (stem.parent / name).is_file()]
    if absent:
        raise ValueError(
            f"{stem.parent} lacks {', '.join(absent)} of {len(names)} shards; get the missing files"
        )
    return tuple(stem.parent / name for name in names)


def _is_bare(name: object) -> bool:
    return isinstance(name, str) and name == Path(name).name
