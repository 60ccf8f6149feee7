"""Configuration from tensor shapes, and the shapes a configuration asks for; names are the engine's."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rfengine.checkpoint.layouts import Part, list_names
from rfengine.checkpoint.tensor_file import StoredTensor
from rfengine.config import EngineConfig, TextConfig, TinyVAEConfig, VAEConfig, WanConfig, Width
from rfengine.diffusion_forcing_config import FPS_ROWS
from rfengine.limits import check_value, field_hints

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
PartConfig = WanConfig | VAEConfig | TextConfig | TinyVAEConfig

PUBLISHED_HEAD_DIM = 128  # of every published Wan2.1 transformer

# What a config.json of Diffusers or transformers calls a field, where that is not the field's own name.
_SETTINGS: Mapping[type[PartConfig], Mapping[str, str]] = {
    WanConfig: {
        "num_heads": "num_attention_heads",
        "in_dim": "in_channels",
        "out_dim": "out_channels",
        "fps_embedding": "inject_sample_info",  # in the files of SkyReels-V2
    },
    VAEConfig: {"temporal_downsample": "temperal_downsample"},  # Diffusers spells it so
    TextConfig: {
        "dim": "d_model",
        "ffn_dim": "d_ff",
        "num_buckets": "relative_attention_num_buckets",
        "max_distance": "relative_attention_max_distance",
        "eps": "layer_norm_epsilon",
    },
}
RGB_CHANNELS = 3


def part_configs(config: EngineConfig) -> dict[Part, PartConfig]:
    """The configuration of each part of a checkpoint."""
    return {
        "transformer": config.model,
        "vae": config.vae,
        "text_encoder": config.text,
        "tiny_vae": config.tiny_vae,
    }


def shapes_of(tensors: Mapping[str, StoredTensor]) -> dict[str, Shape]:
    """The shape of each tensor by its name."""
    return {name: stored.shape for name, stored in tensors.items()}


def infer_config(
    part: Part, shapes: Shapes, settings: Mapping[str, Any] | None = None, place: Path | None = None
) -> PartConfig:
    """The configuration of a part, from the shapes of its tensors and `settings`, its config.json.

    place: where both are from, for errors. Raises ValueError when a tensor that determines a size is absent,
    and when settings are not what they may be or disagree with the shapes.
    """
    settings = settings or {}
    try:
        infer = {"transformer": _infer_transformer, "vae": _infer_vae, "text_encoder": _infer_text}
        return infer[part](shapes, settings) if part in infer else _infer_tiny_vae(shapes)
    except ValueError as error:
        raise ValueError(f"{place}: {error}" if place else str(error)) from error


def expected_shapes(config: PartConfig) -> dict[str, Shape]:
    """The shape of every tensor of the part that `config` describes, by the engine's names.

    The modules themselves have them too, but building one on the meta device takes as long as its layers are
    many, and a hostile configuration has many.
    """
    kinds = {WanConfig: _transformer_shapes, VAEConfig: _vae_shapes, TextConfig: _text_shapes}
    return kinds.get(type(config), _tiny_vae_shapes)(config)


def _infer_transformer(shapes: Shapes, settings: Mapping[str, Any]) -> WanConfig:
    """Shapes do not determine num_heads; without settings it is dim / 128, as in all published models."""
    dim, in_dim, *patch_size = _shape(shapes, "patch_embedding.weight", 5)
    (text_dim,) = _shape(shapes, "text_embedding.0.weight", 2)[1:]
    (freq_dim,) = _shape(shapes, "time_embedding.0.weight", 2)[1:]
    sizes = {
        "dim": dim,
        "ffn_dim": _shape(shapes, "blocks.0.ffn.0.weight", 2)[0],
        "num_layers": _count_layers(shapes, "blocks."),
        "in_dim": in_dim,
        "out_dim": _shape(shapes, "head.head.weight", 2)[0] // max(1, math.prod(patch_size)),
        "text_dim": text_dim,
        "freq_dim": freq_dim,
        "patch_size": tuple(patch_size),
        "fps_embedding": tells_frame_rate(shapes),
    }
    sizes = _completed(sizes, stated_fields(WanConfig, settings))
    if "num_heads" not in sizes:
        if dim % PUBLISHED_HEAD_DIM:
            raise ValueError(
                f"the transformer has dim {dim}, no multiple of {PUBLISHED_HEAD_DIM}, and no config.json "
                "tells its num_heads; convert it with a base of the same dim"
            )
        sizes["num_heads"] = dim // PUBLISHED_HEAD_DIM
    _require_head_dim(settings, "attention_head_dim", dim, sizes["num_heads"])
    return WanConfig(**sizes)


def _infer_vae(shapes: Shapes, settings: Mapping[str, Any]) -> VAEConfig:
    """The statistics of the latents are no tensors: settings have them, or they are those published for 16
    channels."""
    base_dim = _shape(shapes, "encoder.conv1.weight", 5)[0]
    z_dim = _shape(shapes, "conv2.weight", 5)[0]
    levels: list[list[int]] = [[]]
    temporal = []
    for index in range(_count_layers(shapes, "encoder.downsamples.")):
        name = f"encoder.downsamples.{index}"
        if f"{name}.resample.1.weight" in shapes:
            levels.append([])
            temporal.append(f"{name}.time_conv.weight" in shapes)
        else:
            levels[-1].append(_shape(shapes, f"{name}.residual.6.weight", 5)[0])
    if not all(levels):
        raise ValueError("encoder.downsamples has a level without a residual block; the VAE is incomplete")
    published, stated = VAEConfig(), stated_fields(VAEConfig, settings)
    if z_dim != published.z_dim and not {"latents_mean", "latents_std"} <= set(stated):
        raise ValueError(
            f"the VAE has {z_dim} latent channels, the published statistics are for {published.z_dim}; "
            "give a directory whose config.json has latents_mean and latents_std"
        )
    sizes = {
        "base_dim": base_dim,
        "z_dim": z_dim,
        "dim_mult": tuple(widths[-1] // base_dim for widths in levels),
        "num_res_blocks": len(levels[0]),
        "temporal_downsample": tuple(temporal),
    }
    return VAEConfig(**_completed(sizes, stated))


def _infer_text(shapes: Shapes, settings: Mapping[str, Any]) -> TextConfig:
    block = "encoder.block.0.layer"
    vocab_size, dim = _shape(shapes, "shared.weight", 2)
    num_buckets, num_heads = _shape(shapes, f"{block}.0.SelfAttention.relative_attention_bias.weight", 2)
    sizes = {
        "vocab_size": vocab_size,
        "dim": dim,
        "attention_dim": _shape(shapes, f"{block}.0.SelfAttention.q.weight", 2)[0],
        "ffn_dim": _shape(shapes, f"{block}.1.DenseReluDense.wi_0.weight", 2)[0],
        "num_heads": num_heads,
        "num_layers": _count_layers(shapes, "encoder.block."),
        "num_buckets": num_buckets,
    }
    _require_head_dim(settings, "d_kv", sizes["attention_dim"], num_heads)
    return TextConfig(**_completed(sizes, stated_fields(TextConfig, settings)))


def _infer_tiny_vae(shapes: Shapes) -> TinyVAEConfig:
    """The layers of the published tiny decoder are numbered through."""
    width, z_dim = _shape(shapes, "decoder.1.weight", 4)[:2]
    widths, factors, blocks, index = [width], [], [], 3
    while f"decoder.{index}.conv.0.weight" in shapes:
        first = index
        while f"decoder.{index}.conv.0.weight" in shapes:
            index += 1
        blocks.append(index - first)
        grown, channels = _shape(shapes, f"decoder.{index + 1}.conv.weight", 4)[:2]
        factors.append(grown // max(1, channels))
        widths.append(_shape(shapes, f"decoder.{index + 2}.weight", 4)[0])
        index += 3
    if len(set(blocks)) != 1:
        raise ValueError(
            f"the levels of the tiny decoder have {blocks} memory blocks; it is incomplete, or no TAEHV"
        )
    return TinyVAEConfig(z_dim, tuple(widths), blocks[0], tuple(factors))


def stated_fields(kind: type[PartConfig], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json states of the fields of `kind`, in whichever of the layouts' names.

    Raises ValueError, which names the key, for a value that its field may not hold.
    """
    stated: dict[str, Any] = {}
    for field, hint in field_hints(kind).items():
        keys = dict.fromkeys((field, _SETTINGS[kind].get(field, field)))
        for key in (key for key in keys if key in settings):
            value = tuple(settings[key]) if isinstance(settings[key], list) else settings[key]
            check_value(f"the stated {key}", value, hint)
            stated[field] = value
    return stated


