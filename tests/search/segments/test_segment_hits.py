"""Serialised hits of a segment against the rows of an archive."""

from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from segment_parts import batches_of, random_ids, random_table

from orbithash.encoders.archive.tables import make_table
from orbithash.search.protocol.hits import hit_from_pb
from orbithash.search.protocol.queries import Hit
from orbithash.search.segments.columns import ArchiveColumns
from orbithash.search.segments.files import build_segment, write_segment
from orbithash.search.segments.segment import Segment
from orbithash.v1 import search_pb2

INCLUDE = ("uri", "caption", "footprint", "code")


def parsed(messages):
    return [hit_from_pb(search_pb2.Hit.FromString(message)) for message in messages]


def expected_hits(ids, table, rows, include):
    order = np.argsort(ids)
    hits = []
    for row in rows.tolist():
        values = table.slice(order[row], 1).to_pylist()[0]
        values["code"] = bytes(values["code"])
        extra = {name: values[name] for name in include if values[name] is not None}
        shown = [values[name] for name in ("key", "label", "lon", "lat", "datetime")]
        hits.append(Hit(0, 0, int(ids[order[row]]), *shown, extra, None))
    return hits


@pytest.mark.parametrize("is_mapped", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_hits(tmp_path, small_chunks, is_mapped, seed):
    rng = np.random.default_rng(seed)
    ids, table = random_ids(rng, 90), random_table(rng, 90, 20, 5)
    batches = batches_of(rng, ids, table)
    segment = write_segment(tmp_path / "s", batches, 20) if is_mapped else build_segment(batches, 20)
    for _ in range(20):
        rows = rng.integers(0, 90, rng.integers(0, 12))
        include = tuple(rng.permutation(INCLUDE)[: rng.integers(0, 5)].tolist())
        assert parsed(segment.hits(rows, include)) == expected_hits(ids, table, rows, include)


def test_hits_of_columns_that_are_read_row_by_row():
    rng = np.random.default_rng(1)
    ids, table = np.arange(30, dtype=np.uint64), random_table(rng, 30, 20)

    def read(names, ids=None):
        rows = np.arange(30) if ids is None else ids.astype(np.int64)
        return rows.astype(np.uint64), table.select(list(names)).take(rows)

    segment = build_segment([(ids, table)], 20, read=read, names=table.column_names)
    assert isinstance(segment.columns, ArchiveColumns)
    rows = rng.permutation(30)
    assert parsed(segment.hits(rows, INCLUDE)) == expected_hits(ids, table, rows, INCLUDE)


def test_values_at_the_ends_of_their_ranges():
    begin = datetime(1970, 1, 1, tzinfo=UTC)
    times = [begin - timedelta(microseconds=1), begin, datetime(1, 1, 1, tzinfo=UTC), datetime.max.replace(tzinfo=UTC)]
    lons = [0.0, -0.0, float("nan"), None]
    ids, keys = np.array([2**64 - 1, 0, 2**63, 5], np.uint64), ["\u00e9", "森" * 4096, "e\u0301", " "]
    table = make_table(np.zeros((4, 1), np.uint8), 8, keys, keys, datetime=times, lon=lons, label=["", None, "", "x"])
    segment = build_segment([(ids, table)], 8)
    rows = np.arange(4)
    assert parsed(segment.hits(rows)) == expected_hits(ids, table, rows, ())
    # Not a number is unknown, whether the archive holds it as a number or as null.
    nan = table.set_column(table.column_names.index("lat"), "lat", [np.full(4, np.nan)])
    assert [hit.lat for hit in parsed(build_segment([(ids, nan)], 8).hits(rows))] == [None] * 4


def test_messages_equal_those_of_protobuf(small_chunks):
    rng = np.random.default_rng(1)
    ids, table = random_ids(rng, 90), random_table(rng, 90, 512, 5)
    segment = build_segment([(ids, table)], 512)
    messages = segment.hits(np.arange(90), INCLUDE)
    assert messages == [search_pb2.Hit.FromString(message).SerializeToString() for message in messages]
    assert max(map(len, messages)) > 400


def test_a_segment_without_columns():
    segment = Segment.build(np.array([5, 0], np.uint64), np.array([[1], [2]], np.uint8), 8)
    assert parsed(segment.hits(np.array([1, 0]), ("uri", "code"))) == [
        Hit(0, 0, 5, "", None, None, None, None, {"code": b"\1"}, None),
        Hit(0, 0, 0, "", None, None, None, None, {"code": b"\2"}, None),
    ]


@pytest.mark.parametrize("row", [-1, 30, 2**40])
def test_rows_that_do_not_exist(row):
    segment = build_segment([(np.arange(30, dtype=np.uint64), random_table(np.random.default_rng(1), 30, 8))], 8)
    with pytest.raises(IndexError):
        segment.columns.messages(np.array([3, row]), ["key"])
