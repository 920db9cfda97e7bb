"""The answers of the page to addresses, over HTTP in front of a real gateway."""

import base64
import html
import re
from urllib.parse import quote, urlencode

import pytest
from page_world import ATTACK, BITS, HOSTILE, NUM_ROWS_PER_CLASS
from web_parts import serving_web

from orbithash.search.client import Client
from orbithash.search.web.settings import WebSettings


def fragment(service, **state):
    return service.get(f"/?{urlencode(state)}", HX_Request="true")


def tile_ids(text):
    return [int(number) for number in re.findall(r'<article class="tile" id="tile-(\d+)"', text)]


def sentence(text, slot):
    return html.unescape(re.search(rf'(?:id="problem-{slot}"|innerHTML:#problem-{slot}")[^>]*>([^<]*)<', text)[1])


def status(text):
    return html.unescape(re.search(r'(?:id="status"|innerHTML:#status")[^>]*>([^<]*)<', text)[1])


def test_the_first_screen_shows_random_tiles_and_keeps_them(service, world):
    first, again = service.get("/").text, service.get("/").text
    assert len(tile_ids(first)) == 60
    assert tile_ids(first) == tile_ids(again)
    assert tile_ids(service.get("/?seed=2").text) != tile_ids(first)
    assert status(first) == f"{world.num_rows} tiles, in random order."
    assert "data:image/jpeg;base64," in first


def test_further_tiles_follow_without_gaps(service, world):
    text, seen = fragment(service, label="harbor").text, []
    while True:
        seen += tile_ids(text)
        more = re.search(r'hx-get="(/more[^"]*)"', text)
        if more is None:
            break
        text = service.get(html.unescape(more[1]), HX_Request="true").text
    assert len(seen) == len(set(seen)) == NUM_ROWS_PER_CLASS
    text, seen = service.get("/").text, []
    while more := re.search(r'hx-get="(/more[^"]*)"', text):
        seen += tile_ids(text)
        text = service.get(html.unescape(more[1]), HX_Request="true").text
    assert sorted(seen + tile_ids(text)) == sorted(range(world.num_rows))
    assert f'aria-posinset="{world.num_rows}"' in text


def test_rows_like_a_row_are_nearest_first(service, gateway, rows):
    row = rows["harbor/harbor_03.png"]
    with Client(gateway.address) as client:
        hits = client.search(key=row.key, k=60).hits
        counts = client.distances(key=row.key).rows
    text = fragment(service, like=row.id).text
    assert tile_ids(text) == [hit.id for hit in hits]
    cut = fragment(service, like=row.id, radius=2).text
    num_within = sum(counts[:3])
    assert status(cut).startswith(f"{num_within} tile{'' if num_within == 1 else 's'} within 2 bits")
    charted = service.get(f"/counts?like={row.id}", HX_Request="true").text
    assert charted.split('data-rows="')[1].split('"')[0].split(",")[-1] == str(len(rows))


def test_marks_make_a_query_and_stay_visible(service, gateway, rows):
    good, bad = rows["river/river_01.png"], rows["roofs/roofs_01.png"]
    text = fragment(service, good=good.id, bad=bad.id).text
    with Client(gateway.address) as client:
        from orbithash.search.client import Example

        hits = client.search(positives=[Example(key=good.key)], negatives=[Example(key=bad.key)], k=60).hits
    assert tile_ids(text) == [hit.id for hit in hits]
    assert "Good 1" in text
    assert "Bad 1" in text
    assert f'id="tile-{good.id}"' in text
    assert re.search(rf'data-id="{good.id}"[^>]*data-mark="good"', text)
    only_bad = fragment(service, bad=bad.id).text
    assert "Mark at least one tile as good" in sentence(only_bad, "marks")
    assert len(tile_ids(only_bad)) == 60


def test_hidden_tiles_are_not_shown(service, rows):
    shown = tile_ids(fragment(service, like=7).text)
    assert tile_ids(fragment(service, like=7, hide=f"{shown[1]},{shown[3]}").text)[:2] == [shown[0], shown[2]]


def test_the_nearest_are_put_into_the_order_of_time(service, rows):
    by_id = {row.id: row for row in rows.values()}
    text = fragment(service, like=7, sort="newest", label="forest").text
    times = [by_id[number].datetime for number in tile_ids(text)]
    assert times == sorted(times, reverse=True)
    assert "the newest first" in status(text)
    oldest = [by_id[number].datetime for number in tile_ids(fragment(service, sort="oldest").text)]
    assert oldest == sorted(oldest)


