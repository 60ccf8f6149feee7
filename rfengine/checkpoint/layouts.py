"""Tensor names of the known checkpoint layouts and their mapping to the engine's; pure functions of names.

The engine keeps the names of the published Wan2.1 files for the transformer and the VAE, those of
UMT5EncoderModel for the text encoder and of TAEHV for the tiny decoder. Prefixes are the published trainers',
those of DDP, FSDP, torch.compile, DeepSpeed, ComfyUI and DiffSynth.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Literal, TypeVar

logger = logging.getLogger(__name__)

Part = Literal["transformer", "vae", "text_encoder", "tiny_vae"]

# The part that a layout names, and pieces of names that no layout above it has.
_LAYOUTS: dict[str, tuple[Part, tuple[str, ...]]] = {
    "diffusers_transformer": ("transformer", ("condition_embedder.", ".attn1.")),
    "wan_transformer": ("transformer", (".self_attn.", "text_embedding.")),
    "diffusers_vae": ("vae", (".down_blocks.", ".up_blocks.")),
    "wan_vae": ("vae", (".downsamples.", ".upsamples.")),
    "transformers_text": ("text_encoder", ("encoder.block.",)),
    "wan_text": ("text_encoder", (".pos_embedding.embedding.", "token_embedding.")),
    "taehv": ("tiny_vae", ("decoder.3.conv.",)),  # the first memory block
}
SHOWN_NAMES = 8  # how many names an error lists before it only counts

_Value = TypeVar("_Value")

WRAPPER_SEGMENTS = re.compile(
    r"(?:(?<=\.)|(?<=^))(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_fpw_module|_orig_mod)\."
)
# Parts of names that image-to-video models alone have, with dots or underscores around them.
IMAGE_NAMES = re.compile(
    r"(^|[._])(k_img|v_img|norm_k_img|img_emb|add_[kv]_proj|norm_added_[kq]|image_embedder)($|[._])"
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

# Wan name without its leaf (weight, bias), then the name of Diffusers.
_TRANSFORMER_ENDS = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
    # of SkyReels-V2's diffusion forcing model alone
    "fps_embedding": "fps_embedding",
    "fps_projection.0": "fps_projection.net.0.proj",
    "fps_projection.2": "fps_projection.net.2",
}
_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
_TRANSFORMER_BLOCK = {
    "modulation": "scale_shift_table",
    "norm3": "norm2",  # the affine norm in front of cross-attention; Diffusers' norm3 has no parameters
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    **{f"self_attn.{wan}": f"attn1.{diffusers}" for wan, diffusers in _ATTENTION.items()},
    **{f"cross_attn.{wan}": f"attn2.{diffusers}" for wan, diffusers in _ATTENTION.items()},
}

_TEXT_ENDS = {"token_embedding": "shared", "norm": "encoder.final_layer_norm"}
_TEXT_BLOCK = {
    "norm1": "layer.0.layer_norm",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
    **{f"attn.{letter}": f"layer.0.SelfAttention.{letter}" for letter in "qkvo"},
}
_TIED_TEXT_NAME = "encoder.embed_tokens.weight"

# Diffusers name, then Wan name.
_VAE_ENDS = {
    "quant_conv": "conv1",
    "post_quant_conv": "conv2",
    **{
        f"{half}.{diffusers}": f"{half}.{wan}"
        for half in ("encoder", "decoder")
        for diffusers, wan in (
            ("conv_in", "conv1"),
            ("norm_out", "head.0"),
            ("conv_out", "head.2"),
            ("mid_block.attentions.0.norm", "middle.1.norm"),
            ("mid_block.attentions.0.to_qkv", "middle.1.to_qkv"),
            ("mid_block.attentions.0.proj", "middle.1.proj"),
        )
    },
}
_VAE_RESIDUAL = {
    "norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6",
    "conv_shortcut": "shortcut", "resample.1": "resample.1", "time_conv": "time_conv",
}  # fmt: skip


def wan_transformer_from_diffusers(name: str) -> str:
    """Original name of a Diffusers WanTransformer3DModel tensor; an unknown name comes back."""
    return _renamed(name, "blocks", "blocks", _inverse(_TRANSFORMER_BLOCK), _inverse(_TRANSFORMER_ENDS))


def diffusers_transformer_from_wan(name: str) -> str:
    """The way back from wan_transformer_from_diffusers."""
    return _renamed(name, "blocks", "blocks", _TRANSFORMER_BLOCK, _TRANSFORMER_ENDS)


def transformers_text_from_wan(name: str) -> str:
    """UMT5EncoderModel name of an original text encoder tensor; an unknown name comes back."""
    return _renamed(name, "blocks", "encoder.block", _TEXT_BLOCK, _TEXT_ENDS)


def wan_vae_from_diffusers(name: str, num_res_blocks: int = 2) -> str:
    """Original name of an AutoencoderKLWan tensor; an unknown name comes back.

    num_res_blocks: residual blocks of one encoder level; the decoder has one more in each.
    """
    stem, _, leaf = name.rpartition(".")
    if stem in _VAE_ENDS:
        return f"{_VAE_ENDS[stem]}.{leaf}"
    match = re.fullmatch(
        r"(encoder|decoder)\.(?:mid_block\.resnets\.(\d+)|down_blocks\.(\d+)"
        r"|up_blocks\.(\d+)\.(?:resnets\.(\d+)|upsamplers\.0))\.(.+)",
        stem,
    )
    if match is None or match[6] not in _VAE_RESIDUAL:
        return name
    half, middle, down, up, place, rest = match.groups()
    rest = _VAE_RESIDUAL[rest]
    if middle is not None:
        return f"{half}.middle.{2 * int(middle)}.{rest}.{leaf}"
    if down is not None:
        return f"{half}.downsamples.{down}.{rest}.{leaf}"
    index = int(up) * (num_res_blocks + 2) + (num_res_blocks + 1 if place is None else int(place))
    return f"{half}.upsamples.{index}.{rest}.{leaf}"


def _renamed(
    name: str, blocks: str, new_blocks: str, block_table: Mapping[str, str], ends: Mapping[str, str]
) -> str:
    """`name` with its stem looked up, in `block_table` below `blocks`.i and in `ends` elsewhere."""
    match = re.fullmatch(rf"{re.escape(blocks)}\.(\d+)\.(.+)", name)
    prefix, table, rest = (f"{new_blocks}.{match[1]}.", block_table, match[2]) if match else ("", ends, name)
    if rest in table:
        return prefix + table[rest]
    stem, _, leaf = rest.rpartition(".")
    return f"{prefix}{table[stem]}.{leaf}" if stem in table else name


def _inverse(table: Mapping[str, str]) -> dict[str, str]:
    return {value: key for key, value in table.items()}


def strip_prefixes(name: str) -> str:
    """`name` without the segments of FSDP, checkpoints and torch.compile, and without what is in front of the
    model's own name."""
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


