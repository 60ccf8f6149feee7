"""Autotune: which backend runs each op at the engine's own shapes, measured at start-up and kept in a file.

Rule: the fastest candidate wins, by the median of its samples; the candidates are sampled alternating, so
that a change of the clock meets all of them alike. The default stays unless the gain is above the noise: 2 %
of the default's median, or the larger of the two interquartile spreads, whichever is more. A candidate that
fails, or whose results are further from float64 than twice the reference's own error, is refused.
"""

from __future__ import annotations

import contextlib
import logging
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rfengine.config import Backend
from rfengine.cuda_graph import made_current
from rfengine.ops.table import op_of
from rfengine.tuning.attention_probe import probe_candidates
from rfengine.tuning.candidates import FOLDED, FOLDS_GATE, Case, TuningCase
from rfengine.tuning.record import CaseKey, Decision, TuningCache, default_cache_path, describe_machine
from rfengine.tuning.timing import Sampler, Timer, count_cold_sets, graph_sampler
from rfengine.tuning.trials import LostDeviceError, Trials, is_lost

logger = logging.getLogger(__name__)
SAMPLES = 15
WARM_UP_SAMPLES = 3
NOISE_SHARE = 0.02
SEED = 0
_PATIENCE = "autotune builds and times the backends on %s, once for each size; this can take minutes"


@dataclass(frozen=True, slots=True)
class Choice:
    """What choose_ops is called with: choose_ops("auto", device, choice.overrides, choice.folds_gate)."""

    decisions: tuple[Decision, ...] = ()

    @property
    def overrides(self) -> dict[str, str]:
        """Backend by op, or by op and shape of the weight."""
        return {each.key.name: each.backend for each in self.decisions if each.key.name != FOLDS_GATE}

    @property
    def folds_gate(self) -> bool:
        return any(each.key.name == FOLDS_GATE and each.backend == FOLDED for each in self.decisions)


def tune(
    cases: Iterable[Case],
    device: torch.device | str,
    *,
    requested: Backend = "auto",
    forced: Mapping[str, str] | None = None,
    cache_path: str | Path | None = None,
    timer: Timer | None = None,
) -> Choice:
    """Decide each of `cases`, from the cache file where it knows the answer, else by measuring.

    requested: any backend except "auto" is a choice already: nothing is measured. forced: backend by key of
    Ops.choice, or "folds_gate" with "folded" or "apart"; an op stands for all its shapes. A cuDNN that either
    asks for is checked in every case with a check of its own. cache_path: the file, by default autotune.json
    in the user's cache directory. timer: replaces the CUDA clock; without it nothing is measured on any other
    device, and `cases` is not read. Raises RuntimeError where every candidate of a case fails or is wrong, or
    a cuDNN that was asked for.
    """
    device, forced = torch.device(device), dict(forced or {})
    decisions = [Decision(CaseKey(name), backend, "forced") for name, backend in forced.items()]
    for decision in decisions:
        logger.info("autotune: %s", decision)
    if device.type != "cuda" and timer is None:
        return Choice(tuple(decisions))
    cases = list(cases)
    cache = TuningCache(Path(cache_path or default_cache_path()), describe_machine(device))
    for case in cases:
        if isinstance(case, TuningCase) and case.check is not None:
            name = case.key.name
            if forced.get(name, forced.get(op_of(name), requested)) == "cudnn":
                _require_right(case, "cudnn", cache)
    if requested == "auto":
        decisions += _decide_all(cases, decisions, cache, timer)
    return Choice(tuple(decisions))


def _require_right(case: TuningCase, backend: str, cache: TuningCache) -> None:
    """Raise RuntimeError where `backend` is wrong or fails; the cache keeps the verdict. Where it cannot run
    here at all, choose_ops reports it."""
    if backend not in case.candidates:
        return
    trials = Trials(cache)
    known = trials.verdict(case.key, backend) or cache.find(case.key)
    if known is None:
        with torch.no_grad(), made_current(case.device), trials.running(case.key, backend):
            problem = _attempt(case, backend, lambda: _check(case, backend, _seeded(case)), trials)
        known = trials.judge(case.key, backend, problem)
    if backend in known.refused:
        raise RuntimeError(
            f"backend {backend!r} is asked for and refused for {case.key}: {known.refused[backend]}; "
            "use 'auto', which leaves it out there"
        )


def cached_decisions(device: torch.device | str, cache_path: str | Path | None = None) -> list[Decision]:
    """What the cache file holds for this machine, for a report; str() of one is a line."""
    return TuningCache(Path(cache_path or default_cache_path()), describe_machine(device)).decisions()


def _decide_all(
    cases: Sequence[Case], made: Sequence[Decision], cache: TuningCache, timer: Timer | None
) -> list[Decision]:
    """Decisions of the cases that nothing in `made` settles. Each new one is stored at once, so that a start
    which is interrupted need not measure it again."""
    settled = {decision.key.name for decision in made}
    decisions: list[Decision] = []
    trials = Trials(cache)
    has_warned = timer is not None
    for case in cases:
        if not isinstance(case, TuningCase):
            case = case(Choice((*made, *decisions)).overrides)
        if case.key.name in settled or op_of(case.key.name) in settled:
            continue
        if len(case.candidates) == 1:
            decisions.append(Decision(case.key, case.default, "the only one that runs here"))
            continue
        decision = cache.find(case.key)
        if decision is None:
            if not has_warned:
                logger.warning(_PATIENCE, case.device)
                has_warned = True
            logger.info("autotune: measures %s", case.key)
            untried = probe_candidates(case, trials)
            decision = decide(case, timer, trials, untried)
            if not untried:  # else the next start tries again
                cache.store([decision])
        logger.info("autotune: %s", decision)
        decisions.append(decision)
    return decisions


