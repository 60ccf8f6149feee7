"""LoRAs chosen and loaded: the forms of their files, several at once, what is refused."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rfengine.checkpoint import lora as module
from rfengine.checkpoint.loader import save_weights
from rfengine.checkpoint.lora import LoadedLora, Lora, add_loras, changes_by_tensor, load_loras, with_loras
from rfengine.checkpoint.shapes import expected_shapes
from rfengine.checkpoint.tensor_file import StoredTensor
from support.checkpoints import random_tensors
from support.loras import ALPHA, LAYERS, RANK, pairs, write_lora, write_peft
from support.models import SMALL

SHAPES = expected_shapes(SMALL)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return random_tensors(SHAPES)


def merged_by(loras: tuple[LoadedLora, ...], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor that the LoRAs change."""
    return {
        name: with_loras(weights[name], name, changing) for name, changing in changes_by_tensor(loras).items()
    }


@pytest.mark.parametrize("form", ["kohya", "fun", "comfyui", "diffusers", "peft"])
def test_every_form_is_the_same_lora(tmp_path: Path, weights: dict[str, Tensor], form: str) -> None:
    values = pairs(SMALL)
    (found,) = load_loras([write_lora(tmp_path / "a.safetensors", values, form)], SHAPES)
    (kohya,) = load_loras([write_lora(tmp_path / "kohya.safetensors", values)], SHAPES)
    assert found.sha256 == kohya.sha256 and found.nbytes == kohya.nbytes > 0
    merged = merged_by((found,), weights)
    assert merged.keys() == {f"{layer}.weight" for layer in LAYERS}
    for layer, (down, up) in values.items():
        weight = weights[f"{layer}.weight"]
        exact = weight.double() + ALPHA / RANK * (up.double() @ down.double()).reshape(weight.shape)
        torch.testing.assert_close(merged[f"{layer}.weight"].double(), exact, rtol=1e-6, atol=1e-6)


def test_ranks_and_alphas_of_patterns_give_the_factor_of_each_layer(tmp_path: Path) -> None:
    values = pairs(SMALL, LAYERS[:4])
    down, up = values["blocks.0.self_attn.v"]
    values["blocks.0.self_attn.v"] = (torch.cat((down, down)), torch.cat((up, up), dim=1))  # rank 4
    patterns = {"rank_pattern": {"self_attn.v": 4}, "alpha_pattern": {"cross_attn.k": 1}}
    write_peft(tmp_path, values, {"r": RANK, "lora_alpha": ALPHA, **patterns})
    (found,) = load_loras([tmp_path], SHAPES)
    factors = {name: change.factor for name, change in found.changes.items()}
    assert factors == {
        "blocks.0.self_attn.q.weight": 2.0, "blocks.0.self_attn.v.weight": 1.0,
        "blocks.1.self_attn.k.weight": 2.0, "blocks.0.cross_attn.k.weight": 0.5,
    }  # fmt: skip


@pytest.fixture
def three(tmp_path: Path) -> list[Lora]:
    paths = [write_lora(tmp_path / f"{seed}.safetensors", pairs(SMALL, seed=seed)) for seed in range(3)]
    return [Lora(path, scale) for path, scale in zip(paths, (0.7, -1.3, 2.0), strict=True)]


def test_order_of_several_changes_no_bit(three: list[Lora], weights: dict[str, Tensor]) -> None:
    results = [merged_by(load_loras(order, SHAPES), weights) for order in itertools.permutations(three)]
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        assert all(torch.equal(value, results[0][name]) for name, value in other.items())
    values = [pairs(SMALL, seed=seed) for seed in range(3)]
    for layer in LAYERS:
        weight = weights[f"{layer}.weight"]
        exact = weight.double()
        for lora, each in zip(three, values, strict=True):
            down, up = each[layer]
            exact = exact + lora.scale * ALPHA / RANK * (up.double() @ down.double())
        torch.testing.assert_close(results[0][f"{layer}.weight"].double(), exact, rtol=1e-5, atol=1e-5)


def test_a_scale_of_zero_changes_nothing(three: list[Lora]) -> None:
    loaded = load_loras([Lora(lora.path, 0.0) for lora in three], SHAPES)
    assert len(loaded) == 3 and changes_by_tensor(loaded) == {}


def test_what_is_loaded_is_not_read_again(three: list[Lora], monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_loras(three[:2], SHAPES)
    opened = []
    read = module.open_lora
    monkeypatch.setattr(module, "open_lora", lambda path, *rest: opened.append(path) or read(path, *rest))
    second = load_loras([Lora(three[1].path, 0.1), three[2]], SHAPES, loaded=first)
    assert opened == [three[2].path]
    assert second[0].changes is first[1].changes and second[0].lora.scale == 0.1
    load_loras([Lora(three[1].path, 0.1, allow_unmatched=True)], SHAPES, loaded=second)
    assert opened == [three[2].path, three[1].path]  # under another rule it may be another LoRA


@pytest.mark.parametrize("in_folder", [False, True])
def test_other_files_at_a_path_are_read_and_a_relative_path_is_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_folder: bool
) -> None:
    path = Path("adapter_model.safetensors")
    given = Path("." if in_folder else path)
    for folder in ("here", "there"):
        write_lora(tmp_path / folder / path, pairs(SMALL, seed=len(folder)))
    monkeypatch.chdir(tmp_path / "here")
    here = load_loras([given], SHAPES)
    assert load_loras([given], SHAPES, loaded=here)[0].changes is here[0].changes
    monkeypatch.chdir(tmp_path / "there")
    there = load_loras([given], SHAPES, loaded=here)
    assert there[0].sha256 == load_loras([given], SHAPES)[0].sha256 != here[0].sha256
    write_lora(path, pairs(SMALL, seed=9))
    newer = load_loras([given], SHAPES, loaded=there)
    assert newer[0].sha256 == load_loras([given], SHAPES)[0].sha256 != there[0].sha256


