"""Makes a video with OpenAI's own client: asks for it, follows its progress, downloads it, and removes it.

    pip install openai
    rfengine serve                                    # in another terminal
    python examples/video_api_openai.py out.mp4       # RFENGINE_KEY=... where the server has access keys

docs/serving.md says what else the API takes.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from openai import OpenAI

PROMPT = "a large yellow triangle moving slowly upwards over a grassy meadow"


def make(url: str, key: str, output: Path) -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key=key)
    # seed, num_frames and fps are not in OpenAI's API; its client sends what extra_body has
    video = client.videos.create(prompt=PROMPT, seconds="4", extra_body={"seed": 7})
    while video.status in ("queued", "in_progress"):
        print(f"{video.id}: {video.status}, {video.progress} %")
        time.sleep(0.5)
        video = client.videos.retrieve(video.id)
    if video.status == "failed":
        raise SystemExit(f"{video.error.code}: {video.error.message}")
    client.videos.download_content(video.id).write_to_file(output)
    client.videos.delete(video.id)
    print(f"{output}: {video.seconds} s of {video.size}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make a video with OpenAI's client.")
    parser.add_argument("output", type=Path, help="the MP4 to write")
    parser.add_argument("--url", default="http://localhost:8000")
    options = parser.parse_args()
    make(options.url, os.environ.get("RFENGINE_KEY", "none"), options.output)
