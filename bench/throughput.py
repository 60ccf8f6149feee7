"""`python bench/throughput.py`: what `rfengine bench` runs, from a checkout that need not be installed."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # a checkout that need not be installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rfengine.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "bench")
    sys.exit(main())