def detect_layout(names: Iterable[str]) -> str:
    """The layout of a set of names that are without prefixes; a few missing names do not matter.

    Raises ValueError for a LoRA, an image-to-video transformer and names of no known layout.
    """
    names = list(names)
    joined = "\n".join(names)
    if re.search(r"\.lora_(A|B|up|down)(\.|$)|[._]lora\.(up|down)\.", joined, re.MULTILINE):
        raise ValueError(
            "the file holds a LoRA, not a whole model; give it as lora, beside the model it adapts"
        )
    if any(map(IMAGE_NAMES.search, names)):
        raise ValueError("the checkpoint is an image-to-video model; the engine takes text-to-video models")
    for layout, (_, pieces) in _LAYOUTS.items():
        if any(piece in joined for piece in pieces):
            return layout
    raise ValueError(
        f"names such as {list_names(names) or 'none at all'} belong to no known layout; give a transformer, "
        "VAE, text encoder or tiny decoder with the names of Wan2.1, Diffusers, transformers or TAEHV"
    )


def engine_names(tensors: Mapping[str, _Value], use_ema: bool = True) -> tuple[Part, dict[str, _Value]]:
    """The part that a file of any known layout and prefix holds, and its tensors by the engine's names.

    use_ema: of a file with averaged weights and others, take the averaged ones. A name of no known layout is
    kept, so that the check against the model lists it as unexpected. The encoder beside a tiny decoder is
    left out: the engine encodes with the full VAE.
    Raises ValueError for an unknown layout, for several models of which none is the one to take, and when
    two tensors come to have one name.
    """
    inner = {name: strip_prefixes(name) for name in choose_model(tensors, use_ema)}
    layout = detect_layout(inner.values())
    if layout == "transformers_text" and "shared.weight" in inner.values():
        inner = {name: plain for name, plain in inner.items() if plain != _TIED_TEXT_NAME}
    if layout == "taehv":
        decoder = {name: plain for name, plain in inner.items() if not plain.startswith("encoder.")}
        if absent := len(inner) - len(decoder):
            logger.info("%d tensors of the tiny encoder are left out; the full VAE encodes", absent)
        inner = decoder
    res_blocks = _count_res_blocks(inner.values())
    rename = {
        "diffusers_transformer": wan_transformer_from_diffusers,
        "diffusers_vae": lambda name: wan_vae_from_diffusers(name, res_blocks),
        "wan_text": transformers_text_from_wan,
        "transformers_text": lambda name: "shared.weight" if name == _TIED_TEXT_NAME else name,
    }.get(layout, str)
    renamed: dict[str, _Value] = {}
    for stored_name, plain in inner.items():
        name = rename(plain)
        if name in renamed:
            raise ValueError(
                f"{stored_name} and another tensor both become {name}; keep one of them in the file"
            )
        renamed[name] = tensors[stored_name]
    return _LAYOUTS[layout][0], renamed


def _count_res_blocks(names: Iterable[str]) -> int:
    """Residual blocks of one encoder level in a Diffusers VAE: the highest index of a decoder level."""
    found = [re.search(r"decoder\.up_blocks\.\d+\.resnets\.(\d+)\.", name) for name in names]
    return max((int(match[1]) for match in found if match), default=2)


def list_names(names: Iterable[str], most: int = SHOWN_NAMES) -> str:
    """Names for an error: the first `most`, and how many more."""
    names = sorted(name if name.isprintable() else ascii(name) for name in names)
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
