"""Columns of segments in memory, mapped and read from an archive, against the values that were written."""

import threading

import numpy as np
import pyarrow as pa
import pytest
import shapely
from segment_parts import batches_of, random_ids, random_table

from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.archive.tables import fixed_size_rows, make_table
from orbithash.encoders.vectors import VectorSpec
from orbithash.search.segments import columns as columns_module
from orbithash.search.segments.chunks import COLUMNS
from orbithash.search.segments.columns import ArchiveColumns, ColumnsInMemory
from orbithash.search.segments.files import build_segment, write_segment
from orbithash.search.segments.ids import SortedIds

KINDS = ("in memory", "mapped", "of an archive", "of an archive, row by row")
DIMS = 6


class Reader:
    """Reads an archive and more rows of it than a segment has, in another order."""

    def __init__(self, rng, ids, table):
        self.rng, self.ids, self.table = rng, ids, table
        self.reads = []

    def __call__(self, names, ids=None):
        self.reads.append((tuple(names), ids))
        rows = self.rng.permutation(len(self.ids) if ids is None else np.flatnonzero(np.isin(self.ids, ids)))
        return self.ids[rows], self.table.select(list(names)).take(pa.array(rows))


def columns_of(kind, rng, ids, table, folder, monkeypatch):
    if kind == "in memory":
        return build_segment(batches_of(rng, ids, table), 16).columns
    if kind == "mapped":
        return write_segment(folder, batches_of(rng, ids, table), 16).columns
    if kind == "of an archive, row by row":
        monkeypatch.setattr(columns_module, "_MAX_KEPT", {})
    others = np.setdiff1d(np.array([3, 2**64 - 3], np.uint64), ids)
    more = pa.concat_tables([table, random_table(rng, len(others), 16, DIMS)], promote_options="permissive")
    reader = Reader(rng, np.concatenate([ids, others]), more)
    return ArchiveColumns(SortedIds.of(np.sort(ids)), table.column_names, reader)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(6))
def test_columns(tmp_path, monkeypatch, small_chunks, kind, seed):
    rng = np.random.default_rng(seed)
    num_rows = int(rng.choice([1, 16, 100]))
    ids, table = random_ids(rng, num_rows), random_table(rng, num_rows, 16, DIMS)
    columns = columns_of(kind, rng, ids, table, tmp_path / "segments", monkeypatch)
    expected = table.take(pa.array(np.argsort(ids))).select(COLUMNS)
    assert set(columns.names) == set(COLUMNS)
    for rows in (np.arange(0), rng.integers(0, num_rows, 5), rng.integers(0, num_rows, 300)):
        names = rng.permutation(COLUMNS).tolist()
        taken = columns.take(rows, names)
        assert taken.column_names == names
        assert taken.to_pydict() == expected.select(names).take(pa.array(rows)).to_pydict()
    for name in COLUMNS:
        array = columns.array(name)
        assert array.to_pylist() == expected[name].to_pylist()
        assert [len(chunk) for chunk in columns.chunks(name)] == [16] * (num_rows // 16) + [num_rows % 16] * bool(
            num_rows % 16
        )
    assert columns.array("label").type == pa.dictionary(pa.int32(), pa.large_string())
    assert len({chunk.dictionary.buffers()[1].address for chunk in columns.chunks("label")}) == 1
    assert columns.array("key").type == columns.array("uri").type == columns.array("caption").type == pa.large_string()
    vectors, is_known = fixed_size_rows(columns.take(np.arange(num_rows), ["vector"])["vector"])
    assert vectors.flags.c_contiguous
    assert is_known.tolist() == expected["vector"].is_valid().to_pylist()
    assert vectors[is_known].tolist() == expected["vector"].drop_null().to_pylist()


@pytest.mark.parametrize("kind", KINDS)
def test_an_archive_of_lance(tmp_path, monkeypatch, small_chunks, kind):
    """Columns that a real archive gives, whose arrays are slices of batches, and in another order than the ids."""
    rng = np.random.default_rng(8)
    archive = Archive.create(tmp_path / "a", 16, "m" * 32, VectorSpec(DIMS, 0.5))
    table = random_table(rng, 90, 16, DIMS).replace_schema_metadata(archive.schema.metadata)
    archive.upsert(table)
    archive.upsert(table.take(pa.array(rng.permutation(90)[:30])))
    ids, table = archive.scan(archive.schema.names)
    columns = columns_of(kind, rng, ids, table, tmp_path / "segments", monkeypatch)
    expected = archive.take(np.sort(ids), COLUMNS)
    assert columns.take(np.arange(90), COLUMNS).to_pydict() == expected.to_pydict()


def test_what_is_kept_of_an_archive(small_chunks):
    rng = np.random.default_rng(8)
    ids, table = np.arange(40, dtype=np.uint64), random_table(rng, 40, 16, DIMS)
    reader = Reader(rng, ids, table)
    columns = ArchiveColumns(SortedIds.of(ids), table.column_names, reader)
    assert reader.reads == []
    columns.messages(np.array([3]), ["key", "label"])
    columns.take(np.array([5]), ["lon", "datetime"])
    assert reader.reads == [(("key", "label", "lon", "lat", "datetime"), None)]
    columns.take(np.array([5, 5, 2]), ["uri", "key"])
    assert reader.reads[1][0] == ("uri", "key")
    assert reader.reads[1][1].tolist() == [2, 5]
    columns.array("footprint")
    columns.boxes()
    assert len(reader.reads) == 3
    columns.take(np.array([5]), ["footprint", "vector"])
    assert [names for names, _ in reader.reads[3:]] == [("vector",)]


