"""Orders and counts of a shard, compared with a loop over the rows."""

import numpy as np
import pyarrow as pa
import pytest
from ranked_rows import FILTERS, RankedRows, same_ranked
from shard_cases import Shards

from orbithash.search.index.rankings import ByTime, LinearOrder, PlaceOrder, RandomOrder, merge_ranked
from orbithash.search.protocol.errors import InvalidQuery
from orbithash.search.segments.host import ShardHost
from orbithash.search.segments.stop import Stop, Stopped
from orbithash.search.segments.versions import merging, source

ORDERS = [LinearOrder((1, 2, 3, 4, 5)), PlaceOrder(0.0, 0.0), RandomOrder(0), ByTime()]
GROUPS = ("label", "month", "year")


def ranked_by(shards, version, order, k, max_key=None, after=None, text=""):
    parts = [host.rank(version, order, k, max_key, after, text, Stop()) for host in shards.hosts]
    assert all(len(part.keys) <= k for part in parts)
    return merge_ranked(parts, k)


def check_all(case, shards, version, num_ranks):
    """Compare orders and counts of all shards with a loop over the rows."""
    rng = case.rng
    for _ in range(num_ranks):
        order, text = case.order(), str(rng.choice(list(FILTERS)))
        k = int(rng.choice([1, 3, 30, 1000]))
        every = case.ranked(order, len(case.rows), text=text)
        max_key = after = None
        if len(every.keys) and rng.random() < 0.5:
            max_key = int(rng.choice(every.keys)) - int(rng.integers(2))
        if len(every.keys) and rng.random() < 0.5:
            # A row's place in the order, or one between rows.
            place = int(rng.integers(len(every.keys)))
            after = int(every.keys[place]), int(every.ids[place]) + int(rng.integers(-1, 2))
            after = after[0], max(after[1], 0)
        ranked = ranked_by(shards, version, order, k, max_key, after, text)
        assert same_ranked(ranked, case.ranked(order, k, max_key, after, text)), (order, k, max_key, after, text)
    text = str(rng.choice(list(FILTERS)))
    code = np.packbits(rng.integers(0, 2, case.bits, dtype=np.uint8))
    counted = [host.distances(version, code, text, Stop()) for host in shards.hosts]
    assert sum(rows for rows, _ in counted).tolist() == case.distances(code, text)
    num_matching = sum(FILTERS[text](row) for row in case.rows.values())
    assert (
        [each for _, each in counted] == [None] * len(counted)
        if not text
        else sum(n for _, n in counted) == num_matching
    )
    for by in GROUPS:
        groups, without = {}, 0
        for host in shards.hosts:
            of_shard, without_of_shard = host.count_by(version, by, text, Stop())
            assert list(of_shard) == sorted(of_shard)
            without += without_of_shard
            for name, number in of_shard.items():
                groups[name] = groups.get(name, 0) + number
        assert (groups, without) == case.groups(by, text)


@pytest.mark.parametrize("kind", ["files", "memory", "archive"])
@pytest.mark.parametrize(("seed", "num_shards"), [(0, 1), (1, 3), (2, 7)])
def test_every_division_into_shards_and_segments_answers_as_a_loop(
    tmp_path, monkeypatch, small_chunks, seed, num_shards, kind
):
    # So that many small segments stay.
    monkeypatch.setattr(merging, "SMALL_ROWS", 10)
    if kind == "archive":
        monkeypatch.setattr(source, "MAX_ROWS_IN_MEMORY", 0)
    case = RankedRows.create(tmp_path / "archive", seed)
    shards = Shards.of(case, num_shards, 0, folder=tmp_path / "segments" if kind == "files" else None)
    num_segments = []
    for num_new, num_known, num_deleted in ((0, 0, 0), (150, 0, 0), (40, 20, 30), (25, 5, 10), (1, 0, 60)):
        if num_new:
            case.write(num_new, num_known)
            case.delete(num_deleted)
        shards.follow(case.version)
        num_segments.append(max(host.status().num_segments for host in shards.hosts))
        check_all(case, shards, case.version, 12)
    assert max(num_segments) > 1
    shards.merge_all()
    check_all(case, shards, case.version, 12)
    shards.close()


@pytest.mark.parametrize("order", [*ORDERS, LinearOrder((0,) * 5), LinearOrder((1, 1, 0, 0, 0), 7)])
def test_pages_are_the_whole_order(tmp_path, small_chunks, order):
    case = RankedRows.create(tmp_path / "archive", 3)
    case.write(100)
    case.write(50, 20)
    shards = Shards.of(case, 3, 0)
    shards.follow(case.version)
    expected = case.ranked(order, 1000)
    found, after = [], None
    while len((page := ranked_by(shards, case.version, order, 7, after=after)).keys):
        assert (page.num_ranked, page.num_within) == (expected.num_ranked, expected.num_within)
        found += zip(page.keys.tolist(), page.ids.tolist(), strict=True)
        after = found[-1]
    assert found == list(zip(expected.keys.tolist(), expected.ids.tolist(), strict=True))
    shards.close()