def test_a_lora_given_twice_is_refused(three: list[Lora], tmp_path: Path) -> None:
    copy = write_lora(tmp_path / "copy" / "a.safetensors", pairs(SMALL, seed=1), "peft")
    with pytest.raises(
        ValueError, match=r"1.safetensors and .*copy.* are the same LoRA; give it once, at the"
    ):
        load_loras([*three, copy], SHAPES)


def test_whole_tensors_have_no_scale_and_one_owner(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    paths = []
    for seed in range(2):
        folder = tmp_path / str(seed)
        folder.mkdir()
        write_peft(
            folder, pairs(SMALL, LAYERS[:2], seed), {"lora_alpha": 1, "modules_to_save": ["head.head"]}
        )
        file = folder / "adapter_model.safetensors"
        tensors = {name: stored.read() for name, stored in module.open_lora(folder).tensors.items()}
        tensors["base_model.model.head.head.weight"] = torch.full(SHAPES["head.head.weight"], float(seed + 1))
        save_weights(file, tensors)
        paths.append(folder)
    merged = merged_by(load_loras([paths[0], Lora(paths[1], 0)], SHAPES), weights)
    assert torch.equal(merged["head.head.weight"], torch.ones(SHAPES["head.head.weight"]))
    with pytest.raises(
        ValueError, match=r"0 holds head.head.weight whole, which has no scale, and is .* 0.5;"
    ):
        load_loras([Lora(paths[0], 0.5)], SHAPES)
    with pytest.raises(ValueError, match=r"0 and .*1 both hold head.head.weight whole; give one of them"):
        load_loras(paths, SHAPES)


def test_values_that_are_not_finite_are_refused_when_it_is_loaded(tmp_path: Path) -> None:
    values = pairs(SMALL, LAYERS[:1])
    values[LAYERS[0]][1][3, 1] = math.inf
    path = write_lora(tmp_path / "a.safetensors", values)
    with pytest.raises(ValueError, match="self_attn_q.lora_up.weight in .* has values that are not finite"):
        load_loras([path], SHAPES)


def test_merging_for_a_file_is_the_merge_in_memory(three: list[Lora], weights: dict[str, Tensor]) -> None:
    loaded = load_loras(three, SHAPES)
    transformer = {name: StoredTensor.of(tensor) for name, tensor in weights.items()}
    add_loras(transformer, loaded)
    expected = weights | merged_by(loaded, weights)
    assert transformer.keys() == expected.keys()
    for name, stored in transformer.items():
        assert stored.dtype == torch.float32 and torch.equal(stored.read(), expected[name])


@pytest.mark.parametrize("scale", [math.nan, math.inf, 1e4, "1", True, None])
def test_impossible_scale_is_refused(scale: object) -> None:
    with pytest.raises(ValueError, match=r"^the scale of a.safetensors is .*; it must be"):
        Lora("a.safetensors", scale)


@pytest.mark.parametrize("path", ["", None, 3, "a\0b"])
def test_lora_without_a_path_is_refused(path: object) -> None:
    with pytest.raises(ValueError, match="names no file; give a path"):
        Lora(path)


def test_an_allowance_that_is_no_truth_value_is_refused() -> None:
    with pytest.raises(ValueError, match="allow_unmatched of a is 'no'; it must be true or false"):
        Lora("a", allow_unmatched="no")


def test_too_long_a_path_is_one_sentence() -> None:
    with pytest.raises(ValueError, match="cannot be read .File name too long.; make it readable"):
        load_loras(["a" * 300], SHAPES)


@pytest.mark.parametrize("given", ["a.safetensors", None, 3])
def test_a_list_is_asked_for(given: object) -> None:
    with pytest.raises(ValueError, match=f"loras is {given!r}; give a list of LoRAs"):
        load_loras(given, SHAPES)


def test_a_list_is_not_too_long() -> None:
    with pytest.raises(ValueError, match="65 LoRAs are given; give at most 64"):
        load_loras(["a.safetensors"] * 65, SHAPES)


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("a:-2", "a", -2.0),
        ("a:.5", "a", 0.5),
        ("a:1e-1", "a", 0.1),
        ("C:\\styles\\a.safetensors", "C:\\styles\\a.safetensors", 1.0),
        ("C:\\styles\\a.safetensors:0.25", "C:\\styles\\a.safetensors", 0.25),
        ("12:30/a.safetensors", "12:30/a.safetensors", 1.0),
        ("style:2:1", "style:2", 1.0),
        ("a:nan", "a:nan", 1.0),
        ("a:0,8", "a:0,8", 1.0),
        ("a:", "a:", 1.0),
        (":2", ":2", 1.0),
    ],
)
def test_what_is_behind_the_last_colon_is_the_scale_where_it_is_a_number(
    text: str, path: str, scale: float
) -> None:
    assert Lora.parse(text, allow_unmatched=True) == Lora(path, scale, True)


def test_a_file_whose_name_ends_as_a_scale_says_how_it_is_given(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "style:2", pairs(SMALL, LAYERS[:1]))
    with pytest.raises(ValueError, match=r"style:2 is a file, and .* is read as a scale; give .*style:2:1"):
        Lora.parse(str(path))
    assert load_loras([Lora.parse(f"{path}:0.5")], SHAPES)[0].lora == Lora(str(path), 0.5)
