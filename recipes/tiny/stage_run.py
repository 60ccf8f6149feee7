"""One training stage with a budget of minutes: its clock, its JSON-lines log and its checkpoint."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from rfengine.checkpoint.pickle_file import load_pickle
from rfengine.files import replaced
from rfengine.limits import as_number

_SAVE_SECONDS = 60.0
_MOST_MINUTES = 100_000  # ten weeks
_LOG_STEPS = 25


class StageRun:
    """Counts the steps and the seconds of a stage over any number of restarts.

    `directory` receives `<stage>.jsonl`, one line every 25 steps, and `<stage>.pt`, the state to go on from.
    """

    def __init__(self, directory: Path, stage: str, minutes: float) -> None:
        minutes = as_number("minutes", minutes)
        if not 0 < minutes <= _MOST_MINUTES:
            raise ValueError(
                f"minutes is {minutes}; give the stage a budget above 0, of at most {_MOST_MINUTES}"
            )
        directory.mkdir(parents=True, exist_ok=True)
        self.stage = stage
        self.seconds = minutes * 60
        self.step = 0
        self.elapsed = 0.0
        self._log_path = directory / f"{stage}.jsonl"
        self._state_path = directory / f"{stage}.pt"
        self._last_tick = time.monotonic()
        self._last_save = time.monotonic()

    @property
    def progress(self) -> float:
        """Part of the budget that is used, from 0 to 1."""
        return min(1.0, self.elapsed / self.seconds)

    def learning_rate(self, peak: float, warm_up_steps: int = 100, warm_down: float = 0.5) -> float:
        """Linear warm-up, `peak`, then a linear fall to a fiftieth of it over the last `warm_down` of the
        budget."""
        fall = min(1.0, (1.0 - self.progress) / warm_down)
        return peak * min(1.0, (self.step + 1) / warm_up_steps) * max(0.02, fall)

    def tick(self, quiet: bool = False, **figures: float) -> None:
        """Count one step and, unless `quiet`, log its figures when it is time to."""
        now = time.monotonic()
        self.elapsed += now - self._last_tick
        self._last_tick = now
        self.step += 1
        if self.step % _LOG_STEPS == 0 and not quiet:
            self.log(**figures)

    def log(self, **figures: Any) -> None:
        """Append one line: step, seconds and the figures."""
        entry = {"step": self.step, "seconds": round(self.elapsed, 1)}
        entry |= {
            name: round(value, 5) if isinstance(value, float) else value for name, value in figures.items()
        }
        with self._log_path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def wants_save(self) -> bool:
        return time.monotonic() - self._last_save > _SAVE_SECONDS

    def save(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint with `state` and the counters, atomically."""
        with replaced(self._state_path) as partial:
            torch.save(state | {"step": self.step, "elapsed": self.elapsed}, partial)
        self._last_save = time.monotonic()

    def resume(self) -> dict[str, Any] | None:
        """The state of an earlier run, whose counters go on; None on a fresh start.

        Raises ValueError where the file is damaged or none of a StageRun.
        """
        if not self._state_path.exists():
            return None
        state = load_pickle(self._state_path)
        if not isinstance(state, dict) or not {"step", "elapsed"} <= state.keys():
            raise ValueError(f"{self._state_path} is no state of a stage; remove it to begin the stage anew")
        self.step, self.elapsed = state["step"], state["elapsed"]
        self._last_tick = time.monotonic()
        return state
