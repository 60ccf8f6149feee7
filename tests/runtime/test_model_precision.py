"""The precision of the transformer: what is refused before weights are read, and what a table leaves out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy
import pytest
import torch

from rfengine.checkpoint.checkpoint import Checkpoint
from rfengine.checkpoint.fp8_table import TABLE_FILE, FP8Table
from rfengine.config import RuntimeConfig, ScheduleConfig
from rfengine.diffusion_forcing.pipeline import DiffusionForcingPipeline
from rfengine.models.fp8_products import product_names, quantise
from rfengine.pipeline import Pipeline
from rfengine.presets import PRESETS
from rfengine.runtime.loaded_models import Placement
from support.diffusion_forcing import forcing_pipeline
from support.models import frames_of, small_config, small_pipeline, with_runtime, write_pipeline

FP8 = RuntimeConfig(precision="fp8")
ATTENTION = RuntimeConfig(precision="fp8-attention")


@pytest.fixture
def ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA A100")


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr(Checkpoint, "load", load)


@pytest.mark.parametrize("runtime", [FP8, ATTENTION])
def test_a_gpu_without_fp8_is_refused_before_anything_is_read(
    runtime: RuntimeConfig, ampere: None, unread: None
) -> None:
    message = f"precision is '{runtime.precision}' and NVIDIA A100 has no FP8 products, .*; use 'default'"
    with pytest.raises(RuntimeError, match=message):
        Pipeline.from_pretrained("tiny", device="cuda", runtime=runtime)


def test_bf16_is_the_dtype_of_the_model_and_no_other() -> None:
    runtime = RuntimeConfig(precision="bf16")
    assert Placement.of(runtime, "cpu", None, None).dtype == torch.bfloat16
    assert Placement.of(runtime, "cpu", "bfloat16", None).dtype == torch.bfloat16
    assert Placement.of(RuntimeConfig(), "cpu", None, None).dtype == torch.float32
    with pytest.raises(ValueError, match="precision is 'bf16' and dtype is float32; give one of them"):
        Placement.of(runtime, "cpu", "float32", None)


def test_passes_count_from_the_first_step_to_the_context_pass() -> None:
    def passes(*kept: int) -> tuple[int, ...]:
        runtime = dataclasses.replace(ATTENTION, sixteen_bit_passes=kept)
        return dataclasses.replace(PRESETS["wan-1.3b"], runtime=runtime).fp8_passes

    assert passes(0, -1) == (1, 2, 3) and passes() == (0, 1, 2, 3, 4) and passes(-5, 2, 4) == (1, 3)
    assert dataclasses.replace(PRESETS["wan-1.3b"], runtime=FP8).fp8_passes == ()
    with pytest.raises(ValueError, match="sixteen_bit_passes has 5 and a chunk has 5 passes; give numbers"):
        passes(0, 5)


@pytest.mark.parametrize("kept", [(0, -1), (1, 0)])
def test_fp8_attention_is_refused_where_no_pass_is_left_to_it(kept: tuple[int, ...]) -> None:
    """One step and the context pass are both kept by default."""
    runtime = dataclasses.replace(ATTENTION, sixteen_bit_passes=kept)
    with pytest.raises(ValueError, match=r"sixteen_bit_passes is \(.*\), all 2 passes of a chunk; leave out"):
        Pipeline.from_pretrained("tiny", system="one-forcing", runtime=runtime)
    config = small_config(schedule=ScheduleConfig(denoising_steps=(1000,)))
    one_kept = dataclasses.replace(ATTENTION, sixteen_bit_passes=(-1,))
    assert dataclasses.replace(config, runtime=one_kept).fp8_passes == (0,)


def test_fp8_attention_is_refused_where_no_window_is_full() -> None:
    with pytest.raises(ValueError, match="precision is 'fp8-attention' and rolling is 'joint'; chunks"):
        Pipeline.from_pretrained("tiny", system="rolling-forcing", runtime=ATTENTION)
    with pytest.raises(ValueError, match="precision is 'fp8-attention', which is for the window of a stream"):
        DiffusionForcingPipeline.from_pretrained(
            Checkpoint.random(PRESETS["skyreels-df-1.3b"]), "cpu", runtime=ATTENTION
        )


def test_a_rolling_system_runs_in_fp8() -> None:
    pipeline = Pipeline.from_pretrained("tiny", system="rolling-forcing", runtime=FP8)
    found = frames_of(pipeline.stream("a red ball", seed=1), 3)
    assert numpy.array_equal(found, frames_of(pipeline.stream("a red ball", seed=1), 3))


def test_a_model_in_fp8_is_not_taken_for_another() -> None:
    pipeline = with_runtime(small_pipeline(), FP8)
    with pytest.raises(ValueError, match="products of the model are in FP8 and precision is 'default'; use"):
        with_runtime(pipeline, RuntimeConfig())
    assert with_runtime(pipeline, ATTENTION).config.runtime == ATTENTION


def test_a_pipeline_puts_no_model_into_another_precision() -> None:
    """It may be that of a pipeline that runs already, whose frames would be others from then on."""
    pipeline = small_pipeline()
    parts = pipeline.model, pipeline.vae, pipeline.text_encoder, "small-0"
    for runtime, message in (
        (FP8, "precision is 'fp8' and the products of the model are not in FP8; load it by from_pretrained"),
        (
            dataclasses.replace(FP8, fp8_table="a.json"),
            "precision is 'fp8' and the products of the model are",
        ),
        (RuntimeConfig(precision="bf16"), "precision is 'bf16' and the model is in float32; load it in bfl"),
    ):
        with pytest.raises(ValueError, match=message):
            Pipeline(dataclasses.replace(pipeline.config, runtime=runtime), *parts)
    assert pipeline.model.left_out_of_fp8 is None and pipeline.model.blocks[0].self_attn.fp8 is None


def test_a_diffusion_forcing_pipeline_has_the_precision_that_it_says() -> None:
    pipeline = forcing_pipeline()
    config = dataclasses.replace(pipeline.config, runtime=FP8)
    parts = pipeline.model, pipeline.vae, pipeline.text_encoder, pipeline._open_decoder
    with pytest.raises(ValueError, match="precision is 'fp8' and the products of the model are not in FP8"):
        DiffusionForcingPipeline(config, *parts)
    quantise(pipeline.model)
    assert DiffusionForcingPipeline(config, *parts).model.left_out_of_fp8 == frozenset()
    with pytest.raises(ValueError, match="the products of the model are in FP8 and precision is 'default'"):
        DiffusionForcingPipeline(pipeline.config, *parts)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "small").mkdir()
    return write_pipeline(tmp_path / "small", small_pipeline())


def table_of(checkpoint: Path, *left_out: str) -> FP8Table:
    opened = Checkpoint.open(checkpoint)
    errors = dict.fromkeys(product_names(opened.config.model), 0.2)
    return FP8Table(opened.fingerprint(), 0.1, left_out, errors, "1 video")


def test_the_checkpoints_own_table_says_what_is_left_out(checkpoint: Path) -> None:
    assert Pipeline.from_pretrained(checkpoint, "cpu", runtime=FP8).model.left_out_of_fp8 == frozenset()
    table_of(checkpoint, "blocks.0.ffn.0", "blocks.1.self_attn.qkv").write(checkpoint / TABLE_FILE)
    pipeline = Pipeline.from_pretrained(checkpoint, "cpu", runtime=FP8)
    left_out = {"blocks.0.ffn.0", "blocks.0.ffn.2", "blocks.1.self_attn.qkv"}
    assert pipeline.model.left_out_of_fp8 == left_out
    assert "without 3 products" in pipeline._engine.settings()["precision"]
    other = checkpoint.parent / "other.json"
    table_of(checkpoint).write(other)
    runtime = dataclasses.replace(FP8, fp8_table=str(other))
    assert Pipeline.from_pretrained(checkpoint, "cpu", runtime=runtime).model.left_out_of_fp8 == frozenset()
    assert Pipeline.from_pretrained(checkpoint, "cpu").model.left_out_of_fp8 is None


def test_a_table_of_other_weights_is_refused_before_anything_is_read(checkpoint: Path, unread: None) -> None:
    own = table_of(checkpoint)
    dataclasses.replace(own, fingerprint="0" * 64).write(checkpoint / TABLE_FILE)
    message = f"{TABLE_FILE} was measured on weights 000000000000 and these are {own.fingerprint[:12]}; run"
    with pytest.raises(ValueError, match=message):
        Pipeline.from_pretrained(checkpoint, "cpu", runtime=FP8)
    table_of(checkpoint, "blocks.9.ffn.0").write(checkpoint / TABLE_FILE)
    with pytest.raises(ValueError, match="blocks.9.ffn.0 is left out of FP8 and is no product of this model"):
        Pipeline.from_pretrained(checkpoint, "cpu", runtime=FP8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "it is not of format 1"),
        ({"limit": "much"}, "limit is 'much'; it must be a finite number"),
        ({"limit": -1.0}, "limit is -1.0; it must be at least 0"),
        ({"errors": {"blocks.0.ffn.0": -1.0}}, "the error of blocks.0.ffn.0 is -1.0"),
        ({"errors": [1]}, r"errors is \[1\]; it must be a table of numbers by product"),
        ({"left_out": [1]}, r"left_out is \(1,\); it must be a tuple of texts"),
        ({"more": 1}, "it has .*more, where a table has fingerprint, limit, left_out, errors, settings"),
    ],
)
def test_a_damaged_table_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    path = tmp_path / "table.json"
    FP8Table("0" * 64, 0.1, ("blocks.0.ffn.2",), {"blocks.0.ffn.2": 0.2}, "1 video").write(path)
    assert FP8Table.read(path).left_out == ("blocks.0.ffn.2",)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=f"table.json is no table of FP8 products: {message}"):
        FP8Table.read(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="table.json is no table of FP8 products"):
        FP8Table.read(path)
    with pytest.raises(ValueError, match="absent.json is no file; `rfengine calibrate` writes one"):
        FP8Table.read(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("errors", "count"), [({}, 0), ({"blocks.0.ffn.0": 0.2}, 1), ({"blocks.7.ffn.0": 0.2}, 13)]
)
def test_a_table_that_is_not_of_every_product_is_refused(
    checkpoint: Path, unread: None, errors: dict[str, float], count: int
) -> None:
    own = table_of(checkpoint)
    kept = own.errors if count > len(own.errors) else {}
    dataclasses.replace(own, errors={**kept, **errors}).write(checkpoint / TABLE_FILE)
    message = f"{TABLE_FILE} has the errors of {count} products, which are not the 12 of this model; run"
    with pytest.raises(ValueError, match=message):
        Pipeline.from_pretrained(checkpoint, "cpu", runtime=FP8)


def test_a_table_of_the_checkpoint_that_cannot_be_read_is_not_left_aside(
    checkpoint: Path, unread: None
) -> None:
    (checkpoint / TABLE_FILE).symlink_to(checkpoint / "gone.json")  # as in a cache without the file
    with pytest.raises(ValueError, match=f"{TABLE_FILE} is no file; `rfengine calibrate` writes one"):
        Pipeline.from_pretrained(checkpoint, "cpu", runtime=FP8)


def test_a_table_without_fp8_is_refused() -> None:
    with pytest.raises(ValueError, match="fp8_table is 'a.json' and precision is 'default'; it is for"):
        RuntimeConfig(fp8_table="a.json")
