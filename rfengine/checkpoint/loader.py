"""Checkpoints: the configuration of a directory, its weights onto a module, and weights back to disk.

Only safetensors are read. A module is built on the meta device and its parameters are replaced one by one, so
that loading holds the model once, and beside it the one tensor that is being cast.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from rfengine.checkpoint.agreement import require_agreement
from rfengine.checkpoint.directories import (
    CONFIG_FILE,
    MODEL_PARTS,
    PARTS,
    directory_layout,
    part_files,
    part_settings,
    read_json,
)
from rfengine.checkpoint.file_format import weights_format
from rfengine.checkpoint.layouts import Part
from rfengine.checkpoint.manifest import check_sizes
from rfengine.checkpoint.shapes import PartConfig, describe_mismatch, infer_config
from rfengine.checkpoint.tensor_file import (
    StoredTensor,
    TensorEntry,
    open_safetensors,
    read_header,
    write_safetensors,
)
from rfengine.checkpoint.weights_file import open_part
from rfengine.config import (
    PRESETS,
    EngineConfig,
    TextConfig,
    TinyVAEConfig,
    VAEConfig,
    WanConfig,
    from_dict,
    to_dict,
)
from rfengine.files import write_text
from rfengine.grid import LatentGrid
from rfengine.limits import shown

logger = logging.getLogger(__name__)

CONFIG_FORMAT = 1
_SINGLE_FILES: dict[Part, str] = {"tiny_vae": "taew2_1.pth"}  # a part that comes in a file of its own
_SAMPLES = 16  # elements of each tensor that a fingerprint reads, evenly spread


def read_config(directory: Path | str) -> EngineConfig:
    """The configuration of a checkpoint directory: its own, or inferred for the Wan2.1 and Diffusers layouts.

    Inferred means: sizes from tensors and config.json; the published VAE and text encoder where their files
    are absent or pickles; the default cache and schedule, with a warning: those layouts do not name any.
    Raises ValueError for a directory without checkpoint, and for a configuration that is damaged, too new, or
    of other sizes than the tensors beside it.
    """
    directory = Path(directory)
    if directory_layout(directory) != "rfengine":
        return _infer_engine_config(directory)
    path = directory / CONFIG_FILE
    values = read_json(path)
    stated = values.get("format")
    if type(stated) is not int or stated != CONFIG_FORMAT or "engine" not in values:
        raise ValueError(
            f"{path} has format {shown(stated)} and this rfengine reads {CONFIG_FORMAT}; convert the source "
            "again"
        )
    unknown = [key for key in values if key not in ("format", "engine")]
    if unknown:
        raise ValueError(f"{path} has the key {shown(unknown[0])}; it holds format and engine alone")
    try:
        config = from_dict(EngineConfig, values["engine"], "engine")
        LatentGrid.of(config)
    except ValueError as error:
        raise ValueError(f"{path} is not a configuration of this rfengine: {error}") from error
    require_agreement(directory, config)
    return config


def write_config(directory: Path, config: EngineConfig) -> None:
    """Write `rfengine.json` into `directory`; read_config is the way back."""
    text = json.dumps({"format": CONFIG_FORMAT, "engine": to_dict(config)}, indent=2)
    write_text(directory / CONFIG_FILE, text + "\n")


def engine_config(configs: Mapping[Part, PartConfig], name: str = "") -> EngineConfig:
    """The EngineConfig of inferred parts; the published VAEs and text encoder stand in for absent ones.

    name: how the checkpoint is called; the size goes behind it. Raises ValueError when parts do not fit.
    """
    model = configs["transformer"]
    assert isinstance(model, WanConfig)
    published = {preset.model: key.removeprefix("wan-") for key, preset in PRESETS.items()}
    size = published.get(model, f"dim{model.dim}-layers{model.num_layers}")
    vae, text = configs.get("vae", VAEConfig()), configs.get("text_encoder", TextConfig())
    tiny_vae = configs.get("tiny_vae", TinyVAEConfig())
    return EngineConfig(name=f"{name or 'wan'}-{size}", model=model, vae=vae, tiny_vae=tiny_vae, text=text)


def _infer_engine_config(directory: Path) -> EngineConfig:
    configs: dict[Part, PartConfig] = {}
    for part in PARTS:
        files = part_files(directory, part)
        if part == "transformer":
            if not files:
                raise ValueError(f"{directory} has no transformer; give the directory that has it")
            _refuse_pickles(files, directory)
        if files and not _is_pickle(files[0]):
            _, stored = open_part(files)
            shapes = {name: tensor.shape for name, tensor in stored.items()}
            try:
                configs[part] = infer_config(part, shapes, part_settings(directory, part))
            except ValueError as error:
                raise ValueError(f"{files[0].parent}: {error}") from error
    logger.warning(
        "%s names no cache; EMA-Sink is taken, and the model is treated as a teacher, which a few steps do "
        "not suit",
        directory,
    )
    return engine_config(configs)


def load_part(
    module: nn.Module,
    directory: Path | str,
    part: Part,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> None:
    """Load the transformer, VAE, text encoder or tiny VAE of a checkpoint directory of any layout onto
    `module`.

    `module` is changed in place, as by load_weights. Raises ValueError when the directory lacks the part, has
    it only as a pickle, or has it for another model, and where a file has not the size in the manifest.
    """
    directory = Path(directory)
    check_sizes(directory)
    files = part_files(directory, part)
    if not files:
        if part in _SINGLE_FILES:
            way = f"run `rfengine convert {_SINGLE_FILES[part]} DST --base {directory}` and load DST"
        else:
            way = "run `rfengine convert SRC DST --base WAN` where WAN is a directory that has it"
        raise ValueError(f"{directory} has no {part}; {way}")
    _refuse_pickles(files, directory)
    found, stored = open_part(files)
    if found != part:
        raise ValueError(f"{files[0]} holds a {found}, not a {part}; the directory {directory} is mixed up")
    _assign(module, stored, dtype, device, str(files[0]), check_finite=True)


def load_weights(
    module: nn.Module,
    source: Path | str | Iterable[Path],
    dtype: torch.dtype | None,
    device: torch.device | str = "cpu",
    rename: Callable[[str], str] | None = None,
    check_finite: bool = False,
) -> None:
    """Load one safetensors file, or all shards of one model, onto `module`, best on the meta device.

    Every parameter and stored buffer of `module` is replaced by a tensor of `dtype` (integers keep theirs,
    None keeps all) on `device`; tied parameters stay tied and requires_grad stays. rename gives the module's
    name of a stored one.
    Raises ValueError for a damaged file, for missing, unexpected and mis-shaped tensors, which it lists, and,
    with check_finite, for values that are not finite in `dtype`.
    """
    paths = [Path(source)] if isinstance(source, Path | str) else list(source)
    stored = open_safetensors(paths)
    if rename is not None:
        renamed = {rename(name): tensor for name, tensor in stored.items()}
        if len(renamed) < len(stored):
            raise ValueError(
                f"rename gives {len(stored)} tensors only {len(renamed)} names; make it one-to-one"
            )
        stored = renamed
    _assign(module, stored, dtype, device, ", ".join(map(str, paths)), check_finite)


def _assign(
    module: nn.Module,
    stored: Mapping[str, StoredTensor],
    dtype: torch.dtype | None,
    device: torch.device | str,
    label: str,
    check_finite: bool = False,
) -> None:
    wanted = module.state_dict(keep_vars=True)
    aliases: dict[int, list[str]] = {}
    for name, tensor in wanted.items():
        aliases.setdefault(id(tensor), []).append(name)
    # Of tied names one is read: the first that the file has, or the first there is, so that it is listed as
    # missing.
    chosen = {next((name for name in names if name in stored), names[0]): names for names in aliases.values()}
    tied = {name for names in chosen.values() for name in names} - chosen.keys()
    problem = describe_mismatch(
        {name: tuple(wanted[name].shape) for name in chosen},
        {name: tensor.shape for name, tensor in stored.items() if name not in tied},
    )
    if problem:
        raise ValueError(
            f"{label} does not fit the model: {problem}; load it into the model that it was made for"
        )
    _check_kinds(label, stored, {name: wanted[name].dtype for name in chosen})
    state: dict[str, Tensor] = {}
    for name, names in chosen.items():
        value = read_as(name, stored[name], dtype, device, check_finite)
        if isinstance(wanted[name], nn.Parameter):
            value = nn.Parameter(value, requires_grad=wanted[name].requires_grad)
        state |= dict.fromkeys(names, value)
    module.load_state_dict(state, strict=True, assign=True)
    waiting = [name for name, buffer in module.named_buffers() if buffer.is_meta]
    if waiting:
        raise RuntimeError(
            f"buffers {', '.join(waiting)} are in no checkpoint; build them outside the meta device"
        )


def _check_kinds(label: str, stored: Mapping[str, StoredTensor], wanted: Mapping[str, torch.dtype]) -> None:
    """Refuse integers where the module has floating-point numbers, and the other way round: a cast would hide
    that a file is damaged, or quantized in a way of its own."""
    for name, dtype in wanted.items():
        if stored[name].dtype.is_floating_point != dtype.is_floating_point:
            raise ValueError(
                f"{label} holds {name} in {stored[name].dtype} and the model has {dtype} there; get the file "
                "again, or one that is not quantized"
            )


def read_as(
    name: str,
    stored: StoredTensor,
    dtype: torch.dtype | None,
    device: torch.device | str = "cpu",
    check_finite: bool = False,
) -> Tensor:
    """The stored tensor on `device`, in `dtype` unless it holds integers or dtype is None.

    Raises ValueError, with check_finite, when a value is not finite in `dtype`; `name` is for that error.
    """
    kept = dtype is None or not stored.dtype.is_floating_point
    tensor = stored.read().to(device=device, dtype=stored.dtype if kept else dtype)
    if check_finite and not torch.isfinite(tensor).all():
        raise ValueError(
            f"{name} has values that are not finite in {tensor.dtype}; use a wider dtype or another file"
        )
    return tensor


def save_weights(
    path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors to one safetensors file, which appears whole or not at all.

    Raises RuntimeError when the file cannot be written, and ValueError for a dtype that safetensors lacks.
    """
    write_safetensors(
        Path(path), {name: StoredTensor.of(tensor) for name, tensor in tensors.items()}, metadata
    )


