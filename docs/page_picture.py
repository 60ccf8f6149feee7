"""docs/page.png: the page after a change of the prompt and a branch.

`python docs/page_picture.py` makes it anew, with playwright and a Chromium of the system.
"""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from playwright.sync_api import Page, expect, sync_playwright

PICTURE = Path(__file__).with_name("page.png")
CIRCLE = "a large red circle moving slowly to the right over a cloudy sky"
SQUARE = "a large purple square moving slowly to the left over a sandy beach"
TRIANGLE = "a large yellow triangle moving slowly upwards over a grassy meadow"


def play(page: Page) -> None:
    page.fill("#prompt", CIRCLE)
    page.keyboard.press("Enter")
    wait_for_chunks(page, 6)
    page.check("input[value=recache]", force=True)
    page.fill("#prompt", SQUARE)
    page.keyboard.press("Enter")
    expect(page.locator("#receipt")).to_have_text(re.compile("^Shown from chunk"))
    wait_for_chunks(page, 12)
    page.click(".cell >> nth=4")
    page.fill("#prompt", TRIANGLE)
    page.click("#branch")
    expect(page.locator("#receipt")).to_have_text(re.compile("^Shown from chunk 4"))
    wait_for_chunks(page, page.locator(".cell").count() + 5)


def wait_for_chunks(page: Page, count: int) -> None:
    page.wait_for_function(
        "count => document.querySelectorAll('.cell').length >= count", arg=count, timeout=60_000
    )


def main() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "rfengine.cli", "serve", "--port", port, "--data-directory"]
    with tempfile.TemporaryDirectory() as directory:
        server = subprocess.Popen([*command, directory])
        try:
            wait_until_ready(f"http://127.0.0.1:{port}/readyz")
            with sync_playwright() as driver:
                browser = driver.chromium.launch(
                    executable_path=shutil.which("chromium"), args=["--no-sandbox"]
                )
                page = browser.new_page(viewport={"width": 1280, "height": 760}, color_scheme="light")
                page.goto(f"http://127.0.0.1:{port}/")
                play(page)
                page.screenshot(path=PICTURE)
        finally:
            server.terminate()
            server.wait(60)


def wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            with urlopen(url, timeout=1):
                return
        except (URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)
    raise RuntimeError(f"{url} did not answer within a minute")


if __name__ == "__main__":
    main()