def stated_heads(settings: Mapping[str, Any]) -> dict[int, int]:
    """num_heads by dim, as the config.json of a transformer states them; empty where it tells one alone.

    Raises ValueError as stated_fields does.
    """
    stated = stated_fields(WanConfig, settings)
    heads, dim = stated.get("num_heads"), stated.get("dim")
    if heads is not None and dim is None and "attention_head_dim" in settings:
        check_value("the stated attention_head_dim", settings["attention_head_dim"], Width)
        dim = heads * settings["attention_head_dim"]
    return {} if heads is None or dim is None else {dim: heads}


def _completed(sizes: dict[str, Any], stated: dict[str, Any]) -> dict[str, Any]:
    """What the tensors have, and of what config.json states the rest."""
    for field, value in stated.items():
        if value != sizes.get(field, value):
            raise ValueError(
                f"config.json states {field} {value} and the tensors have {sizes[field]}; they do not match"
            )
    return {**stated, **sizes}


def _require_head_dim(settings: Mapping[str, Any], key: str, dim: int, num_heads: int) -> None:
    if key not in settings:
        return
    check_value(f"the stated {key}", settings[key], Width)
    if settings[key] * num_heads != dim:
        raise ValueError(
            f"config.json states {key} {settings[key]}, which in {num_heads} heads is not the {dim} of the "
            "tensors; they do not match"
        )


