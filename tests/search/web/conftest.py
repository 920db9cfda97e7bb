"""Fixtures of the tests of the page: an archive, its gateway, the web service, and Chromium."""

import os
import shutil
from pathlib import Path

import pytest
from page_screen import Screen
from page_services import CHROMIUM_FLAGS, GatewayThread, WebProcess
from page_world import write_world

from orbithash.search import web as page


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """An archive of small images with its model; tests must not change it."""
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def gateway(world):
    """A gateway of the archive. A test that stops it starts it again."""
    running = GatewayThread(world)
    running.start()
    yield running
    running.stop()


@pytest.fixture(scope="session")
def web(gateway):
    """The web service in front of the gateway."""
    if not (Path(page.__file__).parent / "static" / "vendor" / "htmx.min.js").is_file():
        pytest.skip("needs the scripts of the page in search/web/static/vendor: run `make vendor`")
    running = WebProcess(gateway.address)
    yield running
    running.stop()


# Not of the session: the event loop of Playwright runs in this thread, where other tests call asyncio.run.
@pytest.fixture(scope="module")
def browser():
    """Headless Chromium."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("needs Chromium: no `chromium` on the PATH")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install orbithash[dev]")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, args=list(CHROMIUM_FLAGS))
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser, request):
    """Open a page in a browser context of its own, as one more user: `visit(url, width=1440, ...)` -> `Screen`.

    At the end of the test, each page must have kept the rules that `Screen.check` lists.
    """
    screens = []

    def open_page(url, width=1440, height=900, scheme="light", allowed=(), **options):
        context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme=scheme,
            reduced_motion="reduce",
            accept_downloads=True,
            permissions=["clipboard-read", "clipboard-write"],
            **options,
        )
        screen = Screen(context.new_page(), url, allowed)
        screens.append(screen)
        screen.go()
        return screen

    yield open_page
    for screen in screens:
        screen.page.context.close()
    for screen in screens:
        screen.check()


@pytest.fixture(scope="session")
def pictures():
    """Folder of screenshots, given in the environment as ORBITHASH_SCREENSHOTS; None: none are kept."""
    folder = os.environ.get("ORBITHASH_SCREENSHOTS")
    if folder is None:
        return None
    Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder)
