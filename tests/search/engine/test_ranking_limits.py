"""Edges of other orders and counts: numbers at their limits, the same place, replaced versions, too many at a time."""

import asyncio
import math
from datetime import UTC, datetime

import numpy as np
import pytest
from search_parts import MemoryArchive, StubEncoder, random_codes, serving

from orbithash.search.client import Client, Linear, Place, Shuffle, TimeOrder
from orbithash.search.engine.backend import LocalShardClient
from orbithash.search.engine.engine import MAX_READS, Engine
from orbithash.search.engine.ranking import count_groups
from orbithash.search.engine.snapshot import Snapshot
from orbithash.search.observer import Observer
from orbithash.search.protocol.errors import DeadlineExceeded, InvalidQuery, Overloaded
from orbithash.search.protocol.queries import Coverage
from orbithash.search.protocol.rankings import Groups, Ranking
from orbithash.search.segments.dealing import Deal
from orbithash.search.segments.files import warm_up
from orbithash.search.segments.host import ShardHost
from orbithash.v1 import search_pb2

BITS = 16
METRE = 180 / (math.pi * 6_371_008.8)
# Places of rows, of which each pair is the same place.
PAIRS = [
    ((0.5, 0.5), (0.5, 0.5)),
    ((1e-05, -2e-06), (1e-05 + 0.9 * METRE, -2e-06)),
    ((-3e-07, 60.0), (-3e-07, 60 - 0.9 * METRE)),
    ((180.0, 10.0), (-180.0, 10.0)),
    ((-180 + METRE / 4, -20.0), (180 - METRE / 4, -20.0)),
    ((20.0, 89.9999999), (-160.0, 89.9999999)),
]


def snapshot_of_places(num_shards):
    """Return a snapshot of rows with the places of `PAIRS`, and of one row that is 2 m away from each."""
    places = [place for pair in PAIRS for place in pair]
    places += [(lon, lat + 2 * METRE * (-1 if lat > 89 else 1)) for (lon, lat), _ in PAIRS[:-1]]
    ids = np.arange(len(places), dtype=np.uint64)
    codes = random_codes(np.random.default_rng(0), len(ids), BITS)
    archive = MemoryArchive(ids, codes, BITS, [np.array([id_, 1], np.int8) for id_ in ids])
    for id_, (lon, lat) in enumerate(places):
        time = datetime(2020, 1, 1 + id_, tzinfo=UTC)
        archive._rows[id_] |= {"lon": lon, "lat": lat, "datetime": time, "label": "known" if id_ else "first"}
    deal = Deal(num_shards)
    shards = []
    for number in range(num_shards):
        part = ids[deal.part(ids, number)]
        host = ShardHost.of_rows(part, archive.take(part, archive.columns), BITS, version=MemoryArchive.version)
        shards.append(LocalShardClient(host, MemoryArchive.version))
    return Snapshot.of(archive, shards, deal, StubEncoder())


@pytest.fixture(scope="module")
def client():
    warm_up(BITS)
    with serving(Engine(snapshot_of_places(2))) as gateway, Client(gateway.address, timeout_s=60) as made:
        yield made


@pytest.mark.parametrize("number", range(len(PAIRS)))
def test_the_same_place_around_zero_and_the_date_line(client, number):
    for id_ in (2 * number, 2 * number + 1):
        by = TimeOrder(same_place_as=f"place/{id_}.tif")
        assert [hit.id for hit in client.rank(by, k=100).hits] == [2 * number, 2 * number + 1]


def test_a_filter_beside_the_same_place_is_an_expression_by_itself(client):
    by = TimeOrder(same_place_as="place/0.tif")
    with pytest.raises(InvalidQuery, match="is not expected"):
        client.rank(by, filter="label = 'first') OR (label = 'known'")
    answer = client.rank(by, filter="label = 'known' OR label = 'first'")
    assert (answer.matching_rows, answer.ranked_rows, answer.rows_within) == (2, 2, 2)
    assert client.rank(by).matching_rows is None


def test_quotients_without_bounds(client):
    for scale, offset in ((1e-300, 1e300), (1e-300, -1e300), (1e300, 1e300), (5e-324, 1.0)):
        hits = client.rank(Linear((1, 1), scale=scale, offset=offset, least_certain=True), k=100).hits
        assert len(hits) == 2 * len(PAIRS) + len(PAIRS) - 1
        assert client.rank(Linear((1, 1), scale=scale, offset=offset), min_score=-1e308).ranked_rows == len(hits)


def test_a_limit_that_equals_a_distance_lets_its_row_in(client):
    for lon in np.linspace(-179, 179, 40).tolist():
        hits = client.rank(Place(lon, 1.25), k=100).hits
        for hit in hits[:8]:
            within = client.rank(Place(lon, 1.25, max_distance_m=hit.score)).rows_within
            assert within == sum(each.score <= hit.score for each in hits)


