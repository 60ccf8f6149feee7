"""The tensors of a model from its files onto a module, and back to one file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from rfengine.checkpoint.file_format import weights_format
from rfengine.checkpoint.layouts import EMA_WORDS, Part, engine_names
from rfengine.checkpoint.pickle_file import MODEL_KEYS, open_pickle
from rfengine.checkpoint.quantized import check_metadata, dequantized
from rfengine.checkpoint.shapes import describe_mismatch
from rfengine.checkpoint.tensor_file import StoredTensor, open_safetensors, read_header, write_safetensors

_VOCABULARY = "spiece_model"  # which ComfyUI keeps as bytes in the file of a text encoder


def open_weights(files: Sequence[Path], keys: Sequence[str] = MODEL_KEYS) -> dict[str, StoredTensor]:
    """Every tensor of one file or of the shards of one model, by the names in it; none is read yet.

    keys: see open_pickle. Raises ValueError for a file that is damaged or of another format, and for a name
    that two shards both hold.
    """
    stored: dict[str, StoredTensor] = {}
    for path in files:
        opened = open_pickle(path, keys) if weights_format(path) == "pickle" else open_safetensors(path)
        for name, tensor in opened.items():
            if name in stored:
                raise ValueError(
                    f"{path} holds {name}, which another shard holds as well; keep the shards of one model"
                )
            stored[name] = tensor
    return stored


def open_part(files: Sequence[Path], use_ema: bool = True) -> tuple[Part, dict[str, StoredTensor]]:
    """Which part the files hold, and its tensors by the engine's names, scaled FP8 multiplied back.

    use_ema: averaged weights go before the others. Raises ValueError as open_weights does, for a quantized
    form that is not read, and for files of no known layout.
    """
    keys = MODEL_KEYS if use_ema else tuple(key for key in MODEL_KEYS if key not in EMA_WORDS)
    tensors = open_weights(files, keys)
    for path in files:
        if weights_format(path) == "safetensors":
            check_metadata(read_header(path)[1], str(path))
    label = str(files[0])
    weights = {name: stored for name, stored in tensors.items() if name.rpartition(".")[2] != _VOCABULARY}
    try:
        return engine_names(dequantized(weights, label), use_ema)
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from error


def assign(
    module: nn.Module,
    stored: Mapping[str, StoredTensor],
    dtype: torch.dtype | None,
    device: torch.device | str,
    label: str,
    check_finite: bool = False,
) -> None:
    """Replace every parameter and stored buffer of `module`, best one on the meta device, in place.

    The new ones have `dtype` (integers keep theirs, None keeps all) and are made on `device` one by one, so
    that the model is held once, and beside it the tensor that is being cast; tied parameters stay tied and
    requires_grad stays. label: what errors call the file. Raises ValueError for missing, unexpected and
    mis-shaped tensors, which it lists, and, with check_finite, for values that are not finite in `dtype`.
    """
    wanted = module.state_dict(keep_vars=True)
    state: dict[str, Tensor] = {}
    for name, names in chosen_names(module, stored, label).items():
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


def chosen_names(module: nn.Module, stored: Mapping[str, StoredTensor], label: str) -> dict[str, list[str]]:
    """Which stored tensor each tensor of `module` comes from, with all the names of that one: tied ones have
    several. Raises ValueError as assign does for what does not fit."""
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
    for name in chosen:  # a cast would hide that a file is damaged, or quantized in a way of its own
        if stored[name].dtype.is_floating_point != wanted[name].dtype.is_floating_point:
            raise ValueError(
                f"{label} holds {name} in {stored[name].dtype} and the model has {wanted[name].dtype} there; "
                "get the file again, or one that is not quantized"
            )
    return chosen


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
