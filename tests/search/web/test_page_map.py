"""The map in a browser: where tiles lie, areas, marks, and places that are clicked."""

import csv
import io
import json
import re
from pathlib import Path

import pytest
from page_screen import expect
from page_world import OFTEN, SIDE

from orbithash.search.client import Client

MODULE = "import(document.querySelector('script[src*=\"/map.js\"]').src)"


class Map:
    """The map of a page."""

    def __init__(self, screen):
        self.screen, self.page = screen, screen.page
        self.target = self.page.locator("#map")
        expect(self.page.locator("#map canvas").first).to_be_attached()

    def run(self, script, argument=None):
        """Evaluate a function of {map, tiles} and an argument."""
        return self.page.evaluate(f"async argument => ({script})(await {MODULE}, argument)", argument)

    def show(self, lon, lat, zoom):
        self.run(
            """({map}, [lon, lat, zoom]) => new Promise(done => {
                map.once("rendercomplete", done);
                map.getView().setCenter(ol.proj.fromLonLat([lon, lat]));
                map.getView().setZoom(zoom);
                map.render();
            })""",
            [lon, lat, zoom],
        )

    def position(self, lon, lat):
        """Return where a place is on the map, in pixels."""
        x, y = self.run("({map}, place) => map.getPixelFromCoordinate(ol.proj.fromLonLat(place))", [lon, lat])
        return {"x": x, "y": y}

    def click(self, lon, lat):
        self.target.click(position=self.position(lon, lat))

    def drag(self, *places):
        box = self.target.bounding_box()
        points = [self.position(*place) for place in places]
        mouse = self.page.mouse
        mouse.move(box["x"] + points[0]["x"], box["y"] + points[0]["y"])
        mouse.down()
        for point in points[1:]:
            mouse.move(box["x"] + point["x"], box["y"] + point["y"], steps=6)
        mouse.up()

    def tool(self, name):
        return self.page.get_by_role("toolbar", name="Tools of the map").get_by_role("button", name=name, exact=True)


@pytest.fixture
def rows(gateway):
    with Client(gateway.address) as client:
        return {row.key: row for row in client.scroll()}


def opened(visit, web, query="label=harbor", **options):
    screen = visit(web.url, **options)
    screen.go(query)
    expect(screen.tiles.first).to_be_visible()
    return screen, Map(screen)


def test_pictures_lie_on_their_corners(visit, web):
    """An image with a colour in each corner, on an outline that is turned and not a parallelogram."""
    _, chart = opened(visit, web, allowed=["willReadFrequently"])
    colours = chart.run(
        """async ({map, tiles}) => {
            const image = document.createElement("canvas");
            image.width = image.height = 64;
            const context = image.getContext("2d");
            [["#f00", 0, 0], ["#0f0", 32, 0], ["#00f", 32, 32], ["#ff0", 0, 32]].forEach(([colour, x, y]) => {
                context.fillStyle = colour;
                context.fillRect(x, y, 32, 32);
            });
            const tile = document.querySelector("article.tile").cloneNode(true);
            // From the upper left corner against the clock, with further vertices on an edge.
            const corners = [[179.95, 60.02], [179.97, 59.96], [-179.91, 59.95], [-179.96, 60.01]];
            const edge = [[-179.9934, 59.9566], [-179.95, 59.9533]];
            const ring = [corners[0], corners[1], ...edge, corners[2], corners[3]];
            Object.assign(tile.dataset, {id: "1234567", lon: "180", lat: "60",
                                         ring: ring.map(corner => corner.join()).join(" ")});
            const picture = tile.querySelector(".picture img");
            picture.src = image.toDataURL();
            await picture.decode();
            document.getElementById("tiles").append(tile);
            tiles.read();
            const place = tiles.byId.get("1234567");
            const [width, height] = [ol.extent.getWidth(place.extent), ol.extent.getHeight(place.extent)];
            const extent = ol.extent.buffer(place.extent, width / 4);
            const resolution = ol.extent.getWidth(extent) / 1000;
            const size = [1000, ol.extent.getHeight(extent) / resolution];
            const painted = tiles.paint(extent, resolution, 1, size).getContext("2d");
            const at = ([lon, lat], towards) => {
                const [x, y] = ol.proj.fromLonLat([lon < 0 ? lon + 360 : lon, lat]);
                const pixel = [(x - extent[0]) / resolution, (extent[3] - y) / resolution];
                // A few pixels to the inside or to the outside of the corner.
                const middle = [500, size[1] / 2];
                const away = Math.hypot(middle[0] - pixel[0], middle[1] - pixel[1]);
                const [px, py] = [0, 1].map(axis => pixel[axis] + (middle[axis] - pixel[axis]) * towards / away);
                return [...painted.getImageData(Math.round(px), Math.round(py), 1, 1).data];
            };
            return corners.map(corner => [at(corner, 6), at(corner, -6)]);
        }"""
    )
    inside = [colour for colour, _ in colours]
    assert inside == [[255, 0, 0, 255], [255, 255, 0, 255], [0, 0, 255, 255], [0, 255, 0, 255]]
    assert all(outside[3] == 0 for _, outside in colours)


