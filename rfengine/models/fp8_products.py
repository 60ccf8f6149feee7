"""Which products of a WanDiT are in FP8: their weights in e4m3, made beside those of the model.

The weights themselves stay as they are: text keys and values, LoRAs and everything that does not multiply
in FP8 read them. That costs one byte for each of their values.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from rfengine.cache.window_fp8 import AttentionUnits
from rfengine.config import WanConfig
from rfengine.models.dit import SelfAttention, WanDiT
from rfengine.models.linear import Linear, WeightFP8
from rfengine.ops.reference import LARGEST_E4M3

ROUNDING = 1.02  # what three roundings to 16 bits may add to a row
# of one block, named as in the checkpoints; q, k and v are one product
PRODUCTS = ("self_attn.qkv", "self_attn.o", "cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2")


@dataclass(frozen=True, slots=True)
class Product:
    """One product of a model: the module whose `fp8` says whether it is in FP8, and the layers it
    multiplies."""

    owner: Linear | SelfAttention
    layers: tuple[Linear, ...]


def product_names(config: WanConfig) -> tuple[str, ...]:
    """Those of every block, such as "blocks.0.ffn.2"."""
    return tuple(f"blocks.{layer}.{name}" for layer in range(config.num_layers) for name in PRODUCTS)


def require_products(names: Collection[str], config: WanConfig) -> None:
    """Raises ValueError for a name that no product of this model has."""
    own = product_names(config)
    if unknown := sorted(set(names) - set(own)):
        raise ValueError(
            f"{unknown[0]} is left out of FP8 and is no product of this model; its {len(own)} are named such "
            f"as {own[0]}"
        )


def products(model: WanDiT) -> dict[str, Product]:
    """The products of every block by name."""
    found = {}
    for layer, block in enumerate(model.blocks):
        attention, cross, (expand, _, contract) = block.self_attn, block.cross_attn, block.ffn
        single = (attention.o, cross.q, cross.o, expand, contract)
        owners = (attention, *single)
        layers = ((attention.q, attention.k, attention.v), *((each,) for each in single))
        for name, owner, own in zip(PRODUCTS, owners, layers, strict=True):
            found[f"blocks.{layer}.{name}"] = Product(owner, own)
    return found


def with_dependents(left_out: Collection[str]) -> frozenset[str]:
    """`left_out` and what cannot be in FP8 without it: ffn.2, whose rows ffn.0 writes in FP8."""
    return frozenset(left_out) | {
        f"{name.removesuffix('.0')}.2" for name in left_out if name.endswith(".ffn.0")
    }


def quantise(model: WanDiT, left_out: Collection[str] = ()) -> None:
    """Put every product of the blocks into FP8 but those left out, in place; nothing else of the model
    changes. model.left_out_of_fp8 says what it was.

    Call it when the weights are loaded, on their device and in their dtype. Raises ValueError for a name
    that no product of this model has.
    """
    require_products(left_out, model.config)
    model.left_out_of_fp8 = kept = with_dependents(left_out)
    for name, product in products(model).items():
        product.owner.fp8 = None if name in kept else WeightFP8.of(product.layers)


@torch.no_grad()
def attention_units(model: WanDiT) -> AttentionUnits:
    """Powers of two in which no query and no key of any input saturates: a row of the norm is no longer than
    sqrt(D), the weights of the norm stretch it by their largest, a rotation not at all, and a mean of keys is
    no longer than a key."""
    dim, head_dim = model.config.dim, model.config.head_dim
    attentions = [block.self_attn for block in model.blocks]

    def units(norms: list[Tensor], times: float) -> Tensor:
        largest = torch.stack([weight.float().abs().amax() for weight in norms])
        bound = largest * (times * dim**0.5 * ROUNDING)
        return torch.where(largest > 0, torch.exp2(torch.ceil(torch.log2(bound / LARGEST_E4M3))), 1.0)

    query = units([each.norm_q.weight for each in attentions], 1)
    key = units([each.norm_k.weight for each in attentions], 2)
    return AttentionUnits(query, key, query * key / head_dim**0.5)


def refresh(model: WanDiT) -> None:
    """Make the weights in FP8 those of the model's weights again, in the memory that graphs read."""
    for product in products(model).values():
        if product.owner.fp8 is not None:
            product.owner.fp8.refresh(product.layers)
