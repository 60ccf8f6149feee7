"""LoRAs in the weights of a pipeline: exact, in place, undone to the bit, and never half."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor

from rfengine import Lora, Pipeline, memory
from rfengine.checkpoint.convert import convert
from rfengine.checkpoint.loader import save_weights
from rfengine.config import CacheConfig
from rfengine.costs.memory import lora_bytes
from rfengine.models.dit import pack_weights
from rfengine.models.fp8_products import products, quantise
from rfengine.models.linear import WeightFP8
from rfengine.models.weight_layout import joined_view
from rfengine.runtime.adapted_weights import AdaptedWeights
from rfengine.runtime.turns import Turns
from support.loras import ALPHA, LAYERS, RANK, pairs, write_lora
from support.models import SMALL, small_model, small_pipeline, small_runner, write_pipeline
from support.streams import assert_same

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CALLS = [1, 2, 9, 14, 17, 20, 28]  # copies after which a change is interrupted


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("loras")
    forms = ("kohya", "peft", "diffusers")
    return [
        write_lora(folder / f"{seed}.safetensors", pairs(SMALL, seed=seed), form)
        for seed, form in enumerate(forms)
    ]


def adapted(dtype: torch.dtype = torch.float32, packed: bool = False) -> AdaptedWeights:
    model = small_model().to(dtype)
    if packed:
        pack_weights(model)
    return AdaptedWeights(small_runner(model), Turns(), None)


def weights_of(each: AdaptedWeights) -> dict[str, Tensor]:
    """Copies of every weight and of what the runner computed of them."""
    runner = each._runner
    modulations = (*(step.modulation for step in runner.steps), runner.context_modulation)
    kept = {f"modulation {place}": value.layers for place, value in enumerate(modulations)}
    kept |= {f"head {place}": value.head for place, value in enumerate(modulations)}
    kept |= runner.model.state_dict()
    return {name: value.detach().clone() for name, value in kept.items()}


def places(each: AdaptedWeights) -> list[int]:
    runner = each._runner
    modulations = (*(step.modulation for step in runner.steps), runner.context_modulation)
    tensors = [*runner.model.parameters(), *(value.layers for value in modulations)]
    return [tensor.data_ptr() for tensor in (*tensors, *(value.head for value in modulations))]


def host_bytes(each: AdaptedWeights) -> int:
    """What the LoRAs take in host memory: their values, and the originals of what they change."""
    return sum(kept.nbytes for kept in (*each.loras, *each._originals.values()))


def swap(each: AdaptedWeights, *loras: Lora | Path) -> None:
    each.apply(each.load(loras))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_removing_restores_every_bit_and_nothing_moves(
    files: list[Path], dtype: torch.dtype, packed: bool
) -> None:
    each = adapted(dtype, packed)
    before, where = weights_of(each), places(each)
    swap(each, files[0])
    changed = {name for name, value in weights_of(each).items() if not torch.equal(value, before[name])}
    assert {f"{layer}.weight" for layer in LAYERS} <= changed
    assert {"modulation 0", "modulation 2", "head 0"} <= changed and len(changed) == len(LAYERS) + 6
    swap(each, Lora(files[1], -0.4), Lora(files[0], 1.7))
    assert places(each) == where
    swap(each)
    assert_same(weights_of(each), before)
    assert places(each) == where and host_bytes(each) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_is_the_sum_in_float32_rounded_once(files: list[Path], dtype: torch.dtype) -> None:
    each = adapted(dtype)
    before = weights_of(each)
    scales = (0.7, -1.3, 2.0)
    swap(each, *(Lora(path, scale) for path, scale in zip(files, scales, strict=True)))
    values = [pairs(SMALL, seed=seed) for seed in range(3)]
    for layer in LAYERS:
        exact = before[f"{layer}.weight"].double()
        size = exact.abs()
        for scale, found in zip(scales, values, strict=True):
            down, up = found[layer]
            exact = exact + scale * ALPHA / RANK * up.double() @ down.double()
            size = size + abs(scale) * ALPHA / RANK * up.double().abs() @ down.double().abs()
        # one rounding of the result, and one of each of 3 * (RANK + 1) sums in float32
        bound = torch.finfo(dtype).eps / 2 * exact.abs() + 3 * (RANK + 1) * 2.0**-24 * size
        found = each._runner.model.get_parameter(f"{layer}.weight").detach()
        assert found.dtype == dtype and ((found.double() - exact).abs() <= bound).all(), layer


def test_what_was_merged_before_and_the_order_change_no_bit(files: list[Path]) -> None:
    wanted = [Lora(path, scale) for path, scale in zip(files, (0.7, -1.3, 2.0), strict=True)]
    results = []
    for order in itertools.permutations(wanted):
        each = adapted(torch.bfloat16)
        for count in range(len(order)):  # one more at each swap, at a scale that does not stay
            swap(each, *(Lora(lora.path, lora.scale + count) for lora in order[:count]))
        swap(each, *order)
        results.append(weights_of(each))
        assert tuple(lora.lora for lora in each.loras) == order
    for other in results[1:]:
        assert_same(results[0], other)


def test_packed_weights_stay_one_product(files: list[Path]) -> None:
    each = adapted(packed=True)
    swap(each, files[0])
    for block in each._runner.model.blocks:
        for attention, letters in ((block.self_attn, "qkv"), (block.cross_attn, "kv")):
            parts = [getattr(attention, letter).weight for letter in letters]
            joined = joined_view(parts)
            assert joined is not None and torch.equal(joined, torch.cat(parts))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("model"), small_pipeline())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merging_at_load_equals_swapping_and_merging_into_a_file(
    directory: Path, files: list[Path], tmp_path: Path, dtype: str
) -> None:
    loras = [Lora(files[0], 0.6), Lora(files[1], -0.8)]
    loaded = Pipeline.from_pretrained(directory, "cpu", dtype, loras=loras)
    assert loaded.loras == tuple(loras)
    swapped = Pipeline.from_pretrained(directory, "cpu", dtype)
    plain = weights_of(swapped._engine.adapted)
    swapped.set_loras(loras)
    assert_same(weights_of(loaded._engine.adapted), weights_of(swapped._engine.adapted))
    # a file in the pipeline's dtype has the same originals
    convert(directory, tmp_path / "plain", dtype=dtype)
    convert(tmp_path / "plain", tmp_path / "merged", dtype=dtype, loras=loras[::-1])
    merged = Pipeline.from_pretrained(tmp_path / "merged", "cpu", dtype)
    assert_same(weights_of(merged._engine.adapted), weights_of(swapped._engine.adapted))
    loaded.set_loras([])
    assert_same(weights_of(loaded._engine.adapted), plain)


def test_another_scale_reads_no_file(files: list[Path], tmp_path: Path) -> None:
    path = write_lora(tmp_path / "a.safetensors", pairs(SMALL))
    each, other = adapted(), adapted()
    swap(each, path)
    path.unlink()
    swap(each, Lora(path, 0.25))
    swap(other, Lora(files[0], 0.25))
    assert_same(weights_of(each), weights_of(other))
    swap(each, Lora(path, 0.0))
    assert_same(weights_of(each), weights_of(adapted()))
    swap(each, Lora(path, 0.25))
    assert_same(weights_of(each), weights_of(other))
    swap(each)
    with pytest.raises(ValueError, match="does not exist"):
        swap(each, path)


def test_two_models_keep_apart(files: list[Path]) -> None:
    one, other = adapted(), adapted()
    before = weights_of(other)
    swap(one, files[0])
    assert_same(weights_of(other), before)
    swap(other, files[1])
    swap(one)
    assert_same(weights_of(one), before)
    alone = adapted()
    swap(alone, files[1])
    assert_same(weights_of(other), weights_of(alone))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_what_costs_say(files: list[Path], dtype: torch.dtype) -> None:
    each = adapted(dtype)
    swap(each, files[0], Lora(files[1], 0.0))
    parts = lora_bytes(each.loras, SMALL, dtype)
    weights = each._runner.model.state_dict()
    assert parts["lora_originals"] == sum(weights[f"{layer}.weight"].nbytes for layer in LAYERS)
    values = sum(up.nbytes + down.nbytes for down, up in pairs(SMALL).values())
    assert parts["lora_values"] == 2 * values
    assert host_bytes(each) == sum(parts.values())


@pytest.fixture
def faults(tmp_path: Path) -> dict[str, Path]:
    """What is wrong with a LoRA, and its path."""
    large = pairs(SMALL, LAYERS)
    down, up = large["time_projection.1"]  # the last to be written
    large["time_projection.1"] = (1e4 * down, 1e4 * up)
    foreign = {layer: (down[:, :-1], up) for layer, (down, up) in pairs(SMALL, LAYERS[:3]).items()}
    strange = {f"other.{layer}": values for layer, values in pairs(SMALL, LAYERS[:1]).items()}
    (tmp_path / "empty.safetensors").write_bytes(b"")
    torch.save({"a": torch.ones(1)}, tmp_path / "pickle.pt")
    paths = {
        name: write_lora(tmp_path / f"{name}.safetensors", values)
        for name, values in {"large": large, "foreign": foreign, "strange": strange}.items()
    }
    return {
        "time_projection.1.weight has values that are not finite in torch.float16 with": paths["large"],
        r"is \(48, 48\) in the model and \(48, 47\) in the LoRA, and 2 more; give": paths["foreign"],
        "nothing in .*strange.safetensors matches the transformer": paths["strange"],
        "empty.safetensors is empty": tmp_path / "empty.safetensors",
        "pickle.pt is a torch pickle": tmp_path / "pickle.pt",
        "absent.safetensors does not exist": tmp_path / "absent.safetensors",
    }


def test_after_an_error_all_is_as_it_was(files: list[Path], faults: dict[str, Path]) -> None:
    each = adapted(torch.float16)
    for loras in ((), (Lora(files[1], 0.5),)):
        swap(each, *loras)
        before, kept = weights_of(each), host_bytes(each)
        for message, path in faults.items():
            with pytest.raises(ValueError, match=message):
                swap(each, files[0], path)
            assert_same(weights_of(each), before)
            assert host_bytes(each) == kept and tuple(lora.lora for lora in each.loras) == loras
    swap(each, files[0])
    fresh = adapted(torch.float16)
    swap(fresh, files[0])
    assert_same(weights_of(each), weights_of(fresh))


@pytest.mark.parametrize(
    ("scale", "failing_call"),
    # less is copied where the originals are there
    [(scale, call) for scale in (0.0, 0.5) for call in CALLS if not scale or call <= len(LAYERS) + 6],
)
def test_an_interrupt_at_any_tensor_leaves_all_as_it_was(
    files: list[Path], monkeypatch: pytest.MonkeyPatch, scale: float, failing_call: int
) -> None:
    """Of what is copied: the original of each tensor where there is none yet, the tensor, the modulations."""
    each = adapted()
    swap(each, Lora(files[1], scale))
    before, kept = weights_of(each), host_bytes(each)
    calls, copy = itertools.count(1), Tensor.copy_

    def interrupted(self: Tensor, *rest: object) -> Tensor:
        result = copy(self, *rest)
        if next(calls) == failing_call:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Tensor, "copy_", interrupted)
        swap(each, files[0], files[2])
    assert_same(weights_of(each), before)
    assert host_bytes(each) == kept


def weights_in_fp8(each: AdaptedWeights) -> dict[str, Tensor]:
    """Those that multiply, by product and part; e4m3 as float32."""
    found = products(each._runner.model).items()
    kept = {name: product.owner.fp8._asdict() for name, product in found}
    return {
        f"{name} {part}": tensor.float() for name, parts in kept.items() for part, tensor in parts.items()
    }


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_in_fp8_are_those_of_the_loras_and_the_way_back(
    files: list[Path], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, packed: bool
) -> None:
    each, copy = adapted(dtype, packed), Tensor.copy_
    quantise(each._runner.model)
    before = weights_in_fp8(each)
    swap(each, files[0])
    for name, product in products(each._runner.model).items():
        for part, tensor in WeightFP8.of(product.layers)._asdict().items():
            assert torch.equal(weights_in_fp8(each)[f"{name} {part}"], tensor.float()), (name, part)
    merged, fp8_copies = weights_in_fp8(each), itertools.count(1)
    changed = "blocks.1.ffn.0 values"
    assert not torch.equal(merged[changed], before[changed])

    def interrupted(self: Tensor, *rest: object) -> Tensor:
        result = copy(self, *rest)
        if self.dtype == torch.float8_e4m3fn and next(fp8_copies) == 3:  # of the twelve that change
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Tensor, "copy_", interrupted)
        swap(each, files[1])
    assert_same(weights_in_fp8(each), merged)
    swap(each)
    assert_same(weights_in_fp8(each), before)


def test_the_way_back_from_an_error_needs_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second LoRA is not finite in its last tensor, and leaves the only one of the first alone."""
    first = write_lora(tmp_path / "first.safetensors", pairs(SMALL, ["blocks.0.self_attn.q"]))
    values = pairs(SMALL, ["blocks.1.ffn.0", "time_projection.1"])
    values["time_projection.1"] = tuple(1e4 * each for each in values["time_projection.1"])
    second = write_lora(tmp_path / "second.safetensors", values)
    each = adapted(torch.float16)
    swap(each, first)
    before, kept = weights_of(each), host_bytes(each)
    answers = iter([2**40])  # and nothing is free after the first look
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="values that are not finite"):
        patch.setattr(memory, "free_memory", lambda device: next(answers, 0))
        swap(each, second)
    assert_same(weights_of(each), before)
    assert host_bytes(each) == kept and [lora.lora.path for lora in each.loras] == [first]


