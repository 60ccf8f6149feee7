"""VideoReward: VideoAlign's judge of videos, Qwen2-VL-2B with a linear head.

The model reads sampled frames and a fixed questionnaire around the prompt, and the hidden states at the
questionnaire's three special tokens go through the head: visual quality, motion quality, text alignment. Its
language model was trained with plain positions 0, 1, 2, ... on all three rotary axes, and is run so.

Differences from the published use in training, which fed the model what it was not trained on:
- frames are sampled at 2 a second; the published call has the sub-sampling commented out and takes all 81;
- frames are in [0, 1] before they are normalised; the published call leaves them in [-1, 1];
- frames are resized and normalised in float32, where the published ones are bfloat16 already;
- all videos are scored, each by itself and without padding; the published loss scores the first of a batch;
- all three scores are given, where the published loss uses motion quality alone: TrainedScore chooses.
Frames are not rounded to bytes after they are resized, as they are where videos are read from files.

H, W pixels of a frame; n frames that the model sees; S tokens.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rfengine.checkpoint.layouts import list_names
from rfengine.checkpoint.loader import assign, open_weights
from rfengine.checkpoint.lora_change import add_changes
from rfengine.checkpoint.lora_file import LoraFile, lora_changes
from rfengine.checkpoint.lora_scale import MAX_ALPHA, MAX_RANK, ScaleStatement
from rfengine.checkpoint.pickle_file import open_pickle
from rfengine.checkpoint.shapes import shapes_of
from rfengine.checkpoint.tensor_file import StoredTensor, open_safetensors
from rfengine.files import read_text, strict_json
from rfengine.limits import Range, check_value

QUALITIES = ("VQ", "MQ", "TA")
SCORES = ("visual_quality", "motion_quality", "text_alignment")
SPECIAL_TOKENS = tuple(f"<|{quality}_reward|>" for quality in QUALITIES)
# Two public files give these; nothing here was checked against the published checkpoint.
UNVERIFIED_CONSTANTS = {
    "VQ_mean": 3.6757, "VQ_std": 2.2476, "MQ_mean": 1.1646, "MQ_std": 1.3811,
    "TA_mean": 2.8105, "TA_std": 2.5121,
}  # fmt: skip
HEAD = "rm_head.weight"
# VideoAlign's DETAILED_PROMPT_WITH_SPECIAL_TOKEN in UTF-8, the placeholder {text_prompt} in place
PROMPT_SHA256 = "fdb6309bac618dd0c8b1b589d3a0970a974f7856eecbb355a190b2dce54af700"
PROMPT_FILE = "prompt.txt"

_PLACEHOLDER = "{text_prompt}"
_VIDEO = "<|video_pad|>"
# one turn of Qwen2-VL's chat, with its default system message and the assistant's turn opened
_CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|>{video}<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
)
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_LEAST_FRAMES, _MOST_FRAMES = 4, 768
_EMBEDDING = "language_model.embed_tokens.weight"
_SERVED = {"prompt_template_type": "detailed_special", "sample_type": "uniform", "num_frames": None}
_KEYS = ("state_dict", "model")
_MAX_CONFIG_BYTES = 1 << 20
_Mean = Annotated[float, Range(-1e9, 1e9)]
_Positive = Annotated[float, Range(1e-9, 1e9)]
_Whole = Annotated[int, Range(1, 10**9)]
_Alpha = Annotated[float, Range(1e-9, MAX_ALPHA)]
_Rank = Annotated[int, Range(1, MAX_RANK)]


class VideoReward:
    """visual_quality, motion_quality and text_alignment of videos, normalised by the checkpoint's constants.

    directory: a VideoAlign checkpoint with model_config.json, checkpoint-N/ and prompt.txt, which the user
    puts there (it is data of VideoAlign, and verified by its sha256). fps: of the videos that are scored.
    base: directory of Qwen2-VL-2B-Instruct, `base` in the checkpoint's unless given: config.json,
    tokenizer.json, and its weights where the checkpoint has only the adapter. Raises ValueError, in one
    sentence, for files that are absent or do not fit each other.
    """

    def __init__(
        self,
        directory: Path,
        device: torch.device,
        dtype: torch.dtype = torch.bfloat16,
        fps: float = 16.0,
        base: Path | None = None,
        prompt_sha256: str = PROMPT_SHA256,
    ) -> None:
        base = base or directory / "base"
        self.settings, self.fps = read_settings(directory), fps
        self._template = read_template(directory / PROMPT_FILE, prompt_sha256)
        self._tokenizer = _tokenizer(base / "tokenizer.json")
        self._special = [self._tokenizer.token_to_id(token) for token in SPECIAL_TOKENS]
        weights = read_weights(directory, base, self.settings)
        if HEAD not in weights:
            raise ValueError(f"{directory} has no {HEAD}; it is no reward model")
        head, rows = weights.pop(HEAD).read(), self._tokenizer.get_vocab_size()
        self._model = _language_model(base, rows)
        self._head = _checked_head(head, self._model, self.settings).to(device, dtype)
        if (embedding := weights.get(_EMBEDDING)) and embedding.shape[0] > rows:  # as resizing it drops them
            weights[_EMBEDDING] = embedding.part(0, 0, rows)
        assign(self._model, weights, dtype, device, f"the reward model {directory}")
        self._model.to(device)

    @torch.no_grad()
    def __call__(self, frames: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Frames [B, T, H, W, 3], uint8 or float from 0 to 1, and B prompts to float32 [B] each.

        Raises ValueError for a prompt that holds a token of the questionnaire.
        """
        rows = [self._score(clip, text) for clip, text in zip(frames, prompts, strict=True)]
        table = torch.stack(rows) if rows else frames.new_zeros(0, len(SCORES), dtype=torch.float32)
        return dict(zip(SCORES, table.to(frames.device).unbind(1), strict=True))

    def _score(self, clip: Tensor, text: str) -> Tensor:
        """One video [T, H, W, 3] to its normalised scores, float32 [3]."""
        vision, device = self._model.config.vision_config, self._head.device
        pixels = prepare_frames(
            clip.to(device), self.fps, self.settings, vision.patch_size * vision.spatial_merge_size
        )
        patches, grid = to_patches(
            pixels, vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size
        )
        tokens = math.prod(grid) // vision.spatial_merge_size**2
        ids = torch.tensor(self._tokens(text, tokens), device=device)
        positions = torch.arange(len(ids), device=device)
        hidden = self._model(
            input_ids=ids[None],
            position_ids=positions.expand(3, 1, -1),
            pixel_values_videos=patches.to(self._head.dtype),
            video_grid_thw=torch.tensor([grid], device=device),
            use_cache=False,
        ).last_hidden_state[0]
        places = torch.stack([positions[ids == token][0] for token in self._special])
        logits = functional.linear(hidden[places], self._head).float()
        raw = logits.diagonal() if logits.shape[1] == len(SCORES) else logits[:, 0]
        return (raw - raw.new_tensor(self.settings.mean)) / raw.new_tensor(self.settings.std)

    def _tokens(self, text: str, video_tokens: int) -> list[int]:
        message = _CHAT.replace("{video}", _VIDEO * video_tokens)
        message = message.replace("{text}", self._template).replace(_PLACEHOLDER, text)
        ids = self._tokenizer.encode(message, add_special_tokens=False).ids
        counts = [ids.count(token) for token in self._special]
        if counts != [1, 1, 1] or ids.count(self._tokenizer.token_to_id(_VIDEO)) != video_tokens:
            raise ValueError(f"the prompt {text!r} holds a special token of the reward model; take it out")
        return ids


