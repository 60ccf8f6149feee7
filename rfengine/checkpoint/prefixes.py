"""What trainers and programs put in front of a model's tensor names, and which model of a file is taken.

The names are those that the published trainers (spec 6.1), DDP, FSDP, torch.compile, DeepSpeed, ComfyUI and
DiffSynth write; facts of their files, not of one library.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import TypeVar

logger = logging.getLogger(__name__)

_Value = TypeVar("_Value")

WRAPPER_SEGMENTS = re.compile(
    r"(?:(?<=\.)|(?<=^))(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_fpw_module|_orig_mod)\."
)
# A segment in front that tells nothing about which model it is.
_PLAIN_WORDS = frozenset({
    "model", "module", "net", "network", "diffusion_model", "transformer", "dit", "unet", "pipe", "pipeline",
    "backbone", "_forward_module", "umt5xxl", "umt5",
})  # fmt: skip
# One that names a model among several: averaged weights, the model itself, then others.
EMA_WORDS = ("generator_ema", "ema", "ema_model", "model_ema", "student_ema")
_MAIN_WORDS = ("generator", "student")
_RIVAL_WORDS = ("critic", "fake_score", "real_score", "teacher", "discriminator", "optimizer")
_PART_WORDS = (
    "vae", "first_stage_model", "text_encoder", "text_encoders", "cond_stage_model", "conditioner",
    "image_encoder", "clip_vision",
)  # fmt: skip
_MODEL_WORDS = frozenset((*EMA_WORDS, *_MAIN_WORDS, *_RIVAL_WORDS, *_PART_WORDS))


def strip_prefixes(name: str) -> str:
    """`name` without the segments of FSDP, checkpoints and torch.compile, and without what is in front of the
    model's own name (spec 6.1)."""
    return _split(name)[1]


def _split(name: str) -> tuple[str, str]:
    """The word that says whose tensor it is, empty without one, and the name inside its model."""
    name, model = WRAPPER_SEGMENTS.sub("", name), ""
    while "." in name:
        word, _, rest = name.partition(".")
        if word in _MODEL_WORDS:
            model = model or word
        elif word not in _PLAIN_WORDS:
            break
        name = rest
    return model, name


def choose_model(tensors: Mapping[str, _Value], use_ema: bool = True) -> dict[str, _Value]:
    """The tensors of one model, under their full names; a file may hold a critic beside a generator.

    Averaged weights go before the others unless `use_ema` is off. Raises ValueError, with the words in front,
    where it is not clear which model is meant, and for a file of critics, scores or teachers alone.
    """
    models: dict[str, dict[str, _Value]] = {}
    for name, value in tensors.items():
        models.setdefault(_split(name)[0], {})[name] = value
    chosen = _chosen_word(models, use_ema)
    if len(models) > 1:
        others = ", ".join(sorted(word or "names without such a word" for word in models if word != chosen))
        logger.warning(
            "the file holds several models: %s is read, and not %s", chosen or "the plain one", others
        )
    return models.get(chosen, {})


def _chosen_word(models: Mapping[str, Mapping[str, object]], use_ema: bool) -> str:
    averaged = [word for word in EMA_WORDS if word in models]
    main = [word for word in _MAIN_WORDS if word in models]
    if "" in models and (not main or _share_a_name(models[""], models[main[0]])):
        main.append("")
    candidates = averaged if averaged and use_ema else main
    if not candidates and not averaged:
        candidates = [word for word in models if word in _PART_WORDS]
    if len(candidates) == 1:
        return candidates[0]
    found = ", ".join(f"{word or 'names'}{'.' if word else ' without a word in front'}" for word in models)
    if averaged and not candidates:
        raise ValueError(f"the file holds {found} alone, which are averaged weights; read them with use_ema")
    if models:
        raise ValueError(
            f"the file holds {found}, and which of them is the model is not clear; give a file of the "
            "generator alone"
        )
    return ""


def _share_a_name(first: Mapping[str, object], second: Mapping[str, object]) -> bool:
    return not {strip_prefixes(name) for name in first}.isdisjoint(strip_prefixes(name) for name in second)
