"""The data directory of several replicas: one secret for all, which others cannot read."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rfengine.serving.replicas.shared_directory import SharedDirectory


def test_all_that_open_a_directory_at_once_have_one_secret(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        opened = list(pool.map(lambda _: SharedDirectory(tmp_path / "data"), range(16)))
    assert len({each.secret for each in opened}) == 1 and len(opened[0].secret) == 64
    folder = tmp_path / "data" / "replicas"
    assert [path.name for path in folder.iterdir()] == ["secret"]
    assert (folder / "secret").stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700


def test_another_directory_is_refused_by_its_token(tmp_path: Path) -> None:
    here, there = SharedDirectory(tmp_path / "here"), SharedDirectory(tmp_path / "there")
    here.require(here.token)
    assert here.token not in here.secret
    with pytest.raises(ValueError, match=f"is another directory .{here.token}. than .*{there.token}"):
        here.require(there.token)


def test_a_directory_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeError, match="cannot be used .Not a directory.; make it writable or choose"):
        SharedDirectory(tmp_path / "file")


def test_recordings_of_replicas_that_are_gone_are_removed(tmp_path: Path) -> None:
    shared = SharedDirectory(tmp_path)
    shared.remove_recordings(tuple)
    for name in ("aaaaaaaa", "bbbbbbbb"):
        (tmp_path / "recordings" / name).mkdir(parents=True)
        (tmp_path / "recordings" / name / "rt.mp4").write_bytes(b"video")
    (tmp_path / "recordings" / "rt_of_a_single_server.mp4").write_bytes(b"video")

    def kept() -> list[str]:
        (tmp_path / "recordings" / "cccccccc").mkdir()  # of one that joins just now
        return ["bbbbbbbb"]

    shared.remove_recordings(kept)
    assert sorted(path.name for path in (tmp_path / "recordings").iterdir()) == ["bbbbbbbb", "cccccccc"]


@pytest.mark.parametrize(
    ("mode", "text", "message"),
    [
        (0o640, "a" * 64, "secret has mode 640, so others can use the replicas; run: chmod 600"),
        (0o600, "", "secret is not 64 hexadecimal digits; remove it while no replica runs"),
        (0o600, "a" * 65, "is not 64 hexadecimal digits"),
        (0o600, "é" * 64, "is not 64 hexadecimal digits"),
    ],
)
def test_a_secret_that_is_none_or_that_others_read_is_refused(
    tmp_path: Path, mode: int, text: str, message: str
) -> None:
    (tmp_path / "replicas").mkdir()
    secret = tmp_path / "replicas" / "secret"
    secret.write_text(text)
    secret.chmod(mode)
    with pytest.raises(RuntimeError, match=message):
        SharedDirectory(tmp_path)