def read_safetensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of one safetensors file, on the CPU, and its metadata.

    Raises ValueError when the file is absent, empty, truncated, damaged or of another format.
    """
    _, metadata = read_header(Path(path))
    return {name: stored.read() for name, stored in open_safetensors(Path(path)).items()}, metadata


def fingerprint(source: Path | str | nn.Module, parts: Iterable[Part] = PARTS) -> str:
    """A sha256 that tells apart the weights of two checkpoint directories, or of two modules.

    It covers every name, shape and dtype and 16 evenly spread elements of each tensor, not the whole content:
    training and casting change it, an edit between the sampled elements does not. A directory and the module
    loaded from it have different fingerprints. parts: those of a directory that count. Raises ValueError for
    a directory without checkpoint or with pickles in it.
    """
    digest = hashlib.sha256()
    if isinstance(source, nn.Module):
        for name, tensor in sorted(source.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            flat = tensor.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].contiguous().cpu()
            digest.update(sample.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()
    for part in parts:
        files = part_files(Path(source), part)
        if part not in MODEL_PARTS and any(map(_is_pickle, files)):
            continue  # one that is never loaded
        _refuse_pickles(files, Path(source))
        for path in files:
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


def _is_pickle(path: Path) -> bool:
    return weights_format(path) == "pickle"


def _refuse_pickles(files: Iterable[Path], directory: Path) -> None:
    for path in files:
        if _is_pickle(path):
            raise ValueError(
                f"{path} is a pickle, which the engine does not load; run `rfengine convert {directory} "
                "DST` and load DST"
            )
