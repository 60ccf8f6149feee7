"""The fleet on paper, checked by simulation.

python -m studies.fleet.measure                    # measures tiny on this machine, before anything else
python -m studies.fleet.run                        # every scenario, the tables of docs/scaling.md, the plot
python -m studies.fleet.run --scenario loss day    # these alone; the others are as they were kept
python -m studies.fleet.run --tables               # tables and plot of what is kept
python -m studies.fleet.run --scenario loss --seed 3 --results DIRECTORY    # beside what is kept
The same seed gives the same numbers.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

from rfengine.cli.process import run_script
from rfengine.files import require_writable
from rfengine.limits import Range, check_options
from studies.fleet.measure import RESULTS
from studies.fleet.plots import draw
from studies.fleet.scenarios import SCENARIOS, Record
from studies.fleet.tables import place, tables
from studies.toy.record import write_record

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "scaling.md"
Scenario = Literal["tiny", "card", "admission", "day", "loss", "ten_thousand"]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Simulate the fleet."""

    scenario: tuple[Scenario, ...] = ()
    """Those that are simulated; all where none is given."""
    seed: Annotated[int, Range(0, 2**31 - 1)] = 0
    """Of every draw."""
    tables: bool = False
    """Simulate nothing; write tables and plot of what is kept."""
    results: Path = RESULTS
    """Of the records and the plot; the document is written where it is the study's own."""


def run(options: RunOptions) -> None:
    check_options(options)
    require_writable(options.results / "fleet.png", "--results")
    for name in () if options.tables else options.scenario or SCENARIOS:
        started = time.perf_counter()
        record = {**_origin(name, options.seed), **SCENARIOS[name](options.seed)}
        write_record(options.results / f"{name}.json", record)
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    is_own = options.results.resolve() == RESULTS
    missing = missing_records(options.results)
    if missing and not is_own:
        print(f"no plot: {options.results} has no record of {', '.join(missing)}")
        return
    records = read_records(options.results)
    print(draw(records, options.results / "fleet.png"))
    if is_own:
        DOCUMENT.write_text(place(DOCUMENT.read_text(encoding="utf-8"), tables(records)), encoding="utf-8")
        print(DOCUMENT)


def _origin(name: str, seed: int) -> Record:
    """What made a record."""
    command = f"python -m studies.fleet.run --scenario {name} --seed {seed}"
    versions = {"python": platform.python_version(), "simpy": version("simpy")}
    return {"scenario": name, "seed": seed, "command": command, "versions": versions}


def missing_records(results: Path) -> list[str]:
    """The scenarios that are not kept there."""
    return [name for name in SCENARIOS if not (results / f"{name}.json").exists()]


def read_records(results: Path) -> dict[str, Record]:
    """The kept scenarios by name. Raises ValueError where one is missing."""
    missing = missing_records(results)
    if missing:
        raise ValueError(
            f"{results} has no record of {', '.join(missing)}; run python -m studies.fleet.run --scenario "
            f"{' '.join(missing)}"
        )
    return {name: json.loads((results / f"{name}.json").read_text()) for name in SCENARIOS}


if __name__ == "__main__":
    sys.exit(run_script("studies.fleet.run", RunOptions, run))
