"""Screenshots for people to look at, of each state of the page; kept in the folder ORBITHASH_SCREENSHOTS."""

import numpy as np
import pytest
import rasterio
from page_screen import expect
from page_services import GatewayThread, WebProcess
from page_world import World
from rasterio.warp import transform

from orbithash.cluster.encoding.stages import Encoder, decode, item_table, write
from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.networks.model import HashModel
from orbithash.encoders.sources.sources import list_source

pytestmark = pytest.mark.slow

TILE_PX = 128
STATES = {
    "first": "",
    "sentence": "q=a+river+and+some+trees",
    "marks": "q=a+river+and+some+trees&good=150,151,152&bad=60,1",
    "detector": "good=150,151,152,153,154,155&bad=0,1,60,70,110,220&find=all",
    "area": "q=a+river&area=3 51,3.3 51,3.4 51.1,3.1 51.15",
    "empty": "q=a+river&from=2035-01-01",
    "error": "q=a+river&filter=label ~~ 3",
}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1440, 390])
def test_pictures_of_each_state(visit, web, pictures, width, scheme):
    screen = visit(web.url, width=width, height=844 if width == 390 else 900, scheme=scheme, allowed=["status of 400"])
    for name, query in STATES.items():
        screen.go(query)
        screen.picture(pictures, f"{name}-{width}-{scheme}")
    screen.go(STATES["sentence"])
    screen.tile_number(0).get_by_role("button", name="View").click()
    expect(screen.page.locator("dialog#view img").first).to_be_visible()
    screen.picture(pictures, f"view-{width}-{scheme}")


@pytest.fixture(scope="module")
def landsat(world, shared, tmp_path_factory):
    """The Landsat scene, cut into tiles."""
    bands = [shared / "data" / "landsat8_sample" / f"LC81070352015122LGN00_B{band}.tif" for band in (4, 3, 2)]
    root = tmp_path_factory.mktemp("landsat")
    (root / "scene").mkdir()
    with rasterio.open(bands[0]) as band:
        profile = band.profile | {"count": 3, "photometric": "RGB"}
    with rasterio.open(root / "scene" / "scene.tif", "w", **profile) as scene:
        for number, path in enumerate(bands, 1):
            with rasterio.open(path) as band:
                scene.write(band.read(1), number)
    model = HashModel.load(world.model)
    items = list_source(root / "scene", TILE_PX)
    archive = Archive.create(root / "archive", model.bits, model.model_id, model.card.vector)
    encoded = Encoder(world.model, "cpu")(decode(item_table(items), model.preprocessing))
    archive.commit(write(encoded, str(root / "archive"))["fragments"][0].as_py())
    return World(root / "archive", world.model, root / "scene", archive.num_rows)


@pytest.fixture(scope="module")
def landsat_web(landsat):
    gateway = GatewayThread(landsat)
    gateway.start()
    running = WebProcess(gateway.address)
    yield running
    running.stop()
    gateway.stop()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1440, 390])
def test_tiles_of_landsat_lie_at_their_true_place(visit, landsat, landsat_web, pictures, width, scheme):
    screen = visit(landsat_web.url, width=width, height=844 if width == 390 else 900, scheme=scheme)
    screen.go("area=139.5 35.2,140.2 35.2,140.2 36.2,139.5 36.2")
    expect(screen.tiles.first).to_be_visible()
    if width == 390:
        screen.page.get_by_role("button", name="Map", exact=True).click()
    screen.picture(pictures, f"landsat-{width}-{scheme}")
    rings = screen.tiles.evaluate_all("tiles => tiles.map(tile => [tile.dataset.key, tile.dataset.ring])")
    assert len(rings) >= 10
    with rasterio.open(landsat.images / "scene.tif") as scene:
        for key, ring in rings:
            vertices = np.array([[float(number) for number in place.split(",")] for place in ring.split()])
            left, top, tile_width, tile_height = map(int, key.partition("#")[2].split(","))
            right, bottom = left + tile_width, top + tile_height
            corners = [
                scene.transform @ place for place in ((left, top), (right, top), (right, bottom), (left, bottom))
            ]
            true = np.array(transform(scene.crs, "EPSG:4326", *zip(*corners, strict=True))).T
            # Each corner is a vertex of the outline, to a thousandth of a pixel.
            gaps = np.abs(vertices[None] - true[:, None]).max(axis=2).min(axis=1)
            assert gaps.max() < 2e-6
