"""Searching from the page: by sentence, image, tile and place; filters, cut-off, order; endless answers; sharing."""

import re
from datetime import UTC, datetime

import pytest
from page_screen import expect
from page_world import CLASSES, NUM_ROWS_PER_CLASS, NUM_TIMES

from orbithash.search.client import Client

SENTENCE = "a river and some trees"


@pytest.fixture
def client(gateway):
    with Client(gateway.address) as connected:
        yield connected


def keys_of(answer):
    return [hit.key for hit in answer.hits]


def test_the_first_screen_shows_the_archive(visit, web, world):
    screen = visit(web.url)
    expect(screen.tiles).to_have_count(60)
    expect(screen.page.get_by_text(f"{world.num_rows} tiles").first).to_be_visible()
    # Random: not the order of the rows, and every class is there.
    labels = set(screen.tiles.locator(".label").all_text_contents())
    assert set(CLASSES) <= labels
    first = screen.keys()
    screen.page.reload()
    expect(screen.tiles).to_have_count(60)
    assert screen.keys() == first


def test_a_sentence_finds_what_the_gateway_finds(visit, web, client):
    screen = visit(web.url)
    screen.ask(SENTENCE)
    expected = client.search(text=SENTENCE, k=60)
    screen.wait_for_keys(keys_of(expected))
    assert screen.parameters["q"] == [SENTENCE]
    nearest = screen.tiles.first
    assert nearest.get_attribute("data-distance") == str(expected.hits[0].distance)
    expect(nearest).to_contain_text(str(expected.hits[0].distance))
    screen.page.get_by_text("About this answer").click()
    about = screen.page.locator("details.about")
    expect(about).to_contain_text(expected.model_id)
    expect(about).to_contain_text(f"version {expected.archive_version}")
    # Back to the first screen by the browser's own button.
    screen.page.go_back()
    expect(screen.page.locator("#answer")).to_have_attribute("data-has-query", "no")


@pytest.mark.parametrize("event", ["drop", "paste"])
def test_an_image_of_the_user_is_searched_for(visit, web, world, client, event):
    data = (world.images / "river/river_07.png").read_bytes()
    screen = visit(web.url)
    expect(screen.tiles).to_have_count(60)
    screen.bring(data, event=event)
    screen.wait_for_keys(keys_of(client.search(image=data, k=60)))
    # Only its code is in the address; a second user sees the same answer.
    assert "code" in screen.parameters
    other = visit(web.url)
    other.go(screen.page.url.partition("?")[2])
    other.wait_for_keys(screen.keys())


def test_an_image_is_chosen_as_a_file(visit, web, world, client):
    path = world.images / "beach/beach_11.png"
    screen = visit(web.url)
    screen.page.locator("#image").set_input_files(path)
    screen.wait_for_keys(keys_of(client.search(image=path, k=60)))
    expect(screen.tiles.first).to_have_attribute("data-distance", "0")


def test_a_click_on_a_tile_finds_more_like_it(visit, web, client):
    screen = visit(web.url)
    key = screen.keys()[5]
    screen.tile(key).locator("a.picture").click()
    screen.wait_for_keys(keys_of(client.search(key=key, k=60)))
    expect(screen.page.locator("#strip")).to_be_visible()
    screen.page.get_by_role("button", name="Do not search for tiles like this one").click()
    expect(screen.page.locator("#answer")).to_have_attribute("data-has-query", "no")


def test_classes_and_dates_limit_the_answer(visit, web, client):
    screen = visit(web.url)
    screen.ask(SENTENCE)
    screen.page.locator("#class-menu summary").click()
    river = screen.page.locator("#classes label", has_text="river")
    # Counted under the other filters.
    expect(river).to_contain_text(str(NUM_ROWS_PER_CLASS + NUM_TIMES - 1))
    river.locator("input").check()
    screen.wait_for_keys(keys_of(client.search(text=SENTENCE, k=60, filter="label = 'river'")))
    screen.page.keyboard.press("Escape")
    screen.page.locator("#date-menu summary").click()
    screen.page.locator("#from").fill("2020-03-01")
    screen.page.locator("#to").fill("2020-12-31")
    text = "label = 'river' AND datetime >= DATE('2020-03-01') AND datetime < DATE('2021-01-01')"
    screen.wait_for_keys(keys_of(client.search(text=SENTENCE, k=60, filter=text)))
    assert screen.parameters["label"] == ["river"]
    assert screen.parameters["from"] == ["2020-03-01"]
    assert screen.parameters["to"] == ["2020-12-31"]


def test_an_expression_limits_the_answer(visit, web, client):
    screen = visit(web.url)
    screen.ask(SENTENCE)
    screen.page.locator("#filter-menu summary").click()
    screen.page.locator("#filter").fill("key LIKE '%_07.png'")
    screen.page.locator("#filter-menu").get_by_role("button", name="Apply").click()
    screen.wait_for_keys(keys_of(client.search(text=SENTENCE, k=60, filter="key LIKE '%_07.png'")))


