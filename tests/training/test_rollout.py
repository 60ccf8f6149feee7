import dataclasses

import torch

from rfengine.config import PRESETS, WanConfig
from rfengine.models.dit import WanDiT
from rfengine.models.vae import WanVAE
from rfengine.training.rollout import decode_chunks, roll_out

CONFIG = dataclasses.replace(
    PRESETS["tiny"],
    model=WanConfig(
        dim=24,
        ffn_dim=32,
        num_heads=2,
        num_layers=2,
        text_dim=96,
        text_len=16,
        freq_dim=32,
        in_dim=8,
        out_dim=8,
    ),
    height=32,
    width=48,
)


def test_a_rollout_is_reproducible_follows_its_text_and_never_ends_the_window():
    torch.manual_seed(0)
    model, texts = WanDiT(CONFIG.model).eval(), torch.randn(2, 16, 96)
    first = list(roll_out(model, CONFIG, texts, 6, seed=3))
    assert len(first) == 6 and first[0].shape == (2, 8, 3, 4, 6)
    assert all(torch.isfinite(chunk).all() for chunk in first)
    for one, other in zip(first, roll_out(model, CONFIG, texts, 6, seed=3), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(next(roll_out(model, CONFIG, texts, 1, seed=4)), first[0])
    assert not torch.equal(next(roll_out(model, CONFIG, texts.flip(0), 1, seed=3)), first[0])


def test_decoding_chunk_by_chunk_equals_decoding_the_clip():
    torch.manual_seed(0)
    vae = WanVAE(CONFIG.vae).eval()
    chunks = [torch.randn(2, 8, 3, 4, 6) for _ in range(3)]
    with torch.no_grad():
        whole = vae.decode(torch.cat(chunks, dim=2))
    parts = torch.cat(list(decode_chunks(vae, iter(chunks))), dim=2)
    assert parts.shape == (2, 3, 33, 32, 48)
    assert float((parts - whole).abs().max()) < 1e-4
