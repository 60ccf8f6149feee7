"""The files of a VideoAlign checkpoint: its settings, and weights under the names of transformers.

Both layouts are read: `model.pth` with the whole PEFT model, or `adapter_model.safetensors` with
`non_lora_state_dict.pth` over the weights of the base model. LoRA pairs are merged in float32.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

import torch
from torch import Tensor, nn

from rfengine.checkpoint.layouts import list_names
from rfengine.checkpoint.loader import open_weights
from rfengine.checkpoint.lora import merge_lora
from rfengine.checkpoint.pickle_file import open_pickle
from rfengine.checkpoint.tensor_file import StoredTensor, open_safetensors
from rfengine.files import read_text, strict_json

QUALITIES = ("VQ", "MQ", "TA")
# Two public files give these; nothing here was checked against the published checkpoint.
UNVERIFIED_CONSTANTS = {
    "VQ_mean": 3.6757, "VQ_std": 2.2476, "MQ_mean": 1.1646, "MQ_std": 1.3811,
    "TA_mean": 2.8105, "TA_std": 2.5121,
}  # fmt: skip
HEAD = "rm_head.weight"

_SERVED = {"prompt_template_type": "detailed_special", "sample_type": "uniform", "num_frames": None}
_KEYS = ("state_dict", "model")
_MAX_CONFIG_BYTES = 1 << 20
_MAX_SETTING = 1e9  # of any number in the file
_LORA = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")


@dataclass(frozen=True, slots=True)
class VideoRewardSettings:
    """Of model_config.json. mean, std: by quality, in the order of QUALITIES; max_pixels: of a frame that the
    model sees; fps: frames a second that it sees; lora_alpha, lora_rank: None where the file has none."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    output_dim: int | None
    max_pixels: int
    fps: float
    lora_alpha: float | None
    lora_rank: int | None


