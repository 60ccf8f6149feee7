"""Prompts drawn and directories of latents, and what is wrong with them in one sentence."""

from __future__ import annotations

import pytest
import torch

from rfengine.checkpoint.loader import save_weights
from rfengine.training.data import FilePrompts, LatentClips


def states_of(texts: list[str]) -> torch.Tensor:
    return torch.tensor([float(len(text)) for text in texts]).view(-1, 1, 1).expand(-1, 2, 3)


def write_clip(directory, name: str, value: float, frames: int = 5, prompt: str = "a cat") -> None:
    tensors = {"latents": torch.full((4, frames, 2, 3), value, dtype=torch.float16)}
    save_weights(directory / f"{name}.safetensors", tensors, {"prompt": prompt})


def test_drawn_prompts_follow_from_the_generator():
    source = FilePrompts(tuple(f"prompt {'x' * n}" for n in range(20)), states_of)
    one, states = source.draw(6, torch.Generator().manual_seed(3))
    two, _ = source.draw(6, torch.Generator().manual_seed(3))
    other, _ = source.draw(6, torch.Generator().manual_seed(4))
    assert one == two != other
    assert states[:, 0, 0].tolist() == [len(text) for text in one]


def test_clips_are_the_starts_of_the_videos_with_their_prompts(tmp_path):
    write_clip(tmp_path, "one", 1.0, prompt="a")
    write_clip(tmp_path, "two", 2.0, prompt="bb")
    clips = LatentClips(tmp_path, (4, 3, 2, 3), states_of, torch.zeros(1, 2, 3), empty_share=0.0)
    latents, states = clips.draw(16, torch.Generator().manual_seed(0))
    assert latents.shape == (16, 4, 3, 2, 3) and latents.dtype == torch.float32
    assert torch.equal(latents[:, 0, 0, 0, 0], states[:, 0, 0])
    assert set(states[:, 0, 0].tolist()) == {1.0, 2.0}


def test_some_clips_get_the_negative_states(tmp_path):
    write_clip(tmp_path, "one", 1.0)
    clips = LatentClips(tmp_path, (4, 3, 2, 3), states_of, torch.full((1, 2, 3), -1.0), empty_share=0.25)
    _, states = clips.draw(400, torch.Generator().manual_seed(0))
    share = (states[:, 0, 0] == -1).float().mean().item()
    assert 0.18 < share < 0.32


def test_latents_of_another_form_are_refused(tmp_path):
    def open_clips() -> None:
        LatentClips(tmp_path, (4, 3, 2, 3), states_of, torch.zeros(1, 2, 3))

    with pytest.raises(ValueError, match="no \\*.safetensors"):
        open_clips()
    write_clip(tmp_path, "short", 1.0, frames=2)
    with pytest.raises(ValueError, match="2 latent frames; clips of this training have 3"):
        open_clips()
    write_clip(tmp_path, "short", 1.0, prompt=" ")
    with pytest.raises(ValueError, match="no prompt in its metadata"):
        open_clips()
    wide = {"latents": torch.zeros(4, 3, 2, 4)}
    save_weights(tmp_path / "short.safetensors", wide, {"prompt": "a cat"})
    with pytest.raises(ValueError, match=r"\(4, 3, 2, 4\); this training has \[4, F, 2, 3\]"):
        open_clips()
    save_weights(tmp_path / "short.safetensors", {"video": torch.zeros(1)})
    with pytest.raises(ValueError, match="must hold one tensor latents"):
        open_clips()


def test_latents_that_are_not_finite_are_named_when_they_are_drawn(tmp_path):
    write_clip(tmp_path, "one", float("nan"))
    clips = LatentClips(tmp_path, (4, 3, 2, 3), states_of, torch.zeros(1, 2, 3))
    with pytest.raises(ValueError, match="one.safetensors has latents that are not finite"):
        clips.draw(1, torch.Generator())


def test_latents_of_integers_are_refused(tmp_path):
    save_weights(tmp_path / "a.safetensors", {"latents": torch.zeros(4, 5, 2, 3).int()}, {"prompt": "a"})
    with pytest.raises(
        ValueError, match="a.safetensors has latents in torch.int32; they must be floating-point"
    ):
        LatentClips(tmp_path, (4, 3, 2, 3), states_of, torch.zeros(1, 2, 3))


def test_a_file_that_changes_during_the_training_is_named(tmp_path):
    write_clip(tmp_path, "one", 1.0)
    clips = LatentClips(tmp_path, (4, 3, 2, 3), states_of, torch.zeros(1, 2, 3))
    write_clip(tmp_path, "one", 1.0, frames=2)
    with pytest.raises(ValueError, match="one.safetensors was changed since the training began"):
        clips.draw(1, torch.Generator())
