"""Writes bench/results/README.md from the JSON files of gpu_gate.py that are committed beside it.

python bench/results_table.py            # write it
python bench/results_table.py --check    # exit with 1 where it is not what the files say
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout that is not installed

from gate.goals import Goal, judge
from gate.summary import counts_of, failures_of

from rfengine.cli.process import run_process

RESULTS = Path(__file__).resolve().parent / "results"
HEAD = """# GPU results

Written by `python bench/results_table.py` from the JSON files beside it; each is one run of
`python bench/gpu_gate.py --minutes 8 --out bench/results/DATE-GPU.json` and holds every figure of it.
"""
NONE = "\nNo run on a GPU is recorded yet: every GPU figure of this project is unmeasured.\n"
CALLER_ERROR = 2


def read_runs(folder: Path) -> dict[str, dict[str, Any]]:
    """The runs by file name, newest first. Raises ValueError for a file that is none, or a self-check."""
    runs = {}
    for path in folder.glob("*.json"):
        try:
            run = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path.name} is no JSON: {error}") from error
        if not isinstance(run, dict) or not isinstance(run.get("parts"), dict) or "date" not in run:
            raise ValueError(f"{path.name} holds no results of gpu_gate.py; keep other files elsewhere")
        if run.get("self_check"):
            raise ValueError(f"{path.name} is a self-check, whose figures count for nothing; remove it")
        runs[path.name] = run
    return dict(sorted(runs.items(), key=lambda item: (item[1]["date"], item[0]), reverse=True))


def render(runs: dict[str, dict[str, Any]]) -> str:
    if not runs:
        return HEAD + NONE
    return HEAD + "".join(_section(name, run) for name, run in runs.items())


def _section(name: str, run: dict[str, Any]) -> str:
    failures = failures_of(run)
    lines = [
        "",
        f"## {run['device']}, {run['date']}",
        "",
        f"[{name}]({name}): commit `{run['commit']}`, torch {run['torch']}, Triton {run['triton']}, CUDA "
        f"{run['cuda']}, cuDNN {run['cudnn']}, driver {run['driver']}; {run['minutes']:g} minutes. Before: "
        f"{_state(run.get('before', {}))}; after: {_state(run.get('after', {}))}.",
        "",
        "| issue | goal | asked | reached | |",
        "| --- | --- | --- | --- | --- |",
        *map(_row, judge(run)),
        "",
        *(f"- {part}: {counts_of(told)}" for part, told in run["parts"].items()),
        *(["", f"{len(failures)} failures; the first: {_plain(failures[0])}"] if failures else []),
    ]
    return "\n".join(lines) + "\n"


def _row(goal: Goal) -> str:
    reached = "" if goal.reached is None else f"{goal.reached:.3f}"
    told = {True: "met", False: "NOT met", None: "not measured"}[goal.met]
    bound = "at least" if goal.at_least else "at most"
    note = f" ({_plain(goal.note)})" if goal.note else ""
    return f"| {goal.issue} | {goal.name} | {bound} {goal.asked:g} | {reached} | {told}{note} |"


def _state(state: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in state.items()) or "unknown"


def _plain(text: str) -> str:
    return " ".join(text.split()).replace("|", "/")[:200]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the JSON files are")
    options = parser.parse_args()
    try:
        text = render(read_runs(options.folder))
    except ValueError as error:
        print(f"results_table: {error}", file=sys.stderr)
        return CALLER_ERROR
    readme = options.folder / "README.md"
    if not options.check:
        readme.write_text(text)
        return 0
    if not readme.exists() or readme.read_text() != text:
        print("results_table: README.md is out of date; run python bench/results_table.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run_process(main, "results_table"))
