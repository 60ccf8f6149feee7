"""The video job API: what OpenAI's own client sees, and what is refused and how."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from rfengine import Pipeline
from rfengine.serving.access import ApiKeys
from rfengine.serving.jobs.requests import JobLimits
from rfengine.serving.jobs.store import JobStore
from support.models import small_pipeline
from support.sessions import WAIT, eventually
from support.video_api_app import VideoServer, assert_same_video, decoded, video_server

pytest.importorskip("python_multipart", reason="forms are read with python-multipart")
openai = pytest.importorskip("openai")
pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")

KEYS = ("key-of-the-first-client", "key-of-the-second-client")
LONG = 4000  # frames; takes seconds
LIMITS = JobLimits(max_prompt=100, max_frames=LONG, max_waiting=20)


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return small_pipeline()


@pytest.fixture(scope="module")
def server(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VideoServer]:
    with video_server(pipeline, tmp_path_factory.mktemp("server") / "jobs", LIMITS) as running:
        yield running


@pytest.fixture
def client(server: VideoServer) -> Iterator[Any]:
    with client_of(server) as connected:
        yield connected
        for video in connected.videos.list(limit=100):
            connected.videos.delete(video.id)


def client_of(server: VideoServer, key: str = "none") -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=WAIT)


@pytest.fixture
def http(server: VideoServer) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=server.url, timeout=WAIT) as connected:
        yield connected


@contextmanager
def refused(kind: type[Exception], code: str, param: str | None = None) -> Iterator[None]:
    """The block raises an error of OpenAI's client, with that code."""
    with pytest.raises(kind) as raised:
        yield
    assert (raised.value.code, raised.value.param) == (code, param)


def when(client: Any, video_id: str, *statuses: str) -> Any:
    eventually(lambda: client.videos.retrieve(video_id).status in statuses)
    return client.videos.retrieve(video_id)


# The official client