def read_settings(directory: Path) -> VideoRewardSettings:
    """Raises ValueError for a file that is absent or damaged, or that lacks the normalisation constants."""
    path = directory / "model_config.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give the directory of a VideoAlign checkpoint")
    try:
        config = strict_json(read_text(path, _MAX_CONFIG_BYTES))
        parts: dict[str, dict[str, Any]] = {
            name: dict(config.get(name) or {})
            for name in ("data_config", "model_config", "peft_lora_config", "inference_config")
        }
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is no model_config.json of VideoAlign ({error}); get it again") from error
    constants = parts["inference_config"]
    missing = [name for name in UNVERIFIED_CONSTANTS if not _is_number(constants.get(name))]
    if missing:
        raise ValueError(
            f"{path} has no {list_names(missing)} in inference_config; scores need them. Published "
            f"elsewhere, and unverified: {json.dumps(UNVERIFIED_CONSTANTS)}"
        )
    for key, served in _SERVED.items():
        if parts["data_config"].get(key, served) != served:
            raise ValueError(f"{path} has {key} {parts['data_config'][key]!r}; only {served!r} is served")
    std = tuple(float(constants[f"{quality}_std"]) for quality in QUALITIES)
    if min(std) <= 0:
        raise ValueError(f"{path} has standard deviations {std} in inference_config; they must be positive")
    lora, model = parts["peft_lora_config"], parts["model_config"]
    return VideoRewardSettings(
        mean=tuple(float(constants[f"{quality}_mean"]) for quality in QUALITIES),
        std=std,
        output_dim=_whole(model, "output_dim", path),
        max_pixels=_whole(parts["data_config"], "max_frame_pixels", path) or 448 * 448,
        fps=_positive(parts["data_config"], "fps", path) or 2.0,
        lora_alpha=_positive(lora, "lora_alpha", path) or _positive(model, "lora_alpha", path),
        lora_rank=_whole(lora, "r", path) or _whole(model, "lora_r", path),
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _MAX_SETTING


def _positive(section: Mapping[str, Any], key: str, path: Path) -> float | None:
    """A number above 0 in a section of the file `path`; None where it has none or null."""
    value = section.get(key)
    if value is not None and not (_is_number(value) and value > 0):
        raise ValueError(
            f"{path} has {key} {shortened(value)}; it has to be a number above 0 and up to {_MAX_SETTING:g}"
        )
    return None if value is None else float(value)


def _whole(section: Mapping[str, Any], key: str, path: Path) -> int | None:
    value = _positive(section, key, path)
    if value is not None and value != int(value):
        raise ValueError(f"{path} has {key} {value:g}; it has to be a whole number")
    return None if value is None else int(value)


def newest_checkpoint(directory: Path) -> Path:
    """The checkpoint-N of the highest N."""
    numbers = [
        int(match[1])
        for path in directory.iterdir()
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    ]
    if not numbers:
        raise ValueError(f"{directory} has no checkpoint-N; give the directory of a VideoAlign checkpoint")
    return directory / f"checkpoint-{max(numbers)}"


def read_weights(directory: Path, base: Path, settings: VideoRewardSettings) -> dict[str, StoredTensor]:
    """The weights of Qwen2VLModel and of the head by their names, LoRA merged as they are read.

    base: directory of the base model, whose weights serve the second layout alone. Raises ValueError for
    files that are absent, and for LoRA pairs that are incomplete or do not fit.
    """
    folder = newest_checkpoint(directory)
    if (folder / "model.pth").is_file():
        return _merged(open_pickle(folder / "model.pth", _KEYS), settings, folder)
    adapter, rest = folder / "adapter_model.safetensors", folder / "non_lora_state_dict.pth"
    if not (adapter.is_file() and rest.is_file()):
        raise ValueError(f"{folder} has neither model.pth nor {adapter.name} with {rest.name}; get it again")
    files = sorted(base.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{base} has no safetensors; this checkpoint needs the weights of its base model")
    stored = {engine_name(name): tensor for name, tensor in open_weights(files).items()}
    stored |= {engine_name(name): tensor for name, tensor in open_pickle(rest, _KEYS).items()}
    return _merged(stored | open_safetensors(adapter), settings, folder)


def engine_name(name: str) -> str:
    """The name under transformers 5 of a weight of any layout: language_model.*, visual.* or rm_head.*."""
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    if name.startswith(("visual.", "rm_head.", "lm_head.", "language_model.")):
        return name
    name = name.removeprefix("model.")
    if name.startswith(("visual.", "language_model.")):
        return name
    return f"language_model.{name}"


def _merged(
    stored: Mapping[str, StoredTensor], settings: VideoRewardSettings, folder: Path
) -> dict[str, StoredTensor]:
    weights: dict[str, StoredTensor] = {}
    pairs: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in stored.items():
        known = engine_name(name)
        if match := _LORA.fullmatch(known):
            pairs.setdefault(f"{match[1]}.weight", {})[match[2]] = tensor
        elif known != "lm_head.weight":
            weights[known] = tensor
    if pairs and (settings.lora_alpha is None or settings.lora_rank is None):
        raise ValueError(f"{folder} has LoRA pairs and model_config.json no lora_alpha and r; add them there")
    for name, sides in pairs.items():
        weights[name] = _merged_weight(weights.get(name), sides, name, settings, folder)
    return weights


def _merged_weight(
    weight: StoredTensor | None,
    sides: Mapping[str, StoredTensor],
    name: str,
    settings: VideoRewardSettings,
    folder: Path,
) -> StoredTensor:
    shapes = [tuple(sides[side].shape) for side in "AB" if side in sides]
    rank = settings.lora_rank
    if weight is None or shapes != [(rank, weight.shape[-1]), (weight.shape[0], rank)]:
        held = None if weight is None else weight.shape
        raise ValueError(f"{folder} has LoRA {shapes} of rank {rank} for {name} {held}; it does not fit")
    alpha = settings.lora_alpha

    def read() -> Tensor:
        return merge_lora(weight.read(), sides["A"].read(), sides["B"].read(), alpha)

    return StoredTensor(weight.shape, torch.float32, read)


def fill(
    model: nn.Module, weights: Mapping[str, StoredTensor], dtype: torch.dtype, device: torch.device
) -> None:
    """Give every parameter of a model on the meta device its weight. Raises ValueError for other names or
    shapes; surplus rows of the token embedding are dropped, as resizing it does."""
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    embedding = "language_model.embed_tokens.weight"
    absent, foreign = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
    if absent or foreign:
        kind, names = ("lacks", absent) if absent else ("has", foreign)
        raise ValueError(
            f"the reward model {kind} {list_names(names)}; checkpoint and base belong to other models"
        )
    state = {}
    for name, shape in wanted.items():
        held = tuple(weights[name].shape)
        rows = shape[0] if name == embedding else held[0]
        if held[0] < rows or (rows, *held[1:]) != shape:
            raise ValueError(
                f"{name} is {held} in the checkpoint and {shape} in the base's config.json; they differ"
            )
        state[name] = weights[name].read()[:rows].to(device, dtype)
    model.load_state_dict(state, strict=True, assign=True)
