"""The whole choice on a CPU, with an injected clock and candidates that only pretend to be backends."""

import json
import logging
import os

import pytest
import torch

from rfengine import ops
from rfengine.costs.chunk import block_linears
from rfengine.grid import LatentGrid
from rfengine.ops import REFERENCE_OPS, Ops, choose_ops
from rfengine.ops.table import OPS
from rfengine.presets import PRESETS
from rfengine.tensor_parallel import TensorParallel
from rfengine.tuning import autotune
from rfengine.tuning import candidates as tuning_candidates
from rfengine.tuning import record as tuning_cache
from rfengine.tuning.autotune import Choice, cached_decisions, choose, decide, tune
from rfengine.tuning.candidates import TuningCase, TuningShapes, gate_case, transformer_cases
from rfengine.tuning.record import CaseKey, Decision, TuningCache, default_cache_path
from support.models import GRID, small_pipeline

CPU = torch.device("cpu")


def double(x):
    return 2 * x


class Clock:
    """Gives each candidate, by the name of its function, its milliseconds; counts what is timed."""

    def __init__(self, **milliseconds):
        self.milliseconds = milliseconds
        self.timed = []

    def __call__(self, run, sets):
        assert len(sets) == 1
        self.timed.append(run.__name__)
        values = self.milliseconds[run.__name__]
        rest = iter(values if isinstance(values, list) else [])
        return lambda: next(rest, values[-1] if isinstance(values, list) else values)


def case(key="rms_norm", default="plain", **candidates):
    """A case to double [1, 200, 4]; candidates are functions by name."""
    ordered = {default: candidates[default], **candidates}
    return TuningCase(
        CaseKey(key, (200, 4), "float32", tuple(ordered)), ordered, CPU,
        lambda generator: (torch.randn(1, 200, 4, generator=generator),), 3200, double,
        lambda arguments: (arguments[0][:, -8:],), lambda _, returned: (returned[:, -8:],),
    )  # fmt: skip


def plain(x):
    return 2 * x


def other(x):
    return x + x


def wrong(x):
    return 2 * x + 1


def wrong_at_the_end(x):
    return torch.cat((2 * x[:, :-1], 3 * x[:, -1:]), dim=1)


def broken(x):
    raise NotImplementedError("no such shape")


@pytest.fixture
def held():
    """tune() of these cases."""

    def hold(*given, **options):
        return tune(given, CPU, **options)

    return hold


def test_the_fastest_candidate_wins_and_says_by_how_much():
    decision = decide(case(plain=plain, other=other), Clock(plain=2.0, other=1.5))
    assert decision.backend == "other"
    assert decision.reason == (
        "other 1.5000 ms (spread 0.0000), plain 2.0000 ms (spread 0.0000); 25.0% below the default plain"
    )
    assert decision.milliseconds == {"plain": (2.0, 0.0), "other": (1.5, 0.0)}


@pytest.mark.parametrize(
    ("times", "winner"),
    [
        ({"plain": (1.0, 0.0), "other": (0.97, 0.0)}, "other"),  # 3 % is above the noise of 2 %
        ({"plain": (1.0, 0.0), "other": (0.985, 0.0)}, "plain"),
        ({"plain": (1.0, 0.2), "other": (0.9, 0.0)}, "plain"),  # the default itself is that unsteady
        ({"plain": (1.0, 0.0), "other": (0.9, 0.2)}, "plain"),
        ({"plain": (1.0, 0.2), "other": (0.7, 0.2)}, "other"),
        ({"other": (9.0, 0.0)}, "other"),
        ({"plain": (1.0, 0.0), "other": (1.1, 0.0)}, "plain"),
    ],
)
def test_within_the_noise_the_default_stays(times, winner):
    assert choose(times, "plain")[0] == winner


def test_an_outlier_does_not_decide():
    first_is_slow = [50.0] * 4 + [1.0] * 20
    decision = decide(case(plain=plain, other=other), Clock(plain=2.0, other=first_is_slow))
    assert decision.backend == "other" and decision.milliseconds["other"][0] == 1.0


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (broken, "NotImplementedError: no such shape"),
        (wrong, "from float64"),
        (wrong_at_the_end, "from float64"),
    ],
)
def test_a_candidate_that_fails_or_is_wrong_is_refused_with_the_reason(run, reason):
    clock = Clock(plain=2.0, **{run.__name__: 0.1})
    decision = decide(case(plain=plain, other=run), clock)
    assert decision.backend == "plain" and clock.timed == ["plain"]
    assert reason in decision.refused["other"] and reason in decision.reason


def test_a_default_that_fails_gives_way():
    decision = decide(case(plain=broken, other=other), Clock(other=2.0))
    assert decision.backend == "other" and "the default plain is out" in decision.reason
    with pytest.raises(RuntimeError, match="every backend of rms_norm at 200x4 in float32 fails"):
        decide(case(plain=broken, other=wrong), Clock())


