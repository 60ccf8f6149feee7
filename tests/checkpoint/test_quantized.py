from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rfengine.checkpoint.quantized import check_metadata, dequantized
from rfengine.checkpoint.tensor_file import StoredTensor

E4 = torch.float8_e4m3fn


def read(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    stored = {name: StoredTensor.of(tensor) for name, tensor in tensors.items()}
    return {name: tensor.read() for name, tensor in dequantized(stored, "model.safetensors").items()}


def text(content: str) -> Tensor:
    return torch.tensor(list(content.encode()), dtype=torch.uint8)


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(8, 32, generator=torch.Generator().manual_seed(0)).to(E4)


@pytest.mark.parametrize("spelling", ["scale_weight", "weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_scaled_weight_is_multiplied_back_in_float32(
    weight: Tensor, spelling: str, dtype: torch.dtype
) -> None:
    bias, scale = torch.ones(8), torch.tensor(0.75, dtype=dtype)
    for shape in ((), (1,), (1, 1)):
        tensors = {
            "a.0.weight": weight, "a.0.bias": bias, f"a.0.{spelling}": scale.reshape(shape),
            "a.0.scale_input": torch.ones(()), "a.0.input_scale": torch.ones(()),
            "scaled_fp8": torch.zeros(2, dtype=E4), "model.scaled_fp8": torch.zeros(0, dtype=E4),
            "a.0.comfy_quant": text('{"format": "float8_e4m3fn", "full_precision_matrix_mult": true}'),
        }  # fmt: skip
        found = read(tensors)
        assert found.keys() == {"a.0.weight", "a.0.bias"}
        assert found["a.0.weight"].dtype == torch.float32
        assert torch.equal(found["a.0.weight"], weight.float() * 0.75)


def test_plain_fp8_and_other_weights_are_left_as_they_are(weight: Tensor) -> None:
    tensors = {"a.weight": weight, "b.weight": torch.randn(3).bfloat16(), "scaled_fp8": torch.zeros(2)}
    found = read(tensors)
    assert found["a.weight"].dtype == E4 and torch.equal(found["b.weight"], tensors["b.weight"])


@pytest.mark.parametrize(
    ("shape", "expand"),
    [
        ((8,), lambda scale: scale[:, None]),
        ((8, 1), lambda scale: scale),
        ((2, 4), lambda scale: scale.repeat_interleave(4, 0).repeat_interleave(8, 1)),
        ((1, 2), lambda scale: scale.repeat_interleave(16, 1)),
    ],
)
def test_scales_of_rows_and_blocks_fall_on_their_weights(
    weight: Tensor, shape: tuple[int, ...], expand: Callable[[Tensor], Tensor]
) -> None:
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.5
    found = read({"a.weight": weight, "a.weight_scale": scale})
    assert torch.equal(found["a.weight"], weight.float() * expand(scale))


def test_the_scale_of_a_convolution_falls_on_its_rows() -> None:
    weight, scale = torch.randn(4, 3, 1, 2, 2).to(E4), torch.rand(4) + 0.5
    found = read({"a.weight": weight, "a.scale_weight": scale})
    assert torch.equal(found["a.weight"], weight.float() * scale[:, None, None, None, None])


@pytest.mark.parametrize("shape", [(32,), (3, 4), (8, 3), (2, 4, 1), (0,), (16, 64), (8, 32, 1)])
def test_a_scale_of_another_shape_is_refused(weight: Tensor, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"model.safetensors has a.weight_scale .* for a.weight \(8, 32\)"):
        read({"a.weight": weight, "a.weight_scale": torch.ones(shape)})


def test_blocks_that_are_cut_at_the_edge_are_refused() -> None:
    with pytest.raises(ValueError, match="no scale for the tensor, for rows or for even blocks"):
        read({"a.weight": torch.zeros(256, 200).to(E4), "a.weight_scale_inv": torch.ones(2, 2)})


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_no_positive_number_is_refused(weight: Tensor, value: float) -> None:
    with pytest.raises(ValueError, match=r"scales in a.weight_scale that are no positive numbers"):
        read({"a.weight": weight, "a.weight_scale": torch.tensor(value)})


def test_two_scales_of_one_weight_are_refused(weight: Tensor) -> None:
    with pytest.raises(ValueError, match="has two scales for a.weight"):
        read({"a.weight": weight, "a.weight_scale": torch.ones(()), "a.scale_weight": torch.ones(())})


def test_a_scale_without_its_weight_is_kept_so_that_it_is_listed() -> None:
    assert read({"a.weight_scale": torch.ones(())}).keys() == {"a.weight_scale"}


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("a.weight.absmax", "bitsandbytes"),
        ("a.weight.quant_map", "bitsandbytes"),
        ("a.weight.quant_state.bitsandbytes__nf4", "bitsandbytes"),
        ("a.SCB", r"bitsandbytes \(int8\)"),
        ("a.qweight", "GPTQ or AWQ"),
        ("a.wscales", "SVDQuant"),
        ("a.weight_scale_2", "NVFP4"),
        ("a.weight._data", "optimum-quanto"),
        ("a.weight_qdata", "torchao"),
    ],
)
def test_other_quantized_forms_are_refused_by_their_names(weight: Tensor, name: str, form: str) -> None:
    with pytest.raises(ValueError, match=f"is quantized by {form}.* {name}"):
        read({"a.weight": weight, name: torch.ones(1)})


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool])
def test_integers_are_refused_by_their_dtype(dtype: torch.dtype) -> None:
    kind = str(dtype).removeprefix("torch.")
    for extra in ({}, {"a.weight_scale": torch.ones(())}):
        with pytest.raises(ValueError, match=f"has {kind} where weights are floating-point: a.weight"):
            read({"a.weight": torch.ones(2, 2, dtype=dtype), **extra})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"format": "nvfp4"}', "a is quantized as nvfp4"),
        ('{"format": "int8_tensorwise"}', "a is quantized as int8_tensorwise"),
        ('{"format": "float8_e4m3fn", "convrot": true}', "a is FP8 with convrot, which is not read"),
        ("[3]", "a is quantized as None"),
        ("{", "a.comfy_quant is no text in JSON"),
        ("\ud7ff" * 40000, "a.comfy_quant is torch.uint8"),
    ],
)
def test_the_form_that_comfy_quant_names_counts(weight: Tensor, content: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"model.safetensors: {message}"):
        read({"a.weight": weight, "a.comfy_quant": text(content), "a.weight_scale": torch.ones(())})


def test_the_form_in_the_header_counts() -> None:
    def header(form: str) -> dict[str, str]:
        return {
            "_quantization_metadata": json.dumps({"format_version": "1.0", "layers": {"a": {"format": form}}})
        }

    check_metadata({"format": "pt"}, "model.safetensors")
    check_metadata(header("float8_e4m3fn"), "model.safetensors")
    with pytest.raises(ValueError, match="model.safetensors: a is quantized as mxfp8"):
        check_metadata(header("mxfp8"), "model.safetensors")
    for damaged in ("{", "[]", "{}", '{"layers": 3}', "null"):
        with pytest.raises(ValueError, match="model.safetensors has a damaged _quantization_metadata"):
            check_metadata({"_quantization_metadata": damaged}, "model.safetensors")
