"""The programs in examples/, run as their users run them against a server."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rfengine.evaluation.video_file import open_video
from rfengine.serving.access import ApiKeys
from rfengine.serving.jobs.store import JOB_ID
from support.models import small_pipeline
from support.servers import RunningServer, running_server

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
KEY = "key-of-the-examples-0123"
SECONDS = 120


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    directory = tmp_path_factory.mktemp("data")
    with running_server(small_pipeline(), directory, keys=ApiKeys([KEY])) as running:
        yield running


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=SECONDS
    )


def frames_of(path: Path) -> int:
    return sum(len(batch) for batch in open_video(path).batches())


def test_realtime_client_writes_a_video_whose_prompt_changes(server: RunningServer, tmp_path: Path) -> None:
    output = tmp_path / "out.mp4"
    script = EXAMPLES / "realtime_client.py"
    ended = run(
        sys.executable, script, output, "--url", server.websocket_url, "--num-frames", "69", RFENGINE_KEY=KEY
    )
    assert ended.returncode == 0, ended.stderr
    assert re.search(r"^small: 48 x 32, 16 frames/s$", ended.stdout, re.MULTILINE)
    assert re.search(r"^square shows from chunk [3-5] on$", ended.stdout, re.MULTILINE)
    assert f"{output}: 69 frames in 6 chunks, finished" in ended.stdout
    assert frames_of(output) == 69


def test_shell_script_makes_a_video(server: RunningServer, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    output = tmp_path / "out.mp4"
    ended = run(EXAMPLES / "video_api.sh", output, RFENGINE_URL=server.url, RFENGINE_KEY=KEY)
    assert ended.returncode == 0, ended.stderr + ended.stdout
    assert re.fullmatch(rf"{re.escape(str(output))}: {JOB_ID.pattern}\n", ended.stdout)
    assert frames_of(output) == 64


def test_shell_script_says_what_is_wrong(server: RunningServer, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    output = tmp_path / "out.mp4"
    ended = run(EXAMPLES / "video_api.sh", output, RFENGINE_URL=server.url, RFENGINE_KEY="wrong")
    assert ended.returncode != 0
    assert '"unauthorized"' in ended.stderr
    assert not output.exists()


def test_openai_client_makes_a_video(server: RunningServer, tmp_path: Path) -> None:
    pytest.importorskip("openai")
    output = tmp_path / "out.mp4"
    script = EXAMPLES / "video_api_openai.py"
    ended = run(sys.executable, script, output, "--url", server.url, RFENGINE_KEY=KEY)
    assert ended.returncode == 0, ended.stderr
    assert f"{output}: 4 s of 48x32" in ended.stdout
    assert frames_of(output) == 64
