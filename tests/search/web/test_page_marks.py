"""Good and bad marks, the answer after each, and detectors made from them."""

import json
import math
import re

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


def beaches_and_others(ids, count=8):
    """Parameters of an address with marks: beaches are good, other classes bad."""
    good = [ids[f"beach/beach_{number:02d}.png"] for number in range(count)]
    bad = [
        ids[f"{name}/{name}_{n:02d}.png"] for n in range(count // 4) for name in ("river", "forest", "harbor", "roofs")
    ]
    return f"good={','.join(map(str, good))}&bad={','.join(map(str, bad))}"


def scores(screen):
    """Scores of the tiles, as they are shown."""
    texts = screen.tiles.locator(".value").all_text_contents()
    return [float(text.replace("\N{MINUS SIGN}", "-").replace("+", "")) for text in texts]


def test_marks_become_a_detector_of_the_whole_archive(visit, web, ids, tmp_path):
    screen = visit(web.url)
    screen.go(beaches_and_others(ids))
    screen.page.get_by_role("button", name="Find all").click()
    detector = screen.page.get_by_role("group", name="Detector")
    expect(detector).to_contain_text("8 good and 8 bad marks")
    expect(detector).to_contain_text(re.compile(r"precision \d\.\d\d"))
    expect(screen.status).to_contain_text(re.compile(r"detector finds \d+ tile"))
    found = int(re.search(r"finds (\d+)", screen.status.inner_text())[1])
    keys = screen.keys()
    labels = [key.partition("/")[0] for key in keys]
    assert labels.count("beach") >= 0.8 * len(labels)
    # A stricter cut-off lets in fewer, and says how many.
    middle = len(keys) // 2
    strict = math.floor(10 * scores(screen)[middle]) / 10
    assert strict > 0
    screen.slide(screen.page.locator("#min"), strict)
    expect(screen.status).not_to_contain_text(f"finds {found} tile")
    fewer = int(re.search(r"finds (\d+)", screen.status.inner_text())[1])
    assert middle < fewer < found
    screen.wait_for_keys(keys[:fewer])
    assert min(scores(screen)) >= strict

    with screen.page.expect_download() as saved:
        screen.page.get_by_role("link", name="Download the detector").click()
    path = tmp_path / "detector.json"
    saved.value.save_as(path)
    stored = json.loads(path.read_text())
    assert stored["num_good"] == stored["num_bad"] == 8

    # Somebody else loads the file and finds the same.
    other = visit(web.url)
    other.page.locator("#detector-file").set_input_files(path)
    other.page.wait_for_url(re.compile("detector="))
    expect(other.status).to_contain_text(f"finds {found} tile")
    other.wait_for_keys(keys)


def test_the_least_certain_tiles_come_first(visit, web, ids):
    screen = visit(web.url)
    screen.go(beaches_and_others(ids))
    screen.page.get_by_role("button", name="Least certain").click()
    expect(screen.status).to_contain_text("least certain")
    sizes = [abs(score) for score in scores(screen)]
    assert len(sizes) == 60
    assert sizes == sorted(sizes)
    before = screen.parameters["good"]
    unsure = screen.keys()[0]
    screen.mark(unsure, "good")
    screen.page.wait_for_url(re.compile(f"good=[^&]*{ids[unsure]}"))
    assert screen.parameters["good"] != before
    assert screen.parameters["find"] == ["unsure"]
    expect(screen.page.get_by_role("group", name="Detector")).to_contain_text("9 good")


def test_bad_marks_alone_say_what_is_missing(visit, web, ids):
    screen = visit(web.url, allowed=["status of 400"])
    bad = ids["river/river_00.png"]
    screen.go(f"bad={bad}&find=all")
    expect(
        screen.page.locator("#problem-marks, #problem-detector").filter(has_text=re.compile("good", re.I))
    ).to_be_visible()
    # The mark is still there.
    assert screen.parameters["bad"] == [str(bad)]
    expect(screen.page.locator("#q")).to_be_visible()


def test_a_detector_of_another_model_is_refused(visit, web, ids, tmp_path):
    screen = visit(web.url, allowed=["status of 400"])
    screen.go(beaches_and_others(ids) + "&find=all")
    with screen.page.expect_download() as saved:
        screen.page.get_by_role("link", name="Download the detector").click()
    path = tmp_path / "other.json"
    saved.value.save_as(path)
    other = json.loads(path.read_text())
    other["model_id"] = "f" * len(other["model_id"])
    path.write_text(json.dumps(other))
    address, keys = screen.page.url, screen.keys()
    screen.page.locator("#detector-file").set_input_files(path)
    expect(screen.page.locator("#problem-detector")).to_contain_text("model")
    # What was there is there still.
    assert screen.page.url == address
    assert screen.keys() == keys
    path.write_text("no JSON")
    screen.page.locator("#detector-file").set_input_files(path)
    expect(screen.page.locator("#problem-detector")).not_to_contain_text("model ")
    expect(screen.page.locator("#problem-detector")).to_be_visible()
    assert screen.page.url == address
