"""What `orbithash export` writes, and what it refuses."""

import csv
import dataclasses
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import shapely
from export_archives import BITS, DATE_LINE, MODEL_ID, ODD_KEYS, POLE, VECTOR, make_archive

from orbithash.cluster.exporting.export import ExportOptions, export
from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.errors import InputError
from orbithash.encoders.places.code_description import CodeDescription
from orbithash.encoders.places.geometry import hilbert_positions

PARTS = ExportOptions(part_bytes=4_000, row_group_bytes=1_500)


def rows_of(archive):
    """Return the rows of an archive by key."""
    names = [name for name in archive.schema.names if name != "key"]
    ids, table = archive.scan(["key", *names])
    return {row["key"]: row | {"id": number} for row, number in zip(table.to_pylist(), ids.tolist(), strict=True)}


def in_hilbert_order(rows):
    """Return the keys of rows in the order of an export."""
    lon, lat = (
        np.array([row[name] if row[name] is not None else np.nan for row in rows.values()]) for name in ("lon", "lat")
    )
    positions = hilbert_positions(lon, lat).tolist()
    order = sorted(zip(positions, [row["id"] for row in rows.values()], rows, strict=True))
    return [key for _, _, key in order]


def test_geoparquet_has_every_column_of_every_row_in_hilbert_order(archive, cli, tmp_path):
    out = tmp_path / "places.parquet"
    ended = cli("export", archive.path, out)
    assert ended.code == 0, ended.err
    assert "wrote 300 rows" in ended.out
    assert "valid stac-geoparquet" in ended.out
    rows = rows_of(archive)
    table = pq.read_table(out)
    assert table["id"].to_pylist() == in_hilbert_order(rows)
    for row in table.to_pylist():
        given = rows[row["id"]]
        assert row["row_id"] == given["id"]
        for name in ("label", "caption", "datetime", "lon", "lat", "uri", "code", "vector", "thumbnail", "stamp"):
            assert row[name] == given[name]
        assert (row["geometry"], row["has_footprint"], row["footprint"]) == (given["footprint"], True, None)
        assert tuple(row["bbox"].values()) == shapely.from_wkb(given["footprint"]).bounds
        assert row["assets"] == {"image": {"href": given["uri"], "roles": ["data"]}}
        assert row["collection"] == "world"


def test_the_footers_describe_the_codes(archive, tmp_path):
    export(archive.path, tmp_path / "a.parquet")
    # Also for readers without Arrow.
    metadata = pq.read_metadata(tmp_path / "a.parquet").metadata
    assert {name: pq.read_schema(tmp_path / "a.parquet").metadata[name] for name in (b"geo", b"emb", b"orbithash")} == {
        name: metadata[name] for name in (b"geo", b"emb", b"orbithash")
    }
    geo = json.loads(metadata[b"geo"])
    column = geo["columns"]["geometry"]
    assert (geo["version"], column["encoding"], column["geometry_types"]) == ("1.1.0", "WKB", ["Polygon"])
    assert column["covering"]["bbox"]["xmin"] == ["bbox", "xmin"]
    west, south, east, north = column["bbox"]
    assert west < -170 < 170 < east
    assert south < -80 < 80 < north
    assert CodeDescription.from_json(metadata[b"orbithash"]) == CodeDescription(
        BITS, MODEL_ID, vector_dims=VECTOR.dims, vector_scale=VECTOR.scale
    )
    emb = json.loads(metadata[b"emb"])
    assert (emb["type"], emb["dimensions"], emb["data_type"]) == ("chip", BITS, "uint8")
    assert emb["model"]["id"] == MODEL_ID
    stac = json.loads(metadata[b"stac-geoparquet"])
    assert stac["version"] == "1.1.0"
    assert stac["collections"]["world"]["orbithash:codes"]["bits"] == BITS


def test_parts_hold_the_rows_of_one_file_in_its_order(archive, tmp_path):
    export(archive.path, tmp_path / "a.parquet")
    whole = pq.read_table(tmp_path / "a.parquet")
    result = export(archive.path, tmp_path / "stac", PARTS)
    paths = sorted((tmp_path / "stac" / "data").iterdir())
    # More ranges than files are open at a time.
    assert len(paths) == result.files > 10
    tables = [pq.read_table(path) for path in paths]
    assert [row for table in tables for row in table.to_pylist()] == whole.to_pylist()
    assert max(map(len, tables)) < 3 * 300 / len(tables)
    groups = [pq.read_metadata(path).num_row_groups for path in paths]
    assert min(groups[:-1]) >= 2


@pytest.mark.parametrize("part_bytes", [300, 700])
def test_more_ranges_than_open_files_keep_the_order(archive, tmp_path, part_bytes):
    export(archive.path, tmp_path / "a.parquet")
    result = export(archive.path, tmp_path / "b.parquet", dataclasses.replace(PARTS, part_bytes=part_bytes))
    assert result.contents.rows == 300
    expected, got = (pq.read_table(tmp_path / name).to_pylist() for name in ("a.parquet", "b.parquet"))
    assert got == expected