def test_the_cut_off_says_how_many_tiles_it_lets_in(visit, web, world, client):
    screen = visit(web.url)
    screen.ask(SENTENCE)
    slider = screen.page.locator("#radius")
    expect(slider).to_be_visible()
    # Tiles beyond the first part are counted too.
    radius = client.search(text=SENTENCE, k=100).hits[-1].distance
    within = client.search(text=SENTENCE, k=world.num_rows, radius=radius)
    assert 60 < len(within.hits) < world.num_rows
    screen.slide(slider, radius)
    expect(screen.status).to_contain_text(f"within {radius} bits")
    expect(screen.page.locator("#answer")).to_contain_text(f"{len(within.hits)} tiles")
    assert screen.parameters["radius"] == [str(radius)]
    radius = within.hits[0].distance
    screen.slide(slider, radius)
    screen.wait_for_keys(keys_of(client.search(text=SENTENCE, k=60, radius=radius)))
    screen.slide(slider, radius - 1)
    expect(screen.tiles).to_have_count(0)
    expect(screen.page.locator("#tiles")).to_contain_text("cut-off")


def test_the_order_is_by_time_on_request(visit, web, client):
    screen = visit(web.url)
    screen.go("label=river&label=harbor")
    screen.page.locator("#sort").select_option("newest")
    rows = list(client.scroll("label = 'river' OR label = 'harbor'"))
    rows.sort(key=lambda row: (-row.datetime.timestamp(), row.id))
    screen.wait_for_keys([row.key for row in rows[:60]])
    assert datetime(2020, 1, 1, tzinfo=UTC) < rows[-1].datetime < rows[0].datetime
    screen.page.locator("#sort").select_option("oldest")
    rows.sort(key=lambda row: (row.datetime.timestamp(), row.id))
    screen.wait_for_keys([row.key for row in rows[:60]])


def test_a_tile_that_is_not_it_goes_away_and_comes_back(visit, web, client):
    screen = visit(web.url)
    screen.ask(SENTENCE)
    keys = keys_of(client.search(text=SENTENCE, k=60))
    screen.wait_for_keys(keys)
    screen.tile(keys[2]).focus()
    screen.page.keyboard.press("h")
    screen.wait_for_keys(keys[:2] + keys[3:])
    screen.page.get_by_role("button", name="1 hidden: show again").click()
    screen.wait_for_keys(keys)


def test_an_answer_has_no_end_before_the_archive(visit, web, world, client):
    screen = visit(web.url)
    screen.ask(SENTENCE)
    every = keys_of(client.search(text=SENTENCE, k=world.num_rows))
    screen.wait_for_keys(every[:60])
    while len(screen.keys()) < world.num_rows:
        shown = len(screen.keys())
        screen.tiles.last.scroll_into_view_if_needed()
        screen.page.mouse.wheel(0, 2000)
        screen.page.wait_for_function("shown => document.querySelectorAll('article.tile').length > shown", arg=shown)
    assert screen.keys() == every


def test_a_tile_in_full_view(visit, web, client):
    screen = visit(web.url)
    screen.ask(SENTENCE)
    answer = client.search(text=SENTENCE, k=60, include=("uri", "caption"))
    screen.wait_for_keys(keys_of(answer))
    screen.tiles.first.get_by_role("button", name="View").click()
    view = screen.page.locator("dialog#view")
    expect(view).to_be_visible()
    hit = answer.hits[0]
    for text in (hit.key, hit.label, hit.extra["caption"], f"{hit.distance} of 24"):
        expect(view).to_contain_text(text)
    picture = view.locator(".stage img").first
    expect(picture).to_be_visible()
    assert picture.evaluate("async image => { await image.decode(); return image.naturalWidth }") > 0
    # The next tile, and back to the grid.
    screen.page.keyboard.press("ArrowRight")
    expect(view).to_contain_text(answer.hits[1].key)
    screen.page.keyboard.press("Escape")
    expect(view).to_be_hidden()


def test_where_in_the_tile(visit, web):
    screen = visit(web.url)
    screen.ask(SENTENCE)
    screen.tiles.first.get_by_role("button", name="View").click()
    view = screen.page.locator("dialog#view")
    view.get_by_role("button", name="Where in the tile").click()
    expect(view.locator("svg.heat rect")).to_have_count(49)


def test_a_shared_address_shows_the_same(visit, web, client):
    mine = visit(web.url)
    mine.ask(SENTENCE)
    mine.page.locator("#sort").select_option("newest")
    mine.page.wait_for_url(re.compile("sort=newest"))
    radius = client.search(text=SENTENCE, k=30).hits[-1].distance
    mine.slide(mine.page.locator("#radius"), radius)
    expect(mine.status).to_contain_text(f"within {radius} bits")
    assert mine.parameters["radius"] == [str(radius)]
    theirs = visit(web.url)
    theirs.go(mine.page.url.partition("?")[2])
    theirs.wait_for_keys(mine.keys())
    expect(theirs.page.locator("#q")).to_have_value(SENTENCE)
    expect(theirs.page.locator("#sort")).to_have_value("newest")
    assert theirs.status.inner_text() == mine.status.inner_text()
