"""Tensor names of the known checkpoint layouts and their mapping to the engine's; pure functions of names.

The engine keeps the original Wan2.1 names for the transformer (spec 1.2) and the VAE (spec 4), the names of
transformers' UMT5EncoderModel for the text encoder (spec 5.3) and TAEHV's for the tiny decoder (spec 4.9).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Literal, TypeVar

from rfengine.checkpoint.prefixes import choose_model, strip_prefixes

logger = logging.getLogger(__name__)

Part = Literal["transformer", "vae", "text_encoder", "tiny_vae"]
Layout = Literal[
    "wan_transformer", "diffusers_transformer", "wan_vae", "diffusers_vae", "wan_text", "transformers_text",
    "taehv",
]  # fmt: skip

PART_OF_LAYOUT: dict[Layout, Part] = {
    "wan_transformer": "transformer",
    "diffusers_transformer": "transformer",
    "wan_vae": "vae",
    "diffusers_vae": "vae",
    "wan_text": "text_encoder",
    "transformers_text": "text_encoder",
    "taehv": "tiny_vae",
}
SHOWN_NAMES = 8  # how many names an error lists before it only counts

_Value = TypeVar("_Value")

# Wan name without its leaf (weight, bias), then Diffusers name (spec 1.3).
_TRANSFORMER_ENDS = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
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

_VAE_ENDS = {
    "conv1": "quant_conv",
    "conv2": "post_quant_conv",
    **{
        f"{half}.{wan}": f"{half}.{diffusers}"
        for half in ("encoder", "decoder")
        for wan, diffusers in (
            ("conv1", "conv_in"),
            ("head.0", "norm_out"),
            ("head.2", "conv_out"),
            ("middle.1.norm", "mid_block.attentions.0.norm"),
            ("middle.1.to_qkv", "mid_block.attentions.0.to_qkv"),
            ("middle.1.proj", "mid_block.attentions.0.proj"),
        )
    },
}
_VAE_RESIDUAL = {
    "residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2",
    "shortcut": "conv_shortcut", "resample.1": "resample.1", "time_conv": "time_conv",
}  # fmt: skip


def wan_transformer_from_diffusers(name: str) -> str:
    """Original name of a Diffusers WanTransformer3DModel tensor (spec 1.3); an unknown name comes back."""
    return _renamed(name, "blocks", "blocks", _inverse(_TRANSFORMER_BLOCK), _inverse(_TRANSFORMER_ENDS))


def diffusers_transformer_from_wan(name: str) -> str:
    """The way back from wan_transformer_from_diffusers."""
    return _renamed(name, "blocks", "blocks", _TRANSFORMER_BLOCK, _TRANSFORMER_ENDS)


def transformers_text_from_wan(name: str) -> str:
    """UMT5EncoderModel name of an original text encoder tensor (spec 5.3); an unknown name comes back."""
    return _renamed(name, "blocks", "encoder.block", _TEXT_BLOCK, _TEXT_ENDS)


def wan_text_from_transformers(name: str) -> str:
    """The way back from transformers_text_from_wan; the tied embedding has the embedding's name."""
    if name == _TIED_TEXT_NAME:
        return "token_embedding.weight"
    return _renamed(name, "encoder.block", "blocks", _inverse(_TEXT_BLOCK), _inverse(_TEXT_ENDS))


def diffusers_vae_from_wan(name: str, num_res_blocks: int = 2) -> str:
    """AutoencoderKLWan name of an original VAE tensor (spec 4.6); an unknown name comes back as it is.

    num_res_blocks: residual blocks of one encoder level; the decoder has one more in each.
    """
    stem, _, leaf = name.rpartition(".")
    if stem in _VAE_ENDS:
        return f"{_VAE_ENDS[stem]}.{leaf}"
    match = re.fullmatch(r"(encoder|decoder)\.(middle|downsamples|upsamples)\.(\d+)\.(.+)", stem)
    if match is None or match[4] not in _VAE_RESIDUAL:
        return name
    half, group, index, rest = match[1], match[2], int(match[3]), _VAE_RESIDUAL[match[4]]
    if group == "middle":
        return f"{half}.mid_block.resnets.{index // 2}.{rest}.{leaf}"
    if group == "downsamples":
        return f"{half}.down_blocks.{index}.{rest}.{leaf}"
    level, place = divmod(index, num_res_blocks + 2)
    inside = f"resnets.{place}" if place <= num_res_blocks else "upsamplers.0"
    return f"{half}.up_blocks.{level}.{inside}.{rest}.{leaf}"


