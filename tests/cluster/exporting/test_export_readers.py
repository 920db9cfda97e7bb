"""Other programs read what `orbithash export` writes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import shapely
from export_archives import DATE_LINE, ODD_KEYS

from orbithash.cluster.exporting.export import ExportOptions, export

PARTS = ExportOptions(part_bytes=20_000, row_group_bytes=6_000)


@pytest.fixture(scope="module")
def files(archive, tmp_path_factory):
    """A folder with the archive in each format."""
    folder = tmp_path_factory.mktemp("files")
    export(archive.path, folder / "a.parquet", ExportOptions(row_group_bytes=20_000))
    export(archive.path, folder / "stac", PARTS)
    for name in ("a.csv", "a.geojson", "a.json"):
        export(archive.path, folder / name)
    return folder


@pytest.fixture(scope="module")
def unusual_files(unusual, tmp_path_factory):
    """A folder with the unusual archive in each format."""
    folder = tmp_path_factory.mktemp("unusual")
    for name in ("a.parquet", "a.csv", "a.geojson", "a.json", "stac"):
        export(unusual.path, folder / name)
    return folder


def test_geopandas(files, unusual_files):
    geopandas = pytest.importorskip("geopandas", reason="needs geopandas")
    frame = geopandas.read_parquet(files / "a.parquet")
    assert (len(frame), frame.crs) == (300, "OGC:CRS84")
    assert set(frame.geom_type) == {"Polygon"}
    # By the boxes of the rows.
    some = geopandas.read_parquet(files / "a.parquet", bbox=(0, 0, 60, 60))
    boxes = frame.geometry.intersects(shapely.box(0, 0, 60, 60))
    assert set(some["id"]) == set(frame["id"][boxes])
    assert 0 < len(some) < 100
    parts = geopandas.read_parquet(files / "stac" / "data")
    assert list(parts["id"]) == list(frame["id"])
    # The parts across 180 degrees are found from both sides.
    for box in ((179, -20, 180, -10), (-180, -20, -179, -10)):
        near = geopandas.read_parquet(unusual_files / "a.parquet", bbox=box)
        assert DATE_LINE in list(near.geometry)
    assert len(geopandas.read_parquet(unusual_files / "a.parquet")) == len(ODD_KEYS)


def test_duckdb(files, unusual_files):
    duckdb = pytest.importorskip("duckdb", reason="needs duckdb")
    with duckdb.connect() as connection:
        path = str(files / "a.parquet")
        # Hamming distances of packed codes, without orbithash.
        query = f"""
            SELECT b.id, list_sum(list_transform(list_zip(a.code, b.code), x -> bit_count(xor(x[1], x[2])))) AS distance
            FROM '{path}' a, '{path}' b WHERE a.id = 'row 5' AND b.id <> 'row 5' ORDER BY distance, b.row_id LIMIT 5
        """
        from orbithash.encoders.codes import hamming

        nearest = connection.execute(query).fetchall()
        table = {row["id"]: row["code"] for row in connection.execute(f"FROM '{path}'").fetch_arrow_table().to_pylist()}
        import numpy as np

        keys = sorted(table, key=lambda key: int(key.split()[1]))
        every = np.array([table[key] for key in keys], np.uint8)
        distances = hamming(np.array([table["row 5"]], np.uint8), every)[0]
        assert [distance for _, distance in nearest] == sorted(np.delete(distances, 5).tolist())[:5]
        assert all(distances[keys.index(key)] == distance for key, distance in nearest)
        groups = connection.execute(f"SELECT count(DISTINCT row_group_id) FROM parquet_metadata('{path}')").fetchone()
        assert groups[0] > 1


def test_duckdb_spatial(files, unusual_files):
    duckdb = pytest.importorskip("duckdb", reason="needs duckdb")
    with duckdb.connect() as connection:
        _load_spatial(connection)
        path = str(files / "a.parquet")
        area, rows = connection.execute(f"SELECT sum(ST_Area(geometry)), count(*) FROM '{path}'").fetchone()
        assert (round(area, 6), rows) == (75.0, 300)
        near = connection.execute(
            f"SELECT count(*) FROM '{unusual_files / 'a.parquet'}' "
            "WHERE ST_Intersects(geometry, ST_Point(179.9, -16.5)) OR ST_Intersects(geometry, ST_Point(-179.9, -16.5))"
        ).fetchone()
        assert near == (1,)


def _load_spatial(connection):
    """Load the extension from its package, without the network; skip where that is impossible."""
    package = pytest.importorskip("duckdb_extension_spatial", reason="needs the package duckdb-extension-spatial")
    found = sorted(Path(package.__file__).parent.rglob("*.duckdb_extension*"))
    if not found:
        pytest.skip("the package duckdb-extension-spatial has no extension for this platform")
    connection.execute(f"LOAD '{found[0]}'")


def test_pystac(files, unusual_files):
    pystac = pytest.importorskip("pystac", reason="needs pystac")
    pytest.importorskip("jsonschema", reason="needs the extra validation of pystac")
    collection = pystac.Collection.from_file(str(files / "stac" / "collection.json"))
    _validate_core(collection)
    items = list(collection.get_items())
    assert len(items) > 2
    for item in items:
        _validate_core(item)
        assert Path(item.assets["embeddings"].get_absolute_href()).is_file()
        assert item.get_collection().id == collection.id
        # What the embedding extension requires beyond the core: its schema needs the network.
        assert item.properties["emb:quantization"]["method"] == "hash"
    assert sum(item.properties["orbithash:rows"] for item in items) == 300
    fields = collection.extra_fields
    assert (fields["emb:type"], fields["emb:dimensions"], fields["data_type"]) == ("chip", 20, "uint8")
    assert {"emb:model", "emb:source-data"} <= {link.rel for link in collection.links}
    assert fields["orbithash:codes"]["bit_order"] == "msb-first"
    assert not any(name.startswith("emb:") and name not in _EMBEDDING_FIELDS for name in fields)


# Fields that version 0.0.1 of the embedding extension allows in a collection.
_EMBEDDING_FIELDS = {
    "emb:type",
    "emb:dimensions",
    "emb:chip_layout",
    "emb:temporal_resolution",
    "emb:fit_for_use",
    "emb:uncertainty",
}


def _validate_core(described):
    """Validate against the schemas that ship with pystac; those of extensions would need the network."""
    from pystac.validation import validate_dict

    validate_dict({**described.to_dict(include_self_link=False), "stac_extensions": []})


def test_pystac_items(files, unusual_files):
    pystac = pytest.importorskip("pystac", reason="needs pystac")
    pytest.importorskip("jsonschema", reason="needs the extra validation of pystac")
    items = pystac.ItemCollection.from_file(str(files / "a.json"))
    assert len(items) == 300
    for item in list(items)[::50]:
        _validate_core(item)
    # Valid too: the rows with a place and a time, at the date line and at a pole.
    unusual = {item["id"]: item for item in json.loads((unusual_files / "a.json").read_text())["features"]}
    _validate_core(pystac.Item.from_dict(unusual[ODD_KEYS[0]]))
    _validate_core(pystac.Item.from_dict(unusual[ODD_KEYS[2]]))
    for name in ("collection.json", "items/part-00000.json"):
        _validate_core(pystac.read_file(str(unusual_files / "stac" / name)))


def test_gpio_finds_nothing_to_improve(archive, unusual_files, tmp_path):
    tool = shutil.which("gpio") or Path(sys.executable).parents[1] / "tools" / "bin" / "gpio"
    if not Path(tool).exists():
        pytest.skip("needs gpio of geoparquet-io: make tools")
    export(archive.path, tmp_path / "a.parquet")
    export(archive.path, tmp_path / "stac")
    for path in (
        tmp_path / "a.parquet",
        tmp_path / "stac" / "data" / "part-00000.parquet",
        unusual_files / "a.parquet",
    ):
        ended = subprocess.run([tool, "check", "all", path], capture_output=True, text=True, check=False)
        output = ended.stdout + ended.stderr
        assert ended.returncode == 0, output
        assert not {"✗", "❌", "⚠"} & set(output), output
        assert "WARNING" not in output
        assert "ZSTD compression" in output
        assert "proper metadata covering" in output


@pytest.mark.parametrize("name", ["a.csv", "a.geojson", "a.json", "a.parquet"])
def test_ogrinfo_of_gdal(files, unusual_files, name):
    tool = shutil.which("ogrinfo")
    if tool is None:
        pytest.skip("needs ogrinfo of GDAL (Debian: gdal-bin)")
    if name == "a.parquet":
        drivers = subprocess.run([tool, "--formats"], capture_output=True, text=True, check=True).stdout
        if "Parquet" not in drivers:
            pytest.skip("this GDAL has no driver for Parquet")
    for folder, rows in ((files, 300), (unusual_files, len(ODD_KEYS))):
        ended = subprocess.run([tool, "-al", "-so", folder / name], capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
        assert f"Feature Count: {rows}" in ended.stdout
        assert "label" in ended.stdout
        if name != "a.csv":
            assert "WGS 84" in ended.stdout
        assert "ERROR" not in ended.stderr