def test_official_client_creates_polls_downloads_lists_and_deletes(
    client: Any, pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rfengine.serving.jobs.runner._REPORT_S", 0.02)
    first = client.videos.create(prompt="a square", seconds="4", size="64x32", model="small")
    video = client.videos.create(prompt="a red circle", seconds="20", extra_body={"seed": 7})
    assert (video.object, video.status, video.progress, video.error) == ("video", "queued", 0, None)
    assert (video.size, video.seconds, video.model, video.prompt) == ("48x32", "20", "small", "a red circle")
    assert (video.seed, video.num_frames, video.fps) == (7, 320, 16)
    seen = [video]
    while seen[-1].status in ("queued", "in_progress"):
        seen.append(client.videos.retrieve(video.id))
        time.sleep(0.01)
    order = ["queued", "in_progress", "completed"]
    assert list(dict.fromkeys(each.status for each in seen)) == order
    progress = [each.progress for each in seen]
    assert progress == sorted(progress) and len(set(progress)) > 3 and progress[-1] == 100
    assert seen[-1].completed_at >= seen[-1].created_at and seen[-1].expires_at > seen[-1].completed_at

    content = client.videos.download_content(video.id)
    pipeline.generate("a red circle", num_frames=320, seed=7).save(tmp_path / "own.mp4")
    assert_same_video(content.read(), tmp_path / "own.mp4")
    assert [each.id for each in client.videos.list()] == [video.id, first.id]
    assert [each.id for each in client.videos.list(order="asc", limit=1)] == [first.id, video.id]
    assert decoded(client.videos.download_content(first.id).read()).shape == (64, 32, 64, 3)

    deleted = client.videos.delete(video.id)
    assert (deleted.id, deleted.object, deleted.deleted) == (video.id, "video.deleted", True)
    for call in (client.videos.retrieve, client.videos.download_content, client.videos.delete):
        with refused(openai.NotFoundError, "not_found"):
            call(video.id)


def test_official_client_deletes_all_while_it_lists(client: Any) -> None:
    for seed in range(7):
        client.videos.create(prompt="a square", extra_body={"num_frames": 1, "seed": seed})
    for video in client.videos.list(limit=2):
        client.videos.delete(video.id)
    assert client.videos.list().data == []


def test_official_client_polls_by_itself(client: Any) -> None:
    video = client.videos.create_and_poll(prompt="a square", seconds="4", poll_interval_ms=20)
    assert (video.status, video.progress) == ("completed", 100)


def test_official_client_knows_the_model(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["small"]
    assert client.models.retrieve("small").object == "model"
    with refused(openai.NotFoundError, "model_not_found"):
        client.models.retrieve("org/other")


def test_deleted_video_is_stopped_while_it_is_made(client: Any, server: VideoServer) -> None:
    video = client.videos.create(prompt="a square", extra_body={"num_frames": LONG})
    when(client, video.id, "in_progress")
    session = server.runner._running[video.id]
    client.videos.delete(video.id)
    eventually(lambda: not any(server.service.counts().values()))
    assert session.frames < LONG
    assert not list(server.store._directory.glob("*.mp4*"))


def test_failed_video_says_why(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(Pipeline, "stream", lambda *_, **__: 1 / 0)
        video = client.videos.create(prompt="a square")
        video = when(client, video.id, "failed")
    assert video.error.code == "chunk_failed"
    assert video.completed_at is None
    with refused(openai.ConflictError, "job_failed"):
        client.videos.download_content(video.id)


# Requests


def test_form_and_json_ask_for_the_same_video(http: httpx2.Client, client: Any) -> None:
    fields = {
        "prompt": "a red circle ☂", "model": "small", "seconds": "2.5", "size": "64x32",
        "seed": "9223372036854775807", "fps": "16", "num_frames": "40", "num_inference_steps": "2",
        "guidance_scale": "1.0", "negative_prompt": "",
    }  # fmt: skip
    typed = fields | {
        "seed": 2**63 - 1, "fps": 16, "num_frames": 40, "num_inference_steps": 2, "guidance_scale": 1,
    }  # fmt: skip
    form = http.post("/v1/videos", files={name: (None, value) for name, value in fields.items()})
    numbers = http.post("/v1/videos", json=typed | {"seconds": 2.5, "input_reference": None})
    texts = http.post("/v1/videos", json=typed)
    answers = [answer.json() for answer in (form, numbers, texts)]
    for answer in answers:
        assert answer.pop("id").startswith("video_") and answer.pop("created_at") <= time.time()
    assert answers[0] == answers[1] == answers[2]
    assert answers[0] == {
        "object": "video", "status": "queued", "progress": 0, "completed_at": None, "expires_at": None,
        "model": "small", "prompt": "a red circle ☂", "seconds": "2.5", "size": "64x32", "error": None,
        "remixed_from_video_id": None, "seed": 2**63 - 1, "num_frames": 40, "fps": 16,
    }  # fmt: skip


@pytest.mark.parametrize(
    "given, num_frames, seconds",
    [
        ({}, 81, "5.0625"),
        ({"seconds": "4"}, 64, "4"),
        ({"seconds": 0.01}, 1, "0.0625"),
        ({"num_frames": 10}, 10, "0.625"),
        ({"num_frames": 64, "seconds": "4"}, 64, "4"),
    ],
)
def test_length_is_given_in_seconds_or_in_frames(
    http: httpx2.Client, client: Any, given: dict[str, Any], num_frames: int, seconds: str
) -> None:
    video = http.post("/v1/videos", json={"prompt": "a square", **given}).json()
    assert (video["num_frames"], video["seconds"]) == (num_frames, seconds)


WRONG = [
    ({"prompt": ""}, 400, "invalid_value", "prompt"),
    ({"prompt": "  "}, 400, "invalid_value", "prompt"),
    ({"prompt": "a\0b"}, 400, "invalid_value", "prompt"),
    ({"prompt": "\ud800"}, 400, "invalid_value", "prompt"),
    ({"prompt": "x" * 101}, 400, "invalid_value", "prompt"),
    ({"prompt": "x" * 10_001}, 400, "invalid_value", "prompt"),
    ({"prompt": 3}, 400, "invalid_value", "prompt"),
    ({"prompt": None}, 400, "invalid_value", "prompt"),
    ({"model": "sora-2"}, 404, "model_not_found", "model"),
    ({"seconds": "0"}, 400, "invalid_value", "seconds"),
    ({"seconds": -1}, 400, "invalid_value", "seconds"),
    ({"seconds": "four"}, 400, "invalid_value", "seconds"),
    ({"seconds": 1e999}, 400, "invalid_value", "seconds"),
    ({"seconds": "100000"}, 400, "invalid_value", "seconds"),
    ({"seconds": "251"}, 400, "invalid_value", "seconds"),
    ({"seconds": True}, 400, "invalid_value", "seconds"),
    ({"num_frames": 0}, 400, "invalid_value", "num_frames"),
    ({"num_frames": LONG + 1}, 400, "invalid_value", "num_frames"),
    ({"num_frames": 10**40}, 400, "invalid_value", "num_frames"),
    ({"num_frames": "10"}, 400, "invalid_value", "num_frames"),
    ({"num_frames": 65, "seconds": "4"}, 400, "invalid_value", "seconds"),
    ({"size": "48"}, 400, "invalid_value", "size"),
    ({"size": "48x32\n"}, 400, "invalid_value", "size"),
    ({"size": "-48x32"}, 400, "invalid_value", "size"),
    ({"size": "0x0"}, 400, "invalid_value", "size"),
    ({"size": "48x33"}, 400, "invalid_value", "size"),
    ({"size": "16000x16000"}, 400, "invalid_value", "size"),
    ({"size": "99999x16"}, 400, "invalid_value", "size"),
    ({"seed": -1}, 400, "invalid_value", "seed"),
    ({"seed": 2**63}, 400, "invalid_value", "seed"),
    ({"seed": 1.5}, 400, "invalid_value", "seed"),
    ({"fps": 24}, 400, "invalid_value", "fps"),
    ({"num_inference_steps": 50}, 400, "invalid_value", "num_inference_steps"),
    ({"guidance_scale": 5.0}, 400, "invalid_value", "guidance_scale"),
    ({"negative_prompt": "blurry"}, 400, "invalid_value", "negative_prompt"),
    ({"input_reference": {"image_url": "http://127.0.0.1/"}}, 400, "unsupported_field", "input_reference"),
    ({"input_reference": "/etc/passwd"}, 400, "unsupported_field", "input_reference"),
    ({"output_path": "/tmp"}, 400, "unknown_field", "output_path"),
    ({"\ud800": 1}, 400, "unknown_field", None),
    ({"x" * 1000: 1}, 400, "unknown_field", None),
]  # fmt: skip


@pytest.mark.parametrize("given, status, code, param", WRONG, ids=lambda value: repr(value)[:50])
def test_wrong_field_is_refused_by_name(
    http: httpx2.Client, server: VideoServer, given: dict[str, Any], status: int, code: str, param: str | None
) -> None:
    before = server.store.counts()
    answer = http.post(
        "/v1/videos",
        content=_json({"prompt": "a square", **given}),
        headers={"Content-Type": "application/json"},
    )
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["param"], error["retryable"]) == (code, param, False)
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 500
    assert sum(server.store.counts().values()) == sum(before.values())


def _json(values: object) -> bytes:
    return json.dumps(values).replace("Infinity", "1e999").encode()


@pytest.mark.parametrize(
    "kind, body, status, code",
    [
        ("application/json", b"", 400, "invalid_json"),
        ("application/json", b"{", 400, "invalid_json"),
        ("application/json", b"\xff", 400, "invalid_json"),
        ("application/json", b"[]", 400, "invalid_json"),
        ("application/json", b'{"prompt": "a", "prompt": "b"}', 400, "invalid_json"),
        ("application/json", b'{"prompt": "a", "seconds": NaN}', 400, "invalid_json"),
        ("application/json", b"[" * 100_000, 400, "invalid_json"),
        ("application/json", b'{"seed": ' + b"1" * 5000 + b"}", 400, "invalid_json"),
        ("text/plain", b"{}", 415, "unsupported_media_type"),
        ("", b"{}", 415, "unsupported_media_type"),
        ("application/x-www-form-urlencoded", b"prompt=a", 415, "unsupported_media_type"),
        ("multipart/form-data", b"", 400, "invalid_form"),
        ("multipart/form-data; boundary=", b"--", 400, "invalid_value"),
        ("multipart/form-data; boundary=b", b"--c\r\n\r\n", 400, "invalid_form"),
        ("multipart/form-data; boundary=b", b"--b\r\nX: form-data\r\n\r\nx", 400, "invalid_form"),
        ("multipart/form-data; boundary=b", b"", 400, "invalid_value"),
        ("application/json", b"x" * (2**20 + 1), 413, "body_too_large"),
    ],
)
def test_body_that_cannot_be_read_is_refused(
    http: httpx2.Client, kind: str, body: bytes, status: int, code: str
) -> None:
    answer = http.post("/v1/videos", content=body, headers={"Content-Type": kind})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_form_is_refused_for_files_repeats_and_large_fields(http: httpx2.Client, client: Any) -> None:
    def code(files: list[tuple[str, Any]]) -> str:
        answer = http.post("/v1/videos", files=files)
        assert answer.status_code == 400
        return answer.json()["error"]["code"]

    prompt = ("prompt", (None, "a square"))
    assert code([prompt, ("prompt", (None, "a circle"))]) == "invalid_form"
    assert code([prompt, ("prompt", ("a.txt", b"a circle"))]) == "invalid_form"
    assert code([("prompt", ("a.txt", b"a square"))]) == "unsupported_field"
    assert code([("prompt", (None, "x" * 70_000))]) == "invalid_form"
    assert code([prompt, *((f"x{number}", (None, "1")) for number in range(40))]) == "invalid_form"
    assert code([prompt, ("input_reference[image_url]", (None, "http://x/"))]) == "unsupported_field"
    assert code([prompt, ("seed", (None, "one"))]) == "invalid_value"
    with refused(openai.BadRequestError, "unsupported_field", "input_reference"):
        client.videos.create(prompt="a square", input_reference=b"a picture")


def test_queue_of_one_key_has_a_most(pipeline: Pipeline, tmp_path: Path) -> None:
    limits = JobLimits(max_frames=LONG, max_waiting=2)
    with (
        video_server(pipeline, tmp_path / "jobs", limits, ApiKeys(KEYS)) as server,
        client_of(server, KEYS[0]) as first,
        client_of(server, KEYS[1]) as second,
    ):
        running = first.videos.create(prompt="a square", extra_body={"num_frames": LONG})
        when(first, running.id, "in_progress")
        for _ in range(2):
            first.videos.create(prompt="a square")
        with refused(openai.RateLimitError, "too_many_jobs"):
            first.videos.create(prompt="a square")
        second.videos.create(prompt="a square")
        answer = httpx2.post(
            f"{server.url}/v1/videos",
            json={"prompt": "a square"},
            headers={"Authorization": f"Bearer {KEYS[0]}"},
        )
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "10")
        assert answer.json()["error"]["retryable"]


def test_key_sees_its_own_videos_alone(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rfengine.serving.jobs.runner._SWEEP_S", 600.0)  # a request wakes the runner
    with (
        video_server(pipeline, tmp_path / "jobs", LIMITS, ApiKeys(KEYS)) as server,
        client_of(server, KEYS[0]) as first,
        client_of(server, KEYS[1]) as second,
    ):
        video = first.videos.create(prompt="a secret", extra_body={"num_frames": 9})
        when(first, video.id, "completed")
        assert second.videos.list().data == []
        for call in (second.videos.retrieve, second.videos.download_content, second.videos.delete):
            with refused(openai.NotFoundError, "not_found"):
                call(video.id)
        assert decoded(first.videos.download_content(video.id).read()).shape == (9, 32, 48, 3)
        with client_of(server) as nobody, refused(openai.AuthenticationError, "unauthorized"):
            nobody.videos.list()


def test_full_disk_is_a_typed_error_and_passes(
    client: Any, http: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**30, 2**30, 0))
        answer = http.post("/v1/videos", json={"prompt": "a square"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (507, "disk_full")
    assert answer.json()["error"]["type"] == "server_error"
    client.videos.create(prompt="a square")


# Lists and files


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=x", "order=up", "after=../../etc/passwd"])
def test_list_with_a_wrong_query_is_refused(http: httpx2.Client, query: str) -> None:
    answer = http.get(f"/v1/videos?{query}")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == query.partition("=")[0]


@pytest.mark.parametrize("video_id", ["x", "..%2f..%2fetc%2fpasswd", "video_%00", "video_" + "0" * 32, "%ff"])
def test_video_that_is_not_there_is_not_found(http: httpx2.Client, video_id: str) -> None:
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/content")):
        answer = http.request(method, f"/v1/videos/{video_id}{path}")
        assert answer.status_code == 404


@pytest.fixture
def finished(client: Any) -> Any:
    video = client.videos.create(prompt="a square", extra_body={"num_frames": 33})
    return when(client, video.id, "completed")


def test_content_answers_ranges(http: httpx2.Client, finished: Any) -> None:
    path = f"/v1/videos/{finished.id}/content"
    whole = http.get(path)
    assert (whole.status_code, whole.headers["content-type"]) == (200, "video/mp4")
    assert whole.headers["content-disposition"] == f'attachment; filename="{finished.id}.mp4"'
    size = len(whole.content)
    part = http.get(path, headers={"Range": "bytes=100-199"})
    assert (part.status_code, part.content) == (206, whole.content[100:200])
    assert part.headers["content-range"] == f"bytes 100-199/{size}"
    assert http.get(path, headers={"Range": "bytes=-10"}).content == whole.content[-10:]
    assert http.get(path, headers={"Range": f"bytes={size}-"}).status_code == 416
    assert decoded(whole.content).shape == (33, 32, 48, 3)


def test_content_has_the_video_alone(http: httpx2.Client, finished: Any) -> None:
    assert http.get(f"/v1/videos/{finished.id}/content?variant=video").status_code == 200
    answer = http.get(f"/v1/videos/{finished.id}/content?variant=thumbnail")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "variant")


def test_content_is_a_conflict_until_it_is_complete(http: httpx2.Client, client: Any) -> None:
    video = client.videos.create(prompt="a square", extra_body={"num_frames": LONG})
    answer = http.get(f"/v1/videos/{video.id}/content")
    assert (answer.status_code, answer.headers["retry-after"]) == (409, "1")
    assert (answer.json()["error"]["code"], answer.json()["error"]["retryable"]) == ("not_completed", True)


def test_content_whose_file_was_just_deleted_is_not_found(
    http: httpx2.Client, finished: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = JobStore.video

    def delete_first(self: JobStore, job_id: str, owner: str | None) -> Path:
        path = video(self, job_id, owner)
        self.delete(job_id, owner)
        return path

    monkeypatch.setattr(JobStore, "video", delete_first)
    assert http.get(f"/v1/videos/{finished.id}/content").status_code == 404


def test_no_answer_names_a_place_on_the_server(
    http: httpx2.Client, server: VideoServer, finished: Any
) -> None:
    answers = [
        http.get(path).text
        for path in ("/v1/videos", f"/v1/videos/{finished.id}", "/v1/videos/x", "/v1/models", "/openapi.json")
    ]
    for answer in answers:
        assert str(server.store._directory) not in answer
        assert ".mp4" not in answer and "http://" not in answer
