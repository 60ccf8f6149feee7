"""Models whose products have weights in int8, against the same models in float32."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from rfengine.accuracy import relative_error
from rfengine.checkpoint.checkpoint import Checkpoint
from rfengine.checkpoint.int8_tensors import with_int8
from rfengine.checkpoint.loader import assign
from rfengine.checkpoint.rank_weights import rank_parts
from rfengine.checkpoint.tensor_file import StoredTensor
from rfengine.config import CacheConfig, TextConfig
from rfengine.models.dit import WanDiT, pack_weights
from rfengine.models.int8_products import is_in_int8, text_encoder_in_int8, transformer_in_int8
from rfengine.models.linear import Linear
from rfengine.models.text_encoder import ByteTokenizer, TextEncoder, build_umt5
from rfengine.ops import REFERENCE_OPS, Ops
from rfengine.ops.reference_int8 import dequantised
from rfengine.tensor_parallel import WHOLE, TensorParallel
from support.models import (
    SMALL,
    noise_of,
    small_cache,
    small_model,
    small_pipeline,
    small_runner,
    text_states,
    write_pipeline,
)

TEXT = TextConfig(259, 32, 48, 64, 3, 2, tokenizer="bytes")
PROMPTS = ["a red cube rolls over the floor", "naïve café, 猫が走る"]


def rounded(model: torch.nn.Module, build, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The weights of `model` in the int8 form that `build` makes."""
    with torch.device("meta"):
        module = build()
    stored = {name: StoredTensor.of(tensor) for name, tensor in model.state_dict().items()}
    assign(module, with_int8(stored, module, dtype), dtype, "cpu", "the test")
    return module.eval()


def rounded_transformer(model: WanDiT, ops: Ops = REFERENCE_OPS) -> WanDiT:
    return rounded(model, lambda: transformer_in_int8(WanDiT(model.config, ops)))


def chunks(model: WanDiT) -> list[torch.Tensor]:
    runner, cache = small_runner(model), small_cache(CacheConfig())
    text = model.text_keys_values(text_states())
    return [runner.advance(cache, cache.plan_chunk(), noise_of(chunk, 3), text) for chunk in range(4)]


def multiplied_back(model: WanDiT) -> WanDiT:
    """The weights of an int8 model in float32."""
    plain = WanDiT(model.config).eval()
    state = model.state_dict()
    for name in [name for name in state if name.endswith("weight_scale")]:
        scale = state.pop(name)
        weight = name.removesuffix("_scale")
        state[weight] = dequantised(state[weight], scale, torch.float32)
    plain.load_state_dict(state)
    return plain


def test_only_the_products_of_the_blocks_are_rounded() -> None:
    model = small_model()
    found = rounded_transformer(model)
    assert is_in_int8(found) and not is_in_int8(model)
    in_int8 = {name for name, each in found.named_parameters() if each.dtype == torch.int8}
    products = {
        f"{name}.weight" for name, each in model.named_modules()
        if isinstance(each, Linear) and name.startswith("blocks.")
    }  # fmt: skip
    assert in_int8 == products and len(products) == 2 * 10
    for name, weight in model.named_parameters():
        if name not in in_int8:
            assert torch.equal(dict(found.named_parameters())[name], weight), name
    assert found.dtype == torch.float32


@pytest.mark.parametrize("is_packed", [False, True])
def test_a_stream_is_that_of_the_rounded_weights(is_packed: bool) -> None:
    found = rounded_transformer(small_model())
    plain = multiplied_back(found)
    if is_packed:
        pack_weights(found)
        assert found.blocks[0].self_attn.is_packed
    for one, other in zip(chunks(found), chunks(plain), strict=True):
        assert relative_error(one, other) < 1e-5


def test_a_chunk_is_near_that_of_the_weights_in_float32() -> None:
    model = small_model()
    errors = [
        relative_error(one, other)
        for one, other in zip(chunks(rounded_transformer(model)), chunks(model), strict=True)
    ]
    assert 1e-3 < errors[0] < 0.05


