"""Bad input and faults: a clear message, and nothing that the user had is lost."""

import re

import pytest
from page_screen import expect

SENTENCE = "a river and some trees"
REFUSED = ["status of 4"]


def with_answer(visit, web, allowed=REFUSED):
    """Return a screen with an answer, its keys and its address."""
    screen = visit(web.url, allowed=allowed)
    screen.ask(SENTENCE)
    expect(screen.page.locator("#answer")).to_have_attribute("data-has-query", "yes")
    return screen, screen.keys(), screen.page.url


def is_kept(screen, keys, address):
    assert screen.keys() == keys
    assert screen.page.url == address
    expect(screen.page.locator("#q")).to_have_value(SENTENCE)


def test_a_text_file_is_no_image(visit, web):
    screen, *before = with_answer(visit, web)
    screen.bring(b"these are only words\n" * 20, "words.txt", "text/plain")
    expect(screen.page.locator("#problem-image")).to_contain_text(re.compile("JPEG|image", re.I))
    is_kept(screen, *before)
    screen.bring(b"these are only words\n" * 20, "words.jpg", "image/jpeg")
    expect(screen.page.locator("#problem-image")).to_contain_text("JPEG")
    is_kept(screen, *before)


def test_an_image_of_50_mb_is_too_large(visit, web, tmp_path):
    screen, *before = with_answer(visit, web)
    path = tmp_path / "large.jpg"
    with path.open("wb") as file:
        file.write(b"\xff\xd8\xff\xe0")
        file.truncate(50 * 2**20)
    screen.page.locator("#image").set_input_files(path)
    expect(screen.page.locator("#problem-image")).to_contain_text(re.compile("10 M"))
    is_kept(screen, *before)


def test_an_empty_sentence_shows_the_archive_again(visit, web):
    screen, *_ = with_answer(visit, web)
    screen.ask("   ")
    expect(screen.page.locator("#answer")).to_have_attribute("data-has-query", "no")
    expect(screen.tiles).to_have_count(60)
    expect(screen.page.locator(".problem:visible").filter(has_text=re.compile(r"\S"))).to_have_count(0)


def test_10000_characters_are_too_many(visit, web):
    screen, keys, _ = with_answer(visit, web)
    long = "many boats " * 910
    screen.ask(long)
    expect(screen.page.locator("#problem-q")).to_contain_text("2,000 characters")
    assert screen.keys() == keys
    # It can be shortened rather than typed again.
    expect(screen.page.locator("#q")).to_have_value(long)
    screen.ask(SENTENCE)
    expect(screen.page.locator("#problem-q")).to_be_empty()


@pytest.mark.parametrize(
    ("area", "is_refused"),
    [
        # Crosses itself.
        ("3 51,4 52,4 51,3 52", True),
        # Crosses the date line: the short way around.
        ("179 -10,-179 -10,-179 10,179 10", False),
        ("3 51,4 51", True),
        ("3 51,4 951,4 52", True),
        ("word", True),
    ],
)
def test_areas_that_are_unusual_or_invalid(visit, web, area, is_refused):
    screen, *_ = with_answer(visit, web)
    screen.go(f"q={SENTENCE}&area={area}")
    problem = screen.page.locator("#problem-area")
    if is_refused:
        expect(problem).to_contain_text(re.compile(r"\w+ \w+"))
        # The rest of the address has its effect.
        expect(screen.tiles).to_have_count(60)
    else:
        expect(problem).to_be_empty()
        expect(screen.page.locator("#tiles")).to_contain_text("No tile passes the area")
    expect(screen.page.locator("#q")).to_have_value(SENTENCE)


def test_an_invalid_expression_keeps_the_answer(visit, web):
    screen, keys, _ = with_answer(visit, web)
    screen.page.locator("#filter-menu summary").click()
    screen.page.locator("#filter").fill("label ~~ 3")
    screen.page.locator("#filter-menu").get_by_role("button", name="Apply").click()
    expect(screen.page.locator("#problem-filter")).to_contain_text("expression")
    assert screen.keys() == keys
    expect(screen.page.locator("#filter")).to_have_value("label ~~ 3")


@pytest.mark.parametrize(
    "query",
    ["like=99999999", "code=AAAAAAAA", "code=***", "good=1,x", "radius=-1", "sort=upwards", "from=yesterday",
     "min=much", "near=here", "find=none", "detector=abc", "seed=1e9", "good=" + ",".join(map(str, range(400)))],
)  # fmt: skip
def test_a_damaged_address_says_so_and_shows_the_rest(visit, web, query):
    screen = visit(web.url, allowed=REFUSED)
    screen.go(f"label=river&{query}")
    problems = screen.page.locator(".problem, .note-line").filter(has_text=re.compile(r"\w+ \w+"))
    expect(problems).to_have_count(1)
    expect(problems).not_to_contain_text(re.compile("Traceback|Error|Exception"))
    expect(screen.page.locator("#q")).to_be_visible()


def test_an_unknown_page_leads_back(visit, web):
    screen = visit(web.url, allowed=REFUSED)
    screen.page.goto(f"{web.url}/nowhere")
    screen.page.get_by_role("link").first.click()
    expect(screen.tiles).to_have_count(60)


def test_a_gateway_that_stops_and_comes_back(visit, web, gateway):
    # The second is htmx's, for a request that was on its way when the gateway stopped.
    stopped = ["status of 5", "Error Code 5"]
    screen, *_ = with_answer(visit, web, allowed=stopped)
    screen.mark(screen.keys()[0], "good")
    expect(screen.page.get_by_role("group", name="Good marks").locator("li")).to_have_count(1)
    keys = screen.keys()
    gateway.stop()
    try:
        screen.page.locator("#sort").select_option("newest")
        expect(screen.page.locator("#problem-gateway")).to_contain_text(re.compile(r"\w+ \w+"))
        # Everything that was there is still there.
        assert screen.keys() == keys
        expect(screen.page.locator("#q")).to_have_value(SENTENCE)
        # A page that is opened meanwhile says so, and has the line.
        late = visit(web.url, allowed=stopped)
        expect(late.page.locator("#problem-gateway")).to_contain_text(re.compile(r"\w+ \w+"))
        expect(late.page.locator("#q")).to_be_visible()
    finally:
        gateway.start()
    screen.page.locator("#sort").select_option("oldest")
    screen.page.wait_for_url(re.compile("sort=oldest"))
    expect(screen.page.locator("#problem-gateway")).to_be_empty()
    expect(screen.page.get_by_role("group", name="Good marks").locator("li")).to_have_count(1)
    late.page.reload()
    expect(late.tiles).to_have_count(60)
