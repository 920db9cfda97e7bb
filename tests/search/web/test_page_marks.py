"""Good and bad marks, and the answer after each."""

import pytest
from page_screen import expect

from orbithash.search.client import Client, Example

SENTENCE = "a river and some trees"


@pytest.fixture
def client(gateway):
    with Client(gateway.address) as connected:
        yield connected


@pytest.fixture
def ids(client):
    """Ids of all rows by key."""
    return {row.key: row.id for row in client.scroll("")}


def keys_of(answer):
    return [hit.key for hit in answer.hits]


def test_each_mark_changes_the_answer(visit, web, client):
    screen = visit(web.url)
    screen.ask(SENTENCE)
    first = keys_of(client.search(text=SENTENCE, k=60))
    screen.wait_for_keys(first)
    good, bad = first[3], first[7]
    screen.mark(good, "good")
    examples = [Example(text=SENTENCE), Example(key=good)]
    screen.wait_for_keys(keys_of(client.search(positives=examples, k=60)))
    screen.tile(bad).focus()
    screen.page.keyboard.press("-")
    screen.wait_for_keys(keys_of(client.search(positives=examples, negatives=[Example(key=bad)], k=60)))
    # Both stay visible in the strip, whether or not the answer still has them.
    expect(screen.page.get_by_role("group", name="Good marks").locator("li")).to_have_count(1)
    expect(screen.page.get_by_role("group", name="Bad marks").locator("li")).to_have_count(1)
    screen.page.get_by_role("button", name="Clear marks").click()
    screen.wait_for_keys(first)


def test_a_mark_is_pressed_again_to_remove_it(visit, web, ids, client):
    screen = visit(web.url)
    screen.ask(SENTENCE)
    key = client.search(text=SENTENCE, k=1).hits[0].key
    screen.mark(key, "good")
    expect(screen.tile(key)).to_have_attribute("data-mark", "good")
    assert screen.parameters["good"] == [str(ids[key])]
    screen.mark(key, "bad")
    expect(screen.tile(key)).to_have_attribute("data-mark", "bad")
    screen.mark(key, "bad")
    expect(screen.tile(key)).to_have_attribute("data-mark", "")
    assert not {"good", "bad"} & set(screen.parameters)


def test_shift_marks_all_tiles_in_between(visit, web, ids, client):
    screen = visit(web.url)
    screen.go("label=river&sort=oldest")
    keys = screen.keys()
    screen.tile(keys[2]).locator("button.mark.good").click()
    expect(screen.tile(keys[2])).to_have_attribute("data-mark", "good")
    expect(screen.page.get_by_role("group", name="Good marks").locator("li")).to_have_count(1)
    keys = screen.keys()
    begin, end = keys.index(screen.page.locator('article.tile[data-mark="good"]').get_attribute("data-key")), 6
    screen.tile(keys[end]).locator("button.mark.good").click(modifiers=["Shift"])
    expect(screen.page.get_by_role("group", name="Good marks").locator("li")).to_have_count(abs(end - begin) + 1)
    marked = {int(number) for number in screen.parameters["good"][0].split(",")}
    assert marked == {ids[key] for key in keys[min(begin, end) : max(begin, end) + 1]}
