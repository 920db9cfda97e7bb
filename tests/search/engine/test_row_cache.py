"""The row cache through versions, against the columns read from a real archive each time."""

from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from search_parts import random_codes

from orbithash.encoders.archive.archive import Archive
from orbithash.search.engine import row_cache as row_cache_module
from orbithash.search.engine.row_cache import RowCache

BITS = 16


def write(archive, rng, keys):
    """Write rows in which each column except the key may be null."""
    count = len(keys)

    def some(values):
        return [value if rng.random() < 0.7 else None for value in values]

    begin = datetime(1960, 1, 1, tzinfo=UTC)
    return archive.upsert(
        Archive.table(
            random_codes(rng, count, BITS),
            BITS,
            keys,
            keys,
            label=some(rng.choice(["beach", "forest", "Fluß"], count).tolist()),
            lon=some(rng.uniform(-180, 180, count).tolist()),
            lat=some(rng.uniform(-90, 90, count).tolist()),
            datetime=some([begin + timedelta(microseconds=int(step)) for step in rng.integers(0, 2**51, count)]),
        )
    )


def expected_rows(archive, ids):
    rows = archive.take(np.array(ids, np.uint64), ["key", "label", "lon", "lat", "datetime"]).to_pylist()
    return {id_: tuple(row.values()) for id_, row in zip(ids, rows, strict=True)}


@pytest.mark.parametrize(("max_table", "max_ready"), [(10**6, 10**6), (10**6, 5), (0, 10**6), (0, 5)])
def test_rows_through_changes(tmp_path, monkeypatch, max_table, max_ready):
    monkeypatch.setattr(row_cache_module, "MAX_TABLE", max_table)
    monkeypatch.setattr(row_cache_module, "MAX_READY", max_ready)
    rng = np.random.default_rng(4)
    writer = Archive.create(tmp_path / "a", BITS, "m" * 32)
    write(writer, rng, [f"k{i}" for i in range(40)])
    rows = RowCache(Archive.open(tmp_path / "a"))
    rows.warm()
    assert rows.num_cached == (40 if max_table else 0)
    for step in range(25):
        if step % 5 == 4:
            touched = writer.delete([f"k{rng.integers(60)}" for _ in range(3)])
        else:
            touched = write(writer, rng, list({f"k{i}" for i in rng.integers(0, 60, 3)}))
        before, archive = rows, Archive.open(tmp_path / "a")
        rows = rows.after(archive, touched)
        there = archive.scan(["key"])[0]
        for _ in range(4):
            ids = rng.choice(there, rng.integers(1, 9)).tolist()
            known = rows.cached(ids)
            assert known is None or known == expected_rows(archive, ids)
            assert rows.read(ids) == expected_rows(archive, ids)
        # Unchanged rows are not read again, and the cache of the version before is not modified.
        assert before.num_cached >= rows.num_cached
        assert rows.cached([]) == {}


def test_rows_in_memory_are_not_read(tmp_path, monkeypatch):
    rng = np.random.default_rng(4)
    archive = Archive.create(tmp_path / "a", BITS, "m" * 32)
    ids = write(archive, rng, [f"k{i}" for i in range(40)]).tolist()
    rows = RowCache(archive)
    assert rows.cached(ids) is None
    rows.warm()
    expected = expected_rows(archive, ids)
    monkeypatch.setattr(Archive, "take", None)
    assert rows.cached(ids[::-1] + ids) == expected
    after = rows.after(archive, np.array(ids[:2], np.uint64))
    assert (after.num_cached, rows.num_cached) == (38, 40)
    assert after.cached(ids[1:]) is None
    assert after.cached(ids[2:]) == {id_: expected[id_] for id_ in ids[2:]}
    assert rows.cached(ids) == expected


def test_an_archive_without_rows(tmp_path):
    archive = Archive.create(tmp_path / "a", BITS, "m" * 32)
    rows = RowCache(archive)
    rows.warm()
    assert rows.cached([]) == rows.read([]) == {}
    assert rows.cached([3]) is None
    assert rows.after(archive, np.array([3], np.uint64)).num_cached == 0
