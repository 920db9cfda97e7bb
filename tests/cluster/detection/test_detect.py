"""Detectors on the command line: fitted through a gateway, run over an archive without one."""

import json
import subprocess
import sys
from datetime import UTC, datetime

import numpy as np
import pyarrow.parquet as pq
import pytest
import shapely
from archive_parts import serving_archive
from cluster_parts import user_environment

from orbithash.cluster.detection import detect as detection
from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.vectors import VectorSpec
from orbithash.search.client import Client
from orbithash.search.detectors import Detector
from orbithash.search.detectors.fitting import fit_detector

BITS, DIMS = 16, 8
SPEC = VectorSpec(DIMS, 0.01)
MODEL = "m" * 32
NUM_ROWS = 300


def write_archive(path, vector=SPEC):
    """Write rows of three kinds in fragments; every tenth has no vector, every fourth no place."""
    rng = np.random.default_rng(0)
    centres = rng.integers(-60, 60, (3, DIMS))
    archive = Archive.create(path, BITS, MODEL, vector)
    for start in range(0, NUM_ROWS, 100):
        rows = range(start, start + 100)
        vectors = [np.clip(centres[row % 3] + rng.normal(0, 14, DIMS), -127, 127).astype(np.int8) for row in rows]
        columns = {
            "label": [f"kind {row % 3}" for row in rows],
            "lon": [None if row % 4 == 0 else row / 10 for row in rows],
            "lat": [None if row % 4 == 0 else 50.0 for row in rows],
            "footprint": [shapely.box(row, 0, row + 1, 1).wkb if row % 2 else None for row in rows],
            "datetime": [datetime(2024, 1, 1, tzinfo=UTC) for _ in rows],
        }
        if vector is not None:
            columns["vector"] = [
                None if row % 10 == 0 else one.tobytes() for row, one in zip(rows, vectors, strict=True)
            ]
        keys = [f"row {row}" for row in rows]
        archive.upsert(Archive.table(rng.integers(0, 256, (100, 2), np.uint8), BITS, keys, keys, **columns))
    return archive


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return write_archive(tmp_path_factory.mktemp("archives") / "archive")


@pytest.fixture(scope="module")
def detector(archive):
    table = archive.scan(["label", "vector"])[1].to_pylist()
    rows = {
        kind: [row["vector"] for row in table if row["label"] == kind and row["vector"]]
        for kind in ("kind 0", "kind 1")
    }
    good, bad = (np.array(part[:8], np.int8) for part in rows.values())
    return fit_detector(good, bad, MODEL, SPEC, np.array([row["vector"] for row in table if row["vector"]], np.int8))


@pytest.fixture
def file(detector, tmp_path):
    path = tmp_path / "detector.json"
    path.write_text(detector.to_json())
    return path


@pytest.fixture(scope="module")
def gateway(archive):
    with serving_archive(archive.path, vector=SPEC) as (address, _, _):
        yield address


def test_rows_found_have_the_scores_of_a_ranking_bit_for_bit(cli, archive, detector, file, gateway, tmp_path):
    out = tmp_path / "places.parquet"
    ended = cli("detect", archive.path, "--detector", file, "--out", out, "--min-score", "-1", "--json")
    assert ended.code == 0, ended.err
    found = pq.read_table(out).to_pylist()
    with Client(gateway) as client:
        answer = client.rank(detector.linear(), k=1000, min_score=-1.0)
    assert len(found) == len(answer.hits) > 50
    assert {row["id"]: (row["row_id"], row["score"]) for row in found} == {
        hit.key: (hit.id, hit.score) for hit in answer.hits
    }
    assert json.loads(ended.out) == {
        "archive_version": archive.version,
        "rows": NUM_ROWS,
        "matching": NUM_ROWS,
        "without_vector": 30,
        "found": len(found),
        "out": str(out),
    }