def read_template(path: Path, sha256: str = PROMPT_SHA256) -> str:
    """The questionnaire. Raises ValueError where the file is absent or another one."""
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist; put VideoAlign's DETAILED_PROMPT_WITH_SPECIAL_TOKEN there, as UTF-8 and "
            "without a newline of the editor's at its end"
        )
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise ValueError(f"{path} has the sha256 {found}, not {sha256}; put the text there verbatim")
    return data.decode()


def _tokenizer(path: Path) -> Any:
    """The base model's tokenizer with the three special tokens behind its own, in the order of training."""
    from tokenizers import AddedToken, Tokenizer

    if not path.is_file():
        raise ValueError(f"{path} does not exist; give the directory of the base model, Qwen2-VL-2B-Instruct")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    missing = [token for token in (_VIDEO, *SPECIAL_TOKENS) if tokenizer.token_to_id(token) is None]
    if missing:
        raise ValueError(f"{path} has no token {missing[0]}; it is not the tokenizer of a Qwen2-VL model")
    return tokenizer


def _language_model(base: Path, vocabulary: int) -> nn.Module:
    """Qwen2-VL without weights and without its language head; what is no weight is computed already."""
    from transformers import Qwen2VLConfig, Qwen2VLModel

    if not (base / "config.json").is_file():
        raise ValueError(f"{base / 'config.json'} does not exist; give the directory of Qwen2-VL-2B-Instruct")
    config = Qwen2VLConfig.from_pretrained(str(base), local_files_only=True)
    config.text_config.vocab_size = vocabulary
    with torch.device("meta"):
        model = Qwen2VLModel(config)
    rotary = model.language_model.rotary_emb, model.visual.rotary_pos_emb
    model.language_model.rotary_emb = type(rotary[0])(config.text_config)
    model.visual.rotary_pos_emb = type(rotary[1])(config.vision_config)
    return model.eval().requires_grad_(False)


