"""Keys of rows: distances on the sphere, hashes, and kernels that need no further compilation."""

import numpy as np
import pyarrow as pa
import pytest
from ranked_rows import place_keys, splitmix64
from segment_parts import random_ids, random_table

from orbithash.search.index import distance_counts, ranking_kernels
from orbithash.search.index.rankings import ByTime, LinearOrder, PlaceOrder, RandomOrder, Ranked, merge_ranked
from orbithash.search.segments.host import ShardHost
from orbithash.search.segments.rankings.warming import warm_up_rankings
from orbithash.search.segments.stop import Stop

RADIUS_MM = 6_371_008.8e3


def exact_mm(lon, lat, order):
    """Return distances in millimetres, computed with more digits than float64 has."""
    lon, lat, other_lon, other_lat = (
        np.radians(np.asarray(each, np.longdouble)) for each in (lon, lat, order.lon, order.lat)
    )
    squares = np.sin((lat - other_lat) / 2) ** 2
    squares += np.cos(lat) * np.cos(other_lat) * np.sin((lon - other_lon) / 2) ** 2
    return 2 * RADIUS_MM * np.arcsin(np.sqrt(np.minimum(squares, 1)))


@pytest.mark.parametrize(
    "place", [(0.0, 0.0), (179.9999, -12.5), (-360.0, 89.9), (12.0, 90.0), (3.2, 51.3), (360.0, -90.0)]
)
def test_distances_are_right_to_a_millimetre(place):
    rng = np.random.default_rng(0)
    order = PlaceOrder(*place)
    lon = np.concatenate([rng.uniform(-180, 180, 20_000), place[0] + rng.normal(0, 1e-3, 1000), [0, 180, -180, 0]])
    lat = np.concatenate([rng.uniform(-90, 90, 20_000), place[1] + rng.normal(0, 1e-3, 1000), [90, 0, 0, -90]])
    lon, lat = np.clip(lon, -360, 360), np.clip(lat, -90, 90)
    exact = exact_mm(lon, lat, order)
    # Near the antipode the haversine formula itself loses digits: centimetres, 20,000 km away.
    is_far = exact > 19_900e6
    errors = np.abs(np.array(place_keys(lon, lat, order)) - exact)
    assert errors[~is_far].max() <= 1
    assert errors.max() < 100


@pytest.mark.parametrize(
    ("first", "second", "millimetres"),
    [
        ((0, 0), (0, 0), 0),
        ((180, 10), (-180, 10), 0),
        ((-360, 10), (360, 10), 0),
        ((77, 90), (-100, 90), 0),
        ((0, -90), (0, 90), round(np.pi * RADIUS_MM)),
        ((179.5, 0), (-179.5, 0), round(np.pi / 180 * RADIUS_MM)),
        ((-179.5, 0), (180.5, 0), 0),
        ((0, 0), (0, 1e-8), 1),
    ],
)
def test_known_distances(first, second, millimetres):
    for here, there in ((first, second), (second, first)):
        assert place_keys([here[0]], [here[1]], PlaceOrder(*map(float, there))) == [millimetres]


def test_a_distance_does_not_depend_on_the_rows_around_it():
    rng = np.random.default_rng(1)
    lon, lat, order = rng.uniform(-180, 180, 3000), rng.uniform(-90, 90, 3000), PlaceOrder(13.4, 52.5)
    together = place_keys(lon, lat, order)
    assert together == [place_keys([x], [y], order)[0] for x, y in zip(lon, lat, strict=True)]
    assert together[7:] == place_keys(lon[7:], lat[7:], order)


def test_rows_without_a_valid_place_have_no_distance():
    columns = {"lon": [1.0, np.nan, np.inf, 1.0, 1e300, None, 1.0], "lat": [1.0, 1.0, 1.0, -90.01, 1.0, 1.0, None]}
    code = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(7, np.uint8)), 1)
    host = ShardHost.of_rows(np.arange(7, dtype=np.uint64), pa.table({"code": code, **columns}), 8)
    ranked = host.rank(0, PlaceOrder(0.0, 0.0), 9, None, None, "", Stop())
    assert (ranked.ids.tolist(), ranked.num_ranked) == ([0], 1)


def test_random_keys_are_those_of_splitmix64():
    # The first outputs of the reference implementation for the state 1234567.
    states = [(1234567 + i * 0x9E3779B97F4A7C15) % 2**64 for i in range(3)]
    assert [*map(splitmix64, states)] == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    seeds = [0, 1, 2**64 - 1]
    ids = np.array([0, 1, 2**63, 2**64 - 1], np.uint64)
    code = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(4, np.uint8)), 1)
    host = ShardHost.of_rows(ids, pa.table({"code": code}), 8)
    for seed in seeds:
        ranked = host.rank(0, RandomOrder(seed), 9, None, None, "", Stop())
        expected = sorted((splitmix64(splitmix64(seed) ^ id_) >> 1, id_) for id_ in ids.tolist())
        assert list(zip(ranked.keys.tolist(), ranked.ids.tolist(), strict=True)) == expected


def test_many_rows_of_equal_keys_are_ordered_by_id():
    num_rows = 200_000
    code = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(num_rows, np.uint8)), 1)
    times = pa.array(np.arange(num_rows) // 50_000, pa.timestamp("us", "UTC"))
    host = ShardHost.of_rows(np.arange(num_rows, dtype=np.uint64), pa.table({"code": code, "datetime": times}), 8)
    for k in (1, 2, 10_000, 50_001):
        assert host.rank(0, ByTime(), k, None, None, "", Stop()).ids.tolist() == list(range(k))
        newest = host.rank(0, ByTime(newest_first=True), k, None, None, "", Stop())
        assert newest.ids.tolist() == [*range(150_000, num_rows), 100_000][:k]
        assert (newest.num_ranked, newest.num_within) == (num_rows, num_rows)


def test_merging_nothing_and_everything():
    nothing = merge_ranked([], 3)
    assert (len(nothing.keys), nothing.num_rows, nothing.num_matching) == (0, 0, None)
    parts = [
        Ranked(np.array([1, 5], np.int64), np.array([9, 2], np.uint64), 4, 3, 7, 10),
        Ranked(np.array([1, 1], np.int64), np.array([8, 2**64 - 1], np.uint64), 1, 1, 1, 1),
    ]
    merged = merge_ranked(parts, 3)
    assert (merged.keys.tolist(), merged.ids.tolist()) == ([1, 1, 1], [8, 9, 2**64 - 1])
    assert merged[2:] == (5, 4, 8, 11)


def test_orders_compile_nothing_after_warm_up():
    warm_up_rankings(8)
    offers = ("products", "numbers", "hashes", "places")
    kernels = [*(getattr(ranking_kernels, f"offer_{name}") for name in offers), distance_counts.add_distances]
    rng = np.random.default_rng(0)
    host = ShardHost.of_rows(random_ids(rng, 300), random_table(rng, 300, 100, 7), 100)
    for order in (LinearOrder((1,) * 7, 5), PlaceOrder(1, 2), RandomOrder(2**64 - 1), ByTime(True)):
        for text in ("", "lat > 0", "key LIKE '%77'"):
            host.rank(0, order, 5, 2**70, (np.int64(-3), np.uint64(2**63)), text, Stop())
            host.distances(0, np.zeros(13, np.uint8), text, Stop())
    assert [len(kernel._compiled.signatures) for kernel in kernels] == [1] * 5
