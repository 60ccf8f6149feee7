"""Pipelines whose weights are in int8 or in host memory: their streams, and what they refuse."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from rfengine.accuracy import relative_error
from rfengine.config import RuntimeConfig
from rfengine.costs.memory import memory_needs
from rfengine.costs.placed_weights import text_encoder_weights, transformer_weights
from rfengine.grid import LatentGrid
from rfengine.models.block_offload import BlockOffload
from rfengine.pipeline import Pipeline
from rfengine.runtime.options import runtime_switches
from support.loras import LAYERS, pairs, write_lora
from support.models import frames_of

PROMPT = "a red circle moving right over a cloudy sky"


def loaded(**options: object) -> Pipeline:
    return Pipeline.from_pretrained("tiny", runtime=RuntimeConfig(overlap=False, **options))


@pytest.mark.parametrize("weights", ["default", "int8"])
def test_blocks_from_host_memory_give_the_same_frames_bit_for_bit(weights: str) -> None:
    plain, offload = loaded(block_weights=weights), loaded(block_weights=weights, block_buffers=2)
    assert isinstance(offload.model.offload, BlockOffload) and plain.model.offload is None
    streams = [pipeline.stream(PROMPT, seed=1) for pipeline in (plain, offload)]
    expected, found = (frames_of(stream, 5) for stream in streams)
    assert (expected == found).all()
    for stream in streams:
        stream.set_prompt("a blue square moving left over grass", "recache")
    assert (frames_of(streams[0], 2) == frames_of(streams[1], 2)).all()


def test_a_text_encoder_by_layers_gives_the_same_states() -> None:
    prompts = [PROMPT, "a blue square"]
    expected = loaded().text_encoder.encode(prompts)
    assert torch.equal(loaded(text_encoder="layers").text_encoder.encode(prompts), expected)
    int8 = loaded(text_weights="int8").text_encoder.encode(prompts)
    assert 1e-4 < relative_error(int8, expected) < 0.05
    both = loaded(text_encoder="layers", text_weights="int8").text_encoder.encode(prompts)
    assert torch.equal(both, int8)


def test_states_of_int8_weights_are_not_taken_for_others(tmp_path: Path) -> None:
    def states(weights: str) -> torch.Tensor:
        runtime = RuntimeConfig(text_weights=weights)
        pipeline = Pipeline.from_pretrained("tiny", runtime=runtime, text_cache=tmp_path)
        return pipeline.text_encoder.encode([PROMPT])

    plain, int8 = states("default"), states("int8")
    assert not torch.equal(plain, int8)
    assert len(list(tmp_path.iterdir())) == 2
    assert torch.equal(states("int8"), int8)


def test_int8_changes_a_first_chunk_little() -> None:
    expected, found = (
        frames_of(each.stream(PROMPT, seed=1), 1) for each in (loaded(), loaded(block_weights="int8"))
    )
    difference = abs(expected.astype(float) - found.astype(float)).mean()
    assert 0 < difference < 3  # of 255


def test_a_snapshot_names_int8_and_continues_under_it_alone() -> None:
    int8, offload, plain = (
        loaded(block_weights="int8"),
        loaded(block_weights="int8", block_buffers=2),
        loaded(),
    )
    stream = int8.stream(PROMPT)
    frames_of(stream, 2)
    snapshot = stream.snapshot()
    expected = frames_of(stream, 2)
    assert (frames_of(offload.restore(snapshot), 2) == expected).all()  # where weights are changes no bit
    with pytest.raises(ValueError, match="precision"):
        plain.restore(snapshot)
    with pytest.raises(ValueError, match="precision"):
        int8.restore(plain.stream(PROMPT).snapshot())


@pytest.mark.parametrize(
    "options", [{"block_weights": "int8"}, {"block_buffers": 2}], ids=["int8", "offload"]
)
def test_loras_are_refused_with_a_way_out(options: dict, tmp_path: Path) -> None:
    pipeline = loaded(**options)
    lora = write_lora(tmp_path / "a.safetensors", pairs(pipeline.config.model, LAYERS[:1]))
    for attempt in (
        lambda: pipeline.set_loras([lora]),
        lambda: Pipeline.from_pretrained("tiny", runtime=RuntimeConfig(**options), loras=[lora]),
    ):
        with pytest.raises(ValueError, match=r"1 LoRAs are given .* `rfengine convert --lora`"):
            attempt()
    pipeline.set_loras([])
    assert len(frames_of(pipeline.stream(PROMPT), 1)) == 9


def test_a_model_that_was_loaded_otherwise_is_refused() -> None:
    plain, int8 = loaded(), loaded(block_weights="int8")

    def under(pipeline: Pipeline, **options: object) -> None:
        config = dataclasses.replace(pipeline.config, runtime=RuntimeConfig(**options))
        Pipeline(config, pipeline.model, pipeline.vae, pipeline.text_encoder, "tiny")

    with pytest.raises(ValueError, match="block_weights is 'int8' and the model was loaded otherwise"):
        under(plain, block_weights="int8")
    with pytest.raises(ValueError, match="block_weights is None and the model was loaded otherwise"):
        under(int8)
    with pytest.raises(ValueError, match="block_buffers is 2 and the model was loaded otherwise"):
        under(plain, block_buffers=2)
    with pytest.raises(ValueError, match="preset is 'auto', which from_pretrained chooses"):
        under(plain, preset="auto")


def test_graphs_are_off_with_the_reason_where_blocks_come_from_host_memory() -> None:
    for options, reason in (({}, "the default on cuda"), ({"block_buffers": 2}, "come from host memory")):
        graphs = runtime_switches(RuntimeConfig(**options), torch.device("cuda"))["graphs"]
        assert graphs.on == (not options) and reason in graphs.reason


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "options",
    [{}, {"block_weights": "int8", "text_weights": "int8"}, {"text_encoder": "layers", "block_buffers": 2}],
    ids=["plain", "int8", "host"],
)
def test_planned_weights_are_those_that_are_loaded(options: dict, dtype: str) -> None:
    pipeline = Pipeline.from_pretrained("tiny", dtype=dtype, runtime=RuntimeConfig(**options))
    pipeline.text_encoder.encode([PROMPT])
    encoder, own = pipeline.text_encoder._loaded_model(), getattr(torch, dtype)
    transformer, text = (each(pipeline.config, own) for each in (transformer_weights, text_encoder_weights))
    of_text = sum(parameter.nbytes for parameter in encoder.parameters())
    if not options or "block_weights" in options:
        assert transformer.device == sum(parameter.nbytes for parameter in pipeline.model.parameters())
        assert (text.device, text.host) == (of_text, 0)
    else:
        offload = pipeline.model.offload
        # joined weights are aligned together, and in the plan one by one
        assert transformer.working == pytest.approx(2 * offload.nbytes, rel=1e-3)
        assert transformer.host == pytest.approx(sum(memory.nbytes for memory in offload._host), rel=1e-3)
        assert text.host + encoder.encoder.final_layer_norm.weight.nbytes == of_text
        assert text.device == pytest.approx(2 * encoder.encoder.block._offload.nbytes, rel=0.01)
    needs = memory_needs(pipeline.config, LatentGrid.of(pipeline.config), own)
    assert needs["transformer"] == transformer.device and needs["text_encoder"] == text.device
