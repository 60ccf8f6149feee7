"""`rfengine convert`: any known checkpoint into a directory of the engine's own, tensor by tensor.

DST holds rfengine.json, manifest.json, transformer.safetensors and, where the source or the base has them,
vae.safetensors, text_encoder.safetensors, tokenizer/ and tiny_vae.safetensors. Of a tiny decoder without a
base DST holds that last file alone.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch

from rfengine.checkpoint.checkpoint import (
    engine_config,
    is_diffusion_forcing,
    open_tokenizer,
    read_config,
    write_config,
)
from rfengine.checkpoint.directories import (
    MODEL_PARTS,
    PARTS,
    CheckpointDirectory,
    all_shards,
    inner_directory,
)
from rfengine.checkpoint.layouts import Part
from rfengine.checkpoint.loader import open_part, read_as
from rfengine.checkpoint.lora import Lora, add_loras, load_loras
from rfengine.checkpoint.manifest import check_sizes, write_manifest
from rfengine.checkpoint.shapes import (
    PartConfig,
    describe_mismatch,
    expected_shapes,
    infer_config,
    part_configs,
    shapes_of,
    stated_heads,
)
from rfengine.checkpoint.systems import SYSTEMS, SystemName, configured, named_system
from rfengine.checkpoint.tensor_file import StoredTensor, write_safetensors
from rfengine.config import (
    DTypeName,
    EngineConfig,
    VAEConfig,
    WanConfig,
    require_same_latents,
)
from rfengine.files import absence, new_directory, reserved

logger = logging.getLogger(__name__)

SKYREELS = "skyreels"  # the diffusion forcing models, which are no causal system
Kind = Literal["auto", "skyreels"] | SystemName
_KINDS = (*SYSTEMS, SKYREELS)
_SKYREELS_NAME = "skyreelsv2df"  # in the names of their files, without marks


@dataclass(slots=True)
class _Checkpoint:
    """What was found so far: tensors by engine name and the configuration of each part."""

    generator: Path  # the source as it was given, or the base of a lone tiny decoder
    tensors: dict[Part, dict[str, StoredTensor]]
    configs: dict[Part, PartConfig]
    own_config: EngineConfig | None = None  # of a source or base that is in the engine's layout already
    tokenizer: Path | None = None


def convert(
    source: Path | str,
    destination: Path | str,
    *,
    base: Path | str | None = None,
    loras: Sequence[Lora | str | Path] = (),
    dtype: DTypeName = "bfloat16",
    use_ema: bool = True,
    kind: Kind = "auto",
) -> None:
    """Convert a checkpoint into `destination`, which appears whole or not at all.

    source: a directory of Wan2.1, Diffusers, ComfyUI or rfengine, a repository in Hugging Face's cache, or
    one file of a generator or of a tiny decoder (taew2_1): a pickle or safetensors, whatever its name, with
    scaled FP8 too. Of a shard all shards are taken.
    base: a directory that gives the parts the source lacks; without it they are left out, with a warning.
    loras: merged into the transformer in float32, all of them before the one rounding to dtype, each at its
    scale times what its alphas, the adapter_config.json beside it or its header state.
    dtype: of every floating-point tensor written; none is kept wider.
    use_ema: take generator_ema where a pickle has it.
    kind: the system that the checkpoint was trained for, with its cache and its denoising steps
    (systems.SYSTEMS), or skyreels for a diffusion forcing model; auto goes by the tensors of that one, and by
    the name of the source.
    Raises ValueError for a source that is damaged, unknown or does not fit its base, and for a destination
    that is in use; RuntimeError while another conversion writes it, when it cannot be written, or when torch
    is too old to read a pickle.
    """
    source, destination = Path(source), Path(destination).resolve()
    if dtype not in get_args(DTypeName):
        raise ValueError(f"dtype is {dtype!r}; use one of {', '.join(get_args(DTypeName))}")
    with reserved(destination, f"converting into {destination}"):
        checkpoint = _open_source(source, Path(base) if base is not None else None, use_ema)
        complete = "transformer" in checkpoint.tensors
        kind = _kind_of(kind, checkpoint) if complete else ""
        if loras:
            if not complete:
                raise ValueError(
                    f"{source} holds a tiny decoder, which takes no LoRA; give loras with a generator"
                )
            transformer = checkpoint.tensors["transformer"]
            add_loras(transformer, load_loras(loras, shapes_of(transformer), pickles=True))
        _check_tensors(checkpoint)
        config = _target_config(checkpoint, kind) if complete else None
        _warn(kind, checkpoint, bool(loras))
        with new_directory(destination) as directory:
            for part, tensors in checkpoint.tensors.items():
                cast = {name: _cast(name, stored, getattr(torch, dtype)) for name, stored in tensors.items()}
                write_safetensors(directory / f"{part}.safetensors", cast, show_progress=True)
            if checkpoint.tokenizer is not None:
                _copy_files(checkpoint.tokenizer, directory / "tokenizer")
            if config is not None:
                write_config(directory, config)
                write_manifest(directory)


def _open_source(source: Path, base: Path | None, use_ema: bool) -> _Checkpoint:
    checkpoint = _Checkpoint(source, {}, {})
    if not os.path.exists(source):
        raise ValueError(f"{source} {absence(source)}")
    if source.is_dir():
        _take_parts(checkpoint, inner_directory(source), use_ema)
    else:
        part, tensors = open_part(all_shards(source), use_ema)
        if part not in ("transformer", "tiny_vae"):
            raise ValueError(
                f"{source} holds a {part}; give the transformer's file as the source, and a directory "
                f"with the {part} as base"
            )
        checkpoint.tensors[part] = tensors
        if part == "tiny_vae":
            checkpoint.configs[part] = infer_config(part, shapes_of(tensors), place=source)
            if base is None:
                return checkpoint
            checkpoint.generator = base
    if base is not None:
        base = inner_directory(base)
        _take_parts(checkpoint, base, use_ema)
    if "transformer" not in checkpoint.tensors:
        raise ValueError(
            f"{source} has no transformer; give the checkpoint as the source and this directory as base"
        )
    if "transformer" not in checkpoint.configs:
        shapes = shapes_of(checkpoint.tensors["transformer"])
        heads = _base_heads(base, shapes)
        checkpoint.configs["transformer"] = infer_config("transformer", shapes, heads, source)
    return checkpoint


def _take_parts(checkpoint: _Checkpoint, path: Path, use_ema: bool) -> None:
    """Take from the directory `path` every part that is not there yet."""
    check_sizes(path)
    directory = CheckpointDirectory.of(path)
    own = read_config(directory) if directory.layout == "rfengine" else None
    for part in PARTS:
        if part in checkpoint.tensors or not (files := directory.files(part)):
            continue
        checkpoint.tensors[part] = directory.open(part, use_ema)
        if own is None:
            shapes, settings = shapes_of(checkpoint.tensors[part]), directory.settings(part)
            checkpoint.configs[part] = infer_config(part, shapes, settings, files[0].parent)
        else:
            checkpoint.configs[part] = part_configs(own)[part]
        if part == "text_encoder":
            text, checkpoint.tokenizer = checkpoint.configs[part], directory.tokenizer()
            if text.tokenizer == "sentencepiece" and checkpoint.tokenizer is None:
                raise ValueError(
                    f"{path} has a text encoder and no tokenizer; add google/umt5-xxl/ or tokenizer/ to it, "
                    "with the tokenizer.json of umt5-xxl"
                )
            open_tokenizer(checkpoint.tokenizer, text)
    checkpoint.own_config = checkpoint.own_config or own


def _base_heads(base: Path | None, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """num_heads of a base whose transformer has the same dim; a lone file does not tell it."""
    if base is None or "patch_embedding.weight" not in shapes:
        return {}
    directory = CheckpointDirectory.of(base)
    if directory.layout == "rfengine":
        model = read_config(directory).model
        heads = {model.dim: model.num_heads}
    else:
        heads = stated_heads(directory.settings("transformer"))
    dim = shapes["patch_embedding.weight"][0]
    return {"num_heads": heads[dim]} if dim in heads else {}


def _kind_of(kind: Kind, checkpoint: _Checkpoint) -> str:
    """One of _KINDS, or an empty string to keep the configuration of an rfengine directory."""
    source, model = checkpoint.generator, checkpoint.configs["transformer"]
    if kind in SYSTEMS and model.fps_embedding:
        raise ValueError(
            f"kind is {kind!r} and {source} has a table of frame rates, as SkyReels-V2's diffusion forcing "
            f"models alone have; use {SKYREELS}"
        )
    if kind == SKYREELS or (kind == "auto" and _is_skyreels(source, model)):
        return SKYREELS
    return _resolve_kind(kind, source)


def _is_skyreels(source: Path, model: WanConfig) -> bool:
    """Whether the tensors, the name or the files of a source tell a diffusion forcing model."""
    directory = CheckpointDirectory.of(inner_directory(source)) if source.is_dir() else None
    if directory is not None and directory.layout == "rfengine":
        return False
    name = _given_path(source).name
    if model.fps_embedding or _SKYREELS_NAME in re.sub(r"[-_]", "", name.lower()):
        return True
    return directory is not None and not named_system(name) and is_diffusion_forcing(directory, model)


def _resolve_kind(kind: Kind, source: Path) -> str:
    """The key of SYSTEMS to use, or an empty string to keep the configuration of an rfengine directory."""
    if kind in SYSTEMS:
        return kind
    if kind != "auto":
        raise ValueError(f"kind is {kind!r}; use one of auto, {', '.join(_KINDS)}")
    layout = CheckpointDirectory.of(inner_directory(source)).layout if source.is_dir() else ""
    if layout == "rfengine":
        return ""
    given = _given_path(source)
    folders = "/".join(given.parts[-3:]) if source.is_file() else ""  # as in framewise/causal_forcing.pt
    if named := named_system(given.name) or named_system(folders):
        return named
    if layout and not any(word in given.name.lower() for word in ("forcing", "longlive")):
        return "wan"
    raise ValueError(
        f"the name {source.name} does not tell which system the checkpoint was trained for; "
        f"give kind, one of {', '.join(_KINDS)}"
    )


def _given_path(source: Path) -> Path:
    """The path whose last name people chose: in a cache links lead to files named by their hashes, and a
    snapshot, named by one too, is in the folder of its repository."""
    path = Path(os.path.abspath(source))
    return path.parent.parent if path.parent.name == "snapshots" else path


def _check_tensors(checkpoint: _Checkpoint) -> None:
    for part, tensors in checkpoint.tensors.items():
        problem = describe_mismatch(expected_shapes(checkpoint.configs[part]), shapes_of(tensors))
        if problem:
            raise ValueError(
                f"the {part} is not that of Wan2.1: {problem}; get the file again or give the right one"
            )


def _target_config(checkpoint: _Checkpoint, kind: str) -> EngineConfig:
    own = checkpoint.own_config
    configs = {**(part_configs(own) if own else {}), **checkpoint.configs}
    if "tiny_vae" in checkpoint.tensors:
        require_same_latents(configs["tiny_vae"], configs.get("vae", VAEConfig()))
    model = configs["transformer"]
    try:
        forcing = kind == SKYREELS or (not kind and own.diffusion_forcing is not None)
        inferred = engine_config(configs, kind, forcing)
    except ValueError as error:
        raise ValueError(
            f"{error}; give a base whose VAE and text encoder belong to this transformer"
        ) from error
    if kind == SKYREELS:
        return inferred
    if own is None or (kind and own.diffusion_forcing is not None):
        return configured(inferred, kind)
    kept = replace(own, model=model, vae=inferred.vae, tiny_vae=inferred.tiny_vae, text=inferred.text)
    return configured(replace(kept, name=inferred.name), kind) if kind else kept


def _warn(kind: str, checkpoint: _Checkpoint, has_loras: bool) -> None:
    absent = [part for part in MODEL_PARTS if part not in checkpoint.tensors]
    if "transformer" in absent:
        logger.warning(
            "only a tiny decoder was given: copy it into a directory of the engine, or convert again with "
            "that directory as base"
        )
    elif absent:
        logger.warning(
            "no %s was found and none is written; convert again with a base that has it", " or ".join(absent)
        )
    if kind == "wan":
        logger.warning(
            "Wan2.1 without distillation is a teacher: it needs many steps, not the few of this engine"
        )
    if kind == "longlive" and not has_loras:
        logger.warning(
            "LongLive is converted without its LoRA; give lora.pt as a LoRA unless it is merged already"
        )


def _cast(name: str, stored: StoredTensor, dtype: torch.dtype) -> StoredTensor:
    target = dtype if stored.dtype.is_floating_point else stored.dtype
    return StoredTensor(stored.shape, target, lambda: read_as(name, stored, target, check_finite=True))


def _copy_files(folder: Path, target: Path) -> None:
    """The ordinary files of a tokenizer's folder, those behind links too."""
    target.mkdir()
    for path in sorted(folder.iterdir()):
        if path.is_file():
            shutil.copyfile(path, target / path.name)