def _checked_head(head: Tensor, model: nn.Module, settings: VideoRewardSettings) -> Tensor:
    width = model.config.text_config.hidden_size
    outputs = settings.output_dim or (head.shape[0] if head.ndim == 2 else 0)
    if tuple(head.shape) != (outputs, width) or outputs not in (1, len(SCORES)):
        raise ValueError(
            f"{HEAD} is {tuple(head.shape)}; it has to be (1 or {len(SCORES)}, {width}), and as high as "
            f"output_dim in model_config.json, which is {settings.output_dim}"
        )
    return head


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
        sections = ("data_config", "model_config", "peft_lora_config", "inference_config")
        data, model, lora, constants = (dict(config.get(name) or {}) for name in sections)
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is no model_config.json of VideoAlign ({error}); get it again") from error
    missing = [name for name in UNVERIFIED_CONSTANTS if constants.get(name) is None]
    if missing:
        raise ValueError(
            f"{path} has no {list_names(missing)} in inference_config; scores need them. Published "
            f"elsewhere, and unverified: {json.dumps(UNVERIFIED_CONSTANTS)}"
        )
    for key, served in _SERVED.items():
        if data.get(key, served) != served:
            raise ValueError(f"{path} has {key} {data[key]!r}; only {served!r} is served")

    def value(section: dict[str, Any], key: str, hint: Any) -> Any:
        if section.get(key) is not None:
            check_value(f"{key} in {path}", section[key], hint)
        return section.get(key)

    return VideoRewardSettings(
        mean=tuple(float(value(constants, f"{quality}_mean", _Mean)) for quality in QUALITIES),
        std=tuple(float(value(constants, f"{quality}_std", _Positive)) for quality in QUALITIES),
        output_dim=value(model, "output_dim", _Whole),
        max_pixels=value(data, "max_frame_pixels", _Whole) or 448 * 448,
        fps=value(data, "fps", _Positive) or 2.0,
        lora_alpha=value(lora, "lora_alpha", _Alpha) or value(model, "lora_alpha", _Alpha),
        lora_rank=value(lora, "r", _Rank) or value(model, "lora_r", _Rank),
    )


