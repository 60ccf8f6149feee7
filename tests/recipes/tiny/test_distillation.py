from pathlib import Path

import pytest
import torch

from recipes.tiny import distillation
from recipes.tiny.distillation import distill_student
from recipes.tiny.training import StageConfig
from rfengine.checkpoint.directories import checkpoint_directory
from rfengine.checkpoint.loader import read_safetensors
from rfengine.presets import PRESETS
from rfengine.training.parallel import Ranks


def test_the_student_goes_halfway_to_what_distillation_and_then_streams_make_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    student = teacher = Path(checkpoint_directory("tiny"))
    before, _ = read_safetensors(student / "transformer.safetensors")
    asked = []

    def distilled(config, stage, directory, ranks):
        asked.extend([stage, (config, directory)])
        return {name: value.float() + 1 for name, value in before.items()}

    def streamed(config, start, videos, directory, ranks, device):
        asked.append((config, directory))
        halfway, _ = read_safetensors(start / "transformer.safetensors")
        for name, value in halfway.items():
            torch.testing.assert_close(value, (before[name].float() + 0.5).half())
        return {name: value.float() - 1 for name, value in before.items()}

    monkeypatch.setattr(distillation, "build_stage", lambda config, device, ranks: config)
    monkeypatch.setattr(distillation, "train", distilled)
    monkeypatch.setattr(distillation, "train_on_streams", streamed)
    config = StageConfig("distill", PRESETS["tiny"], 5, 3)
    weights = distill_student(config, teacher, student, None, tmp_path, Ranks(), torch.device("cpu"))
    assert weights.keys() == before.keys()
    for name, value in weights.items():  # halfway between 0.5 above and 1 below
        torch.testing.assert_close(value, before[name].float() - 0.25)
    plain, run, (streams, streams_directory) = asked
    assert run == (config, tmp_path) and streams_directory == tmp_path
    assert (plain.stage, plain.steps, plain.seed) == ("dmd", 5, 3)
    assert (plain.student, plain.teacher, plain.base) == (str(student), str(teacher), str(teacher))
    assert (streams.name, streams.steps, streams.seed) == ("distill_streams", 8, 4)
