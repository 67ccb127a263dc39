"""The viewer in a real browser: headless Chromium through Playwright. Skipped where one of them is missing."""

import io
import shutil
import time

import numpy as np
import pytest
import torch
from PIL import Image

from idnerf.data.load import load_scene
from idnerf.data.procedural.config import ProceduralConfig
from idnerf.data.procedural.files import save_scene
from idnerf.data.procedural.generate import generate_scene
from idnerf.models.idnerf import IDNeRF, ModelConfig
from idnerf.viewer.server import Viewer
from tiny_cases import TINY_CASCADE

pytest.importorskip("viser")
playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

LIMIT = 120.0
"""Seconds: software rendering on a busy machine is slow, and this is no test of speed."""


@pytest.fixture(scope="module")
def viewer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "garden"
    config = ProceduralConfig(size=(64, 48), num_views=5, complexity=(0.1, 0.1), supersample=1)
    save_scene(generate_scene(5, config), folder)
    torch.manual_seed(0)
    viewer = Viewer(IDNeRF(ModelConfig(cascade=TINY_CASCADE)).eval(), load_scene(folder), port=0)
    yield viewer
    viewer.close()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"],
        )
        yield browser
        browser.close()


def open_page(browser, viewer):
    """A page of its own browser context, once its first full picture is there; and every address it asked for."""
    page = browser.new_context(viewport={"width": 640, "height": 400}).new_page()
    addresses: list[str] = []
    page.on("request", lambda request: addresses.append(request.url))
    page.goto(viewer.url)
    wait_for(page, lambda: "Full" in status(page))
    return page, addresses


def status(page) -> str:
    return page.evaluate("(document.querySelector('strong') || {parentElement: {}}).parentElement.innerText || ''")


def wait_for(page, condition) -> None:
    """Playwright's own waiting lets the page go on; sleeping would not."""
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end, f"nothing happened in time; the panel says {status(page)!r}"
        page.wait_for_timeout(100)


def canvas(page) -> np.ndarray:
    """What the 3D view shows, beside the panel."""
    picture = Image.open(io.BytesIO(page.screenshot(clip={"x": 20, "y": 200, "width": 260, "height": 180})))
    return np.asarray(picture.convert("RGB")).astype(float)


def choose(page, label: str, option: str) -> None:
    page.get_by_label(label, exact=True).first.click()
    page.get_by_role("option", name=option, exact=True).click()


def test_a_page_loads_shows_a_rendering_and_the_toggle_changes_it(browser, viewer):
    page, addresses = open_page(browser, viewer)
    assert all(a.startswith((viewer.url, viewer.url.replace("http", "ws"), "data:", "blob:")) for a in addresses)
    wait_for(page, lambda: canvas(page).std() > 5)
    colour = canvas(page)
    choose(page, "Show", "Depth")
    wait_for(page, lambda: np.abs(canvas(page) - colour).mean() > 10)
    choose(page, "Show", "Colour")
    wait_for(page, lambda: np.abs(canvas(page) - colour).mean() < 3)

    (session,) = viewer.sessions.values()
    shown = session._picture
    page.mouse.move(150, 250)
    page.mouse.down()
    page.mouse.move(200, 270, steps=4)
    page.mouse.up()
    wait_for(page, lambda: session._picture is not shown)  # the picture follows the camera
    wait_for(page, lambda: session._picture.full)

    with page.expect_download(timeout=1000 * LIMIT) as download:
        page.get_by_role("button", name="Save PNG").click()
    saved = Image.open(download.value.path())
    assert download.value.suggested_filename == "garden_colour.png" and saved.size == session._picture.camera.size
    page.context.close()
    wait_for_no_browser(viewer)


def test_two_browsers_look_around_on_their_own_and_one_that_goes_is_forgotten(browser, viewer):
    first, _ = open_page(browser, viewer)
    second, _ = open_page(browser, viewer)
    assert len(viewer.sessions) == 2
    one, other = (viewer.sessions[i] for i in sorted(viewer.sessions))
    still, moved = one.view_point().c2w, other.view_point().c2w
    second.get_by_label("View", exact=True).last.click()
    second.get_by_role("option", name="4", exact=True).click()
    second.get_by_role("button", name="Go to this view").click()
    wait_for(second, lambda: np.abs(other.view_point().c2w - moved).max() > 0.01)
    np.testing.assert_array_equal(one.view_point().c2w, still)
    wait_for(first, lambda: "Full" in status(first) and "Full" in status(second))
    second.context.close()
    wait_for(first, lambda: len(viewer.sessions) == 1)
    assert one is next(iter(viewer.sessions.values()))
    first.context.close()
    wait_for_no_browser(viewer)


def wait_for_no_browser(viewer) -> None:
    end = time.monotonic() + LIMIT
    while viewer.sessions or viewer._scheduler.queue.interactive_work():
        assert time.monotonic() < end, "a browser that has gone is still known"
        time.sleep(0.05)
