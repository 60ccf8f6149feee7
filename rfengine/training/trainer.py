"""Trainer: runs the steps of a stage, and logs, samples, saves and resumes."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Protocol

from rfengine.config_json import to_dict
from rfengine.stop_signals import stop_signals
from rfengine.training.checkpoints import TrainingCheckpoints, TrainState
from rfengine.training.learner import Figures
from rfengine.training.log import TrainingLog
from rfengine.training.parallel import Ranks
from rfengine.training.stages import TrainingStage

logger = logging.getLogger(__name__)
_MAY_DIFFER = (
    "steps", "save_every", "sample_every", "keep", "parallel", "shard_ranks", "offload_teacher",
    "checkpointing",
)  # fmt: skip


class RunConfig(Protocol):
    """A frozen dataclass that describes a run; a run resumes only with equal values, _MAY_DIFFER aside."""

    name: str
    steps: int
    save_every: int
    keep: int


class Trainer:
    """One training in one directory: `log.jsonl`, `tensorboard/`, `samples/` and `checkpoints/`.

    It continues from the newest checkpoint there that is whole. Nothing else may train there at the same
    time: the caller holds checkpoints.locked_run.
    sample(step, directory) writes videos of the moving average every config.sample_every steps; every rank
    calls it, since each may hold a share of the weights. on_step(step, figures) sees what was logged; when it
    returns a sentence the run is saved and stops with it (a reward guard does that).
    """

    def __init__(
        self,
        config: RunConfig,
        stage: TrainingStage,
        directory: Path,
        ranks: Ranks,
        sample: Callable[[int, Path], None] | None = None,
        on_step: Callable[[int, Figures], str | None] | None = None,
    ) -> None:
        self.config, self.stage, self.directory, self.ranks = config, stage, directory, ranks
        self._sample, self.on_step = sample, on_step
        self.state = TrainState(stage)
        identity = {name: value for name, value in to_dict(config).items() if name not in _MAY_DIFFER}
        self.checkpoints = TrainingCheckpoints(directory, identity, config.keep)
        if self.checkpoints.restore(self.state):
            logger.info("resumed at step %d of %d", self.state.step, config.steps)
        self._stop = ""
        self.interrupted = False  # by a signal, once run() has returned

    def run(self) -> str:
        """Train to the configured step.

        Returns why it ended: "" when all steps are done; after a signal to stop, or when on_step says so, a
        sentence, and a checkpoint of the last whole step is there to resume from.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        with self._signals(), ExitStack() as stack:
            log = None
            if self.ranks.rank == 0:
                log = TrainingLog(self.directory, self.config.name, self.config.steps, self.state.step)
                stack.callback(log.close)
            while self.state.step < self.config.steps and not self._stop:
                self._step(log)
            self.checkpoints.save(self.state, wait=True)
        return self._stop

    def finish(self, how: str) -> None:
        """run() to the configured step. Raises KeyboardInterrupt after a signal, RuntimeError when on_step
        ends the run. how: the end of "resume to go on ..." in the message."""
        if reason := self.run():
            message = f"{reason} {how}, at step {self.state.step} of {self.config.steps}"
            raise KeyboardInterrupt(message) if self.interrupted else RuntimeError(message)

    def _step(self, log: TrainingLog | None) -> None:
        started = time.perf_counter()
        figures = self.stage.update(self.state.step)
        self.state.step += 1
        step = self.state.step
        if log is not None:
            log.write(step, figures | {"seconds": time.perf_counter() - started})
        reason = self.on_step(step, figures) if self.on_step is not None else None
        self._stop = self.ranks.agreed(reason or self._stop)
        self.checkpoints.finish_if_written()
        if step % self.config.save_every == 0 and step < self.config.steps:
            self.checkpoints.save(self.state)
        every = self.config.sample_every if self._sample is not None else 0
        if every and step % every == 0:
            self._sample(step, self.directory / "samples")
            self.ranks.meet(patient=True)  # the first rank makes them, for minutes

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C, SIGTERM and SIGHUP end the run after the step that is being made."""

        def stop(number: int, _: FrameType | None) -> None:
            self.interrupted = True
            self._stop = f"stopped by {signal.Signals(number).name}; resume to go on"

        before = {number: signal.signal(number, stop) for number in stop_signals()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
