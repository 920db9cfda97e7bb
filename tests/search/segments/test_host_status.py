"""What a shard reports for operators: merges of segments and evaluated filters."""

import numpy as np
import pyarrow as pa
import pytest

from orbithash.encoders.archive.archive import Archive
from orbithash.search.segments.dealing import Deal
from orbithash.search.segments.host import ShardHost
from orbithash.search.segments.stop import Stop
from orbithash.search.segments.versions.merging import SMALL_ROWS


def rows_of(count, first):
    codes = np.random.default_rng(first).integers(0, 256, (count, 2), np.uint8)
    keys = [f"{number:08d}" for number in range(first, first + count)]
    return Archive.table(codes, 16, key=keys, uri=keys, label=[key[-1] for key in keys])


@pytest.fixture
def host(tmp_path):
    archive = Archive.create(tmp_path / "archive", 16, "model")
    host = ShardHost(archive.path, 16, Deal(1), 0)
    for number in range(3):
        archive.commit(Archive.write_fragments(archive.path, rows_of(SMALL_ROWS, number * SMALL_ROWS)))
        host.follow(archive.version)
    yield host
    host.close()


def test_evaluations_are_counted_once(host):
    (version,) = host.status().versions[-1:]
    before = host.status().num_evaluations
    for _ in range(3):
        assert host.count(version, "label = '7'", Stop()) > 0
    assert 0 < host.status().num_evaluations - before <= 3 * 2


def test_merges_are_counted(host):
    while host._upkeep.work():
        pass
    status = host.status()
    assert status.num_merges > 0
    assert status.num_segments < 3
    assert status.num_rows == 3 * SMALL_ROWS


def test_a_fresh_shard_has_counted_nothing():
    codes = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(20, dtype=np.uint8)), 2)
    status = ShardHost.of_rows(np.arange(10, dtype=np.uint64), pa.table({"code": codes}), 16).status()
    assert (status.num_merges, status.num_evaluations) == (0, 0)
