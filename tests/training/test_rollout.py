"""Rollouts: the one a student learns from, compared with a plain one in float64, and streams."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from rfengine.config import CacheConfig, EngineConfig, ScheduleConfig
from rfengine.models.dit import patchify
from rfengine.ops.reference import rms_norm, rotate, unpatchify
from rfengine.rotary import rotary_table
from rfengine.schedule import FlowSchedule
from rfengine.training.config import RolloutConfig
from rfengine.training.rollout import (
    PromptSwitch,
    decode_chunks,
    draw_exits,
    draw_switch,
    roll_out,
    self_forced_rollout,
)
from support.models import GRID, SMALL, small_model, text_states
from support.small_training import ENGINE, differentiable, small_vae

STEPS = (1000, 750, 500)
BATCH = 2


def engine_config(cache: CacheConfig) -> EngineConfig:
    return dataclasses.replace(ENGINE, cache=cache, schedule=ScheduleConfig(denoising_steps=STEPS))


def student():
    return differentiable(small_model().double())


def noise_of(chunk: int, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * chunk + step)
    shape = (BATCH, SMALL.in_dim, 3, GRID.latent_height, GRID.latent_width)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def texts() -> torch.Tensor:
    return torch.cat([text_states(0), text_states(1)]).double()


def linear(x: torch.Tensor, layer: torch.nn.Linear) -> torch.Tensor:
    return x @ layer.weight.T + layer.bias


def attend(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    q, keys, values = (part.transpose(1, 2) for part in (q, keys, values))
    return (torch.softmax(q @ keys.mT / q.shape[-1] ** 0.5, -1) @ values).transpose(1, 2).flatten(2)


class Unrolled:
    """The same computation with lists of keys and values and no cache: nothing is written in place."""

    def __init__(self, model, config: EngineConfig) -> None:
        self.model, self.config = model, config
        self.past: list[list[tuple]] = []  # of every chunk in the window, of every layer: raw keys, values
        self.schedule = FlowSchedule(config.schedule)

    def forward(self, x, timestep, text):
        model, eps, frames = self.model, SMALL.eps, self.config.cache.chunk_frames
        modulation = model.modulation(torch.tensor([[timestep]]))
        tokens = F.linear(patchify(x, 2), model.patch_embedding.weight.flatten(1), model.patch_embedding.bias)
        own = []
        for index, block in enumerate(model.blocks):
            shift, scale, gate, shift_ffn, scale_ffn, gate_ffn = modulation.layers[index].unbind(2)
            attention = block.self_attn
            normed = F.layer_norm(tokens, tokens.shape[-1:], eps=eps) * (1 + scale) + shift
            q = rms_norm(linear(normed, attention.q), attention.norm_q.weight, eps).unflatten(-1, (2, -1))
            k = rms_norm(linear(normed, attention.k), attention.norm_k.weight, eps).unflatten(-1, (2, -1))
            v = linear(normed, attention.v).unflatten(-1, (2, -1))
            own.append((k, v))
            pairs = [chunk[index] for chunk in self.past] + [(k, v)]
            tables = [
                rotary_table(SMALL.head_dim, torch.arange(place * frames, (place + 1) * frames), 2, 3)
                for place in range(len(pairs))
            ]
            keys = torch.cat([rotate(pair[0], table) for pair, table in zip(pairs, tables, strict=True)], 1)
            values = torch.cat([pair[1] for pair in pairs], 1)
            tokens = tokens + gate * linear(attend(rotate(q, tables[-1]), keys, values), attention.o)
            normed = F.layer_norm(tokens, tokens.shape[-1:], block.norm3.weight, block.norm3.bias, eps)
            cross = block.cross_attn
            q = rms_norm(linear(normed, cross.q), cross.norm_q.weight, eps).unflatten(-1, (2, -1))
            tokens = tokens + linear(attend(q, text.keys[index], text.values[index]), cross.o)
            normed = F.layer_norm(tokens, tokens.shape[-1:], eps=eps) * (1 + scale_ffn) + shift_ffn
            hidden = F.gelu(linear(normed, block.ffn[0]), approximate="tanh")
            tokens = tokens + gate_ffn * linear(hidden, block.ffn[2])
        shift, scale = modulation.head.unbind(2)
        normed = F.layer_norm(tokens, tokens.shape[-1:], eps=eps) * (1 + scale) + shift
        return unpatchify(linear(normed, model.head.head), x), own

    def evict(self) -> None:
        cache = self.config.cache
        if len(self.past) * 3 < cache.window_frames:
            return
        leaving = 1 if cache.sink_frames else 0
        if cache.sink == "ema":
            self.past[0] = [
                tuple(
                    cache.alpha * old + (1 - cache.alpha) * new for old, new in zip(sink, gone, strict=True)
                )
                for sink, gone in zip(self.past[0], self.past[leaving], strict=True)
            ]
            self.past[0] = [tuple(part.detach() for part in pair) for pair in self.past[0]]
        del self.past[leaving]

    def recache(self, text, chunks: list[torch.Tensor]) -> None:
        sinks = self.config.cache.sink_frames // 3
        count = len(self.past) - sinks
        self.past = self.past[:sinks]
        for x0 in chunks[len(chunks) - count :]:
            self.past.append(self.forward(x0.detach(), 0.0, text)[1])

    def run(self, text, exits: tuple[int, ...], switch: PromptSwitch | None = None) -> torch.Tensor:
        chunks: list[torch.Tensor] = []
        final, text = text, switch.before if switch else text
        sigmas, timesteps = self.schedule.denoising_sigmas, self.schedule.denoising_timesteps
        for chunk, exit_step in enumerate(exits):
            if switch and chunk == switch.chunk:
                text = final
                if switch.recached:
                    with torch.no_grad():
                        self.recache(text, chunks)
            self.evict()
            x = noise_of(chunk, 0)
            with torch.no_grad():
                for step in range(exit_step):
                    x0 = x - sigmas[step] * self.forward(x, timesteps[step], text)[0]
                    noised = (1 - sigmas[step + 1]) * x0.float()
                    x = (noised + sigmas[step + 1] * noise_of(chunk, step + 1).float()).double()
            flow, _ = self.forward(x, timesteps[exit_step], text)
            x0 = x - sigmas[exit_step] * flow
            with torch.no_grad():
                clean = self.forward(x0.detach(), 0.0, text)[1]
            self.past.append(clean)
            if len(self.past) * 3 > self.config.cache.window_frames:
                raise AssertionError("a chunk too many in the window")
            chunks.append(x0)
        return torch.cat(chunks, 2)


def compare(
    cache: CacheConfig,
    exits: tuple[int, ...],
    rollout: RolloutConfig,
    switch: tuple[int, bool] | None = None,
) -> None:
    """switch: the chunk of a change of the prompts, which are swapped there, and whether it recaches."""
    model, config = student(), engine_config(cache)
    with torch.no_grad():
        swapped = switch and PromptSwitch(model.text_keys_values(texts().flip(0)), *switch)
    direction = torch.cat([noise_of(50 + chunk, 0) for chunk in range(len(exits))], dim=2)
    direction[:, :, : 3 * (len(exits) - rollout.gradient_chunks)] = 0

    text = model.text_keys_values(texts())
    result = self_forced_rollout(model, config, text, noise_of, exits, rollout, swapped)
    (result * direction).sum().backward()
    gradients = {name: value.grad.clone() for name, value in model.named_parameters()}
    model.zero_grad()

    plain = Unrolled(model, config).run(model.text_keys_values(texts()), exits, swapped)
    (plain * direction).sum().backward()
    torch.testing.assert_close(result, plain, rtol=0, atol=1e-6)
    for name, value in model.named_parameters():
        scale = value.grad.abs().max()
        assert scale > 0, f"{name} has no gradient"
        error = (gradients[name] - value.grad).abs().max() / scale
        assert error < 2e-6, f"{name}: {error:.1e}"


EMA = CacheConfig(alpha=0.8)
CACHES = {
    "ema": EMA,
    "frozen": dataclasses.replace(EMA, sink="frozen"),
    "none": dataclasses.replace(EMA, sink="none", sink_frames=0),
}


@pytest.mark.parametrize("name", CACHES)
def test_gradient_equals_that_of_plain_unrolled_implementation_beyond_the_window(name):
    compare(CACHES[name], (1, 0, 2, 1, 2, 0), RolloutConfig(6, 6, 6))


@pytest.mark.parametrize("recached", [False, True])
@pytest.mark.parametrize("name", CACHES)
def test_a_switch_of_the_prompts_keeps_the_window_or_recomputes_it(name, recached):
    for chunk in (1, 4):  # before and after the window is full
        compare(CACHES[name], (1, 0, 2, 1, 0, 1), RolloutConfig(6, 6, 2), (chunk, recached))


def test_switches_come_with_the_judged_clip_or_before_it_as_often_as_asked():
    rollout = RolloutConfig(5, 9, 3, switch_share=0.6, recache_share=0.25)
    drawn = [draw_switch(rollout, 9, 3, 2, torch.Generator().manual_seed(seed)) for seed in range(800)]
    switches = [entry for entry in drawn if entry]
    assert abs(len(switches) / 800 - 0.6) < 0.05
    assert {chunk for chunk, _ in switches} == {4, 5, 6}
    assert abs(sum(recached for _, recached in switches) / len(switches) - 0.25) < 0.06
    assert draw_switch(rollout, 3, 3, 2, torch.Generator().manual_seed(0)) is None
    always = RolloutConfig(4, 4, 3, switch_share=1.0)
    assert draw_switch(always, 4, 3, 3, torch.Generator().manual_seed(0))[0] == 1


def test_only_the_last_chunks_carry_gradients():
    rollout = RolloutConfig(5, 5, gradient_chunks=2)
    compare(EMA, (1, 1, 1, 1, 1), rollout)
    model, config = student(), engine_config(EMA)
    text = model.text_keys_values(texts())
    result = self_forced_rollout(model, config, text, noise_of, (1,) * 5, rollout)
    grad = torch.autograd.grad(result[:, :, :9].sum(), list(model.parameters()), allow_unused=True)
    assert all(part is None or part.eq(0).all() for part in grad)


def test_checkpointing_gives_the_same_gradients_while_the_cache_evicts():
    compare(EMA, (1, 0, 2, 1, 2, 0), RolloutConfig(6, 6, 6, checkpointing=True))


def test_rollout_without_gradients_is_the_same():
    model, config, exits = student(), engine_config(EMA), (2, 1, 0, 1, 2)
    text = model.text_keys_values(texts())
    rollout = RolloutConfig(5, 5, 5)
    with torch.no_grad():
        still = self_forced_rollout(model, config, text, noise_of, exits, rollout)
    assert not still.requires_grad
    learning = self_forced_rollout(model, config, text, noise_of, exits, rollout)
    torch.testing.assert_close(still, learning.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("switch", [None, 1, 4])
def test_a_rollout_goes_on_from_given_chunks_as_from_its_own(switch: int | None):
    model, config, exits = student(), engine_config(EMA), (2,) * 6
    rollout, text = RolloutConfig(6, 6, 2), model.text_keys_values(texts())
    change = None if switch is None else PromptSwitch(model.text_keys_values(texts().flip(0)), switch, True)
    own = self_forced_rollout(model, config, text, noise_of, exits, rollout, change)
    given = own[:, :, :9].detach()
    result = self_forced_rollout(model, config, text, noise_of, exits, rollout, change, given)
    torch.testing.assert_close(result, own, rtol=0, atol=1e-12)
    other = self_forced_rollout(model, config, text, noise_of, exits, rollout, change, given + 1)
    assert torch.equal(other[:, :, :9], given + 1)
    assert (other - own)[:, :, 9:].abs().amin((1, 3, 4)).gt(1e-9).all()


def test_exits_are_drawn_within_their_range_and_reproduced():
    config = RolloutConfig(2, 5, 2)
    drawn = [draw_exits(config, 4, torch.Generator().manual_seed(seed)) for seed in range(200)]
    assert {len(exits) for exits in drawn} == {2, 3, 4, 5}
    assert {step for exits in drawn for step in exits} == {0, 1, 2, 3}
    assert all(len(set(exits)) == 1 for exits in drawn)
    assert drawn[7] == draw_exits(config, 4, torch.Generator().manual_seed(7))


def test_a_share_of_the_rollouts_is_the_first_chunk_alone():
    config = RolloutConfig(2, 9, 2, first_share=0.5)
    drawn = [draw_exits(config, 4, torch.Generator().manual_seed(seed)) for seed in range(400)]
    assert abs(sum(len(exits) == 1 for exits in drawn) / 400 - 0.5) < 0.06
    assert {len(exits) for exits in drawn} == set(range(1, 10))
    assert {exits[0] for exits in drawn} == {0, 1, 2, 3}


def test_a_rollout_is_reproducible_follows_its_text_and_never_ends_the_window():
    model, texts = small_model(), torch.cat([text_states(0), text_states(1)])
    first = list(roll_out(model, ENGINE, texts, 6, seed=3))
    assert len(first) == 6 and first[0].shape == (2, 4, 3, 4, 6)
    assert all(torch.isfinite(chunk).all() for chunk in first)
    for one, other in zip(first, roll_out(model, ENGINE, texts, 6, seed=3), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(next(roll_out(model, ENGINE, texts, 1, seed=4)), first[0])
    assert not torch.equal(next(roll_out(model, ENGINE, texts.flip(0), 1, seed=3)), first[0])


def test_decoding_chunk_by_chunk_equals_decoding_the_clip():
    torch.manual_seed(0)
    vae = small_vae().double()  # norms of random weights amplify rounding
    chunks = [torch.randn(2, 4, 3, 4, 6, dtype=torch.float64) for _ in range(3)]
    with torch.no_grad():
        whole = vae.decode(torch.cat(chunks, dim=2))
    parts = torch.cat(list(decode_chunks(vae, iter(chunks))), dim=2)
    assert parts.shape == (2, 3, 33, 32, 48)
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 3, 1), "min_chunks is 0"),
        ((4, 3, 1), "max_chunks 3"),
        ((1, 3, 0), "gradient_chunks is 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        RolloutConfig(*arguments)
