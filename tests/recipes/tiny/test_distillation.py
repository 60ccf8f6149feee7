from pathlib import Path

import pytest
import torch

from recipes.tiny import distillation
from recipes.tiny.distillation import distill_student
from recipes.tiny.training import StageConfig
from rfengine.checkpoint.directories import checkpoint_directory
from rfengine.checkpoint.loader import read_safetensors
from rfengine.config import PRESETS
from rfengine.training.parallel import Ranks


def test_the_student_is_halfway_to_what_distillation_makes_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    student, teacher = Path(checkpoint_directory("tiny")), tmp_path / "teacher"
    before, _ = read_safetensors(student / "transformer.safetensors")
    asked = []

    def learnt(config, directory, ranks, device):
        asked.append((config, directory))
        return {name: value.float() + 1 for name, value in before.items()}

    monkeypatch.setattr(distillation, "distill", learnt)
    config = StageConfig("distill", PRESETS["tiny"], 7, 3)
    weights = distill_student(config, teacher, student, tmp_path, Ranks(), torch.device("cpu"))
    assert weights.keys() == before.keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, before[name].float() + 0.5)
    ((training, directory),) = asked
    assert directory == tmp_path / "distill"
    assert (training.stage, training.steps, training.seed) == ("dmd", 7, 3)
    assert (training.student, training.teacher, training.base) == (str(student), str(teacher), str(teacher))
