from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rfengine.checkpoint.lora_change import merged
from rfengine.checkpoint.lora_file import LoraFile, lora_changes, open_lora
from rfengine.checkpoint.lora_names import parse_lora
from rfengine.checkpoint.lora_scale import ScaleStatement
from rfengine.checkpoint.shapes import expected_shapes
from rfengine.checkpoint.tensor_file import StoredTensor, write_safetensors
from rfengine.config import WanConfig
from rfengine.presets import PRESETS

ADAPTED = [
    *(f"{kind}_attn.{letter}" for kind in ("self", "cross") for letter in "qkvo"),
    "ffn.0",
    "ffn.2",
]


def lora_shapes(config: WanConfig, rank: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a LongLive LoRA."""
    weights = expected_shapes(config)
    shapes = {}
    for layer in (f"blocks.{i}.{name}" for i in range(config.num_layers) for name in ADAPTED):
        outputs, inputs = weights[f"{layer}.weight"]
        shapes[f"base_model.model.{layer}.lora_A.weight"] = (rank, inputs)
        shapes[f"base_model.model.{layer}.lora_B.weight"] = (outputs, rank)
    return shapes


def stored(tensors: dict[str, Tensor]) -> dict[str, StoredTensor]:
    return {name: StoredTensor.of(tensor) for name, tensor in tensors.items()}


def add(
    transformer: dict[str, StoredTensor],
    tensors: dict[str, StoredTensor],
    statements: Sequence[ScaleStatement] = (),
    allow_unmatched: bool = False,
) -> None:
    """Replace the tensors that the LoRA changes."""
    shapes = {name: stored.shape for name, stored in transformer.items()}
    lora = LoraFile("lora.pt", tensors, tuple(statements))
    for name, change in lora_changes(lora, shapes, allow_unmatched).items():
        transformer[name] = StoredTensor.of(merged(transformer[name].read(), [(1.0, change)]))


def test_published_lora_has_300_pairs_of_the_published_size() -> None:
    shapes = lora_shapes(PRESETS["wan-1.3b"].model, rank=256)
    assert (len(shapes), sum(map(math.prod, shapes.values()))) == (600, 349_962_240)
    known = expected_shapes(PRESETS["wan-1.3b"].model).keys()
    layers, unmatched = parse_lora(shapes, known)
    assert len(layers) == 300 and layers.keys() <= known and not unmatched.names


@pytest.mark.parametrize("alpha", [None, 12.0])
def test_300_pairs_are_merged_in_float32(alpha: float | None) -> None:
    rank, config = 8, WanConfig(dim=32, ffn_dim=48, num_heads=2, num_layers=30)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(shape, generator=generator).to(torch.bfloat16)
        for name, shape in expected_shapes(config).items()
    }
    pairs = {
        name: torch.randn(shape, generator=generator).to(torch.bfloat16)
        for name, shape in lora_shapes(config, rank).items()
    }
    if alpha is not None:
        pairs |= {
            name.replace("lora_A.weight", "alpha"): torch.tensor(alpha)
            for name in list(pairs)
            if "_A" in name
        }
    merged = stored(weights)
    add(merged, stored(pairs))
    scale, changed = 1.0 if alpha is None else alpha / rank, 0
    for name, weight in weights.items():
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{layer}.lora_A.weight" not in pairs:
            assert torch.equal(merged[name].read(), weight)
            continue
        changed += 1
        up, down = pairs[f"{layer}.lora_B.weight"].double(), pairs[f"{layer}.lora_A.weight"].double()
        exact = weight.double() + scale * up @ down
        # each of the rank + 2 float32 roundings is at most 2**-24 of the sum of magnitudes
        bound = (rank + 2) * 2.0**-24 * (weight.double().abs() + scale * up.abs() @ down.abs())
        assert merged[name].dtype == torch.float32 and merged[name].shape == weight.shape
        assert ((merged[name].read().double() - exact).abs() <= bound).all()
    assert changed == 300


def test_lora_of_another_model_is_refused() -> None:
    transformer = stored({"blocks.0.ffn.0.weight": torch.zeros(6, 4)})

    def pair(layer: str, outputs: int, inputs: int) -> dict[str, StoredTensor]:
        sides = {
            f"{layer}.lora_A.weight": torch.zeros(2, inputs),
            f"{layer}.lora_B.weight": torch.zeros(outputs, 2),
        }
        return stored(sides)

    with pytest.raises(ValueError, match=r"nothing in lora.pt matches .* \(blocks.9.ffn.0.lora_A.weight, bl"):
        add(transformer, pair("blocks.9.ffn.0", 6, 4))
    message = r"^lora.pt does not fit: blocks.0.ffn.0.weight is \(6, 4\) in the model and \(6, 5\) in"
    with pytest.raises(ValueError, match=message):
        add(transformer, pair("blocks.0.ffn.0", 6, 5) | pair("blocks.9.ffn.0", 6, 5), allow_unmatched=True)
    with pytest.raises(ValueError, match=r"\(6, 4\) in the model and \(6, 2\) x \(3, 4\) in the LoRA; give"):
        mixed = pair("blocks.0.ffn.0", 6, 4) | stored({"blocks.0.ffn.0.lora_A.weight": torch.zeros(3, 4)})
        add(transformer, mixed)
    assert torch.equal(transformer["blocks.0.ffn.0.weight"].read(), torch.zeros(6, 4))


CONFIG = WanConfig(dim=16, ffn_dim=24, num_heads=2, num_layers=2, text_dim=8, freq_dim=8)
LAYER = "blocks.0.self_attn.q"


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def transformer() -> dict[str, StoredTensor]:
    shapes = expected_shapes(CONFIG)
    return stored({name: drawn(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())})


def pair(layer: str = LAYER, rank: int = 2, outputs: int = 16, inputs: int = 16) -> dict[str, Tensor]:
    return {
        f"{layer}.lora_A.weight": drawn(rank, inputs, seed=1),
        f"{layer}.lora_B.weight": drawn(outputs, rank, seed=2),
    }


def change(
    transformer: dict[str, StoredTensor], lora: dict[str, Tensor], name: str, *statements: ScaleStatement
) -> Tensor:
    """What the LoRA adds to the tensor `name`."""
    before = transformer[name].read()
    add(transformer, stored(lora), statements)
    return transformer[name].read() - before


def product(lora: dict[str, Tensor]) -> Tensor:
    down, up = lora.values()
    return up @ down


def test_stated_alpha_over_rank_is_the_scale(transformer: dict[str, StoredTensor]) -> None:
    added = change(transformer, pair(), f"{LAYER}.weight", ScaleStatement("a.json", rank=2, alpha=8.0))
    torch.testing.assert_close(added, 4 * product(pair()))


def test_rslora_divides_by_the_root_of_the_rank(transformer: dict[str, StoredTensor]) -> None:
    statement = ScaleStatement("a.json", alpha=8.0, is_rslora=True)
    added = change(transformer, pair(rank=4), f"{LAYER}.weight", statement)
    torch.testing.assert_close(added, 4 * product(pair(rank=4)))


def test_scale_that_nothing_states_is_one_and_is_reported(
    transformer: dict[str, StoredTensor], caplog: pytest.LogCaptureFixture
) -> None:
    lora = {**pair(), **pair("blocks.1.self_attn.q"), f"{LAYER}.alpha": torch.tensor(8)}
    add(transformer, stored(lora))
    assert "lora.pt: no alpha is stated for 1 of 2 pairs, which are merged at scale 1" in caplog.text


def test_alphas_of_two_places_have_to_agree(transformer: dict[str, StoredTensor]) -> None:
    lora = {**pair(), f"{LAYER}.alpha": torch.tensor(0.3, dtype=torch.bfloat16)}
    add(dict(transformer), stored(lora), [ScaleStatement("a.json", alpha=0.3)])
    with pytest.raises(
        ValueError, match=r"scale of blocks.0.self_attn.q.weight in lora.pt is contradictory: "
    ):
        add(transformer, stored(lora), [ScaleStatement("a.json", alpha=2.0)])


def test_rank_of_other_tensors_is_refused(transformer: dict[str, StoredTensor]) -> None:
    with pytest.raises(ValueError, match=r"a.json states rank 16 for blocks.0.self_attn.q and its tensors"):
        add(transformer, stored(pair()), [ScaleStatement("a.json", rank=16, alpha=16.0)])


@pytest.mark.parametrize(
    "alpha",
    [
        torch.tensor(0.0),
        torch.tensor(-4.0),
        torch.tensor(math.nan),
        torch.tensor(math.inf),
        torch.tensor(True),
        torch.tensor(4j),
        torch.ones(2),
        torch.ones(0),
    ],
)
def test_alpha_tensor_that_is_no_alpha_is_refused(
    transformer: dict[str, StoredTensor], alpha: Tensor
) -> None:
    with pytest.raises(ValueError, match=r"blocks.0.self_attn.q.alpha in lora.pt is "):
        add(transformer, stored({**pair(), f"{LAYER}.alpha": alpha}))


def test_pair_of_a_convolution_is_merged(transformer: dict[str, StoredTensor]) -> None:
    name = "patch_embedding.weight"
    shape = transformer[name].shape
    up, down = drawn(16, 3, 1, 1, 1), drawn(3, *shape[1:])
    lora = {"patch_embedding.lora_up.weight": up, "patch_embedding.lora_down.weight": down}
    exact = torch.einsum("or,ritxy->oitxy", up[..., 0, 0, 0].double(), down.double())
    flat = {name: value.flatten(1) for name, value in lora.items()}
    for each in (lora, flat):
        torch.testing.assert_close(change(dict(transformer), each, name), exact.float(), rtol=1e-4, atol=1e-5)


def test_merge_is_in_float32_under_autocast(transformer: dict[str, StoredTensor]) -> None:
    expected = change(dict(transformer), pair(), f"{LAYER}.weight")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(change(transformer, pair(), f"{LAYER}.weight"), expected)


def test_differences_are_added_to_weight_bias_and_modulation(transformer: dict[str, StoredTensor]) -> None:
    added = {
        "norm3.diff": "blocks.0.norm3.weight",
        "norm3.diff_b": "blocks.0.norm3.bias",
        "self_attn.q.diff_b": "blocks.0.self_attn.q.bias",
        "self_attn.norm_k.w_norm": "blocks.0.self_attn.norm_k.weight",
        "diff_m": "blocks.0.modulation",
    }
    lora = {
        f"diffusion_model.blocks.0.{name}": drawn(*transformer[target].shape)
        for name, target in added.items()
    }
    lora["diffusion_model.head.diff_m"] = drawn(*transformer["head.modulation"].shape)
    before = {name: each.read() for name, each in transformer.items()}
    add(transformer, stored(lora))
    for value, target in zip(lora.values(), [*added.values(), "head.modulation"], strict=True):
        assert torch.equal(transformer[target].read(), before[target] + value)
    changed = {name for name, each in transformer.items() if not torch.equal(each.read(), before[name])}
    assert changed == {*added.values(), "head.modulation"}


def test_pair_and_difference_of_one_weight_are_both_added(transformer: dict[str, StoredTensor]) -> None:
    lora = {**pair(), f"{LAYER}.diff": drawn(16, 16, seed=9), f"{LAYER}.alpha": torch.tensor(8.0)}
    added = change(transformer, lora, f"{LAYER}.weight")
    torch.testing.assert_close(added, 4 * product(pair()) + drawn(16, 16, seed=9))


def test_bias_of_lora_b_is_scaled_as_its_matrices(transformer: dict[str, StoredTensor]) -> None:
    lora = {**pair(), f"{LAYER}.lora_B.bias": drawn(16)}
    with pytest.raises(ValueError, match=r"lora_B.bias, which PEFT scales .* and no alpha is stated"):
        add(dict(transformer), stored(lora))
    statement = ScaleStatement("a.json", alpha=8.0, has_lora_bias=True)
    torch.testing.assert_close(change(transformer, lora, f"{LAYER}.bias", statement), 4 * drawn(16))


def test_stated_lora_bias_has_to_be_there(transformer: dict[str, StoredTensor]) -> None:
    statement = ScaleStatement("a.json", alpha=8.0, has_lora_bias=True)
    with pytest.raises(ValueError, match=r"a.json has lora_bias true and lora.pt is otherwise"):
        add(transformer, stored(pair()), [statement])


def test_modules_to_save_take_the_place_of_the_base(transformer: dict[str, StoredTensor]) -> None:
    shape = transformer["head.head.weight"].shape
    lora = {**pair(), "base_model.model.head.head.weight": drawn(*shape, seed=5)}
    with pytest.raises(
        ValueError, match=r"lora.pt holds base_model.model.head.head.weight whole, and no mod"
    ):
        add(dict(transformer), stored(lora), [ScaleStatement("a.json", alpha=2.0)])
    statement = ScaleStatement("a.json", alpha=2.0, saved_modules=("head.head",))
    with pytest.raises(ValueError, match=r"lora.pt lacks the modules_to_save head.head"):
        add(dict(transformer), stored(pair()), [statement])
    add(transformer, stored(lora), [statement])
    assert torch.equal(transformer["head.head.weight"].read(), drawn(*shape, seed=5))


def test_trained_biases_take_the_place_of_the_base(transformer: dict[str, StoredTensor]) -> None:
    lora = {**pair(), f"{LAYER}.bias": drawn(16, seed=5)}
    statement = ScaleStatement("a.json", alpha=2.0, has_biases=True)
    with pytest.raises(ValueError, match=r"lora.pt lacks the biases"):
        add(dict(transformer), stored(pair()), [statement])
    add(transformer, stored(lora), [statement])
    assert torch.equal(transformer[f"{LAYER}.bias"].read(), drawn(16, seed=5))


def test_rank_of_zero_is_refused(transformer: dict[str, StoredTensor]) -> None:
    with pytest.raises(ValueError, match=r"rank 0 or without values for blocks.0.self_attn.q.weight by"):
        add(transformer, stored(pair(rank=0)))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
def test_matrices_of_integers_are_refused(transformer: dict[str, StoredTensor], dtype: torch.dtype) -> None:
    lora = {name: value.to(dtype) for name, value in pair().items()}
    with pytest.raises(ValueError, match=r"lora.pt holds blocks.0.self_attn.q.lora_A.weight torch"):
        add(transformer, stored(lora))


def test_matrices_of_float8_are_merged(transformer: dict[str, StoredTensor]) -> None:
    lora = {name: value.to(torch.float8_e4m3fn) for name, value in pair().items()}
    exact = product({name: value.float() for name, value in lora.items()})
    torch.testing.assert_close(change(transformer, lora, f"{LAYER}.weight"), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_value_that_is_not_finite_is_named(transformer: dict[str, StoredTensor], value: float) -> None:
    lora = pair()
    lora[f"{LAYER}.lora_B.weight"][3, 1] = value
    with pytest.raises(ValueError, match=r"q.lora_B.weight in lora.pt has values that are not finite"):
        add(transformer, stored(lora))


def test_difference_of_another_shape_is_refused(transformer: dict[str, StoredTensor]) -> None:
    with pytest.raises(ValueError, match=r"blocks.0.modulation is \(1, 6, 16\) in the model and \(6, 16\)"):
        add(transformer, stored({"blocks.0.diff_m": drawn(6, 16)}))


def test_pattern_of_no_layer_is_reported(
    transformer: dict[str, StoredTensor], caplog: pytest.LogCaptureFixture
) -> None:
    statement = ScaleStatement("a.json", alpha=2.0, alpha_pattern=((re.compile("ffn.9$"), 4.0),))
    with caplog.at_level(logging.WARNING):
        add(transformer, stored(pair()), [statement])
    assert "a.json: no adapted layer has the name ffn.9" in caplog.text


def test_keys_that_match_nothing_are_listed_and_left_out_where_that_is_allowed(
    transformer: dict[str, StoredTensor], caplog: pytest.LogCaptureFixture
) -> None:
    before = {name: each.read() for name, each in transformer.items()}
    strange = {f"lora_te_layer_{number:02}.lora_up.weight": drawn(2, 2) for number in range(30)}
    lora = {**pair(), **strange, f"{LAYER}.alpha": torch.tensor(8.0)}
    with pytest.raises(ValueError, match="layer_00.lora_up.weight, .*_23.lora_up.weight and 6 more") as error:
        add(transformer, stored(lora))
    assert "or leave them out with allow_unmatched (--allow-unmatched-lora)" in str(error.value)
    assert all(torch.equal(each.read(), before[name]) for name, each in transformer.items())
    add(transformer, stored(lora), allow_unmatched=True)
    assert "lora.pt: keys that match nothing in the transformer are left out: lora_te_layer_00" in caplog.text
    torch.testing.assert_close(
        transformer[f"{LAYER}.weight"].read() - before[f"{LAYER}.weight"], 4 * product(pair())
    )
    with pytest.raises(ValueError, match="nothing in lora.pt matches the transformer"):
        add(transformer, stored(strange), allow_unmatched=True)


NAMES = [f"base_model.model.blocks.0.ffn.0.lora_{side}.weight" for side in "AB"]
TENSORS = {name: torch.ones(2, 2) for name in NAMES}
ADAPTER_CONFIG = json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 8})


def write(path: Path, metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, {name: StoredTensor.of(tensor) for name, tensor in TENSORS.items()}, metadata)
    return path


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "pytorch_lora_weights.safetensors"])
def test_directory_and_file_are_the_same_adapter(tmp_path: Path, name: str) -> None:
    write(tmp_path / name)
    (tmp_path / "adapter_config.json").write_text(ADAPTER_CONFIG)
    for path in (tmp_path, tmp_path / name):
        opened = open_lora(path)
        assert opened.label == str(tmp_path / name) and opened.tensors.keys() == TENSORS.keys()
        assert [each.scale(("blocks.0.ffn.0",), 2) for each in opened.statements] == [4.0]


def test_pickle_in_a_directory_is_read_with_its_config(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_config.json").write_text(ADAPTER_CONFIG)
    opened = open_lora(tmp_path)
    assert opened.tensors.keys() == TENSORS.keys() and opened.statements[0].alpha == 8.0


def test_config_and_header_are_both_stated(tmp_path: Path) -> None:
    write(tmp_path / "adapter_model.safetensors", {"lora_alpha": "16"})
    (tmp_path / "adapter_config.json").write_text(ADAPTER_CONFIG)
    assert [each.alpha for each in open_lora(tmp_path).statements] == [8.0, 16.0]


def test_links_of_a_cache_go_by_the_name_as_given(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "5e9f"
    write(blobs / "aaaa")
    (blobs / "bbbb").write_text(ADAPTER_CONFIG)
    snapshot.mkdir(parents=True)
    (snapshot / "adapter_model.safetensors").symlink_to(blobs / "aaaa")
    (snapshot / "adapter_config.json").symlink_to(blobs / "bbbb")
    for path in (snapshot, snapshot / "adapter_model.safetensors"):
        assert open_lora(path).statements[0].alpha == 8.0
    (blobs / "bbbb").unlink()
    with pytest.raises(ValueError, match=r"adapter_config.json is a link to a file that is not there"):
        open_lora(snapshot)


def test_content_and_not_the_suffix_says_the_format(tmp_path: Path) -> None:
    torch.save({"generator_lora": TENSORS}, tmp_path / "lora.safetensors")
    assert open_lora(tmp_path / "lora.safetensors").tensors.keys() == TENSORS.keys()
    write(tmp_path / "lora.pt", {"lora_alpha": "16"})
    assert open_lora(tmp_path / "lora.pt").statements[0].alpha == 16.0


def test_directory_without_or_with_two_adapters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no adapter_model.safetensors .* \(it holds nothing\)"):
        open_lora(tmp_path)
    write(tmp_path / "style.safetensors")
    with pytest.raises(ValueError, match=r"\(it holds style.safetensors\); give the file of the LoRA itself"):
        open_lora(tmp_path)
    write(tmp_path / "adapter_model.safetensors")
    write(tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(
        ValueError, match=r"adapter_model.safetensors and pytorch_lora_weights.safetensors; gi"
    ):
        open_lora(tmp_path)


def test_pickle_is_refused_where_convert_alone_reads_it(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "lora.pt")
    with pytest.raises(ValueError, match=r"lora.pt is a torch pickle, .* `rfengine convert SRC DST --lora "):
        open_lora(tmp_path / "lora.pt", pickles=False)


def test_absent_file_is_named(tmp_path: Path) -> None:
    for pickles in (True, False):
        with pytest.raises(ValueError, match=r"no.safetensors does not exist"):
            open_lora(tmp_path / "no.safetensors", pickles)