def test_hover_lights_up_tiles_in_the_grid_and_on_the_map(visit, web, rows):
    screen, chart = opened(visit, web)
    row = rows["harbor/harbor_20.png"]
    chart.target.hover(position=chart.position(row.lon, row.lat))
    expect(screen.tile(row.key)).to_have_class(re.compile(r"\blit\b"))
    screen.tile_number(0).hover()
    expect(screen.tile(row.key)).not_to_have_class(re.compile(r"\blit\b"))
    assert chart.run("({tiles}) => tiles.lit") == screen.tile_number(0).get_attribute("data-id")


def test_a_click_on_a_tile_offers_more_like_it(visit, web, rows):
    screen, chart = opened(visit, web)
    row = rows["harbor/harbor_20.png"]
    chart.click(row.lon, row.lat)
    card = screen.page.locator("#map-card")
    expect(card).to_contain_text("harbor")
    card.get_by_role("button", name="Good example").click()
    expect(screen.tile(row.key)).to_have_attribute("data-mark", "good")
    card.get_by_role("button", name="View").click()
    expect(screen.page.locator("dialog#view")).to_contain_text(row.key)
    screen.page.keyboard.press("Escape")
    card.get_by_role("button", name="More like this").click()
    screen.page.wait_for_url(re.compile(f"like={row.id}"))
    assert screen.parameters["label"] == ["harbor"]


def test_a_click_on_an_empty_place_searches_for_what_lies_there(visit, web, rows):
    screen, chart = opened(visit, web)
    row = rows["harbor/harbor_20.png"]
    chart.show(row.lon, row.lat, 13)
    # Half a tile beside its edge.
    chart.click(row.lon, row.lat + SIDE * 0.6)
    screen.page.wait_for_url(re.compile(f"like={row.id}"))
    expect(screen.page.locator("#map-message")).to_contain_text("More like harbor")


def test_far_from_all_tiles_a_click_asks_first(visit, web):
    screen, chart = opened(visit, web)
    chart.show(30, 10, 4)
    chart.click(31, 11)
    card = screen.page.locator("#map-card")
    expect(card).to_contain_text("km from here")
    assert "like" not in screen.parameters
    card.get_by_role("button", name="Nearest to here").click()
    screen.page.wait_for_url(re.compile("near=3"))
    expect(screen.status).to_contain_text("nearest to the chosen place")