def newest_checkpoint(directory: Path) -> Path:
    """The checkpoint-N of the highest N."""
    found = [path for path in directory.iterdir() if re.fullmatch(r"checkpoint-[0-9]+", path.name)]
    if not found:
        raise ValueError(f"{directory} has no checkpoint-N; give the directory of a VideoAlign checkpoint")
    return max(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def read_weights(directory: Path, base: Path, settings: VideoRewardSettings) -> dict[str, StoredTensor]:
    """The weights of Qwen2VLModel and of the head by their names, LoRA merged in float32 as they are read.

    Both layouts of a checkpoint are read: `model.pth` with the whole PEFT model, or
    `adapter_model.safetensors` with `non_lora_state_dict.pth` over the weights of the base model in `base`.
    Raises ValueError for files that are absent, and for LoRA pairs that are incomplete or do not fit.
    """
    folder = newest_checkpoint(directory)
    whole, adapter, rest = (
        folder / name for name in ("model.pth", "adapter_model.safetensors", "non_lora_state_dict.pth")
    )
    if whole.is_file():
        layers = [open_pickle(whole, _KEYS)]
    elif adapter.is_file() and rest.is_file():
        if not (files := sorted(base.glob("*.safetensors"))):
            raise ValueError(f"{base} has no safetensors; the checkpoint needs the weights of its base model")
        layers = [open_weights(files), open_pickle(rest, _KEYS), open_safetensors(adapter)]
    else:
        raise ValueError(f"{folder} has neither model.pth nor {adapter.name} with {rest.name}; get it again")
    stored = {engine_name(name): tensor for layer in layers for name, tensor in layer.items()}
    pairs = {name: stored.pop(name) for name in list(stored) if ".lora_" in name}
    stored.pop("lm_head.weight", None)
    if pairs and (settings.lora_alpha is None or settings.lora_rank is None):
        raise ValueError(f"{folder} has LoRA pairs and model_config.json no lora_alpha and r; add them there")
    if pairs:
        scale = ScaleStatement("model_config.json", settings.lora_rank, settings.lora_alpha)
        changes = lora_changes(LoraFile(str(folder), pairs, (scale,)), shapes_of(stored))
        add_changes(stored, {name: [(1.0, change)] for name, change in changes.items()})
    return stored


def engine_name(name: str) -> str:
    """The name under transformers 5 of a weight of any layout: language_model.*, visual.* or rm_head.*."""
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    if not name.startswith(("visual.", "rm_head.", "lm_head.")):
        name = name.removeprefix("model.")
    known = name.startswith(("visual.", "rm_head.", "lm_head.", "language_model."))
    return name if known else f"language_model.{name}"


def prepare_frames(clip: Tensor, fps: float, settings: VideoRewardSettings, factor: int) -> Tensor:
    """Frames [T, H, W, 3], T at least 2, to those the model sees, normalised: float32 [n, 3, H', W'].

    Evenly spaced from first to last at settings.fps, an even number, at least 4 where there are as many;
    sides are multiples of factor, the patch size times the merge size, within settings.max_pixels.
    """
    count = 2 * round(len(clip) / fps * settings.fps / 2)
    count = max(_LEAST_FRAMES, min(count, _MOST_FRAMES))
    count = min(count, len(clip) // 2 * 2)
    rows = torch.linspace(0, len(clip) - 1, count).round().long().to(clip.device)
    scale = 255.0 if clip.dtype == torch.uint8 else 1.0
    chosen = clip[rows].permute(0, 3, 1, 2).float() / scale
    size = fitted_size(clip.shape[1], clip.shape[2], factor, settings.max_pixels)
    if size != tuple(chosen.shape[-2:]):
        chosen = functional.interpolate(chosen, size, mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (chosen.new_tensor(part)[:, None, None] for part in (_CLIP_MEAN, _CLIP_STD))
    return (chosen - mean) / std


def fitted_size(height: int, width: int, factor: int, max_pixels: int) -> tuple[int, int]:
    """The nearest multiples of factor, or, where their area is above max_pixels, those just below the sides
    of the largest picture of the same shape."""
    near = tuple(max(factor, round(side / factor) * factor) for side in (height, width))
    if math.prod(near) <= max_pixels:
        return near
    shrink = math.sqrt(height * width / max_pixels)
    return tuple(max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))


def to_patches(pixels: Tensor, patch: int, temporal: int, merge: int) -> tuple[Tensor, tuple[int, int, int]]:
    """Frames [n, 3, H, W] to patches [t * h * w, 3 * temporal * patch * patch] and their grid (t, h, w).

    The patches that are merged to one token follow each other. n is a multiple of `temporal`.
    """
    count, channels, height, width = pixels.shape
    grid = count // temporal, height // patch, width // patch
    parts = pixels.reshape(
        grid[0], temporal, channels, grid[1] // merge, merge, patch, grid[2] // merge, merge, patch
    )
    return parts.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(math.prod(grid), -1), grid
