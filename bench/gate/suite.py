"""Part tests: tests/kernels and every test marked gpu, with whatever pytest there is, told one by one.

pytest runs inside the part's process, under settings of its own, since pyproject.toml asks for a newer pytest
than an image may have. Several such processes share the tests: on a GPU it is compiling that takes the time.
"""

from __future__ import annotations

import importlib.util
import re
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from gate.part import NOT_RUN, TOLD_CHARACTERS, Setting
from gate.record import Result

if TYPE_CHECKING:
    import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALL_FILE, SMALL_COUNT = "tests/kernels/test_flow_step.py", 3
PYTEST_ABSENT = "pytest is not installed; each kernel is checked before it is timed"
ABSENT_MODULE = re.compile(r"No module named '([\w.]+)'")
OWN_MODULES = ("rfengine", "gate", *(path.stem for path in (ROOT / "tests").iterdir()))
NO_TESTS, ALL_PASSED, SOME_FAILED = 5, 0, 1  # exit codes of pytest
USAGE_ERROR = "pytest ended with"


def run_tests(setting: Setting, tell: Callable[[Result], None]) -> None:
    """Run the tests of this shard that no earlier process began. Raises RuntimeError when the device is lost
    or pytest itself fails."""
    if importlib.util.find_spec("pytest") is None:
        tell({"begun": "pytest"})
        tell({"item": "pytest", "not_run": PYTEST_ABSENT})
        tell({"ended": "pytest", "state": NOT_RUN})
        return
    import pytest

    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder) / "pytest.ini"
        settings.write_text(pytest_settings())
        arguments = [
            "-c", str(settings), f"--rootdir={ROOT}", "-p", "no:cacheprovider", "--tb=short", "-q",
            "--continue-on-collection-errors", *map(str, files_of(setting)),
        ]  # fmt: skip
        if importlib.util.find_spec("xdist") is not None:  # it would start processes of its own
            arguments += ["-p", "no:xdist"]
        reporter = Reporter(setting, tell)
        code = int(pytest.main(arguments, plugins=[reporter]))
    if reporter.lost:
        raise RuntimeError(f"the device is lost: {reporter.lost}")
    if code not in (ALL_PASSED, SOME_FAILED, NO_TESTS, 2):  # 2: a file could not be read, which is told
        raise RuntimeError(f"{USAGE_ERROR} {code}")


def pytest_settings() -> str:
    """The settings of pyproject.toml without the version it asks for, as a pytest.ini with whole paths."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        own = tomllib.load(file)["tool"]["pytest"]["ini_options"]
    own.pop("minversion", None)
    own["pythonpath"] = [str(ROOT / path) for path in own.get("pythonpath", ())] + [str(ROOT)]
    own.pop("testpaths", None)
    lines = ["[pytest]"]
    for name, value in own.items():
        separator = " " if name == "addopts" else "\n    "
        text = separator.join(value) if isinstance(value, list) else str(value)
        lines.append(f"{name} = {separator if isinstance(value, list) else ''}{text}")
    return "\n".join(lines) + "\n"


def files_of(setting: Setting) -> Iterator[Path]:
    """Kernel tests, and files with a test marked gpu; not others, which may import what is not here."""
    if setting.small:
        yield ROOT / SMALL_FILE
        return
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        if path.parent.name == "kernels" or "mark.gpu" in path.read_text():
            yield path


class Reporter:
    """A plugin of pytest: chooses the tests of the shard and tells of each when it begins and ends."""

    def __init__(self, setting: Setting, tell: Callable[[Result], None]) -> None:
        self.lost = ""
        self._setting, self._tell = setting, tell
        self._state = ""
        self._told: Result = {}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Those marked gpu come first: they run nowhere else."""
        wanted = [item for item in items if "gpu" in item.keywords or "/kernels/" in item.path.as_posix()]
        wanted.sort(key=lambda item: "gpu" not in item.keywords)
        first, count = self._setting.shard
        chosen = wanted[first::count]
        if self._setting.small:
            chosen = [item for item in wanted if "gpu" not in item.keywords][:SMALL_COUNT]
        if not any(item.nodeid in self._setting.taken for item in chosen):  # the first process of this shard
            self._tell({"chosen": len(chosen)})
        items[:] = [item for item in chosen if item.nodeid not in self._setting.taken]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that could not be read; the first process alone tells of it."""
        if not report.failed or self._setting.shard[0] or report.nodeid in self._setting.taken:
            return
        text = str(report.longrepr)
        absent = ABSENT_MODULE.search(text)
        foreign = absent and absent[1].split(".")[0] not in OWN_MODULES
        self._tell({"begun": report.nodeid})
        if foreign:
            self._tell({"item": report.nodeid, "not_run": f"{absent[1]} is not installed"})
        else:
            self._tell({"item": report.nodeid, "failed": text.strip()[-TOLD_CHARACTERS:]})
        self._tell({"ended": report.nodeid, "state": NOT_RUN if foreign else "failed"})

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._state, self._told = "passed", {}
        self._tell({"begun": nodeid})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            text = str(report.longrepr)
            absent = ABSENT_MODULE.search(text)
            if absent and absent[1].split(".")[0] not in OWN_MODULES:
                self._state, self._told = NOT_RUN, {"not_run": f"{absent[1]} is not installed"}
            else:
                self._state, self._told = "failed", {"failed": text.strip()[-TOLD_CHARACTERS:]}
        elif report.skipped and self._state == "passed":
            reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self._state, self._told = "skipped", {"skipped": str(reason)[:TOLD_CHARACTERS]}

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        if self._told:
            self._tell({"item": nodeid, **self._told})
        self._tell({"ended": nodeid, "state": self._state})

    def pytest_runtest_teardown(self, item: pytest.Item, nextitem: pytest.Item | None) -> None:
        """After an illegal access every later test would fail too: stop, so that a fresh process goes on."""
        if self._setting.small:
            return
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            self.lost = str(error).splitlines()[0]
            item.session.shouldstop = "the device is lost"