def test_a_box_is_an_area_until_it_is_removed(visit, web, rows):
    screen, chart = opened(visit, web, "")
    west, south = rows["forest/forest_05.png"].lon, rows["forest/forest_05.png"].lat
    chart.tool("Box").click()
    expect(chart.tool("Box")).to_have_attribute("aria-pressed", "true")
    chart.drag((west - SIDE, south - SIDE), (west + 7 * SIDE, south + SIDE))
    screen.page.wait_for_url(re.compile("area="))
    expect(chart.tool("Box")).to_have_attribute("aria-pressed", "false")
    inside = {
        key
        for key, row in rows.items()
        if abs(row.lat - south) < 1.5 * SIDE and -1.5 * SIDE < row.lon - west < 7.5 * SIDE
    }
    expect(screen.tiles).to_have_count(len(inside))
    assert set(screen.keys()) == inside
    chart.tool("Clear area").click()
    expect(screen.tiles).to_have_count(60)
    assert "area" not in screen.parameters
    expect(chart.tool("Clear area")).to_be_hidden()


def test_a_polygon_is_an_area_and_one_that_crosses_itself_is_refused(visit, web, rows):
    screen, chart = opened(visit, web, "")
    row = rows["forest/forest_05.png"]
    (west, south), (east, north) = (row.lon - SIDE, row.lat - SIDE), (row.lon + SIDE, row.lat + SIDE)
    for corners in (
        [(west, south), (east, south), (row.lon, north)],
        [(west, south), (east, north), (east, south), (west, north)],
    ):
        chart.show(row.lon, row.lat, 13)
        place = chart.position(*corners[0])
        chart.tool("Polygon").click()
        # The hint of the tool does not move the map below the pointer.
        expect(screen.page.locator("#map-message")).to_be_visible()
        assert chart.position(*corners[0]) == place
        for corner in corners:
            chart.click(*corner)
        chart.click(*corners[0])
        screen.page.wait_for_url(re.compile("area="))
        if len(corners) == 3:
            screen.wait_for_keys([row.key])
        else:
            expect(screen.page.locator("#problem-area")).to_contain_text("crosses itself")
    # What was there stays.
    assert screen.keys() == [row.key]


def test_a_polygon_with_an_edge_around_half_the_earth_holds_what_was_drawn(visit, web, rows):
    """The service joins corners along the shorter way, so that of an edge of 200 degrees it needs further ones."""
    screen, chart = opened(visit, web, "")
    chart.show(0, 20, 0)
    corners = [(-100, -10), (100, -10), (0, 70)]
    chart.tool("Polygon").click()
    for corner in (*corners, corners[0]):
        chart.click(*corner)
    screen.page.wait_for_url(re.compile("area="))
    expect(screen.page.locator("#clear-area")).to_be_visible()
    # All tiles lie near 3 E, 51 N.
    expect(screen.status).to_contain_text(f"{len(rows)} tiles that pass the filters")


def test_a_brush_marks_the_tiles_that_it_touches(visit, web, rows):
    screen, chart = opened(visit, web, "label=harbor")
    touched = [rows[f"harbor/harbor_{number}.png"] for number in (20, 21, 22)]
    chart.tool("Mark bad on the map").click()
    chart.drag(*[(row.lon, row.lat) for row in touched])
    screen.page.wait_for_url(re.compile("bad="))
    assert screen.parameters["bad"] == [",".join(str(row.id) for row in touched)]
    expect(screen.page.get_by_role("group", name="Bad marks").locator("li")).to_have_count(3)
    # The brush stays in the hand until it is put away.
    expect(chart.tool("Mark bad on the map")).to_have_attribute("aria-pressed", "true")
    chart.target.press("Escape")
    expect(chart.tool("Mark bad on the map")).to_have_attribute("aria-pressed", "false")


