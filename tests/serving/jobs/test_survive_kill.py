"""A server that is killed at any moment loses no job that it accepted, and serves no broken video."""

from __future__ import annotations

import random
import time
from pathlib import Path
from threading import Timer

import httpx2
import pytest

from rfengine.serving.jobs.store import MOST_ATTEMPTS
from support.killed_servers import KilledServers
from support.models import small_pipeline
from support.sessions import WAIT, eventually
from support.video_api_app import assert_same_video

pytest.importorskip("fastapi")
FRAMES = (9, 81, 333)  # of jobs; the longest takes half a second


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.soak)])
def test_jobs_survive_kills_at_random_moments(tmp_path: Path, kills: int) -> None:
    chance = random.Random(kills)
    directory = tmp_path / "jobs"
    jobs: dict[str, dict] = {}  # accepted ones
    videos: dict[str, bytes] = {}  # of completed ones
    with KilledServers() as servers, httpx2.Client(timeout=WAIT) as http:
        for _ in range(kills):
            url = f"{servers.start(directory)}/v1/videos"
            killing = Timer(chance.uniform(0.1, 1.5), servers.kill)
            killing.start()
            try:
                for _ in range(3):
                    frames = chance.choice(FRAMES)
                    body = {"prompt": "a square", "num_frames": frames, "seed": len(jobs) % 3}
                    answer = http.post(url, json=body)
                    if answer.status_code == 200:
                        jobs[answer.json()["id"]] = answer.json()
                    else:
                        assert answer.json()["error"]["code"] == "too_many_jobs"
                while killing.is_alive():
                    collect(http, url, jobs, videos)
                    time.sleep(0.01)
            except httpx2.TransportError:  # it is killed
                pass
            killing.join()
        url = f"{servers.start(directory)}/v1/videos"
        assert jobs
        jobs |= unanswered(http, url, jobs)
        eventually(lambda: collect(http, url, jobs, videos) == 0)
        files = {path.stem for path in directory.glob("*.mp4")}
    assert files == videos.keys() == {name for name, job in jobs.items() if job["status"] == "completed"}
    errors = [job["error"]["code"] for job in jobs.values() if job["status"] == "failed"]
    assert set(errors) <= {"interrupted"}
    assert len(errors) <= kills // MOST_ATTEMPTS
    check_videos(jobs, videos, tmp_path)


def unanswered(http: httpx2.Client, url: str, jobs: dict[str, dict]) -> dict[str, dict]:
    """The jobs that are not among those accepted: the server was killed between the disk and the answer."""
    listed: dict[str, dict] = {}
    page = http.get(url, params={"limit": 100}).json()
    while page["data"]:
        listed |= {job["id"]: job for job in page["data"]}
        page = http.get(url, params={"limit": 100, "after": page["last_id"]}).json()
    assert jobs.keys() <= listed.keys()
    return {job_id: job for job_id, job in listed.items() if job_id not in jobs}


def collect(http: httpx2.Client, url: str, jobs: dict[str, dict], videos: dict[str, bytes]) -> int:
    """Look at every job that was accepted, and get the videos that are new; returns how many are not done."""
    for job_id in jobs.keys() - videos.keys():
        answer = http.get(f"{url}/{job_id}")
        assert answer.status_code == 200, answer.text  # what was accepted is there
        jobs[job_id] = answer.json()
        if jobs[job_id]["status"] == "completed":
            videos[job_id] = http.get(f"{url}/{job_id}/content").read()
    return sum(job["status"] in ("queued", "in_progress") for job in jobs.values())


def check_videos(jobs: dict[str, dict], videos: dict[str, bytes], directory: Path) -> None:
    """Each video is what a server that nobody killed would have made."""
    pipeline = small_pipeline()
    own: dict[tuple[int, int], bytes] = {}
    for job_id, video in videos.items():
        frames, seed = jobs[job_id]["num_frames"], jobs[job_id]["seed"]
        if (frames, seed) not in own:
            pipeline.generate("a square", num_frames=frames, seed=seed).save(directory / "own.mp4")
            own[frames, seed] = (directory / "own.mp4").read_bytes()
        assert_same_video(video, own[frames, seed])