def wan_vae_from_diffusers(name: str, num_res_blocks: int = 2) -> str:
    """The way back from diffusers_vae_from_wan."""
    stem, _, leaf = name.rpartition(".")
    ends, residual = _inverse(_VAE_ENDS), _inverse(_VAE_RESIDUAL)
    if stem in ends:
        return f"{ends[stem]}.{leaf}"
    match = re.fullmatch(
        r"(encoder|decoder)\.(?:mid_block\.resnets\.(\d+)|down_blocks\.(\d+)"
        r"|up_blocks\.(\d+)\.(?:resnets\.(\d+)|upsamplers\.0))\.(.+)",
        stem,
    )
    if match is None or match[6] not in residual:
        return name
    half, middle, down, up, place, rest = match[1], match[2], match[3], match[4], match[5], residual[match[6]]
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


def detect_layout(names: Iterable[str]) -> Layout:
    """The layout of a set of names that are without prefixes; a few missing names do not matter.

    Raises ValueError for a LoRA, an image-to-video transformer and names of no known layout.
    """
    names = list(names)
    joined = "\n".join(names)
    if re.search(r"\.lora_(A|B|up|down)(\.|$)|[._]lora\.(up|down)\.", joined, re.MULTILINE):
        raise ValueError(
            "the file holds a LoRA, not a whole model; give it as lora, beside the model it adapts"
        )
    if any(mark in joined for mark in ("img_emb.", ".k_img.", "image_embedder.", ".add_k_proj.")):
        raise ValueError("the checkpoint is an image-to-video model; the engine takes text-to-video models")
    marks: dict[Layout, tuple[str, ...]] = {
        "diffusers_transformer": ("condition_embedder.", ".attn1."),
        "wan_transformer": (".self_attn.", "text_embedding."),
        "diffusers_vae": (".down_blocks.", ".up_blocks."),
        "wan_vae": (".downsamples.", ".upsamples."),
        "transformers_text": ("encoder.block.",),
        "wan_text": (".pos_embedding.embedding.", "token_embedding."),
        "taehv": ("decoder.3.conv.",),  # the first memory block (spec 4.9)
    }
    for layout, known in marks.items():
        if any(mark in joined for mark in known):
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
    tensors = choose_model(tensors, use_ema)
    layout = detect_layout(map(strip_prefixes, tensors))
    if layout == "transformers_text" and any(strip_prefixes(name) == "shared.weight" for name in tensors):
        tensors = {name: value for name, value in tensors.items() if strip_prefixes(name) != _TIED_TEXT_NAME}
    if layout == "taehv":
        tensors = _without_encoder(tensors)
    renamed: dict[str, _Value] = {}
    res_blocks = _count_res_blocks(tensors) if layout == "diffusers_vae" else 0
    for stored_name, value in tensors.items():
        name = _engine_name(layout, strip_prefixes(stored_name), res_blocks)
        if name in renamed:
            raise ValueError(
                f"{stored_name} and another tensor both become {name}; keep one of them in the file"
            )
        renamed[name] = value
    return PART_OF_LAYOUT[layout], renamed


def _without_encoder(tensors: Mapping[str, _Value]) -> dict[str, _Value]:
    kept = {name: value for name, value in tensors.items() if not strip_prefixes(name).startswith("encoder.")}
    if len(kept) < len(tensors):
        logger.info(
            "%d tensors of the tiny encoder are left out; the full VAE encodes", len(tensors) - len(kept)
        )
    return kept


def _engine_name(layout: Layout, name: str, res_blocks: int) -> str:
    if layout == "diffusers_transformer":
        return wan_transformer_from_diffusers(name)
    if layout == "diffusers_vae":
        return wan_vae_from_diffusers(name, res_blocks)
    if layout == "wan_text":
        return transformers_text_from_wan(name)
    return "shared.weight" if name == _TIED_TEXT_NAME else name


def _count_res_blocks(names: Iterable[str]) -> int:
    """Residual blocks of one encoder level in a Diffusers VAE: the highest index of a decoder level."""
    found = [re.search(r"decoder\.up_blocks\.\d+\.resnets\.(\d+)\.", name) for name in names]
    return max((int(match[1]) for match in found if match), default=2)


def list_names(names: Iterable[str]) -> str:
    """Names for an error: the first few, and how many more."""
    names = sorted(name if name.isprintable() else ascii(name) for name in names)
    rest = len(names) - SHOWN_NAMES
    return ", ".join(names[:SHOWN_NAMES]) + (f" and {rest} more" if rest > 0 else "")
