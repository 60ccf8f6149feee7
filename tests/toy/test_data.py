"""The toy world as a source of prompts and clips."""

from __future__ import annotations

from dataclasses import astuple

import torch

from rfengine.toy.captions import parse_caption
from rfengine.toy.data import LatentDataset, ToyClips, ToyPrompts


def texts_of(first: int, later: int, switch: int) -> list[list[int]]:
    """Rows of the two texts of five chunks, of which those from `switch` on show another scene."""
    return [[row, row + 1] for row in [2 * first] * switch + [2 * later] * (5 - switch)]


DATA = LatentDataset(
    latents=torch.arange(15).half()[None, None, :, None, None].expand(6, 2, 15, 4, 4)
    + 100 * torch.arange(6).half()[:, None, None, None, None],
    foreground=torch.zeros(6, 15, 4, 4, dtype=torch.bool),
    texts=torch.arange(1, 17).half()[:, None, None].expand(16, 5, 7),
    text_rows=torch.tensor([texts_of(number, number, 5) for number in range(4)]
                           + [texts_of(4, 5, 3), texts_of(6, 7, 1)]),
    places=torch.zeros(6, 3),
    values=torch.zeros(6, 2, 12, 2),
)  # fmt: skip


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_clips_begin_at_chunks_and_bring_their_own_text():
    clips, states = ToyClips(DATA, frames=9, chunk_frames=3).draw(600, seeded(0))
    assert clips.shape == (600, 2, 9, 4, 4)
    videos = (clips[:, 0, 0, 0, 0] // 100).long()
    starts = (clips[:, 0, 0, 0, 0] % 100)[videos < 4]
    assert {int(start) for start in starts} == {0, 3, 6}
    assert 0.55 < (starts == 0).float().mean() < 0.75
    assert ((clips[:, 0, :, 0, 0] - clips[:, 0, :1, 0, 0]) == torch.arange(9)).all()
    kinds = states[:, 0, 0]
    chunks = (clips[:, 0, 0, 0, 0] % 100).long() // 3
    full = DATA.text_rows[videos, chunks, 0] + 1
    assert ((kinds == 0) | (kinds == full) | (kinds == full + 1)).all()
    shares = [(kinds == full).float().mean(), (kinds == full + 1).float().mean(), (kinds == 0).float().mean()]
    assert all(abs(share - wanted) < 0.08 for share, wanted in zip(shares, (0.6, 0.3, 0.1), strict=True))


def test_clips_stay_within_one_scene():
    clips, _ = ToyClips(DATA, frames=9, chunk_frames=3).draw(600, seeded(1))
    firsts = clips[:, 0, 0, 0, 0]
    assert set(firsts[(firsts >= 400) & (firsts < 500)].tolist()) == {400}
    assert set(firsts[firsts >= 500].tolist()) == {503, 506}


def test_clips_as_long_as_the_videos_begin_at_their_start():
    clips, _ = ToyClips(DATA, frames=15, chunk_frames=3).draw(20, seeded(0))
    assert (clips[:, 0, 0, 0, 0] % 100 == 0).all()


def test_draws_follow_from_their_generator():
    source = ToyClips(DATA, frames=9, chunk_frames=3)
    for one, other in zip(source.draw(9, seeded(3)), source.draw(9, seeded(3)), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(source.draw(9, seeded(3))[0], source.draw(9, seeded(4))[0])


def encode(texts: list[str]) -> torch.Tensor:
    return torch.tensor([[float(len(text))] for text in texts])


def test_prompts_leave_attributes_open_as_often_as_asked():
    texts, states = ToyPrompts(encode, open_share=0.25).draw(400, seeded(0))
    scenes = [parse_caption(text) for text in texts]
    opened = [
        None in (scene.motion, scene.speed, scene.background, *astuple(scene.objects[0])) for scene in scenes
    ]
    assert 0.17 < sum(opened) / len(opened) < 0.30
    assert states[:, 0].tolist() == [len(text) for text in texts]
    assert texts == ToyPrompts(encode, open_share=0.25).draw(400, seeded(0))[0]
    closed, _ = ToyPrompts(encode, open_share=0.0).draw(50, seeded(1))
    assert all(parse_caption(text).speed for text in closed)
