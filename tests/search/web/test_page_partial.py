"""The page in front of a gateway whose shards do not all answer."""

import inspect
import re

import pytest
from page_screen import expect
from page_services import WebProcess
from search_parts import local_shards, serving, small_case, snapshot_of

from orbithash.search.engine.engine import Engine

CASE = small_case(num_rows=300, num_shards=3)


class AwayShard:
    """A shard whose calls fail."""

    def __init__(self, shard):
        self._shard = shard

    def __getattr__(self, name):
        found = getattr(self._shard, name)
        return self._fail if inspect.iscoroutinefunction(found) else found

    async def _fail(self, *args, **options):
        raise RuntimeError("this shard is away")


# Set up before the browser, and so torn down after it: this thread runs the event loop of one of them at a time.
@pytest.fixture(scope="module")
def partial_web():
    """A web service over three shards, one of which is away."""
    shards = [AwayShard(shard) if number == 1 else shard for number, shard in enumerate(local_shards(CASE))]
    with serving(Engine(snapshot_of(CASE, shards))) as gateway:
        running = WebProcess(gateway.address)
        yield running
        running.stop()


@pytest.mark.parametrize("query", ["", "like=0", "sort=newest", "near=3,51"])
def test_a_partial_answer_says_so(partial_web, visit, query):
    screen = visit(partial_web.url)
    screen.go(query)
    partial = screen.page.locator(".partial")
    expect(partial).to_contain_text(re.compile(r"Only \d\d % of the archive"))
    expect(partial).to_contain_text("1 of 3 parts did not answer")
    expect(screen.tiles.first).to_be_visible()


@pytest.mark.slow
@pytest.mark.parametrize("width", [1440, 390])
def test_a_picture_of_a_partial_answer(partial_web, visit, pictures, width):
    screen = visit(partial_web.url, width=width)
    screen.go("like=0")
    expect(screen.page.locator(".partial")).to_be_visible()
    screen.picture(pictures, f"partial-{width}-light")