def test_no_weight_is_folded_into_the_product_before_it_in_another_dtype() -> None:
    model = small_model()
    folding = Ops(dict(REFERENCE_OPS.choice), folds_gate=True)
    expected = chunks(rounded_transformer(model))
    for one, other in zip(chunks(rounded_transformer(model, folding)), expected, strict=True):
        assert torch.equal(one, other)


def test_a_weight_that_is_not_finite_is_refused() -> None:
    model = small_model()
    model.blocks[1].ffn[0].weight.data[3, 4] = torch.nan
    stored = {name: StoredTensor.of(tensor) for name, tensor in model.state_dict().items()}
    with torch.device("meta"):
        module = transformer_in_int8(WanDiT(SMALL))
    stored = with_int8(stored, module, torch.float32)
    with pytest.raises(ValueError, match=r"blocks.1.ffn.0.weight_scale has values that are not finite"):
        assign(module, stored, torch.float32, "cpu", "the test", check_finite=True)


def test_each_weight_is_read_once() -> None:
    reads: list[str] = []
    model = small_model()

    def counted(name: str, tensor: torch.Tensor) -> StoredTensor:
        return StoredTensor(tuple(tensor.shape), tensor.dtype, lambda: (reads.append(name), tensor)[1])

    stored = {name: counted(name, tensor) for name, tensor in model.state_dict().items()}
    with torch.device("meta"):
        module = transformer_in_int8(WanDiT(SMALL))
    assign(module, with_int8(stored, module, torch.float32), torch.float32, "cpu", "the test")
    assert len(reads) == len(set(reads)) == len(stored)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_text_states_in_int8_are_near_those_without(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    exact = build_umt5(TEXT)
    found = rounded(exact, lambda: text_encoder_in_int8(build_umt5(TEXT)), dtype)
    weights = [each for each in found.parameters() if each.dtype == torch.int8]
    assert len(weights) == 2 * 7 and found.encoder.embed_tokens.weight.dtype == dtype
    expected = TextEncoder(exact, ByteTokenizer(), 64).encode(PROMPTS)
    states = TextEncoder(found, ByteTokenizer(), 64, dtype=dtype).encode(PROMPTS)
    assert [each.dtype for each in found.parameters()].count(torch.int8) == 2 * 7
    assert states.dtype == dtype
    assert 1e-3 < relative_error(states.float(), expected) < 0.05


@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_layers_that_come_one_by_one_give_the_same_states(is_int8: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(TEXT, num_layers=3)

    def build() -> torch.nn.Module:
        return text_encoder_in_int8(build_umt5(config)) if is_int8 else build_umt5(config)

    source = build_umt5(config)
    stays, layered = (
        TextEncoder(rounded(source, build, dtype), ByteTokenizer(), 64, "cpu", dtype, by_layers=by_layers)
        for by_layers in (False, True)
    )
    for _ in range(2):  # the device has no layer between two prompts
        assert torch.equal(layered.encode(PROMPTS), stays.encode(PROMPTS))
        assert layered._loaded_model().encoder.block._offload._slots == []


@pytest.mark.parametrize("is_random", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_has_its_part_of_what_is_rounded_as_a_whole(
    rank: int, is_random: bool, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(write_pipeline(tmp_path, small_pipeline()))
    if is_random:
        checkpoint = Checkpoint.random(checkpoint.config)
    parallel = TensorParallel(rank, 2)

    def weights(own: TensorParallel) -> dict[str, torch.Tensor]:
        def build() -> WanDiT:
            return transformer_in_int8(WanDiT(checkpoint.config.model, parallel=own))

        return checkpoint.load(build, "transformer", torch.float32, "cpu", own).state_dict()

    whole, part = weights(WHOLE), weights(parallel)
    assert whole.keys() == part.keys()
    for name, tensor in rank_parts({n: StoredTensor.of(t) for n, t in whole.items()}, parallel).items():
        assert torch.equal(part[name], tensor.read()), name
