"""Autotune: which backend runs each op at the engine's own shapes, measured at start-up and kept in a file.

Rule: the fastest contender wins, by the median of its samples; the contenders are sampled in turn, so that a
change of the clock meets all of them alike. The default stays unless the gain is above the noise: 2 % of the
default's median, or the larger of the two interquartile spreads, whichever is more. A contender that fails,
or whose results are further from float64 than twice the reference's own error, is refused.
"""

from __future__ import annotations

import contextlib
import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rfengine.config import Backend, EngineConfig
from rfengine.grid import LatentGrid
from rfengine.ops.table import op_of
from rfengine.tuning.attention_probe import probe_contenders
from rfengine.tuning.candidates import FOLDED, FOLDS_GATE, Contest, Site, backend_contests, gate_contest
from rfengine.tuning.convolutions import decoder_contests
from rfengine.tuning.record import Decision, Subject, TuningCache, default_cache_path, describe_machine
from rfengine.tuning.timing import Arguments, Sampler, Timer, count_cold_sets, graph_sampler
from rfengine.tuning.trials import LostDeviceError, Trials, is_lost

logger = logging.getLogger(__name__)
SAMPLES = 15
WARM_UP_SAMPLES = 3
NOISE_SHARE = 0.02
ERROR_FACTOR = 2.0  # times the error of the reference in the same dtype
SEED = 0
_PATIENCE = "autotune builds and times the backends on %s, once for each size; this can take minutes"


@dataclass(frozen=True, slots=True)
class Choice:
    """What choose_ops is called with: choose_ops("auto", device, choice.overrides, choice.folds_gate)."""

    decisions: tuple[Decision, ...] = ()

    @property
    def overrides(self) -> dict[str, str]:
        """Backend by op, or by op and shape of the weight."""
        return {each.subject.key: each.backend for each in self.decisions if each.subject.key != FOLDS_GATE}

    @property
    def folds_gate(self) -> bool:
        return any(each.subject.key == FOLDS_GATE and each.backend == FOLDED for each in self.decisions)


def tune(
    config: EngineConfig,
    grid: LatentGrid,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    requested: Backend = "auto",
    forced: Mapping[str, str] | None = None,
    cache_path: str | Path | None = None,
    timer: Timer | None = None,
) -> Choice:
    """Decide what runs a stream of `config` at `grid`, from the cache file where it knows, else by measuring.

    requested: any backend but "auto" is a choice already: nothing is measured. forced: backend by key of
    Ops.choice, or "folds_gate" with "folded" or "apart"; an op stands for all its shapes. cache_path: the
    file, by default autotune.json in the user's cache directory. timer: replaces the CUDA clock; without it
    nothing is measured on any other device. Raises RuntimeError where every contender of an op fails or is
    wrong.
    """
    device = torch.device(device)
    decisions = _forced(forced or {})
    if requested == "auto" and (device.type == "cuda" or timer is not None):
        site = Site(config, grid, dtype, device)
        cache = TuningCache(Path(cache_path or default_cache_path()), describe_machine(device))
        decisions += _hold(backend_contests(site), decisions, cache, timer)
        decisions += _hold([gate_contest(site, Choice(tuple(decisions)).overrides)], decisions, cache, timer)
    return Choice(tuple(decisions))


def tune_decoder(
    config: EngineConfig,
    grid: LatentGrid,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    requested: Backend = "auto",
    forced: Mapping[str, str] | None = None,
    cache_path: str | Path | None = None,
    timer: Timer | None = None,
) -> Choice:
    """tune, for the convolutions of the decoder: a choice for each of their shapes at `grid`.

    A cuDNN that was asked for, by `requested` or by `forced`, is checked at every shape that it would run.
    Raises RuntimeError as tune does, and where such a check fails.
    """
    device = torch.device(device)
    forced = dict(forced or {})
    decisions = _forced(forced)
    if device.type == "cuda" or timer is not None:
        contests = decoder_contests(Site(config, grid, dtype, device))
        cache = TuningCache(Path(cache_path or default_cache_path()), describe_machine(device))
        for contest in contests:
            key = contest.subject.key
            if forced.get(key, forced.get(op_of(key), requested)) == "cudnn":
                _require_right(contest, "cudnn", cache)
        if requested == "auto":
            decisions += _hold(contests, decisions, cache, timer)
    return Choice(tuple(decisions))


