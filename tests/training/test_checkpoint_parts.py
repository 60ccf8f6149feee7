"""A trained model is exported whole or not at all."""

from pathlib import Path

import pytest
import torch

from rfengine.checkpoint.manifest import verify
from rfengine.ops import choose_ops
from rfengine.training import checkpoint_parts
from rfengine.training.checkpoint_parts import base_engine, export_checkpoint, load_transformer


def test_an_export_that_fails_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, cpu = base_engine("tiny"), torch.device("cpu")
    weights = load_transformer("tiny", engine.model, choose_ops("reference", cpu), cpu).state_dict()
    out = tmp_path / "run" / "checkpoint"
    export_checkpoint(weights, engine, "tiny", out)
    verify(out)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_parts, "write_manifest", full)
        with pytest.raises(RuntimeError, match=r"cannot write .*checkpoint \(No space left on device\)"):
            export_checkpoint(weights, engine, "tiny", out)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before
    changed = {name: value + 1 for name, value in weights.items()}
    export_checkpoint(changed, engine, "tiny", out)
    verify(out)
    found = load_transformer(str(out), engine.model, choose_ops("reference", cpu), cpu).state_dict()
    name = next(iter(weights))
    assert torch.allclose(found[name], weights[name] + 1, atol=1e-2)
    assert [path.name for path in out.parent.iterdir()] == ["checkpoint"]