def test_rows_of_one_place_are_divided_too(tmp_path):
    archive = make_archive(tmp_path / "one", 200, lon=[5.0] * 200, lat=[6.0] * 200, footprint=[None] * 200)
    result = export(archive.path, tmp_path / "stac", PARTS)
    assert result.files > 5
    tables = [pq.read_table(path) for path in sorted((tmp_path / "stac" / "data").iterdir())]
    assert [key for table in tables for key in table["id"].to_pylist()] == [f"row {number}" for number in range(200)]
    assert max(map(len, tables)) < 60


def test_unusual_places_and_names(unusual, tmp_path):
    result = export(unusual.path, tmp_path / "a.parquet")
    assert str(result).endswith(
        "2 rows have no place and 3 rows have no time; footprints that are not valid outlines became points: 1; STAC "
        "requires a place and a time of each row"
    )
    assert b"stac-geoparquet" not in pq.read_metadata(tmp_path / "a.parquet").metadata
    rows = {row["id"]: row for row in pq.read_table(tmp_path / "a.parquet").to_pylist()}
    assert set(rows) == set(ODD_KEYS)
    shapes = [shapely.from_wkb(rows[key]["geometry"]) for key in ODD_KEYS]
    assert shapes == [DATE_LINE, POLE, shapely.Point(-180, -90), None, None, shapely.Point(7, 8)]
    assert rows[ODD_KEYS[0]]["bbox"] == {"xmin": -180, "ymin": -17, "xmax": 180, "ymax": -16}
    assert rows[ODD_KEYS[3]]["bbox"] is None
    assert [rows[key]["has_footprint"] for key in ODD_KEYS] == [True, True, False, False, False, True]
    assert rows[ODD_KEYS[5]]["footprint"] == b"no geometry"
    # Rows without a place come last.
    assert set(list(rows)[-2:]) == {ODD_KEYS[3], ODD_KEYS[4]}


def test_text_formats(unusual, tmp_path):
    for name in ("a.csv", "a.geojson", "a.json"):
        export(unusual.path, tmp_path / name)
    rows = rows_of(unusual)
    with (tmp_path / "a.csv").open(newline="") as file:
        lines = {line["uri"].removeprefix("'"): line for line in csv.DictReader(file)}
    features = {
        name: {each["id"]: each for each in json.loads((tmp_path / name).read_text())["features"]}
        for name in ("a.geojson", "a.json")
    }
    for key, row in rows.items():
        code = bytes(row["code"]).hex()
        assert lines[key]["code"] == features["a.geojson"][key]["properties"]["code"] == code
        assert features["a.json"][key]["properties"]["orbithash:code"] == code
        assert features["a.json"][key]["assets"]["image"]["href"] == row["uri"]
        assert "thumbnail" not in lines[key]
    assert lines["=1+1"]["id"] == "'=1+1"
    # RFC 7946: a box across the antimeridian has its western edge in the east.
    assert features["a.json"][ODD_KEYS[0]]["bbox"] == [179.5, -17, -179.5, -16]
    assert features["a.json"][ODD_KEYS[1]]["bbox"] == [-180, 80, 180, 90]
    for name in ("a.geojson", "a.json"):
        assert json.loads((tmp_path / name).read_text())["orbithash:codes"]["bits"] == BITS


def test_chosen_columns(archive, tmp_path):
    chosen = ExportOptions(columns=["label", "code", "row_id"])
    export(archive.path, tmp_path / "a.parquet", chosen)
    names = pq.read_schema(tmp_path / "a.parquet").names
    assert names == ["id", "row_id", "label", "code", "geometry", "has_footprint", "footprint", "bbox"]
    every = ExportOptions(columns=["vector", "thumbnail", "stamp"])
    export(archive.path, tmp_path / "a.geojson", every)
    feature = json.loads((tmp_path / "a.geojson").read_text())["features"][0]
    row = rows_of(archive)[feature["id"]]
    assert feature["properties"]["vector"] == row["vector"]
    assert list(feature["properties"]) == ["vector", "thumbnail", "stamp"]


@pytest.mark.parametrize("condition", ["label = 'kind 1'", "key = 'row 17'", "label = 'none'", "lon > -100"])
def test_a_filter_selects_rows(archive, tmp_path, condition):
    result = export(archive.path, tmp_path / "a.parquet", ExportOptions(filter=condition, columns=["label", "code"]))
    table = pq.read_table(tmp_path / "a.parquet")
    rows = rows_of(archive)
    expected = [
        key
        for key in in_hilbert_order(rows)
        if {
            "label = 'kind 1'": rows[key]["label"] == "kind 1",
            "key = 'row 17'": key == "row 17",
            "lon > -100": rows[key]["lon"] > -100,
        }.get(condition, False)
    ]
    assert table["id"].to_pylist() == expected
    assert result.contents.rows == len(expected)
    assert [bytes(code) for code in table["code"].to_pylist()] == [bytes(rows[key]["code"]) for key in expected]


