"""What holds for every page: access by keyboard and for screen readers, texts of the archive as texts, users apart."""

import re

import pytest
from axe_playwright_python.sync_playwright import Axe
from page_screen import expect
from page_world import ATTACK, HOSTILE

SENTENCE = "a river and some trees"

STATES = {
    "first screen": "",
    "answer": "q=a+river+and+some+trees",
    "marks": "q=a+river&good=0,5&bad=60",
    "detector": "good=150,151,152,153&bad=0,1,60,70&find=all",
    "nothing found": "q=a+river&from=2035-01-01",
    "an invalid expression": "q=a+river&filter=label+~~+3",
}


@pytest.mark.parametrize("width", [1440, 390])
def test_axe_finds_nothing_serious_in_both_colour_schemes(visit, web, width):
    screen = visit(web.url, width=width, height=844 if width == 390 else 900, allowed=["status of 400"])
    found = {}
    for name, query in STATES.items():
        screen.go(query)
        expect(screen.page.locator("#answer")).to_be_attached()
        found[name] = serious(screen)
    screen.go(STATES["answer"])
    screen.tiles.first.get_by_role("button", name="View").click()
    expect(screen.page.locator("dialog#view")).to_be_visible()
    found["full view"] = serious(screen)
    screen.page.keyboard.press("Escape")
    screen.page.locator("#class-menu summary").click()
    expect(screen.page.locator("#classes input").first).to_be_visible()
    found["classes"] = serious(screen)
    assert not {name: problems for name, problems in found.items() if problems}


def serious(screen):
    """Return the serious findings: all rules in the light scheme, and the one that depends on colours in the dark."""
    problems = []
    contrast = {"runOnly": ["color-contrast"]}
    for scheme, options in (("dark", contrast), ("light", {})):
        screen.page.emulate_media(color_scheme=scheme)
        response = Axe().run(screen.page, options={"resultTypes": ["violations"], **options}).response
        problems += [
            (
                scheme,
                violation["id"],
                [node["target"] for node in violation["nodes"]][:3],
                violation["nodes"][0]["failureSummary"],
            )
            for violation in response["violations"]
            if violation["impact"] in ("serious", "critical")
        ]
    return problems


def test_no_part_lies_outside_a_narrow_screen(visit, web):
    screen = visit(web.url, width=390, height=844)
    for query in STATES.values():
        screen.allowed = ["status of 400"]
        screen.go(query)
        assert screen.page.evaluate("document.documentElement.scrollWidth") <= 390, query


def test_the_keyboard_alone_leads_from_the_first_screen_to_an_export(visit, web):
    screen = visit(web.url)
    press = screen.page.keyboard.press
    expect(screen.tiles.first).to_be_visible()
    press("/")
    expect(screen.page.locator("#q")).to_be_focused()
    screen.page.keyboard.type(SENTENCE)
    press("Enter")
    screen.page.wait_for_url(re.compile("q="))
    expect(screen.page.locator("#answer")).to_have_attribute("data-has-query", "yes")
    press("Escape")
    expect(screen.page.locator("article.tile:focus")).to_have_count(1)
    first = screen.page.locator("article.tile:focus").get_attribute("data-key")
    press("ArrowRight")
    second = screen.page.locator("article.tile:focus").get_attribute("data-key")
    assert second == screen.keys()[screen.keys().index(first) + 1]
    press("+")
    expect(screen.page.get_by_role("group", name="Good marks").locator("li")).to_have_count(1)
    # The focus has not been lost with the old tiles.
    expect(screen.page.locator("article.tile:focus")).to_have_count(1)
    press("ArrowRight")
    press("-")
    expect(screen.page.get_by_role("group", name="Bad marks").locator("li")).to_have_count(1)
    press("v")
    expect(screen.page.locator("dialog#view")).to_be_visible()
    press("Escape")
    expect(screen.page.locator("dialog#view")).to_be_hidden()
    tab_to(screen, screen.page.get_by_role("button", name="Find all"))
    press("Enter")
    screen.page.wait_for_url(re.compile("find=all"))
    export = screen.page.locator('a[href*="/export.geojson"]').first
    tab_to(screen, export)
    with screen.page.expect_download() as saved:
        press("Enter")
    assert saved.value.suggested_filename.endswith(".geojson")


def tab_to(screen, target, most=150):
    """Press Tab until the target has the focus; opens menus on the way that contain it."""
    is_menu_of = """node => {
        const focused = document.activeElement;
        return focused.tagName === "SUMMARY" && focused.parentElement.contains(node) && !focused.parentElement.open;
    }"""
    for _ in range(most):
        if target.evaluate("node => node === document.activeElement"):
            return
        screen.page.keyboard.press("Tab")
        if target.evaluate(is_menu_of):
            screen.page.keyboard.press("Enter")
    raise AssertionError(f"Tab does not reach {target}")


def test_markup_in_the_archive_stays_text(visit, web, gateway):
    screen = visit(web.url)
    screen.go("filter=key+LIKE+'evil%25'")
    expect(screen.tiles).to_have_count(1)
    tile = screen.tile_number(0)
    expect(tile).to_contain_text(ATTACK)
    tile.get_by_role("button", name="View").click()
    view = screen.page.locator("dialog#view")
    for text in HOSTILE.values():
        expect(view).to_contain_text(text)
    screen.page.keyboard.press("Escape")
    screen.mark_tile(tile, "good")
    expect(screen.page.get_by_role("group", name="Good marks").locator("li")).to_have_count(1)
    screen.page.locator("#class-menu summary").click()
    expect(screen.page.locator("#classes")).to_contain_text(ATTACK)
    # Nor does what the user types, or what a link holds, become markup.
    screen.go("q=%22%3E" + "%3Cimg src=x onerror=document.title='owned'%3E")
    expect(screen.page.locator("#q")).to_have_value(f'">{ATTACK}')
    assert screen.page.title() != "owned"
    assert screen.page.locator("img[src=x], script:not([src])").count() == 0


def test_two_users_do_not_see_each_other(visit, web):
    one, two = visit(web.url), visit(web.url)
    one.ask(SENTENCE)
    two.ask("a beach")
    expect(one.page.locator("#answer")).to_have_attribute("data-has-query", "yes")
    expect(two.page.locator("#answer")).to_have_attribute("data-has-query", "yes")
    before = two.keys()
    one.mark_tile(one.tile_number(0), "good")
    expect(one.page.get_by_role("group", name="Good marks").locator("li")).to_have_count(1)
    assert two.keys() == before
    assert "good" not in two.parameters
    two.page.reload()
    assert two.keys() == before
    expect(two.page.locator("#q")).to_have_value("a beach")