def _shape(shapes: Shapes, name: str, axes: int) -> Shape:
    if name not in shapes:
        raise ValueError(f"the checkpoint has no {name}, from which sizes are read; it is incomplete")
    if len(shapes[name]) != axes:
        raise ValueError(f"{name} is {tuple(shapes[name])}; it must have {axes} axes")
    if min(shapes[name]) < 1:
        raise ValueError(f"{name} is {tuple(shapes[name])}, which is empty; get the file again")
    return tuple(shapes[name])


def _count_layers(shapes: Shapes, prefix: str) -> int:
    """One more than the highest index after `prefix`; a gap shows up later as missing tensors."""
    found = [re.match(rf"{re.escape(prefix)}([0-9]{{1,9}})\.", name) for name in shapes]
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def _transformer_shapes(config: WanConfig) -> dict[str, Shape]:
    """Every tensor of the transformer by its original name."""
    dim, ffn_dim = config.dim, config.ffn_dim
    fps = {
        "fps_embedding.weight": (FPS_ROWS, dim),
        **_conv("fps_projection.0", dim, dim),
        **_conv("fps_projection.2", 6 * dim, dim),
    }
    block = {
        "modulation": (1, 6, dim),
        **{f"norm3.{leaf}": (dim,) for leaf in ("weight", "bias")},
        **_conv("ffn.0", ffn_dim, dim),
        **_conv("ffn.2", dim, ffn_dim),
    }
    for attention in ("self_attn", "cross_attn"):
        block |= {f"{attention}.norm_{letter}.weight": (dim,) for letter in "qk"}
        for letter in "qkvo":
            block |= _conv(f"{attention}.{letter}", dim, dim)
    return {
        **_conv("patch_embedding", dim, config.in_dim, *config.patch_size),
        **_conv("text_embedding.0", dim, config.text_dim),
        **_conv("text_embedding.2", dim, dim),
        **_conv("time_embedding.0", dim, config.freq_dim),
        **_conv("time_embedding.2", dim, dim),
        **_conv("time_projection.1", 6 * dim, dim),
        "head.modulation": (1, 2, dim),
        **_conv("head.head", math.prod(config.patch_size) * config.out_dim, dim),
        **_repeated("blocks", config.num_layers, block),
        **(fps if config.fps_embedding else {}),
    }


