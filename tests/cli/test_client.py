"""client: a session on a real server, from its first message to its file, and each error a sentence."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from rfengine import cli
from rfengine.serving.access import ApiKeys
from support.models import small_pipeline
from support.outcome import fails, frame_count
from support.servers import RunningServer, running_server

KEY = "client-key-0123456789"


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[RunningServer]:
    data = tmp_path_factory.mktemp("client") / "data"
    with running_server(small_pipeline(), data, keys=ApiKeys([KEY])) as running:
        yield running


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_text(f"# of this test\n\n{KEY}\n")
    return path


def test_client_writes_the_length_asked_for_and_says_how_fast_it_came(
    server: RunningServer, key_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.mp4"
    options = ["--seconds", "3", "--switch", "1:a square", "--api-key-file", str(key_file)]
    assert cli.main(["client", server.url, "a circle", "-o", str(path), *options]) == 0
    printed = capsys.readouterr()
    assert re.search(r"48 frames; the first chunk after \d+ ms, .* finished", printed.out)
    assert re.search(r"switch-0 shows from chunk [1-4] on", printed.err)
    assert frame_count(path) == 48
    assert [each.name for each in tmp_path.iterdir() if each.name.startswith(".")] == []


def test_client_prints_the_address_of_the_playlist(
    server: RunningServer, key_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["-o", str(tmp_path / "out.mp4"), "--seconds", "1", "--hls", "--api-key-file", str(key_file)]
    assert cli.main(["client", server.url, "a circle", *arguments]) == 0
    expected = rf"HLS: {re.escape(server.url)}/v1/realtime/sessions/rt_[0-9a-f]+/hls/playlist.m3u8"
    assert re.search(expected, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (
            ["http://127.0.0.1:9", "a circle"],
            1,
            "127.0.0.1:9 cannot be reached .* is the server running there",
        ),
        (["ftp://host", "a circle"], 2, "the server is 'ftp://host'; give an address such as"),
        (["SERVER", "a circle"], 1, "refused .401 Unauthorized.; check the key and the address"),
        (["SERVER", "  "], 2, "the prompt ' ' is empty; give it at least one word"),
        (["SERVER", "a circle", "--api-key-file", "/nowhere/keys"], 2, "/nowhere/keys does not exist"),
        (["SERVER", "a circle", "--api-key-file", "/dev/null"], 2, "/dev/null is a device; give an ordinary"),
        (["SERVER", "a circle", "--switch", "x"], 2, "--switch is 'x'; use SECONDS:PROMPT"),
        (["SERVER", "a circle", "--switch", "-1:a"], 2, "--switch is '-1:a'; use SECONDS:PROMPT"),
        (["SERVER", "a circle", "--height", "33", "KEY"], 1, "the server refused: .*height.*multiple of 16"),
    ],
)
def test_client_says_what_is_wrong(
    server: RunningServer,
    key_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    message: str,
) -> None:
    given = [server.url if each == "SERVER" else each for each in arguments]
    if "KEY" in given:
        given[given.index("KEY") :] = ["--api-key-file", str(key_file)]
    error = fails(capsys, status, "client", *given, "-o", tmp_path / "out.mp4")
    assert re.search(message, error), error
    assert not (tmp_path / "out.mp4").exists()
