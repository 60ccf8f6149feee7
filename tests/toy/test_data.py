"""The toy world as a source of prompts and clips."""

from __future__ import annotations

import dataclasses

import torch

from rfengine.toy.data import LatentDataset, ToyClips, ToyPrompts
from rfengine.toy.world import SPEEDS

DATA = LatentDataset(
    latents=torch.arange(15).half()[None, None, :, None, None].expand(6, 2, 15, 4, 4)
    + 100 * torch.arange(6).half()[:, None, None, None, None],
    foreground=torch.zeros(6, 15, 4, 4, dtype=torch.bool),
    texts=torch.arange(1, 4).half()[:, None, None].expand(3, 5, 7),
    open_texts=-torch.arange(1, 4).half()[:, None, None].expand(3, 5, 7),
    text_rows=torch.tensor([0, 1, 2, 0, 1, 2]),
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_clips_begin_at_chunks_and_bring_their_own_text():
    clips, states = ToyClips(DATA, frames=9, chunk_frames=3).draw(400, seeded(0))
    assert clips.shape == (400, 2, 9, 4, 4)
    starts = clips[:, 0, 0, 0, 0] % 100
    assert {int(start) for start in starts} == {0, 3, 6}
    assert 0.4 < (starts == 0).float().mean() < 0.6
    assert ((clips[:, 0, :, 0, 0] - clips[:, 0, :1, 0, 0]) == torch.arange(9)).all()
    videos = (clips[:, 0, 0, 0, 0] // 100).long()
    kinds = states[:, 0, 0]
    assert ((kinds == 0) | (kinds.abs() == DATA.text_rows[videos] + 1)).all()
    shares = [(kinds > 0).float().mean(), (kinds < 0).float().mean(), (kinds == 0).float().mean()]
    assert all(abs(share - wanted) < 0.08 for share, wanted in zip(shares, (0.6, 0.3, 0.1), strict=True))


def test_clips_as_long_as_the_videos_begin_at_their_start():
    clips, _ = ToyClips(DATA, frames=15, chunk_frames=3).draw(20, seeded(0))
    assert (clips[:, 0, 0, 0, 0] % 100 == 0).all()


def test_draws_follow_from_their_generator():
    source = ToyClips(DATA, frames=9, chunk_frames=3)
    for one, other in zip(source.draw(9, seeded(3)), source.draw(9, seeded(3)), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(source.draw(9, seeded(3))[0], source.draw(9, seeded(4))[0])


def test_prompts_leave_their_speed_open_as_often_as_asked():
    def encode(texts: list[str]) -> torch.Tensor:
        return torch.tensor([[float(len(text))] for text in texts])

    texts, states = ToyPrompts(encode, open_share=0.25).draw(400, seeded(0))
    opened = [not any(f" {speed}" in text for speed in SPEEDS) for text in texts]
    assert 0.18 < sum(opened) / len(opened) < 0.32
    assert states[:, 0].tolist() == [len(text) for text in texts]
    assert texts == ToyPrompts(encode, open_share=0.25).draw(400, seeded(0))[0]
    closed, _ = dataclasses.replace(ToyPrompts(encode), open_share=0.0).draw(50, seeded(1))
    assert all(any(f" {speed}" in text for speed in SPEEDS) for text in closed)