def _forced(backends: Mapping[str, str]) -> list[Decision]:
    decisions = [Decision(Subject(key), backend, "forced") for key, backend in backends.items()]
    for decision in decisions:
        logger.info("autotune: %s", decision)
    return decisions


def _require_right(contest: Contest, backend: str, cache: TuningCache) -> None:
    """RuntimeError where `backend` is wrong or fails; the cache keeps what was found. Where it cannot run
    here at all, choose_ops says so."""
    if backend not in contest.contenders:
        return
    trials = Trials(cache)
    known = trials.verdict(contest.subject, backend) or cache.find(contest.subject)
    if known is None:
        generator = torch.Generator(contest.device).manual_seed(SEED)
        with torch.no_grad(), _current(contest.device), trials.running(contest.subject, backend):
            problem = _attempt(contest, backend, lambda: _problem(contest, backend, generator), trials)
        known = trials.judge(contest.subject, backend, problem)
    if backend in known.refused:
        raise RuntimeError(
            f"backend {backend!r} is asked for and refused for {contest.subject}: {known.refused[backend]}; "
            "use 'auto', which leaves it out there"
        )


def cached_decisions(device: torch.device | str, cache_path: str | Path | None = None) -> list[Decision]:
    """What the cache file holds for this machine, for a report; str() of one is a line."""
    return TuningCache(Path(cache_path or default_cache_path()), describe_machine(device)).decisions()


def _hold(
    contests: Sequence[Contest], made: Sequence[Decision], cache: TuningCache, timer: Timer | None
) -> list[Decision]:
    """Decisions of the contests that nothing in `made` settles; each new one goes into the cache at once, so
    that a start which is broken off need not begin anew."""
    settled = {decision.subject.key for decision in made}
    decisions = []
    trials = Trials(cache)
    is_told = timer is not None
    for contest in contests:
        key = contest.subject.key
        if key in settled or op_of(key) in settled:
            continue
        if len(contest.contenders) == 1:
            decisions.append(Decision(contest.subject, contest.default, "the only one that runs here"))
            continue
        decision = cache.find(contest.subject)
        if decision is None:
            if not is_told:
                logger.warning(_PATIENCE, contest.device)
                is_told = True
            logger.info("autotune: measures %s", contest.subject)
            untried = probe_contenders(contest, trials)
            decision = decide(contest, timer, trials, untried)
            if not untried:  # else the next start tries again
                cache.store([decision])
        logger.info("autotune: %s", decision)
        decisions.append(decision)
    return decisions


def decide(
    contest: Contest,
    timer: Timer | None = None,
    trials: Trials | None = None,
    left_out: Mapping[str, str] | None = None,
) -> Decision:
    """Check and time the contenders of one contest, and choose.

    timer: replaces the CUDA clock. trials: what is known of contenders that did not come back, and keeps it.
    left_out: why by contenders that are not to be run.
    Raises RuntimeError where all of them fail or are wrong, LostDeviceError where one breaks the device.
    """
    device = contest.device
    refused = dict(left_out or {}) | (trials.refused(contest.subject) if trials else {})
    with torch.no_grad(), _current(device):
        samplers = _prepare(contest, timer or graph_sampler, refused, trials)
        times = _sample(contest, samplers, refused, trials)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if not times:
        raise RuntimeError(
            f"every backend of {contest.subject} fails: {refused}; turn autotune off and choose one by name"
        )
    backend, reason = choose(times, contest.default)
    notes = [reason, *(f"{name} refused: {problem}" for name, problem in refused.items())]
    return Decision(contest.subject, backend, "; ".join(notes), times, refused)


