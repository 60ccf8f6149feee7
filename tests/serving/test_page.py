"""The page, in a real browser that talks to a real server with the `tiny` model."""

from __future__ import annotations

import io
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy
import pytest

from rfengine import Pipeline

pytest.importorskip("fastapi", reason="the server needs fastapi")
pytest.importorskip("uvicorn", reason="the server needs uvicorn")
playwright = pytest.importorskip("playwright.sync_api", reason="the page is tested with playwright")

from rfengine.serving.options import ServiceOptions  # noqa: E402
from support.servers import running_server  # noqa: E402

if TYPE_CHECKING:
    from numpy import ndarray
    from playwright.sync_api import Browser, Download, Page

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="the page is tested in chromium, which is not installed"),
]

CIRCLE = "a large red circle moving slowly to the right over a cloudy sky"
SHAPES = "a small green square and a small purple circle bouncing over a checkered floor"
TRIANGLE = "a large yellow triangle moving slowly upwards over a grassy meadow"
WAIT_MS = 30_000

expect = playwright.expect
# every frame that the screen shows, as pixels: the video itself may be scaled and cut
PIXELS = """() => {
  const video = document.querySelector("video");
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
  canvas.getContext("2d").drawImage(video, 0, 0);
  return Array.from(canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data);
}"""
COUNT_VIOLATIONS = """
  window.violations = [];
  const note = (event) => window.violations.push(event.violatedDirective);
  document.addEventListener("securitypolicyviolation", note);
"""


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.from_pretrained("tiny", device="cpu")


