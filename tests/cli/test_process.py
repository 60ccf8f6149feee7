"""A process around a command: signals while packages are imported, pipes that close, letters and streams."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [
    "bench/compile_report", "bench/first_start", "bench/goals", "bench/gpu_gate", "bench/kernels",
    "bench/native_report", "bench/precision", "bench/roofline", "bench/serving", "bench/throughput",
    "bench/training_step", "bench/vae", "studies/toy/run",
]  # fmt: skip

# the command, which gets a signal when a package is imported, before its own code runs
STOPPED = """
import os, signal, sys

class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == {package!r}:
            os.kill(os.getpid(), signal.{signal})
            for _ in range(1000):  # the handler runs between two instructions
                pass

sys.meta_path.insert(0, Stop())
sys.argv = ["rfengine", "doctor"]
from rfengine.cli import main
sys.exit(main())
"""

# before it: what a hangup does, and a command that costs nothing
HANGUP = """
import signal, sys, types
signal.signal(signal.SIGHUP, signal.{action})
sys.modules["rfengine.cli.commands"] = types.SimpleNamespace(run_command=lambda _: print("it went on"))
"""

# the command, which prints a report that costs nothing
REPORTING = """
import runpy, sys
import rfengine.doctor

rfengine.doctor.examine = lambda *options: {"files": None}
sys.argv = ["rfengine", "doctor", "--json"]
runpy.run_module("rfengine.cli", run_name="__main__")
"""

# what a script or a command prints, in a process of its own
PRINTING = """
import sys
from rfengine.cli.process import run_process

def main():
    {body}

sys.exit(run_process(main, "name"))
"""


def run(code: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        **{"cwd": ROOT, "capture_output": True, "text": True, "timeout": 120, **options},
    )


@pytest.mark.parametrize(
    ("package", "name"),
    [
        *(("logging", name) for name in ("SIGINT", "SIGTERM", "SIGHUP")),
        ("torch", "SIGTERM"),
        ("tyro", "SIGINT"),
        ("rfengine.pipeline", "SIGINT"),
    ],
)
def test_signal_while_packages_are_imported_is_one_line_and_130(package: str, name: str) -> None:
    finished = run(STOPPED.format(package=package, signal=name))
    assert finished.stderr == "rfengine: error: interrupted; nothing was written\n"
    assert (finished.returncode, finished.stdout) == (130, "")


@pytest.mark.parametrize(
    ("action", "ending"),
    [
        ("SIG_IGN", (0, "it went on\n", "")),
        ("SIG_DFL", (130, "", "rfengine: error: interrupted; nothing was written\n")),
    ],
)
def test_hangup_ends_the_command_unless_it_is_ignored(action: str, ending: tuple[int, str, str]) -> None:
    """As under nohup. What runs the command, and takes seconds to import, is left out."""
    code = HANGUP.format(action=action) + STOPPED.format(package="rfengine.cli.terminal", signal="SIGHUP")
    finished = run(code)
    assert (finished.returncode, finished.stdout, finished.stderr) == ending


def closed_pipe() -> int:
    reading, writing = os.pipe()
    os.close(reading)
    return writing


@pytest.mark.parametrize("body", ["print('a')", "print('a', flush=True)", "print('a' * 100_000)"])
def test_closed_pipe_ends_it_without_a_word(body: str) -> None:
    pipe = closed_pipe()
    finished = run(PRINTING.format(body=body), capture_output=False, stdout=pipe, stderr=subprocess.PIPE)
    os.close(pipe)
    assert (finished.returncode, finished.stderr) == (141, "")


def test_closed_pipe_for_errors_is_no_traceback_either() -> None:
    pipe = closed_pipe()
    body = "print('a'); print('b', file=sys.stderr, flush=True)"
    finished = run(PRINTING.format(body=body), capture_output=False, stdout=subprocess.PIPE, stderr=pipe)
    os.close(pipe)
    assert (finished.returncode, finished.stdout) == (141, "a\n")


def test_command_whose_pipe_is_closed_says_nothing() -> None:
    pipe = closed_pipe()
    finished = run(REPORTING, capture_output=False, stdout=pipe, stderr=subprocess.PIPE)
    os.close(pipe)
    assert (finished.returncode, finished.stderr) == (141, "")


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_runs_in_such_a_process(name: str) -> None:
    ending = (ROOT / f"{name}.py").read_text().rpartition('if __name__ == "__main__":')[2]
    assert any(call in ending for call in ("run_process(main, ", "run_script(", "sys.exit(main())"))


def test_the_scripts_are_all_that_there_are() -> None:
    scripts = [path for folder in ("bench", "studies/toy") for path in (ROOT / folder).glob("*.py")]
    mains = {path.relative_to(ROOT).with_suffix("") for path in scripts if "__main__" in path.read_text()}
    assert {path.as_posix() for path in mains} == set(SCRIPTS)


def test_full_disk_under_the_output_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        finished = run(
            PRINTING.format(body="print('a')"), capture_output=False, stdout=full, stderr=subprocess.PIPE
        )
    message = "name: error: the output cannot be written (No space left on device)\n"
    assert (finished.returncode, finished.stderr) == (1, message)


@pytest.mark.parametrize("encoding", ["ascii", "ascii:strict", "latin-1"])
def test_letters_that_the_terminal_lacks_are_escaped(encoding: str) -> None:
    body = r"print('видео \udcff'); print('видео', file=sys.stderr)"
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    finished = run(PRINTING.format(body=body), env=environment)
    shown = r"\u0432\u0438\u0434\u0435\u043e"
    assert (finished.returncode, finished.stdout) == (0, shown + " \\udcff\n")
    assert finished.stderr == shown + "\n"


def test_lone_half_of_a_character_is_escaped_in_any_locale() -> None:
    for locale in ("C", "C.UTF-8", "POSIX"):
        environment = {**os.environ, "LC_ALL": locale, "LANG": locale}
        finished = run(PRINTING.format(body=r"print('\udcff')"), env=environment)
        assert (finished.returncode, finished.stdout) == (0, "\\udcff\n")


def test_process_without_streams_opens_no_file_in_their_place(tmp_path: Path) -> None:
    body = f"print('a'); print('b', file=sys.stderr); file = open({str(tmp_path / 'a')!r}, 'w'); "
    body += "file.write(str(file.fileno())); sys.stdout.write('lost')"
    shell = f'exec "{sys.executable}" -c "$CODE" <&- >&- 2>&-'
    environment = {**os.environ, "CODE": PRINTING.format(body=body)}
    finished = subprocess.run(["sh", "-c", shell], cwd=ROOT, env=environment, timeout=120)
    assert finished.returncode == 0 and int((tmp_path / "a").read_text()) > 2


def test_interrupted_script_is_one_line() -> None:
    finished = run(PRINTING.format(body=f"import os; os.kill(os.getpid(), {int(signal.SIGINT)})"))
    assert (finished.returncode, finished.stderr) == (130, "name: error: interrupted\n")