def test_an_answer_is_kept_and_nothing_is_timed_again(held, tmp_path, caplog):
    path, asked = tmp_path / "deep" / "autotune.json", case(plain=plain, other=other)
    clock = Clock(plain=2.0, other=1.0)
    with caplog.at_level(logging.INFO):
        first = held(asked, timer=clock, cache_path=path)
    assert first.overrides == {"rms_norm": "other"} and sorted(clock.timed) == ["other", "plain"]
    assert "autotune: rms_norm at 200x4 in float32: other, other 1.0000 ms" in caplog.text
    second_clock = Clock()
    assert held(asked, timer=second_clock, cache_path=path) == first
    assert second_clock.timed == [] and list(path.parent.iterdir()) == [path]
    assert [str(each) for each in cached_decisions(CPU, path)] == [str(first.decisions[0])]


def test_what_was_measured_before_a_start_broke_off_is_kept(tmp_path):
    path = tmp_path / "autotune.json"
    cache = tuning_cache.TuningCache(path, tuning_cache.describe_machine(CPU))
    asked = [case(plain=plain, other=other), case("linear@4x4", plain=broken, other=wrong)]
    with pytest.raises(RuntimeError, match="every backend"):
        autotune._decide_all(asked, [], cache, Clock(plain=2.0, other=1.0))
    assert [decision.backend for decision in cached_decisions(CPU, path)] == ["other"]


def test_a_warning_says_once_what_a_measurement_waits_for(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(autotune, "graph_sampler", Clock(plain=2.0, other=1.0))
    asked = [case(key, plain=plain, other=other) for key in ("rms_norm", "linear@4x4")]
    for expected in (1, 0):  # nothing is measured the second time
        caplog.clear()
        cache = tuning_cache.TuningCache(tmp_path / "a.json", tuning_cache.describe_machine(CPU))
        autotune._decide_all(asked, [], cache, None)
        messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert ["times the backends on cpu" in message for message in messages] == [True] * expected


def test_two_processes_that_tune_at_once_keep_what_both_found(tmp_path):
    path = tmp_path / "autotune.json"
    one, two = (tuning_cache.TuningCache(path, tuning_cache.describe_machine(CPU)) for _ in range(2))
    for cache, key in ((one, "rms_norm"), (two, "linear@4x4"), (one, "linear@8x8")):
        cache.store([decide(case(key, plain=plain, other=other), Clock(plain=2.0, other=1.0))])
    found = {decision.key.name for decision in cached_decisions(CPU, path)}
    assert found == {"rms_norm", "linear@4x4", "linear@8x8"}


def test_another_shape_or_another_set_of_candidates_is_measured(held, tmp_path):
    path, clock = tmp_path / "autotune.json", Clock(plain=2.0, other=1.0)
    held(case(plain=plain, other=other), timer=clock, cache_path=path)
    held(case("linear@4x4", plain=plain, other=other), timer=clock, cache_path=path)
    held(case(plain=plain, third=other), timer=clock, cache_path=path)
    assert len(clock.timed) == 6 and len(cached_decisions(CPU, path)) == 3


def test_a_case_that_depends_on_others_is_made_from_their_winners(held, tmp_path):
    given = []

    def depends(overrides):
        given.append(overrides)
        return case("linear@4x4", plain=plain)

    held(
        case(plain=plain, other=other), depends, timer=Clock(plain=2.0, other=1.0), cache_path=tmp_path / "a"
    )
    assert given == [{"rms_norm": "other"}]


def test_what_another_gpu_found_is_neither_used_nor_lost(held, tmp_path, monkeypatch):
    path, asked = tmp_path / "autotune.json", case(plain=plain, other=other)
    held(asked, timer=Clock(plain=2.0, other=1.0), cache_path=path)
    machine = tuning_cache.describe_machine(CPU)
    monkeypatch.setattr(autotune, "describe_machine", lambda _: machine | {"gpu": "another"})
    choice = held(asked, timer=Clock(plain=1.0, other=2.0), cache_path=path)
    assert choice.overrides == {"rms_norm": "plain"}
    for name, backend in (("none", "other"), ("another", "plain")):
        (kept,) = TuningCache(path, machine | {"gpu": name}).decisions()
        assert kept.backend == backend


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: '{"format": 0, "decisions": []}',
        lambda text: text.replace('"backend": "other"', '"backend": "fourth"'),
        lambda text: text.replace('"milliseconds"', '"seconds"'),
        lambda text: text.replace('"machine": {', '"machine": 3, "of": {'),
        lambda text: "\x00\xff",
    ],
)
def test_a_damaged_file_is_ignored_in_one_sentence_and_written_again(held, tmp_path, caplog, damage):
    path, asked = tmp_path / "autotune.json", case(plain=plain, other=other)
    held(asked, timer=Clock(plain=2.0, other=1.0), cache_path=path)
    path.write_text(damage(path.read_text()), encoding="utf-8")
    clock = Clock(plain=2.0, other=1.0)
    caplog.clear()
    assert held(asked, timer=clock, cache_path=path).overrides == {"rms_norm": "other"}
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "is ignored and all is measured again" in warning and len(clock.timed) == 2
    assert json.loads(path.read_text())["format"] == tuning_cache.FORMAT