def test_an_older_version_and_deleted_rows(tmp_path):
    archive = make_archive(tmp_path / "a", 30)
    before = archive.version
    archive.delete(["row 3", "row 29"])
    assert export(archive.path, tmp_path / "old.csv", ExportOptions(version=before)).contents.rows == 30
    export(archive.path, tmp_path / "new.parquet")
    keys = pq.read_table(tmp_path / "new.parquet")["id"].to_pylist()
    assert sorted(keys) == sorted({f"row {number}" for number in range(30)} - {"row 3", "row 29"})


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.geojson", "a.json", "stac"])
def test_an_empty_archive_is_a_valid_file(tmp_path, name):
    archive = make_archive(tmp_path / "empty", 0, vector=None)
    result = export(archive.path, tmp_path / name)
    assert (result.contents.rows, result.files) == (0, 1)
    if name.endswith("json"):
        assert json.loads((tmp_path / name).read_text())["features"] == []
    elif name == "a.csv":
        assert len((tmp_path / name).read_text().splitlines()) == 1
    else:
        path = tmp_path / name if name == "a.parquet" else tmp_path / "stac" / "data" / "part-00000.parquet"
        assert pq.read_table(path).num_rows == 0
        assert "vector" not in pq.read_schema(path).names


def test_a_file_is_replaced_and_a_full_folder_is_not(archive, refused, cli, tmp_path):
    out = tmp_path / "a.csv"
    out.write_text("old")
    assert cli("export", archive.path, out, "--json").code == 0
    assert len(out.read_text().splitlines()) == 301
    folder = tmp_path / "folder"
    folder.mkdir()
    assert cli("export", archive.path, folder).code == 0, "an empty folder is free"
    refused("export", archive.path, folder, words=["not empty", "a new or an empty folder"])
    refused("export", archive.path, out, "--format", "stac", words=["is a file"])
    refused("export", archive.path, folder, "--format", "csv", words=["is a folder"])


def test_wrong_options_are_refused_in_one_line(archive, refused, tmp_path):
    path = archive.path
    refused("export", path, tmp_path / "a.txt", words=["ending .txt", ".parquet, .geojson, .csv, .json"])
    refused("export", path, tmp_path / "a", "--format", "shp", words=["--format is shp", "parquet, stac, items"])
    refused("export", path, tmp_path / "a.csv", "--workers", "2", words=["parquet or stac"])
    refused("export", path, tmp_path / "a.parquet", "--workers", "3:2", words=["1 <= MIN <= MAX"])
    refused(
        "export", path, tmp_path / "a.csv", "--columns", "label,colour", words=["no column colour", "row_id, label"]
    )
    refused("export", path, tmp_path / "a.csv", "--filter", "colour = 1", words=["colour"])
    refused("export", path, tmp_path / "a.csv", "--version", "99", words=[path])
    refused("export", path, f"{path}/a.csv", words=["lies in the archive"])
    refused("export", path, "s3://bucket/a.csv", words=["object store"])
    refused("export", tmp_path / "none", tmp_path / "a.csv", words=["does not exist"])
    refused("export", path, tmp_path / "a.csv", "--model", tmp_path, words=["not a model folder"])


FULL = """
import resource, signal, sys
from orbithash.cluster.cli.main import main
# A file cannot grow beyond this size: like a full disk, in the middle of a file.
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
main()
"""


@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "stac"])
def test_a_full_disk_leaves_nothing(archive, tmp_path, name):
    out = tmp_path / name
    ended = subprocess.run(
        [sys.executable, "-c", FULL, "5000", "export", archive.path, str(out)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        check=False,
    )
    assert ended.returncode == 2, ended.stderr
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error")]
    assert line == f"error: {out} cannot be written: File too large"
    assert list(tmp_path.iterdir()) == []


def test_the_model_must_be_that_of_the_codes(archive, tmp_path, model):
    with pytest.raises(InputError, match="give the folder of that model"):
        export(archive.path, tmp_path / "a.csv", ExportOptions(model=model))


def test_a_model_adds_its_description(tmp_path, model):
    from orbithash.encoders.networks.card import read_model_folder

    card, model_id, _ = read_model_folder(model)
    archive = Archive.create(tmp_path / "a", card.bits, model_id, card.vector)
    model = shutil.copytree(model, tmp_path / "run" / "model")
    (model / "stac-item.json").write_text('{"type": "Feature"}')
    result = export(
        archive.path, tmp_path / "stac", ExportOptions(model=model, licence="CC0-1.0", source="https://x.org/")
    )
    assert (result.description.model, result.description.method) == ("run", card.method)
    assert result.description.thresholds == card.thresholds
    collection = json.loads((tmp_path / "stac" / "collection.json").read_text())
    links = {link["rel"]: link["href"] for link in collection["links"]}
    assert (links["emb:model"], links["emb:source-data"]) == ("./model.json", "https://x.org/")
    assert collection["license"] == "CC0-1.0"
    assert json.loads((tmp_path / "stac" / "model.json").read_text()) == {"type": "Feature"}
