"""The results of a gate so far, in a JSON file that is whole at every moment."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

Result = dict[str, Any]
BEGUN = "begun"


class Record:
    """Results by part. Every part has `items`, the state of each by name, `results`, in the order told, and,
    where it came to tell that, how many items were `chosen` to be run.

    The states: "begun", "done", "failed", "passed", "skipped", "not run", and "broken" for one whose process
    ended in it. Several threads may add at once.
    """

    def __init__(self, path: Path, head: Result) -> None:
        self.path = path
        self.results: Result = head | {"parts": {}}
        self._lock = threading.Lock()
        self._save()  # what an earlier run left under this name is no result of this one

    def part(self, name: str) -> Result:
        return self.results["parts"].setdefault(name, {"items": {}, "results": []})

    def add(self, part: str, result: Result) -> None:
        with self._lock:
            self.part(part)["results"].append(result)
            self._save()

    def mark(self, part: str, item: str, state: str) -> None:
        with self._lock:
            self.part(part)["items"][item] = state
            self._save()

    def count(self, part: str, items: int) -> None:
        """So many items more are to be run."""
        with self._lock:
            self.part(part)["chosen"] = self.part(part).get("chosen", 0) + items
            self._save()

    def note(self, **values: Any) -> None:
        with self._lock:
            self.results |= values
            self._save()

    def _save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_name(self.path.name + ".unfinished")
        unfinished.write_text(json.dumps(self.results, indent=1, allow_nan=False) + "\n")
        unfinished.replace(self.path)


def read_line(line: str) -> Result | None:
    """The result on a line of a part's process; None for anything else. NaN and infinities become null,
    since JSON has none."""
    try:
        result = json.loads(line, parse_constant=lambda _: None)
    except ValueError:
        return None
    return result if isinstance(result, dict) else None