def _vae_shapes(config: VAEConfig) -> dict[str, Shape]:
    """Every tensor of the VAE by its original name."""
    widths, z_dim = [config.base_dim * factor for factor in config.dim_mult], config.z_dim
    temporal, blocks = config.temporal_downsample, config.num_res_blocks
    return {
        **_conv("conv1", 2 * z_dim, 2 * z_dim, 1, 1, 1),
        **_conv("conv2", z_dim, z_dim, 1, 1, 1),
        **_conv("encoder.conv1", config.base_dim, RGB_CHANNELS, 3, 3, 3),
        **_levels("encoder.downsamples", config.base_dim, widths, temporal, blocks),
        **_middle_and_head("encoder", widths[-1], widths[-1], 2 * z_dim),
        **_conv("decoder.conv1", widths[-1], z_dim, 3, 3, 3),
        **_levels("decoder.upsamples", widths[-1], widths[::-1], temporal[::-1], blocks + 1),
        **_middle_and_head("decoder", widths[-1], widths[0], RGB_CHANNELS),
    }


def _text_shapes(config: TextConfig) -> dict[str, Shape]:
    """Every tensor of the text encoder by its transformers name, the tied embedding once."""
    inner, dim = config.attention_dim, config.dim
    block = {
        **{f"0.SelfAttention.{letter}.weight": (inner, dim) for letter in "qkv"},
        "0.SelfAttention.o.weight": (dim, inner),
        "0.SelfAttention.relative_attention_bias.weight": (config.num_buckets, config.num_heads),
        **{f"{index}.layer_norm.weight": (dim,) for index in (0, 1)},
        **{f"1.DenseReluDense.wi_{index}.weight": (config.ffn_dim, dim) for index in (0, 1)},
        "1.DenseReluDense.wo.weight": (dim, config.ffn_dim),
    }
    return {
        "shared.weight": (config.vocab_size, dim),
        "encoder.final_layer_norm.weight": (dim,),
        **_repeated(
            "encoder.block", config.num_layers, {f"layer.{name}": shape for name, shape in block.items()}
        ),
    }


def _tiny_vae_shapes(config: TinyVAEConfig) -> dict[str, Shape]:
    """Every tensor of the tiny decoder by its published name."""
    widths = config.widths
    shapes = _conv("decoder.1", widths[0], config.z_dim, 3, 3)
    index = 3
    for channels, outputs, factor in zip(widths, widths[1:], config.time_factors, strict=False):
        for block in range(index, index + config.memory_blocks):
            shapes |= _conv(f"decoder.{block}.conv.0", channels, 2 * channels, 3, 3)
            shapes |= _conv(f"decoder.{block}.conv.2", channels, channels, 3, 3)
            shapes |= _conv(f"decoder.{block}.conv.4", channels, channels, 3, 3)
        index += config.memory_blocks
        shapes[f"decoder.{index + 1}.conv.weight"] = (channels * factor, channels, 1, 1)
        shapes[f"decoder.{index + 2}.weight"] = (outputs, channels, 3, 3)
        index += 3
    return shapes | _conv(f"decoder.{index + 1}", RGB_CHANNELS, widths[-1], 3, 3)


def _repeated(prefix: str, count: int, block: Shapes) -> dict[str, Shape]:
    return {f"{prefix}.{index}.{name}": shape for index in range(count) for name, shape in block.items()}