def test_a_column_of_nulls_and_one_that_is_missing(tmp_path):
    codes = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(70_000, np.uint8)), 1)
    ids = np.arange(70_000, dtype=np.uint64)
    nulls = {
        "label": pa.nulls(70_000, pa.string()),
        "datetime": pa.nulls(70_000, pa.timestamp("us", "UTC")),
        "lon": pa.nulls(70_000, pa.float64()),
        "lat": pa.nulls(70_000, pa.float64()),
        "vector": pa.nulls(70_000, pa.list_(pa.int8(), 5)),
    }
    for columns in (nulls, {"lon": nulls["lon"]}):
        host = ShardHost.of_rows(ids, pa.table({"code": codes, **columns}), 8)
        for order in ORDERS:
            if "vector" not in columns and isinstance(order, LinearOrder):
                continue
            ranked = host.rank(0, order, 3, None, None, "", Stop())
            assert ranked.num_ranked == (70_000 if isinstance(order, RandomOrder) else 0)
            assert ranked.num_rows == 70_000
        for by in GROUPS:
            assert host.count_by(0, by, "", Stop()) == ({}, 70_000)


def test_limits_beyond_all_keys_and_ids(tmp_path):
    case = RankedRows.create(tmp_path / "archive", 4)
    case.write(50)
    shards = Shards.of(case, 2, 0)
    shards.follow(case.version)
    for order in ORDERS:
        for k, max_key, after in (
            (0, None, None),
            (9, 2**80, None),
            (9, -(2**80), None),
            (9, None, (2**80, 0)),
            (9, None, (-(2**80), 2**64 - 1)),
            (9, None, (0, 2**64 - 1)),
            (9, 0, (0, 2**70)),
        ):
            ranked = ranked_by(shards, case.version, order, k, max_key, after)
            assert same_ranked(ranked, case.ranked(order, k, max_key, after)), (order, k, max_key, after)
    shards.close()


@pytest.mark.parametrize("pivot", [None, 2**31, -(2**31)])
def test_the_largest_sums_are_exact(pivot):
    dims = 600
    weights = [-32768] * 511 + [32767] + [0] * (dims - 512)
    weights[600 - 1] = 2**24 - 1 - sum(map(abs, weights))
    assert sum(map(abs, weights)) == 2**24 - 1
    order = LinearOrder(tuple(weights), pivot)
    signs = np.where(np.array(weights) < 0, -1, 1)
    vectors = np.stack(
        [np.full(dims, -128), np.full(dims, 127), np.where(signs < 0, -128, 127), np.where(signs < 0, 127, -128)]
    )
    products = [sum(w * v for w, v in zip(weights, vector, strict=True)) for vector in vectors.tolist()]
    assert max(products) > 2**31 - 2**18
    assert min(products) < -(2**31) + 2**25
    table = {
        "code": pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(4, np.uint8)), 1),
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.astype(np.int8).reshape(-1)), dims),
    }
    ranked = ShardHost.of_rows(np.arange(4, dtype=np.uint64), pa.table(table), 8).rank(
        0, order, 9, None, None, "", Stop()
    )
    expected = sorted((-p if pivot is None else abs(p - pivot), id_) for id_, p in enumerate(products))
    assert list(zip(ranked.keys.tolist(), ranked.ids.tolist(), strict=True)) == expected


@pytest.mark.parametrize("dims", [1, 2, 7, 16, 31, 33, 64, 100, 256])
def test_vectors_of_any_length(dims):
    rng = np.random.default_rng(dims)
    vectors = rng.integers(-128, 128, (3000, dims), np.int8)
    weights = rng.integers(-32768, 32768, dims)
    table = {
        "code": pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(3000, np.uint8)), 1),
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), dims),
    }
    host = ShardHost.of_rows(np.arange(3000, dtype=np.uint64), pa.table(table), 8)
    ranked = host.rank(0, LinearOrder(tuple(weights.tolist())), 2000, None, None, "", Stop())
    keys = -(vectors.astype(np.int64) @ weights)
    best = np.lexsort((np.arange(3000), keys))[:2000]
    assert ranked.ids.tolist() == best.tolist()
    assert ranked.keys.tolist() == keys[best].tolist()


def test_orders_that_do_not_fit_are_refused(tmp_path):
    case = RankedRows.create(tmp_path / "archive", 0)
    case.write(20)
    bare = RankedRows.create(tmp_path / "bare", 0, dims=0)
    bare.write(20)
    for rows, order, message in (
        (case, LinearOrder((1, 2)), "linear.weights: got 2 weights; stored vectors have 5 dimensions"),
        (case, LinearOrder((32768, 0, 0, 0, 0)), "a weight is outside of -32768 to 32767"),
        (case, LinearOrder((32767,) * 600), "the sum of their magnitudes is 19,660,200; at most 16,777,215 is allowed"),
        (case, LinearOrder((1,) * 5, 2**63), "the pivot is 9223372036854775808"),
        (bare, LinearOrder((1,) * 5), "linear: the archive has no stored vectors; encode it with a model that"),
    ):
        shards = Shards.of(rows, 2, 0)
        shards.follow(rows.version)
        with pytest.raises(InvalidQuery, match=message):
            ranked_by(shards, rows.version, order, 3)
        shards.close()


def test_work_ends_between_chunks(tmp_path):
    case = RankedRows.create(tmp_path / "archive", 0)
    case.write(20)
    shards = Shards.of(case, 1, 0)
    shards.follow(case.version)
    [host], stop = shards.hosts, Stop()
    stop.cancel()
    for order in ORDERS:
        with pytest.raises(Stopped):
            host.rank(case.version, order, 3, None, None, "", stop)
    with pytest.raises(Stopped):
        host.distances(case.version, np.zeros(3, np.uint8), "", stop)
    for by in GROUPS:
        with pytest.raises(Stopped):
            host.count_by(case.version, by, "", stop)
    shards.close()