def test_an_archive_that_lacks_rows(small_chunks):
    rng = np.random.default_rng(8)
    table = random_table(rng, 40, 16)
    columns = ArchiveColumns(
        SortedIds.of(np.arange(41, dtype=np.uint64)), table.column_names, Reader(rng, np.arange(40).astype("u8"), table)
    )
    for read in (columns.array, lambda name: columns.take(np.array([40]), [name])):
        for name in ("key", "uri"):
            with pytest.raises(LookupError, match="rows of a segment"):
                read(name)


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_contain_footprints(tmp_path, monkeypatch, small_chunks, kind):
    rng = np.random.default_rng(1)
    num_rows = 100
    lon, lat = rng.uniform(-180, 180, num_rows), rng.uniform(-90, 90, num_rows)
    shapes = [
        shapely.box(west, south, west + rng.uniform(0, 9), south + 1e-9) for west, south in zip(lon, lat, strict=True)
    ]
    wkb = shapely.to_wkb(shapes).tolist()
    wkb[0] = wkb[20] = wkb[21] = None
    wkb[32:48] = [None] * 16
    lons, lats = lon.tolist(), lat.tolist()
    lons[20] = lats[0] = lons[21] = lats[21] = None
    wkb[1] = shapely.to_wkb(shapely.Polygon())
    wkb[2] = b"no outline"
    with np.errstate(invalid="ignore"):
        wkb[3] = shapely.to_wkb(shapely.LineString([(0, 0), (np.nan, 5)]))
    # A curve, which shapely does not read.
    wkb[4] = bytes.fromhex("0108000000") + (3).to_bytes(4, "little") + np.arange(6, dtype="<f8").tobytes()
    wkb[5] = shapely.to_wkb(shapely.MultiPolygon([shapely.box(170, 0, 180, 5), shapely.box(-180, 0, -170, 5)]))
    wkb[6] = shapely.to_wkb(shapely.Point(1e300, 0))
    names = [str(row) for row in range(num_rows)]
    table = make_table(np.zeros((num_rows, 2), np.uint8), 16, names, names, lon=lons, lat=lats, footprint=wkb)
    ids = np.arange(num_rows, dtype=np.uint64)
    columns = columns_of(kind, rng, ids, table.append_column("vector", pa.nulls(num_rows)), tmp_path / "s", monkeypatch)
    boxes = columns.boxes()
    assert (boxes.dtype, boxes.shape) == (np.float32, (4, num_rows))
    west, south, east, north = boxes.astype(np.float64)
    infinite = [-np.inf, -np.inf, np.inf, np.inf]
    for row in range(num_rows):
        if row in (0, 20, 21):
            assert np.isnan(boxes[:, row]).all()
            continue
        if row in (1, 3):
            assert boxes[:, row].tolist() == infinite
            continue
        place = shapely.Point(lon[row], lat[row]) if wkb[row] is None or row in (2, 4) else shapely.from_wkb(wkb[row])
        inner = place.bounds
        assert west[row] <= inner[0] <= inner[2] <= east[row]
        assert south[row] <= inner[1] <= inner[3] <= north[row]
        if row != 6:
            assert np.abs(boxes[:, row] - np.array(inner)).max() < 2e-5


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_footprints_have_no_boxes(tmp_path, monkeypatch, small_chunks, kind):
    rng = np.random.default_rng(1)
    names = [str(row) for row in range(40)]
    table = make_table(np.zeros((40, 2), np.uint8), 16, names, names, lon=[1.0] * 40, lat=[2.0] * 40)
    table = table.append_column("vector", pa.nulls(40))
    assert columns_of(kind, rng, np.arange(40, dtype=np.uint64), table, tmp_path / "s", monkeypatch).boxes() is None


def test_columns_without_rows(tmp_path):
    table = random_table(np.random.default_rng(1), 0, 16)
    segment = write_segment(tmp_path / "s", [(np.empty(0, np.uint64), table)], 16)
    assert (segment.num_rows, segment.hits(np.arange(0), ("uri", "code"))) == (0, [])
    for columns in (segment.columns, ColumnsInMemory.of(table)):
        assert columns.array("label").to_pylist() == []
        assert columns.take(np.arange(0), ["key", "label"]).to_pydict() == {"key": [], "label": []}


def test_concurrent_readers_of_an_archive(small_chunks):
    """Each column is read once, and every thread gets it."""
    rng = np.random.default_rng(8)
    ids, table = np.arange(200, dtype=np.uint64), random_table(rng, 200, 16, DIMS)
    reader = Reader(rng, ids, table)
    columns = ArchiveColumns(SortedIds.of(ids), table.column_names, reader)
    start, results = threading.Barrier(8), []

    def use():
        start.wait()
        boxes = columns.boxes()
        results.append((columns.messages(np.arange(200), ["key", "lat"], ids), columns.array("lat").to_pylist(), boxes))

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = ColumnsInMemory.of(table.select(COLUMNS))
    assert len(results) == 8
    for messages, latitudes, boxes in results:
        assert messages == expected.messages(np.arange(200), ["key", "lat"], ids)
        assert latitudes == table["lat"].to_pylist()
        np.testing.assert_array_equal(boxes, expected.boxes())
    assert len(reader.reads) == 2