def test_host_memory_that_cannot_hold_the_originals_is_one_sentence(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    each = adapted()
    before = weights_of(each)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="keeping the original weights of"):
        patch.setattr(memory, "free_memory", lambda device: 1000)
        swap(each, files[0])
    assert_same(weights_of(each), before)


def test_loras_of_a_whole_checkpoint_are_refused_before_its_weights_are_read(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rfengine.checkpoint.checkpoint import Checkpoint

    monkeypatch.setattr(Checkpoint, "load", lambda *_: 1 / 0)
    save_weights(tmp_path / "a.safetensors", {"unet.conv.lora_down.weight": torch.ones(2, 2)})
    with pytest.raises(ValueError, match=r"nothing in .*a.safetensors matches the transformer \(unet.conv"):
        Pipeline.from_pretrained(directory, "cpu", loras=[tmp_path / "a.safetensors"])


def test_keys_that_match_nothing_are_left_out_where_that_is_allowed(
    files: list[Path], tmp_path: Path
) -> None:
    values = pairs(SMALL) | {"blocks.9.ffn.0": pairs(SMALL)["blocks.1.ffn.0"]}
    path = write_lora(tmp_path / "a.safetensors", values)
    each, plain = adapted(), adapted()
    with pytest.raises(ValueError, match=r"lora_unet_blocks_9_ffn_0.alpha, .*; the transformer has 2 layers"):
        swap(each, path)
    swap(each, Lora(path, allow_unmatched=True))
    swap(plain, files[0])
    assert_same(weights_of(each), weights_of(plain))
    assert each.settings()[0].split()[:2] == plain.settings()[0].split()[:2]


def test_loras_are_not_set_from_inside_a_chunk(files: list[Path]) -> None:
    pipe = small_pipeline(CacheConfig())
    stream = pipe.stream("a circle")
    with pytest.raises(RuntimeError, match="a chunk is being made; set the LoRAs once its on_step"):
        stream.advance(on_step=lambda *_: pipe.set_loras(files[:1]))
    assert pipe.loras == ()
    pipe.set_loras(files[:1])
    assert pipe.loras == (Lora(files[0]),)


def test_tiny_takes_a_lora_and_gives_it_back(tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained("tiny", "cpu")
    before = weights_of(pipe._engine.adapted)
    path = write_lora(tmp_path / "a.safetensors", pairs(pipe.config.model, LAYERS[:6]))
    frames = [next(pipe.stream("a red circle", seed=3)).frames]
    for loras in ([Lora(path, 0.5)], []):
        pipe.set_loras(loras)
        frames.append(next(pipe.stream("a red circle", seed=3)).frames)
    assert not numpy.array_equal(frames[0], frames[1]) and numpy.array_equal(frames[0], frames[2])
    assert_same(weights_of(pipe._engine.adapted), before)
    loaded = Pipeline.from_pretrained("tiny", "cpu", loras=[Lora(path, 0.5)])
    assert numpy.array_equal(next(loaded.stream("a red circle", seed=3)).frames, frames[1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu_removing_restores_every_bit(files: list[Path], dtype: torch.dtype) -> None:
    model = small_model().to("cuda", dtype)
    pack_weights(model)
    each = AdaptedWeights(small_runner(model), Turns(), torch.cuda.Stream())
    before, where = weights_of(each), places(each)
    swap(each, files[0], Lora(files[1], 0.5))
    assert places(each) == where
    assert host_bytes(each) == sum(lora_bytes(each.loras, SMALL, dtype).values())
    swap(each)
    assert_same(weights_of(each), before)
    assert places(each) == where