@pytest.fixture(scope="module")
def url(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_server(pipeline, tmp_path_factory.mktemp("server")) as server:
        yield server.url


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    """The page, which reports no error, asks no other host and keeps to its content security policy."""
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.set_default_timeout(WAIT_MS)
    complaints: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.add_init_script(COUNT_VIOLATIONS)
    page.goto(url)
    yield page
    assert page.evaluate("window.violations") == []
    page.close()
    assert complaints == []
    own = (url, f"blob:{url}", "data:")
    assert [request for request in requests if not request.startswith(own)] == []


def start(page: Page, prompt: str = CIRCLE) -> None:
    """Start a video from the prompt box, and see its first frames."""
    page.fill("#prompt", prompt)
    page.keyboard.press("Enter")
    wait_until_shown(page, 0.5)


def wait_until_shown(page: Page, seconds: float) -> None:
    page.wait_for_function(
        "seconds => document.querySelector('video').currentTime >= seconds", arg=seconds, timeout=WAIT_MS
    )


def time_of(page: Page) -> float:
    return page.evaluate("document.querySelector('video').currentTime")


def pixels(page: Page) -> ndarray:
    """What the video shows, [64, 64, 3]."""
    return numpy.array(page.evaluate(PIXELS)).reshape(64, 64, 4)[..., :3]


def change_prompt(page: Page, prompt: str) -> None:
    page.fill("#prompt", prompt)
    page.keyboard.press("Enter")


def wait_for_cells(page: Page, count: int) -> None:
    page.wait_for_function(
        "count => document.querySelectorAll('.cell').length >= count", arg=count, timeout=WAIT_MS
    )


def decoded_frames(download: Download) -> int:
    import av

    with av.open(io.BytesIO(Path(download.path()).read_bytes())) as container:
        return sum(1 for _ in container.decode(video=0))


def test_video_plays_while_it_is_made(page: Page) -> None:
    start(page)
    expect(page.locator("#status-text")).to_have_text("Live")
    before, time_before = pixels(page), time_of(page)
    wait_until_shown(page, time_before + 1.0)
    assert numpy.abs(pixels(page) - before).mean() > 2  # of 255
    expect(page.locator("#rate-shown")).to_have_text(re.compile(r"^1[4-8]\.\d frames/s$"))
    expect(page.locator("#rate-arriving")).to_have_text(re.compile(r"^\d+\.\d frames/s$"))
    assert float(page.inner_text("#rate-ahead").split()[0]) < 3.0


def test_chosen_example_is_in_the_box_and_starts(page: Page) -> None:
    page.click("#example-list button >> nth=1")
    assert page.input_value("#prompt") == page.inner_text("#example-list button >> nth=1")
    page.click("#send")
    wait_until_shown(page, 0.2)


def test_prompt_change_has_a_receipt_and_is_seen(page: Page) -> None:
    start(page)
    blue_sky = pixels(page).mean((0, 1))
    page.check("input[value=hard]", force=True)
    change_prompt(page, TRIANGLE)
    receipt = page.locator("#receipt")
    expect(receipt).to_have_text(re.compile(r"^Shown from chunk \d+, \d\.\d s after you pressed Enter\.$"))
    assert page.locator(".run").count() == 2
    assert page.locator(".run-label").last.inner_text() == TRIANGLE
    changed = page.locator(".cell.changed")
    assert changed.count() == 1
    assert changed.inner_text().split()[0] == re.search(r"chunk (\d+)", receipt.inner_text())[1]
    green_meadow = pixels(page).mean((0, 1))
    assert blue_sky[2] > blue_sky[1]
    assert green_meadow[1] > green_meadow[2]


def test_transition_length_is_sent_with_a_soft_change_alone(page: Page) -> None:
    sent: list[str] = []
    page.on("websocket", lambda socket: socket.on("framesent", lambda frame: sent.append(frame)))
    start(page)
    page.focus("#transition")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    expect(page.locator("#transition-text")).to_have_text("4 chunks, 3 s")
    change_prompt(page, SHAPES)
    page.check("input[value=recache]", force=True)
    expect(page.locator("#transition")).to_be_disabled()
    change_prompt(page, CIRCLE)
    expect(page.locator("#receipt")).to_have_text(re.compile("^Shown from chunk"))
    soft, recache = (frame for frame in sent if "session.interaction" in frame)
    assert '"transition_chunks":4' in soft
    assert "transition_chunks" not in recache


def test_pause_holds_the_video_still_until_play(page: Page) -> None:
    start(page)
    page.click("#play")
    expect(page.locator("#status-text")).to_have_text("Paused")
    page.wait_for_timeout(300)
    still, chunks = time_of(page), page.locator(".cell").count()
    page.wait_for_timeout(1500)
    assert time_of(page) == still
    assert page.locator(".cell").count() <= chunks + 1  # the one that was being made
    page.click("#play")
    wait_until_shown(page, still + 0.5)
    expect(page.locator("#status-text")).to_have_text("Live")


def test_chunk_that_is_looked_at_is_gone_on_from(page: Page) -> None:
    start(page)
    wait_for_cells(page, 7)
    page.click(".cell >> nth=2")
    expect(page.locator("#status-text")).to_have_text("Looking back")
    expect(page.locator("#look-text")).to_contain_text("Chunk 2 of main line")
    page.wait_for_function("() => !document.querySelector('video').seeking")
    assert 21 / 16 <= time_of(page) < 33 / 16  # the first chunk has 9 frames, each other one 12
    first_chunks = page.locator(".cell").count()
    page.click("#go-on")
    expect(page.locator("#status-text")).to_have_text("Live")
    wait_for_cells(page, first_chunks + 2)
    last = page.locator(".run").last
    expect(last.locator(".run-label")).to_contain_text("Branch 1")
    assert last.locator(".cell").first.inner_text() == "0"  # the point before it is the beginning
    new_chunks_begin = (9 + 12 * (first_chunks - 1)) / 16
    wait_until_shown(page, new_chunks_begin)


def test_branch_with_another_prompt_is_in_the_tree(page: Page) -> None:
    start(page)
    wait_for_cells(page, 6)
    page.click("#keep")
    expect(page.locator("#receipt")).to_have_text(re.compile(r"^Kept: the moment before chunk \d+\.$"))
    expect(page.locator("#tree .point.chosen")).to_have_count(1)
    wait_for_cells(page, page.locator(".cell").count() + 2)  # so that the main line goes on from there
    page.click(".cell >> nth=4")
    page.fill("#prompt", TRIANGLE)
    expect(page.locator("#branch-text")).to_contain_text("the prompt in the box")
    page.click("#branch")
    expect(page.locator("#receipt")).to_have_text(
        re.compile("^Shown from chunk 4, .* after you pressed the button")
    )
    branches = page.locator("#tree li")
    assert branches.count() == 2
    assert branches.nth(1).get_attribute("aria-current") == "true"
    assert branches.nth(1).inner_text().startswith("Branch 1")
    assert TRIANGLE in branches.nth(1).inner_text()
    assert page.locator("#tree path").count() == 2

    page.click("#tree .point.chosen")
    expect(branches).to_have_count(3)
    expect(branches.nth(2)).to_contain_text(CIRCLE)


def test_downloads_are_videos_that_decode(page: Page) -> None:
    start(page)
    wait_for_cells(page, 5)
    page.click(".cell >> nth=4")
    page.click("#go-on")
    expect(page.locator("#tree li")).to_have_count(2)
    wait_for_cells(page, 8)
    page.click("#play")
    page.wait_for_timeout(300)
    chunks = page.locator(".cell").count()
    own_chunks = page.locator(".run").last.locator(".cell").count()
    with page.expect_download() as everything:
        page.click("#download")
    assert decoded_frames(everything.value) == 9 + 12 * (chunks - 1)
    with page.expect_download() as branch:
        page.click("#download-branch")
    assert decoded_frames(branch.value) == 9 + 12 * (4 + own_chunks - 1)  # it left before chunk 4


def test_keyboard_alone_does_everything(page: Page) -> None:
    expect(page.locator("#prompt")).to_be_focused()
    page.keyboard.type(CIRCLE)
    page.keyboard.press("Enter")
    wait_for_cells(page, 6)
    page.keyboard.press("Shift+Tab")  # from the prompt back to the timeline
    expect(page.locator(".cell:focus")).to_have_count(1)
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    expect(page.locator("#look-text")).to_contain_text("Chunk 1 of main line")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    expect(page.locator("#go-on")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#status-text")).to_have_text("Live")
    expect(page.locator("#tree li")).to_have_count(2)
    page.focus("#play")
    page.keyboard.press("Space")
    expect(page.locator("#status-text")).to_have_text("Paused")


def test_every_control_has_a_name(page: Page) -> None:
    start(page)
    wait_for_cells(page, 5)
    nameless = page.evaluate("""() => [...document.querySelectorAll("button, a, input, textarea")]
      .filter((each) => !each.textContent.trim() && !each.ariaLabel && !(each.labels && each.labels.length))
      .map((each) => each.outerHTML)""")
    assert nameless == []


def test_end_is_told_and_a_start_again_offered(page: Page) -> None:
    start(page)
    page.click("#stop")
    expect(page.locator("#notice-text")).to_have_text("You ended the video.")
    expect(page.locator("#status-text")).to_have_text("Ended")
    page.click("#notice-action")
    expect(page.locator("#status-text")).to_have_text("Live")
    expect(page.locator("#notice")).to_be_hidden()
    expect(page.locator(".run-label").first).to_have_text(CIRCLE)


def test_full_browser_buffer_gives_up_its_oldest_part(page: Page) -> None:
    start(page)
    wait_until_shown(page, 4.0)
    page.evaluate("""() => {
      const append = SourceBuffer.prototype.appendBuffer;
      SourceBuffer.prototype.appendBuffer = function (bytes) {
        SourceBuffer.prototype.appendBuffer = append;
        throw new DOMException("the buffer is full", "QuotaExceededError");
      };
    }""")
    page.wait_for_function("() => document.querySelector('video').buffered.start(0) > 0.5")
    wait_until_shown(page, time_of(page) + 2.0)
    page.click(".cell >> nth=0")
    expect(page.locator("#look-text")).to_contain_text("too long ago to be shown again")


def test_video_that_the_browser_stopped_goes_on(page: Page) -> None:
    start(page)
    page.evaluate("document.querySelector('video').pause()")
    page.wait_for_function("() => !document.querySelector('video').paused")
    wait_until_shown(page, 3.0)
    page.evaluate("document.querySelector('video').currentTime -= 2.6")  # too far from the end: it hurries
    page.wait_for_function("() => document.querySelector('video').playbackRate > 1")


def test_refusal_and_end_of_the_server_are_plain_words(
    browser: Browser, pipeline: Pipeline, tmp_path: Path
) -> None:
    first, second = browser.new_page(), browser.new_page()
    with running_server(pipeline, tmp_path, service=ServiceOptions(max_sessions=1)) as server:
        first.goto(server.url)
        start(first)
        second.goto(server.url)
        second.fill("#prompt", SHAPES)
        second.click("#send")
        expect(second.locator("#notice-text")).to_contain_text("The server is busy")
        assert second.input_value("#prompt") == SHAPES
        assert second.inner_text("#notice-action") == "Try again"
        assert server.app.state.service.drain(10.0)
        expect(first.locator("#notice-text")).to_have_text(
            "The server is being stopped, so the video has ended."
        )
    second.click("#notice-action")
    expect(second.locator("#notice-text")).to_contain_text("The server cannot be reached")
    first.close()
    second.close()


def test_page_fits_desktop_and_phone(page: Page, tmp_path: Path) -> None:
    start(page)
    wait_for_cells(page, 6)
    directory = Path(os.environ.get("RFENGINE_SCREENSHOT", tmp_path))
    for name, width, height in (("desktop", 1280, 800), ("phone", 360, 780)):
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            page.set_viewport_size({"width": width, "height": height})
            page.wait_for_timeout(100)
            assert page.evaluate("document.documentElement.scrollWidth") == width
            side = page.locator("video").bounding_box()["width"]
            assert side % 64 == 0  # whole pixels, all of one size
            assert side >= 256
            page.screenshot(path=directory / f"page-{name}-{scheme}.png")
