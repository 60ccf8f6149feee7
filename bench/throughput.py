"""`python bench/throughput.py`: what `rfengine bench` runs, from a checkout that need not be installed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rfengine.benchmark.command_line import parse_options
from rfengine.benchmark.options import ThroughputOptions
from rfengine.benchmark.throughput import run
from rfengine.cli.exit_status import CALLER_ERROR, OTHER_ERROR
from rfengine.cli.process import run_process


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        return run(parse_options(ThroughputOptions, arguments))
    except BrokenPipeError:  # a pipe that its reader closed is no failure to tell of
        raise
    except (ValueError, RuntimeError, OSError) as error:
        print(f"throughput: {' '.join(str(error).split())}", file=sys.stderr)
        return CALLER_ERROR if isinstance(error, ValueError) else OTHER_ERROR


if __name__ == "__main__":
    sys.exit(run_process(main, "throughput"))