@pytest.mark.parametrize("coverage", [-0.5, 1.5, math.nan, "all"])
def test_a_coverage_out_of_range(client, coverage):
    calls = [lambda: client.count_by("label", min_coverage=coverage)]
    calls += [
        lambda: client.rank(Shuffle(), min_coverage=coverage),
        lambda: client.search(key="a", min_coverage=coverage),
    ]
    for call in calls:
        with pytest.raises(InvalidQuery, match="min_coverage: a fraction from 0 to 1"):
            call()
    if not isinstance(coverage, str):
        # Of other clients, too.
        request = search_pb2.CountByRequest(by="GROUP_BY_LABEL", min_coverage=coverage)
        with pytest.raises(InvalidQuery, match="min_coverage: a fraction from 0 to 1"):
            client.call("CountBy", request)


def test_wrong_types(client):
    for call, words in (
        (lambda: client.rank(Linear(np.ones(2, np.int64))), "weights: a tuple of whole numbers, got ndarray"),
        (lambda: client.rank(Linear(3)), "weights: a tuple of whole numbers, got int"),
        (lambda: client.rank(Linear((1, 1), least_certain="no")), "least_certain: True or False, got 'no'"),
        (lambda: client.rank(TimeOrder(newest_first=1)), "newest_first: True or False, got 1"),
        (lambda: client.rank(TimeOrder(same_place_as=5)), "same_place_as: a key is a string, got int"),
        (lambda: client.encode(), "content: give exactly one of image, text and vector, got none"),
        (lambda: client.call("Encode", search_pb2.EncodeRequest()), "content: give exactly one"),
        (lambda: client.rank(Shuffle(), include="uri"), "include: a sequence of column names"),
        (lambda: client.view("a", -1), "max_side: a whole number of pixels from 1 to 4,096, got -1"),
        (lambda: client.view("a", 0), "max_side: a whole number"),
        (lambda: client.view("a", 2.5), "max_side: a whole number"),
        (lambda: client.heat_map("a", key="a", cells=-1), "cells: a whole number from 2 to 16, got -1"),
        (lambda: client.heat_map("a", key="a", cells=0), "cells: a whole number from 2 to 16, got 0"),
    ):
        with pytest.raises(InvalidQuery, match=words):
            call()


def test_ids_as_arrays_and_any_other_iterable(client):
    for ids in (np.array([3, 1], np.uint64), iter([3, 1]), (3, 1)):
        assert [row.id for row in client.get(ids=ids).values()] == [3, 1]
    assert client.get(ids=np.array([], np.uint64)) == {}


def groups_of(num_searched):
    return Groups({}, 0, 0, Coverage(num_searched, 10, num_searched, 10), 1)


def test_a_partial_answer_of_a_replaced_version_is_read_again():
    old, new = snapshot_of_places(1), snapshot_of_places(1)
    engine = Engine(old)
    asked = []

    async def read(snapshot, timeout_s):
        asked.append(snapshot)
        if snapshot is old:
            engine.swap(new)
            return groups_of(4)
        return groups_of(10)

    assert asyncio.run(engine.read(read, 10)) == groups_of(10)
    assert asked == [old, new]

    async def partial(snapshot, timeout_s):
        asked.append(snapshot)
        return groups_of(4)

    # Of the current version it is the answer.
    assert asyncio.run(engine.read(partial, 10)) == groups_of(4)
    assert asked == [old, new, new]


def test_too_many_reads_are_refused():
    async def run():
        engine = Engine(snapshot_of_places(1))
        may_end = asyncio.Event()

        async def wait(snapshot, timeout_s):
            await may_end.wait()
            return groups_of(10)

        def count():
            return engine.read(
                lambda snapshot, timeout_s: count_groups(snapshot, timeout_s, "label", "", 0.0, Observer()), 60
            )

        reads = [asyncio.create_task(engine.read(wait, 60)) for _ in range(MAX_READS)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match=f"{MAX_READS} rankings and counts are in progress"):
            await count()
        # One that is given up makes room.
        reads[0].cancel()
        await asyncio.wait(reads[:1])
        assert (await count()).coverage.fraction == 1
        may_end.set()
        await asyncio.wait(reads)
        with pytest.raises(DeadlineExceeded):
            await engine.read(wait, 0)

    asyncio.run(run())


def test_a_ranking_says_everything_that_is_wrong_with_it():
    with pytest.raises(InvalidQuery) as caught:
        Ranking(by=Place(math.inf, 0), k=0, min_coverage=2, min_score=1.0).check()
    assert [field for field, _ in caught.value.violations] == ["lon", "k", "min_score", "min_coverage"]