def test_the_keyboard_moves_the_map_and_sets_an_area(visit, web):
    screen, chart = opened(visit, web)
    before = chart.run("({map}) => map.getView().getCenter()[0]")
    zoom = chart.run("({map}) => map.getView().getZoom()")
    chart.target.focus()
    focused = screen.page.locator("#map:focus")
    screen.page.keyboard.press("ArrowRight")
    screen.page.keyboard.press("+")
    screen.page.wait_for_function(
        f"async ([x, zoom]) => {{ const view = (await {MODULE}).map.getView();"
        " return view.getCenter()[0] > x && view.getZoom() > zoom && !view.getAnimating(); }",
        arg=[before, zoom],
    )
    # These keys have not acted on the tiles.
    expect(focused).to_have_count(1)
    assert "good" not in screen.parameters
    chart.tool("In view").press("Enter")
    screen.page.wait_for_url(re.compile("area="))
    expect(screen.page.locator("#clear-area")).to_be_visible()


def test_an_area_may_be_wider_than_half_the_earth_and_not_all_of_it(visit, web, rows):
    screen, chart = opened(visit, web, "")
    chart.show(0, 0, 0)
    chart.tool("In view").click()
    expect(screen.page.locator("#map-message")).to_contain_text("less than once around the Earth")
    degrees = chart.run("({map}) => map.getSize()[0] * map.getView().getResolutionForZoom(1) / 20037508.34 * 180")
    assert 180 < degrees < 359
    chart.show(20, 0, 1)
    chart.tool("In view").click()
    screen.page.wait_for_url(re.compile("area="))
    expect(screen.status).to_contain_text(f"{len(rows)} tiles that pass the filters")


def test_tiles_without_places_are_counted(visit, web):
    screen = visit(web.url)

    def without_places(route):
        response = route.fetch()
        route.fulfill(response=response, body=re.sub(r'data-(lon|lat|ring)="[^"]*"', r'data-\1=""', response.text()))

    screen.page.route(re.compile(r"/(\?.*)?$"), without_places)
    screen.go("label=harbor")
    expect(screen.page.locator("#map-message")).to_have_text("50 of the tiles shown have no place.")


def test_the_map_of_a_narrow_screen_shows_all_tiles_and_loads_no_more(visit, web):
    screen = visit(web.url, width=390, height=844, scheme="dark")
    expect(screen.tiles.first).to_be_visible()
    loaded = screen.tiles.count()
    screen.page.get_by_role("button", name="Map", exact=True).click()
    screen.page.wait_for_function(
        f"async () => {{ const {{map, tiles}} = await {MODULE};"
        " return ol.extent.containsExtent(map.getView().calculateExtent(map.getSize()), tiles.extent()); }"
    )
    screen.page.wait_for_load_state("networkidle")
    assert screen.tiles.count() == loaded


def test_other_times_of_a_place(visit, web, rows):
    screen, _ = opened(visit, web, f"like={rows[OFTEN].id}")
    screen.tile(OFTEN).hover()
    screen.tile(OFTEN).get_by_role("button", name="View", exact=True).click()
    screen.page.get_by_role("button", name="Other times").click()
    times = screen.page.locator("dialog#times")
    expect(times.get_by_role("listitem")).to_have_count(3)
    times.get_by_role("listitem").nth(2).get_by_role("button", name="View").click()
    expect(times).to_be_hidden()
    expect(screen.page.locator("dialog#view")).to_contain_text("later2")


def test_exports_from_the_menu(visit, web):
    screen, _ = opened(visit, web, "label=harbor&q=harbor")
    screen.page.locator("#export-menu > summary").press("Enter")
    expect(screen.page.locator("#export-menu")).to_contain_text("All tiles of this answer: 50")
    features, lines = (downloaded(screen, scope, name) for scope, name in (("shown", "GeoJSON"), ("all", "CSV")))
    assert [feature["id"] for feature in json.loads(features)["features"]] == screen.keys()
    assert len(list(csv.DictReader(io.StringIO(lines)))) == 50


def downloaded(screen, scope, name):
    with screen.page.expect_download() as download:
        screen.page.locator(f'a[data-scope="{scope}"]', has_text=name).press("Enter")
    assert download.value.suggested_filename.startswith("orbithash_harbor_")
    return Path(download.value.path()).read_text()