def test_texts_of_the_archive_stay_text(service, rows):
    row = rows[HOSTILE["key"]]
    pages = [
        service.get(f"/?like={row.id}").text,
        service.get(f"/?good={row.id}&{urlencode({'label': HOSTILE['label']})}").text,
        service.get(f"/row/{row.id}?like={row.id}", HX_Request="true").text,
        service.get("/classes", HX_Request="true").text,
        service.get(f"/?{urlencode({'q': ATTACK, 'filter': ATTACK})}").text,
    ]
    for text in pages:
        assert "<img src=x" not in text
        assert "<script>document" not in text
        assert "49" not in re.findall(r"<dd>([^<]*)</dd>", text)
    assert html.escape(HOSTILE["label"]) in pages[3].replace("&#39;", "&#x27;")


@pytest.mark.parametrize(
    ("state", "slot", "part"),
    [
        ({"q": "x" * 10_000}, "q", "this one has 10,000"),
        ({"area": "0 0,1 1,1 0,0 1"}, "area", "crosses itself"),
        ({"filter": "label = ="}, "filter", "not valid"),
        ({"code": "AAECAwQF"}, "image", "does not fit this archive"),
        ({"good": "x"}, "marks", "whole number"),
        ({"radius": "near"}, "radius", "whole number"),
    ],
)
def test_a_problem_is_said_and_the_rest_is_kept(service, state, slot, part):
    reply = fragment(service, like=3, **state)
    assert part in sentence(reply.text, slot)
    # What is on the page stays.
    assert reply.headers["HX-Reswap"] == "none"
    assert tile_ids(reply.text) == []
    page = service.get(f"/?{urlencode({**state, 'hide': '4'})}")
    assert part in sentence(page.text, slot)
    assert html.escape(state.get("q", "")) in page.text


def test_an_image_becomes_a_code_in_the_address(service, world, rows):
    image = (world.images / "beach/beach_05.png").read_bytes()
    code = service.post("/image", image).json["code"]
    assert base64.urlsafe_b64decode(code + "=" * (-len(code) % 4)) == rows["beach/beach_05.png"].code
    assert tile_ids(fragment(service, code=code).text)[0] in {row.id for row in rows.values() if row.label == "beach"}
    for body, part in ((b"just text", "cannot be searched for"), (b"", "The file is empty")):
        refused = service.post("/image", body, Accept="application/json")
        assert refused.status == 400
        assert part in refused.error["message"]
    assert service.post("/image", bytes(11 * 2**20), Accept="application/json").status == 413


def test_a_row_is_shown_with_the_bits_that_differ(service, gateway, rows):
    row = rows["forest/forest_09.png"]
    with Client(gateway.address) as client:
        hits = {hit.id: hit for hit in client.search(key="beach/beach_00.png", k=300).hits}
    text = service.get(f"/row/{row.id}?like={rows['beach/beach_00.png'].id}", HX_Request="true").text
    assert f"<b>{hits[row.id].distance} of {BITS}</b>" in text
    assert text.count('class="differs"') == hits[row.id].distance
    assert "forest/forest_09.png" in text
    assert "Nothing is searched for yet" in service.get(f"/row/{row.id}", HX_Request="true").text
    assert service.get("/row/999999", HX_Request="true").status == 404
    picture = service.get(f"/view/{row.id}")
    assert picture.headers["Content-Type"] in ("image/jpeg", "image/png")
    assert service.get("/view/999999").status == 404


def test_classes_and_months_are_counted_under_the_other_filters(service):
    text = service.get("/classes?label=harbor&from=2020-01-01&to=2020-02-10", HX_Request="true").text
    counts = dict(re.findall(r'value="(\w+)"[^>]*> <span>\w+</span> <span class="rows">(\d+)', text))
    assert counts["harbor"] == counts["beach"] == "2"
    months = service.get("/months?label=harbor", HX_Request="true").text
    assert 'title="2020-01: 1"' in months


def test_without_a_gateway_the_page_says_so(world):
    with serving_web(WebSettings(gateway="127.0.0.1:1", listen="127.0.0.1:0")) as alone:
        page = alone.get("/?" + urlencode({"q": "two boats"}))
        assert page.status == 503
        assert "tries again by itself" in sentence(page.text, "gateway")
        assert 'value="two boats"' in page.text
        part = alone.get("/", HX_Request="true")
        assert (part.status, part.headers["HX-Reswap"]) == (503, "none")


def test_a_row_that_is_gone_is_reported(service):
    text = fragment(service, like=99999, good="5,88888").text
    assert "no longer in the archive" in text
    assert "1 marked tile is no longer" in text
    assert tile_ids(text)


def test_an_address_is_kept_in_the_links_of_further_tiles(service):
    text = fragment(service, like=3, label="a&b' OR 1", filter="lat > 50").text
    assert quote("a&b' OR 1", safe="").replace("%20", "+") in text or "No tile" in text