def _current(device: torch.device) -> contextlib.AbstractContextManager[None]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _prepare(
    contest: Contest, timer: Timer, refused: dict[str, str], trials: Trials | None
) -> dict[str, Sampler]:
    """What samples each contender that is right; why others are not goes into `refused`."""
    generator = torch.Generator(contest.device).manual_seed(SEED)
    on_cuda = contest.device.type == "cuda"
    count = count_cold_sets(contest.device, contest.set_bytes) if on_cuda else 1
    sets = [contest.make_inputs(generator) for _ in range(count)]
    samplers: dict[str, Sampler] = {}
    for name, run in contest.contenders.items():
        if name in refused:
            continue

        def first_run(name: str = name, run: Callable[..., object] = run) -> str:
            problem = _problem(contest, name, generator)
            if not problem:
                sampler = timer(run, sets)
                sampler()
                samplers[name] = sampler
            return problem

        with trials.running(contest.subject, name) if trials else contextlib.nullcontext():
            problem = _attempt(contest, name, first_run, trials)
        if problem:
            refused[name] = problem
    return samplers


def _attempt(contest: Contest, name: str, run: Callable[[], str], trials: Trials | None) -> str:
    """Why a contender is refused: what `run` returns, or raises. LostDeviceError where the device is lost."""
    try:
        return run()
    # a launcher or a compiler may raise anything (KeyError, AssertionError), and whatever it is, the other
    # contenders can do the work: broad on purpose, and the reason is kept
    except Exception as error:  # noqa: BLE001
        problem = f"{type(error).__name__}: {str(error).strip()[:200]}"
        if is_lost(contest.device, error):
            if trials:
                trials.judge(contest.subject, name, f"it broke the device: {problem}")
            raise LostDeviceError(contest.subject, name, problem) from error
        return problem


def _problem(contest: Contest, name: str, generator: torch.Generator) -> str:
    """Why the results of a contender are wrong, or ""."""
    return _error_of(contest, contest.contenders[name], contest.make_inputs(generator))


def _sample(
    contest: Contest, samplers: Mapping[str, Sampler], refused: dict[str, str], trials: Trials | None
) -> dict[str, tuple[float, float]]:
    """Median and interquartile spread by contender; every round samples all, each round the other way. One
    that fails goes into `refused`."""
    samples: dict[str, list[float]] = {name: [] for name in samplers}

    def sample(name: str) -> str:
        samples[name].append(samplers[name]())
        return ""

    for round_index in range(WARM_UP_SAMPLES + SAMPLES):
        order = list(samplers) if round_index % 2 else list(reversed(samplers))
        for name in order:
            if name in refused:
                continue
            problem = _attempt(contest, name, lambda name=name: sample(name), trials)
            if problem:
                refused[name] = problem
    return {
        name: _summary(values[WARM_UP_SAMPLES:]) for name, values in samples.items() if name not in refused
    }


def _summary(values: list[float]) -> tuple[float, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, high - low


def choose(times: Mapping[str, tuple[float, float]], default: str) -> tuple[str, str]:
    """The winner and why, from median and spread by contender (the rule is at the top)."""
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


def _error_of(contest: Contest, run: Callable[..., object], arguments: Arguments) -> str:
    """Why the results of `run` are wrong, or "" where they are right: against the reference in float64."""
    if contest.check is not None:
        return contest.check(run, arguments)
    part = contest.part(arguments)  # before the call, which may write into its arguments
    expected = _results(contest, contest.meaning, _map(Tensor.clone, part))
    truth = _results(contest, contest.meaning, _map(_widened, part))
    found = _results(contest, run, arguments)
    for index, (ours, plain, exact) in enumerate(zip(found, expected, truth, strict=True)):
        if ours.shape != exact.shape:
            return f"result {index} is {tuple(ours.shape)}, not {tuple(exact.shape)}"
        error, usual = (_distance(result, exact) for result in (ours, plain))
        limit = ERROR_FACTOR * usual + torch.finfo(plain.dtype).eps / 16
        if not error <= limit:  # a NaN is refused as well
            return f"result {index} is {error:.2e} from float64, the limit is {limit:.2e}"
    return ""


def _results(contest: Contest, run: Callable[..., object], arguments: Arguments) -> tuple[Tensor, ...]:
    return contest.results(arguments, run(*arguments))


def _distance(result: Tensor, exact: Tensor) -> float:
    return ((result.double() - exact.double()).norm() / exact.double().norm()).item()


def _map(change: Callable[[Tensor], Tensor], arguments: Arguments) -> Arguments:
    return tuple(change(item) if isinstance(item, Tensor) else item for item in arguments)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor.clone()
