"""Names in the LoRA files that people have, and the transformer's tensors they mean; pure functions of names.

Layers have the names of Wan2.1 or of Diffusers, behind the prefixes of PEFT, ComfyUI, Diffusers, DiffSynth or
a training wrapper, or kohya's lora_unet_ with underscores for dots (VideoX-Fun writes lora_unet__). The two
matrices are lora_A and lora_B, lora_down and lora_up, or the older lora.down and lora.up, with or without the
name of an adapter. lightx2v adds .diff to a weight, .diff_b to a bias and .diff_m to a modulation; LyCORIS
.w_norm and .b_norm to a norm.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace

from rfengine.checkpoint.layouts import (
    IMAGE_NAMES,
    WRAPPER_SEGMENTS,
    diffusers_transformer_from_wan,
    list_names,
)

_PREFIXES = (
    "base_model.model.", "base_model.", "diffusion_model.", "model.", "module.", "net.", "transformer.",
    "unet.", "pipe.", "pipeline.", "dit.", "generator.", "student.",
    "lora_unet__", "lora_unet_", "lora_transformer_", "lycoris_",
)  # fmt: skip
_MOST_PREFIXES = 4  # of one name, as in base_model.model.model.diffusion_model.
_TEXT_ENCODER = re.compile(r"lora_te\d*_|(text_encoders?(_\d)?|cond_stage_model|conditioner|te\d?)\.")
# A matrix, or another tensor of a layer.
_NAME = re.compile(
    r"(?P<layer>.+?)(?:"
    r"(?:\.lora_(?P<side>A|B|down|up)|[._]lora(?:_linear_layer)?\.(?P<old_side>down|up))"
    r"(?:\.(?P<adapter>(?!(?:weight|bias)$)[^.]+))?(?:\.(?P<leaf>weight|bias))?"
    r"|\.(?P<kind>alpha|diff|diff_b|diff_m|w_norm|b_norm|weight|bias))"
)

# Parts of names by which other methods than LoRA are known.
_OTHER_METHODS = {
    r"lora_magnitude_vector|dora_scale|dora_layer": "DoRA",
    r"hada_\w+": "LoHa",
    r"lokr_\w+": "LoKr",
    r"lora_mid": "LoCon's Tucker form",
    r"lora_embedding_[AB]": "the LoRA of an embedding",
    r"b?oft_\w+": "OFT",
    r"vera_\w+": "VeRA",
    r"ia3_\w+|on_input": "IA3",
    r"[ab][12]\.weight": "GLoRA",
    r"reshape_weight|set_weight": "ComfyUI's new shapes",
}

# Field of LoraNames, and the leaves that its tensor can have in the transformer; an empty one means that the
# name in front is that of a tensor. A bias of the first matrix is of no known form.
_FIELDS = {
    **dict.fromkeys(("lora_A", "lora_down"), ("down", ("weight",))),
    **dict.fromkeys(("lora_B", "lora_up"), ("up", ("weight",))),
    **dict.fromkeys(("lora_B bias", "lora_up bias"), ("up_bias", ("bias",))),
    "alpha": ("alpha", ("weight",)),
    "diff": ("diff", ("weight", "")),
    "diff_b": ("diff", ("bias",)),
    "diff_m": ("diff", ("modulation", "scale_shift_table", "")),
    "w_norm": ("diff", ("weight",)),
    "b_norm": ("diff", ("bias",)),
    "weight": ("whole", ("weight",)),
    "bias": ("whole", ("bias",)),
}
_EXPECTED = "give lora_A and lora_B of PEFT, lora_down and lora_up of kohya, or diff of lightx2v"


@dataclass(frozen=True, slots=True)
class LoraNames:
    """Names in a LoRA file that change one tensor of the transformer."""

    down: str | None = None  # lora_A, [rank, in]
    up: str | None = None  # lora_B, [out, rank]
    alpha: str | None = None  # a scalar
    up_bias: str | None = None  # bias of lora_B, [out], added to the layer's bias at the scale of the pair
    diff: str | None = None  # added as it is
    whole: str | None = None  # takes the tensor's place
    layers: tuple[str, ...] = field(default=(), compare=False)  # names of the layer, prefixes fewer and fewer


@dataclass(frozen=True, slots=True)
class Unmatched:
    """Names in a LoRA file that stand for nothing in the transformer, and why, in half a sentence."""

    names: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True, slots=True)
class _Found:
    """One name of the file, taken apart."""

    name: str
    layer: str  # what stands in front of the part that tells the kind
    kind: str  # a field of LoraNames
    leaves: tuple[str, ...]  # of its tensor in the transformer
    adapter: str = ""


def parse_lora(
    names: Iterable[str], known: Collection[str], label: str = "the LoRA"
) -> tuple[dict[str, LoraNames], Unmatched]:
    """The tensors that a LoRA changes, by the engine's names, and what of it matches nothing.

    known: the transformer's tensors by the engine's names. label: what the LoRA is called in errors.
    Raises ValueError for names of another method, for several adapters in one file, for two names of one
    tensor, for a layer that has only one of the two matrices, and for whole weights alone.
    """
    names = list(names)
    text = dict.fromkeys(name for name in names if any(map(_TEXT_ENCODER.match, _stripped(name))))
    found = [_take_apart(name) for name in names if name not in text]
    _check_forms(found, bool(text), label)
    foreign = [each for each in found if not each.kind]
    found = [each for each in found if each.kind]
    adapters = {each.adapter for each in found if each.adapter}
    if len(adapters) > 1:
        raise ValueError(f"{label} holds the adapters {list_names(adapters)}; keep one of them in the file")
    spellings = _spellings(known)
    targets = [_target(each, spellings) for each in found]
    lacking = [each for each, target in zip(found, targets, strict=True) if target is None]
    parts: dict[str, dict[str, _Found]] = {}
    for each, target in zip(found, targets, strict=True):
        if target is None:
            continue
        other = parts.setdefault(target, {}).setdefault(each.kind, each)
        if other is not each:
            raise ValueError(
                f"{label} has {other.name} and {each.name}, which both are the {each.kind} of {target}; keep "
                "one of them in the file"
            )
    layers = {}
    for target, kinds in parts.items():
        fields = {kind: each.name for kind, each in kinds.items()}
        layers[target] = LoraNames(**fields, layers=_stripped(next(iter(kinds.values())).layer))
    _check_complete(layers, label)
    unmatched = (*text, *(each.name for each in (*foreign, *lacking)))
    return layers, Unmatched(unmatched, _reason(bool(text), foreign, lacking, spellings))


def _take_apart(name: str) -> _Found:
    """What `name` says of itself; the kind is empty for a name of no known form."""
    clean = WRAPPER_SEGMENTS.sub("", name)
    match = _NAME.fullmatch(clean)
    if match is None:
        return _Found(name, clean, "", ())
    side = f"lora_{match['side'] or match['old_side']}{' bias' * (match['leaf'] == 'bias')}"
    kind, leaves = _FIELDS.get(match["kind"] or side, ("", ("bias",)))
    return _Found(name, match["layer"], kind, leaves, match["adapter"] or "")


def _check_forms(found: list[_Found], has_text: bool, label: str) -> None:
    for parts, method in _OTHER_METHODS.items():
        names = [each.name for each in found if re.search(rf"[._](?:{parts})(?:\.|$)", each.name)]
        if names:
            raise ValueError(
                f"{label} is no plain LoRA: {list_names(names)} are of {method}, which the engine does not "
                "merge; merge it with the program that trained it and convert the merged model"
            )
    if not found and not has_text:
        raise ValueError(f"{label} has no tensor; {_EXPECTED}")
    if found and all(each.kind == "whole" for each in found):
        names = [each.name for each in found]
        raise ValueError(
            f"{label} holds whole weights ({list_names(names)}), not a LoRA; give a model as the source"
        )


def _stripped(layer: str) -> tuple[str, ...]:
    """`layer` without wrappers, then with one known prefix fewer each time."""
    forms = [WRAPPER_SEGMENTS.sub("", layer)]
    for _ in range(_MOST_PREFIXES):
        prefix = next((each for each in _PREFIXES if forms[-1].startswith(each)), None)
        if prefix is None:
            break
        forms.append(forms[-1].removeprefix(prefix))
    return tuple(forms)


def _spellings(known: Iterable[str]) -> dict[str, str]:
    """Every way to write the names of the transformer's tensors, with the engine's name of each.

    Two tensors of one spelling, which underscores could bring about, are both left out of it.
    """
    meant: dict[str, set[str]] = {}
    for name in known:
        for spelling in (name, diffusers_transformer_from_wan(name)):
            layer, _, leaf = spelling.rpartition(".")
            underscores = layer.replace(".", "_")
            forms = (spelling, f"{underscores}.{leaf}", f"{underscores}_{leaf}") if layer else (spelling,)
            for form in forms:
                meant.setdefault(form, set()).add(name)
    return {form: names.pop() for form, names in meant.items() if len(names) == 1}


def _target(found: _Found, spellings: dict[str, str]) -> str | None:
    for layer in _stripped(found.layer):
        for leaf in found.leaves:
            if target := spellings.get(f"{layer}.{leaf}" if leaf else layer):
                return target
    return None


def _reason(has_text: bool, foreign: list[_Found], lacking: list[_Found], spellings: dict[str, str]) -> str:
    """Why names match nothing, in half a sentence."""
    if any(IMAGE_NAMES.search(each.layer) for each in lacking):
        return "image-to-video models alone have such layers, so give a LoRA of a text-to-video model"
    in_first_block = [
        replace(each, layer=re.sub(r"(^|[._])blocks([._])\d+", r"\1blocks\g<2>0", each.layer))
        for each in lacking
    ]
    if lacking and all(_target(each, spellings) for each in in_first_block):
        blocks = {match[1] for name in spellings if (match := re.match(r"blocks\.(\d+)\.", name))}
        return f"the transformer has {len(blocks)} layers, so give a LoRA of a transformer of its size"
    if lacking:
        return "give a LoRA that adapts this transformer alone"
    if foreign:
        return _EXPECTED
    return "they adapt the text encoder, which the engine keeps as it is" if has_text else ""


def _check_complete(layers: dict[str, LoraNames], label: str) -> None:
    single = [
        target
        for target, names in layers.items()
        if (names.down is None) != (names.up is None) or (names.alpha is not None and names.down is None)
    ]
    if single:
        raise ValueError(
            f"{label} has only one of lora_A and lora_B for {list_names(single)}; get it again"
            if any(layers[target].down or layers[target].up for target in single)
            else f"{label} has an alpha and no matrices for {list_names(single)}; get it again"
        )
    for target, names in layers.items():
        pair = layers.get(f"{target.removesuffix('.bias')}.weight", LoraNames())
        if names.up_bias is not None and pair.down is None:
            raise ValueError(
                f"{label} has {names.up_bias} and no lora_A and lora_B of its layer; get it again"
            )
        if names.whole is not None and (names.down or names.diff or names.up_bias):
            raise ValueError(
                f"{label} has {names.whole} whole and changes {target} as well; keep one of them in the file"
            )
