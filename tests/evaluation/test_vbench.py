"""VBench is optional: its interface is called as its release 0.1.5 has it, here by a stand-in."""

from __future__ import annotations

import importlib.machinery
import json
import sys
import types
from pathlib import Path

import pytest

from rfengine.evaluation.vbench import DIMENSIONS, check_vbench, vbench_scores


def test_missing_vbench_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vbench", None)
    with pytest.raises(RuntimeError, match="VBench is not installed; pip install vbench"):
        check_vbench()


def test_scores_are_read_from_what_vbench_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class VBench:
        def __init__(self, device: str, full_info_dir: str, output_path: str) -> None:
            self.output = Path(output_path)
            self.output.mkdir()

        def evaluate(
            self, videos_path: str, name: str, prompt_list=(), dimension_list=None, mode="vbench_standard"
        ) -> None:
            assert mode == "custom_input"
            contents = [file.read_text() for file in sorted(Path(videos_path).iterdir())]
            scores = {dimension: [len(contents), contents] for dimension in dimension_list}
            (self.output / f"{name}_eval_results.json").write_text(json.dumps(scores))

    module = types.ModuleType("vbench")
    module.VBench = VBench
    module.__spec__ = importlib.machinery.ModuleSpec("vbench", None)
    monkeypatch.setitem(sys.modules, "vbench", module)
    files = []
    for folder in ("a", "b"):  # one name in two directories
        (tmp_path / folder).mkdir()
        files.append(tmp_path / folder / "same.mp4")
        files[-1].write_text(folder)
    assert vbench_scores(files, "cpu") == dict.fromkeys(DIMENSIONS, 2.0)