def test_the_file_has_the_columns_of_the_rows_in_the_order_of_the_archive(cli, archive, file, tmp_path):
    out = tmp_path / "places.parquet"
    ended = cli("detect", archive.path, "--detector", file, "--out", out, "--filter", "label = 'kind 0'")
    assert ended.code == 0, ended.err
    assert "found 90 of 300 rows (100 pass the filter)" in ended.out
    assert "10 rows have no stored vector" in ended.out
    table = pq.read_table(out)
    rows = table.to_pylist()
    assert [row["id"] for row in rows] == [f"row {number}" for number in range(0, NUM_ROWS, 3) if number % 10]
    assert json.loads(table.schema.metadata[b"geo"])["version"] == "1.1.0"
    by_key = {row["id"]: row for row in rows}
    assert shapely.from_wkb(by_key["row 3"]["geometry"]).equals(shapely.box(3, 0, 4, 1))
    assert shapely.from_wkb(by_key["row 6"]["geometry"]).equals(shapely.Point(0.6, 50))
    assert by_key["row 12"]["geometry"] is None
    assert by_key["row 3"]["datetime"] == datetime(2024, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize("name", ["places.geojson", "places.csv"])
def test_other_formats_are_chosen_by_the_ending(cli, archive, file, tmp_path, name):
    assert cli("detect", archive.path, "--detector", file, "--out", tmp_path / name).code == 0
    text = (tmp_path / name).read_text()
    assert text.count("row ") >= 180
    if name.endswith("geojson"):
        assert json.loads(text)["type"] == "FeatureCollection"


def test_nothing_found_is_a_valid_file(cli, archive, file, tmp_path):
    out = tmp_path / "places.parquet"
    assert cli("detect", archive.path, "--detector", file, "--out", out, "--min-score", "1e9").code == 0
    assert pq.read_table(out).num_rows == 0


@pytest.mark.ray
def test_ray_data_finds_the_same_rows_in_the_same_order(archive, detector, tmp_path):
    here = detection.detect(archive.path, detector, tmp_path / "here.parquet")
    there = detection.detect(archive.path, detector, tmp_path / "there.parquet", max_rows_here=0)
    assert there.counts == here.counts
    assert pq.read_table(tmp_path / "there.parquet").equals(pq.read_table(tmp_path / "here.parquet"))


@pytest.mark.slow
def test_a_cluster_is_started_for_a_large_archive(archive, file, tmp_path):
    # Ray reads how its processes identify themselves when it is imported, so not before that is set up.
    code = f"""
import sys
from pathlib import Path
from orbithash.cluster.detection.detect import detect
from orbithash.cluster.detection.fit import read_detector
print(detect({archive.path!r}, read_detector(Path({str(file)!r})), Path("places.csv"), max_rows_here=0))
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=user_environment(), cwd=tmp_path, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert "of 300 rows" in ended.stdout


def test_a_failure_leaves_the_older_file(archive, detector, tmp_path, monkeypatch):
    out = tmp_path / "places.parquet"
    out.write_bytes(b"older")

    def fail(scorer):
        yield from list(detection.FragmentScorer.find(scorer, scorer.fragments()[0]))
        raise RuntimeError("the disk is gone")

    monkeypatch.setattr(detection, "_found_here", fail)
    with pytest.raises(RuntimeError):
        detection.detect(archive.path, detector, out)
    assert out.read_bytes() == b"older"
    assert [path.name for path in tmp_path.iterdir()] == ["places.parquet"]


def test_wrong_input_is_refused_in_one_line(refused, archive, detector, file, tmp_path):
    out = tmp_path / "places.parquet"
    common = ("--detector", file, "--out", out)
    (tmp_path / "other.json").write_text(detector.to_json().replace(MODEL, "x" * 32))
    (tmp_path / "damaged.json").write_text(detector.to_json()[:100])
    (tmp_path / "places.txt").write_text("")
    plain = write_archive(tmp_path / "plain", vector=None)
    refused("detect", archive.path, "--detector", tmp_path / "other.json", "--out", out, words=["another model"])
    refused(
        "detect", archive.path, "--detector", tmp_path / "damaged.json", "--out", out, words=["damaged.json", "JSON"]
    )
    refused("detect", archive.path, "--detector", tmp_path / "none.json", "--out", out, words=["none.json", "No such"])
    refused("detect", archive.path, "--detector", file, "--out", tmp_path / "a.tif", words=["a.tif", ".parquet"])
    refused("detect", archive.path, *common, "--filter", "nothing = 1", words=["nothing"])
    refused("detect", archive.path, *common, "--min-score", "nan", words=["--min-score", "nan"])
    refused("detect", plain.path, *common, words=["no stored vectors"])
    refused("detect", tmp_path / "missing", *common, words=["missing", "does not exist"])


def test_a_detector_is_fitted_to_keys_through_a_gateway(cli, gateway, tmp_path):
    out, good = tmp_path / "detector.json", tmp_path / "good.txt"
    good.write_text("".join(f"row {number}\n" for number in range(3, 30, 3)))
    bad = [word for number in (1, 4, 7, 11, 13) for word in ("--bad", f"row {number}")]
    command = ("detector", "--address", gateway, "--good", f"@{good}", "--out", out)
    ended = cli(*command, *bad)
    assert ended.code == 0, ended.err
    assert f"{out}: from 9 good and 5 bad rows; cross-validated over the marked rows: precision 1.00" in ended.out
    fitted = Detector.from_json(out.read_text())
    assert (fitted.num_good, fitted.num_bad, fitted.model_id) == (9, 5, MODEL)
    assert fitted.num_background > 200
    with Client(gateway) as client:
        answer = client.rank(fitted.linear(), k=100, min_score=0.0)
    assert {hit.label for hit in answer.hits[:80]} == {"kind 0"}
    assert "too few marks" in cli(*command, "--bad", "row 1").out
    again = out.read_text()
    cli(*command, "--bad", "row 1")
    assert out.read_text() == again


def test_wrong_marks_are_refused_in_one_line(refused, gateway, tmp_path):
    command = ("detector", "--address", gateway, "--out", tmp_path / "detector.json")
    refused(*command, "--good", "row 1", "--bad", "row 1", words=["'row 1' is both good and bad"])
    refused(*command, "--good", "nowhere", words=["no row of the archive has the key 'nowhere'"])
    refused(*command, "--good", "row 10", words=["'row 10' has no stored vector"])
    refused(*command, "--good", f"@{tmp_path / 'none'}", words=["--good", "No such file"])
    refused(*command, words=["--good"])
