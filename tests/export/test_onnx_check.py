"""The exported graphs in onnxruntime: node by node and over several chunks against PyTorch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from rfengine.export import onnx_check
from rfengine.export.onnx_check import check_in_onnxruntime
from support.small_export import GRID, LATENTS, TWO_LEVELS, random_vae

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

TOLERANCE = 1e-4  # float32


@pytest.fixture
def exported_once(session_export, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check takes the programs of the session instead of exporting again."""

    def program_of(graph):
        return session_export.programs["first" if graph.first else "steady"]

    monkeypatch.setattr(onnx_check, "export_graph", program_of)


@pytest.mark.slow
def test_float32_agrees_node_by_node_over_several_chunks(session_export, exported_once) -> None:
    agreement = check_in_onnxruntime(session_export.vae, LATENTS, GRID.height, GRID.width)
    assert agreement.chunks == 3
    assert agreement.node_count > 200
    assert agreement.pixels <= TOLERANCE and agreement.state <= TOLERANCE and agreement.nodes <= TOLERANCE
    assert "3 chunks agree to" in str(agreement)


def test_wrong_weight_in_the_file_shows_in_every_figure(session_export, exported_once, monkeypatch) -> None:
    right = onnx_check.export_graph

    def with_wrong_weight(graph):
        program = right(graph)
        model = program.model_proto
        weight = next(entry for entry in model.graph.initializer if entry.name == "layers.1.weight")
        values = onnx.numpy_helper.to_array(weight) * 1.01
        weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
        return SimpleNamespace(model_proto=model, exported_program=program.exported_program)

    monkeypatch.setattr(onnx_check, "export_graph", with_wrong_weight)
    agreement = check_in_onnxruntime(session_export.vae, LATENTS, GRID.height, GRID.width)
    assert min(agreement.pixels, agreement.state, agreement.nodes) > 10 * TOLERANCE
    assert agreement.worst == max(agreement.pixels, agreement.state, agreement.nodes)


def test_history_that_is_lost_shows_from_the_second_chunk_on(
    session_export, exported_once, monkeypatch
) -> None:
    monkeypatch.setattr(onnx_check, "state_output", lambda name: f"no output of {name}")
    agreement = check_in_onnxruntime(session_export.vae, LATENTS, GRID.height, GRID.width)
    assert agreement.pixels > 100 * TOLERANCE and agreement.nodes <= TOLERANCE


@pytest.mark.slow
def test_float16_graph_of_the_first_latent_runs() -> None:
    """Bound: some 40 roundings to 11 bits on values around one."""
    agreement = check_in_onnxruntime(random_vae(TWO_LEVELS).half(), 1, GRID.height // 2, GRID.width // 2)
    assert agreement.pixels < 0.05


def test_missing_onnxruntime_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_check, "missing_packages", lambda *names: list(names))
    with pytest.raises(
        RuntimeError, match="onnxruntime cannot be imported and the check needs it; pip install"
    ):
        check_in_onnxruntime(random_vae(), 1, GRID.height, GRID.width)
