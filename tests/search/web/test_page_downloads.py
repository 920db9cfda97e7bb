"""Exports: what is shown, and all that the cut-off lets in, as GeoJSON, CSV and GeoParquet."""

import csv
import io
import json

import pyarrow.parquet as pq
import pytest
import shapely
from page_screen import expect

from orbithash.search.client import Client

SENTENCE = "a river and some trees"


def keys_in(kind, content):
    """Return the keys of an export in its order, and the longitudes and latitudes of its outlines' centres."""
    if kind == "geojson":
        parsed = json.loads(content)
        assert parsed["type"] == "FeatureCollection"
        shapes = [shapely.from_geojson(json.dumps(feature["geometry"])) for feature in parsed["features"]]
        keys = [feature["id"] for feature in parsed["features"]]
    elif kind == "csv":
        rows = list(csv.DictReader(io.StringIO(content.decode("utf-8-sig"))))
        return [row["id"] for row in rows], [(float(row["lon"]), float(row["lat"])) for row in rows]
    else:
        table = pq.read_table(io.BytesIO(content))
        geo = json.loads(table.schema.metadata[b"geo"])
        assert geo["primary_column"] == "geometry"
        shapes, keys = shapely.from_wkb(table["geometry"].to_pylist()), table["id"].to_pylist()
    return keys, [(shape.centroid.x, shape.centroid.y) for shape in shapes]


@pytest.mark.parametrize("kind", ["geojson", "csv", "parquet"])
def test_an_export_has_the_rows_of_the_answer(visit, web, world, gateway, kind, tmp_path):
    screen = visit(web.url)
    with Client(gateway.address) as client:
        radius = client.search(text=SENTENCE, k=100).hits[-1].distance
        within = client.search(text=SENTENCE, k=world.num_rows, radius=radius).hits
    screen.go(f"q={SENTENCE}&radius={radius}")
    assert len(within) > 60, "more than one part, so that the two scopes differ"
    expect(screen.tiles).to_have_count(60)
    for scope, expected in (("shown", within[:60]), ("all", within)):
        link = screen.page.locator(f'a[href*="/export.{kind}"][href*="scope={scope}"]')
        for menu in screen.page.locator("details:not([open])").filter(has=link).all():
            menu.locator("summary").click()
        with screen.page.expect_download() as saved:
            link.click()
        assert saved.value.suggested_filename.endswith(f".{kind}")
        path = tmp_path / saved.value.suggested_filename
        saved.value.save_as(path)
        keys, centres = keys_in(kind, path.read_bytes())
        assert keys == [hit.key for hit in expected]
        for (lon, lat), hit in zip(centres, expected, strict=True):
            assert (lon, lat) == pytest.approx((hit.lon, hit.lat), abs=1e-9)


def test_a_csv_of_hostile_texts_runs_no_formula(visit, web, tmp_path):
    screen = visit(web.url)
    response = screen.page.request.get(f"{web.url}/export.csv?filter=key LIKE 'evil%25'&scope=all")
    assert response.ok
    (row,) = csv.DictReader(io.StringIO(response.body().decode("utf-8-sig")))
    assert "<script>" in row["id"]
    assert response.headers["content-disposition"].startswith("attachment")
    assert response.headers["x-content-type-options"] == "nosniff"