def _conv(name: str, outputs: int, inputs: int, *kernel: int) -> dict[str, Shape]:
    """A convolution, or without a kernel a linear layer."""
    return {f"{name}.weight": (outputs, inputs, *kernel), f"{name}.bias": (outputs,)}


def _residual(name: str, inputs: int, outputs: int) -> dict[str, Shape]:
    shapes = {f"{name}.residual.0.gamma": (inputs, 1, 1, 1), f"{name}.residual.3.gamma": (outputs, 1, 1, 1)}
    shapes |= _conv(f"{name}.residual.2", outputs, inputs, 3, 3, 3)
    shapes |= _conv(f"{name}.residual.6", outputs, outputs, 3, 3, 3)
    return shapes if inputs == outputs else shapes | _conv(f"{name}.shortcut", outputs, inputs, 1, 1, 1)


def _levels(
    prefix: str, channels: int, widths: Sequence[int], temporal: Sequence[bool], blocks: int
) -> dict[str, Shape]:
    """Residual blocks of each level, numbered through, and a step between two levels, which in the decoder
    halves the channels. temporal: which steps change the number of frames."""
    up, shapes, index = prefix.startswith("decoder"), {}, 0
    for level, width in enumerate(widths):
        for inputs in (channels, *[width] * (blocks - 1)):
            shapes |= _residual(f"{prefix}.{index}", inputs, width)
            index += 1
        channels = width // 2 if up else width
        if level < len(temporal):
            shapes |= _conv(f"{prefix}.{index}.resample.1", channels, width, 3, 3)
            if temporal[level]:
                shapes |= _conv(f"{prefix}.{index}.time_conv", 2 * width if up else width, width, 3, 1, 1)
            index += 1
    return shapes


def _middle_and_head(half: str, channels: int, head_channels: int, outputs: int) -> dict[str, Shape]:
    return {
        **_residual(f"{half}.middle.0", channels, channels),
        f"{half}.middle.1.norm.gamma": (channels, 1, 1),
        **_conv(f"{half}.middle.1.to_qkv", 3 * channels, channels, 1, 1),
        **_conv(f"{half}.middle.1.proj", channels, channels, 1, 1),
        **_residual(f"{half}.middle.2", channels, channels),
        f"{half}.head.0.gamma": (head_channels, 1, 1, 1),
        **_conv(f"{half}.head.2", outputs, head_channels, 3, 3, 3),
    }


def tells_frame_rate(shapes: Shapes) -> bool:
    """Whether the tensors are those of a transformer that is told its frame rate."""
    return "fps_embedding.weight" in shapes


def describe_mismatch(expected: Shapes, found: Shapes) -> str:
    """What is wrong with the tensors `found`, by name; empty when they are those of `expected`."""
    missing = expected.keys() - found.keys()
    unexpected = found.keys() - expected.keys()
    misshaped = [
        f"{name} {tuple(found[name])} instead of {tuple(expected[name])}"
        for name in expected.keys() & found.keys()
        if tuple(found[name]) != tuple(expected[name])
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("mis-shaped", misshaped))
    problems = [f"{len(names)} {kind}: {list_names(names)}" for kind, names in kinds if names]
    sizes = [_describe_size(shapes) for shapes in (found, expected)]
    if problems and all(sizes) and sizes[0] != sizes[1]:
        problems.insert(0, f"the checkpoint has {sizes[0]} and the model has {sizes[1]}")
    return "; ".join(problems)


def _describe_size(shapes: Shapes) -> str:
    """Size of a transformer, text encoder or VAE in words; empty when the tensors that tell it are absent."""
    tellers = {
        "patch_embedding.weight": ("dim", "blocks."),
        "encoder.final_layer_norm.weight": ("dim", "encoder.block."),
        "encoder.conv1.weight": ("base_dim", "encoder.downsamples."),
    }
    for name, (word, prefix) in tellers.items():
        if name in shapes and shapes[name]:
            return f"{word} {shapes[name][0]} in {_count_layers(shapes, prefix)} layers"
    return ""