def test_a_file_that_cannot_be_written_costs_only_a_warning(held, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "autotune.json"
    choice = held(case(plain=plain, other=other), timer=Clock(plain=2.0, other=1.0), cache_path=path)
    assert choice.overrides == {"rms_norm": "other"} and "is not written" in caplog.text
    cache = tuning_cache.TuningCache(path, tuning_cache.describe_machine(CPU))
    caplog.clear()
    for _ in range(3):  # one for each case would bury what else is reported
        cache.store(choice.decisions)
    assert sum(record.levelno == logging.WARNING for record in caplog.records) == 1


def test_a_failed_write_leaves_the_old_file_whole(held, tmp_path, monkeypatch, caplog):
    path = tmp_path / "autotune.json"
    held(case(plain=plain, other=other), timer=Clock(plain=2.0, other=1.0), cache_path=path)
    before = path.read_bytes()

    def refuse(*_):
        raise OSError("disk is full")

    monkeypatch.setattr(os, "replace", refuse)
    held(case("rotate", plain=plain, other=other), timer=Clock(plain=2.0, other=1.0), cache_path=path)
    assert path.read_bytes() == before and "disk is full" in caplog.text


def test_a_forced_choice_is_not_timed(held, tmp_path):
    clock = Clock()
    for forced in ({"rms_norm": "reference"}, {"rms_norm": "reference", "folds_gate": "folded"}):
        choice = held(
            case(plain=plain, other=other), forced=forced, timer=clock, cache_path=tmp_path / "a.json"
        )
        assert choice.overrides == {"rms_norm": "reference"}
        assert choice.folds_gate == ("folds_gate" in forced)
    shaped = held(
        case("linear@4x4", plain=plain, other=other),
        forced={"linear": "reference"},
        timer=clock,
        cache_path=tmp_path / "a.json",
    )
    assert shaped.overrides == {"linear": "reference"}
    asked_for = held(case(plain=plain, other=other), requested="reference", timer=clock)
    assert asked_for == Choice() and clock.timed == [] and not (tmp_path / "a.json").exists()


def test_a_cpu_measures_nothing():
    assert tune([case(plain=plain, other=other)], "cpu") == Choice()
    choice = tune([case(plain=plain, other=other)], "cpu", forced={"linear": "reference"})
    assert choice.overrides == {"linear": "reference"}
    assert choose_ops("auto", "cpu", choice.overrides, choice.folds_gate).folds_gate is False


def test_the_file_lies_in_the_users_cache_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_path() == tmp_path / "rfengine" / "autotune.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_path() == tmp_path / ".cache" / "rfengine" / "autotune.json"


def test_cases_are_those_of_the_engines_own_shapes(monkeypatch):
    monkeypatch.setattr(tuning_candidates, "runnable", lambda *_: {"one": plain})
    config = PRESETS["wan-1.3b"]
    for height, tokens in ((480, 4680), (240, 2340)):
        stream = TuningShapes(config, LatentGrid.of(config, height), torch.bfloat16, CPU)
        *cases, gate = transformer_cases(stream)
        shapes = {each.key.name: each.key.shape for each in cases}
        assert shapes["sink_window_attention"] == (tokens, 3 * tokens, 12, 128)
        assert shapes["clip_attention"] == (tokens, 512, 12, 128)
        assert {key: shape for key, shape in shapes.items() if key.startswith("linear")} == {
            "linear@4608x1536": (tokens, 4608, 1536),
            "linear@1536x1536": (tokens, 1536, 1536),
            "linear_gelu@8960x1536": (tokens, 8960, 1536),
            "linear@1536x8960": (tokens, 1536, 8960),
        }
        assert shapes["evict_and_rephase"][1:] == (3 * tokens, 12, 128)
        assert gate({}).key.shape == (tokens, 1536, 8960)


def test_cases_of_a_rank_are_of_its_heads_and_columns(monkeypatch):
    monkeypatch.setattr(tuning_candidates, "runnable", lambda *_: {"one": plain})
    config = PRESETS["wan-1.3b"]
    parallel = TensorParallel(1, 2)
    stream = TuningShapes(config, LatentGrid.of(config), torch.bfloat16, CPU, parallel)
    shapes = {each.key.name: each.key.shape for each in transformer_cases(stream)}
    own = block_linears(config.model, parallel.own(config.model)).values()
    products = {shape[1:] for key, shape in shapes.items() if key.startswith("linear")}
    assert products == {(outputs, inputs) for inputs, outputs in own}
    assert shapes["sink_window_attention"][2] == shapes["evict_and_rephase"][2] == 6


def test_on_hopper_every_form_of_tritons_attention_is_a_candidate_beside_cudnn(monkeypatch):
    reasons = dict.fromkeys(tuning_candidates.backend_reasons("cpu"), "") | {"flash": "it is not installed"}
    for module in (tuning_candidates, ops):
        monkeypatch.setattr(module, "backend_reasons", lambda device: reasons)
    for capability, dtype, expected in (
        ((9, 0), torch.bfloat16, ["cudnn", "triton", "triton-descriptor", "triton-pointer"]),
        ((9, 0), torch.float32, ["triton", "cudnn"]),
        ((8, 0), torch.bfloat16, ["triton", "cudnn"]),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        monkeypatch.setattr(tuning_candidates, "implementation", lambda op, backend: plain)
        able = tuning_candidates.runnable("sink_window_attention", torch.device("cuda"), dtype)
        assert list(able) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_case_accepts_the_reference_and_refuses_a_changed_result(dtype):
    shapes = TuningShapes(small_pipeline().config, GRID, dtype, CPU)
    *cases, gate = transformer_cases(shapes)
    assert len({each.key.name for each in (*cases, gate({}))}) == 8
    for each in (*cases, gate({})):
        arguments = each.make_inputs(torch.Generator().manual_seed(0))
        assert each.problem(each.meaning, arguments) == "", each.key

        def spoiled(*arguments, meaning=each.meaning):
            returned = meaning(*arguments)
            target = arguments[1] if returned is None else returned
            (target if isinstance(target, torch.Tensor) else target[-1])[..., -1:].mul_(1.5)
            return returned

        arguments = each.make_inputs(torch.Generator().manual_seed(0))
        assert "from float64" in each.problem(spoiled, arguments), each.key


def test_decisions_of_the_engine_bind_by_shape(monkeypatch):
    calls = {"linear@6x4": "reference", "linear": "reference"}
    ops = choose_ops("auto", "cpu", calls)
    assert ops.choice["linear@6x4"] == "reference"
    with pytest.raises(ValueError, match="there is no op 'rms_norm@6x4'"):
        choose_ops("auto", "cpu", {"rms_norm@6x4": "reference"})
    monkeypatch.setitem(OPS["linear"].backends, "cublaslt", lambda x, weight, bias: "by shape")
    ops = Ops(calls | {"linear@6x4": "cublaslt"})
    x = torch.zeros(2, 4)
    assert ops.linear(x, torch.zeros(6, 4), torch.zeros(6)) == "by shape"
    assert ops.linear(x, torch.zeros(5, 4), torch.zeros(5)).shape == (2, 5)


def test_folding_is_offered_where_triton_runs_and_depends_on_the_products(monkeypatch):
    shapes = TuningShapes(small_pipeline().config, GRID, torch.float32, CPU)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert tuple(gate_case(shapes, {}).candidates) == ("apart",)
    pytest.importorskip("triton")
    monkeypatch.setattr(tuning_candidates, "backend_reasons", lambda _: {"triton": ""})
    chosen = []
    monkeypatch.setattr(tuning_candidates, "Ops", lambda choice: chosen.append(choice) or REFERENCE_OPS)
    both = gate_case(shapes, {"linear@48x64": "reference"})
    assert tuple(both.candidates) == ("apart", "folded")
    assert both.key.depends_on == "products by reference, reference"
    assert chosen[0]["linear@48x64"] == "reference" and chosen[1]["gated_linear"] == "triton"
    folded = Decision(both.key, "folded", "faster")
    assert Choice((folded,)).folds_gate and Choice((folded,)).overrides == {}
    arguments = both.make_inputs(torch.Generator().manual_seed(0))
    assert both.problem(both.candidates["folded"], arguments) == ""


@pytest.mark.gpu
def test_a_gpu_decides_everything_and_remembers(tmp_path):
    config, path = PRESETS["tiny"], tmp_path / "autotune.json"
    grid = LatentGrid.of(config)
    shapes = TuningShapes(config, grid, torch.bfloat16, torch.device("cuda"))
    choice = tune(transformer_cases(shapes), "cuda", cache_path=path)
    choose_ops("auto", "cuda", choice.overrides, choice.folds_gate)
    assert tune(transformer_cases(shapes), "cuda", cache_path=path) == choice
    assert cached_decisions("cuda", path)