def decide(
    case: TuningCase,
    timer: Timer | None = None,
    trials: Trials | None = None,
    left_out: Mapping[str, str] | None = None,
) -> Decision:
    """Check and time the candidates of one case, and choose.

    timer: replaces the CUDA clock. trials: knows candidates that did not come back, and keeps new ones.
    left_out: reason by candidate that is not to be run.
    Raises RuntimeError where all of them fail or are wrong, LostDeviceError where one breaks the device.
    """
    refused = dict(left_out or {}) | (trials.refused(case.key) if trials else {})
    with torch.no_grad(), made_current(case.device):
        samplers = _prepare(case, timer or graph_sampler, refused, trials)
        times = _sample(case, samplers, refused, trials)
    if case.device.type == "cuda":
        torch.cuda.empty_cache()
    if not times:
        raise RuntimeError(
            f"every backend of {case.key} fails: {refused}; turn autotune off and choose one by name"
        )
    backend, reason = choose(times, case.default)
    notes = [reason, *(f"{name} refused: {problem}" for name, problem in refused.items())]
    return Decision(case.key, backend, "; ".join(notes), times, refused)


def _seeded(case: TuningCase) -> torch.Generator:
    return torch.Generator(case.device).manual_seed(SEED)


def _check(case: TuningCase, name: str, generator: torch.Generator) -> str:
    """Why the results of a candidate are wrong, or ""."""
    return case.problem(case.candidates[name], case.make_inputs(generator))


def _prepare(
    case: TuningCase, timer: Timer, refused: dict[str, str], trials: Trials | None
) -> dict[str, Sampler]:
    """The sampler of each candidate that is right; why others are not goes into `refused`."""
    generator = _seeded(case)
    count = count_cold_sets(case.device, case.set_bytes) if case.device.type == "cuda" else 1
    sets = [case.make_inputs(generator) for _ in range(count)]
    samplers: dict[str, Sampler] = {}
    for name, run in case.candidates.items():
        if name in refused:
            continue

        def first_run(name: str = name, run: Callable[..., object] = run) -> str:
            problem = _check(case, name, generator)
            if not problem:
                sampler = timer(run, sets)
                sampler()
                samplers[name] = sampler
            return problem

        with trials.running(case.key, name) if trials else contextlib.nullcontext():
            problem = _attempt(case, name, first_run, trials)
        if problem:
            refused[name] = problem
    return samplers


def _attempt(case: TuningCase, name: str, run: Callable[[], str], trials: Trials | None) -> str:
    """Why a candidate is refused: what `run` returns, or raises. LostDeviceError where the device is lost."""
    try:
        return run()
    # a launcher or a compiler may raise anything (KeyError, AssertionError), and whatever it is, the other
    # candidates can do the work: broad on purpose, and the reason is kept
    except Exception as error:  # noqa: BLE001
        problem = f"{type(error).__name__}: {str(error).strip()[:200]}"
        if is_lost(case.device, error):
            if trials:
                trials.judge(case.key, name, f"it broke the device: {problem}")
            raise LostDeviceError(case.key, name, problem) from error
        return problem


def _sample(
    case: TuningCase, samplers: Mapping[str, Sampler], refused: dict[str, str], trials: Trials | None
) -> dict[str, tuple[float, float]]:
    """Median and interquartile spread by candidate; every round samples all, in alternating order. One that
    fails goes into `refused`."""
    samples: dict[str, list[float]] = {name: [] for name in samplers}

    def sample(name: str) -> str:
        samples[name].append(samplers[name]())
        return ""

    for round_index in range(WARM_UP_SAMPLES + SAMPLES):
        order = list(samplers) if round_index % 2 else list(reversed(samplers))
        for name in order:
            if name in refused:
                continue
            problem = _attempt(case, name, lambda name=name: sample(name), trials)
            if problem:
                refused[name] = problem
    return {
        name: _summary(values[WARM_UP_SAMPLES:]) for name, values in samples.items() if name not in refused
    }


def _summary(values: list[float]) -> tuple[float, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, high - low


def choose(times: Mapping[str, tuple[float, float]], default: str) -> tuple[str, str]:
    """The winner and why, from median and spread by candidate (the rule is at the top)."""
    ranked = sorted(times, key=lambda name: times[name][0])
    listed = ", ".join(f"{name} {times[name][0]:.4f} ms (spread {times[name][1]:.4f})" for name in ranked)
    best = ranked[0]
    if default not in times:
        return best, f"{listed}; the default {default} is out"
    if best == default:
        return default, listed
    (usual, usual_spread), (least, spread) = times[default], times[best]
    if usual - least > max(NOISE_SHARE * usual, usual_spread, spread):
        return best, f"{listed}; {1 - least / usual:.1%} below the default {default}"
    return default, f"{listed}; within the noise, so the default stays"
