"""Other orders of rows and numbers of rows, through a real gateway: equal to loops over all rows for any shards."""

import itertools
import math
import re
from collections import Counter

import numpy as np
import pytest
from search_parts import MemoryArchive, StubEncoder, random_codes, serving

from orbithash.search.client import Client, Linear, Place, Query, Shuffle, TimeOrder
from orbithash.search.engine.backend import LocalShardClient
from orbithash.search.engine.engine import Engine
from orbithash.search.engine.snapshot import Snapshot
from orbithash.search.protocol.errors import InvalidQuery, KeyNotFound, Unavailable
from orbithash.search.segments.dealing import Deal
from orbithash.search.segments.files import warm_up
from orbithash.search.segments.host import ShardHost

BITS, NUM, DIMS = 16, 90, 5
KNOWN = "label IS NOT NULL"


class Fixture:
    """An archive in memory, of which every seventh row has no vector, and clients of gateways with its shards."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.codes = random_codes(rng, NUM, BITS)
        self.ids = rng.permutation(NUM * 3)[:NUM].astype(np.uint64)
        self.vectors = [
            None if id_ % 7 == 0 else rng.integers(-128, 128, DIMS).astype(np.int8) for id_ in self.ids.tolist()
        ]
        self.archive = MemoryArchive(self.ids, self.codes, BITS, self.vectors)
        self.vector_of = dict(zip(self.ids.tolist(), self.vectors, strict=True))

    def shards(self, number):
        deal = Deal(number)
        hosts = []
        for place in range(number):
            ids = self.ids[deal.part(self.ids, place)]
            table = self.archive.take(ids, self.archive.columns)
            hosts.append(ShardHost.of_rows(ids, table, BITS, version=MemoryArchive.version))
        return [LocalShardClient(host, MemoryArchive.version) for host in hosts]

    def row(self, id_):
        return self.archive.row(int(id_))

    def passes(self, id_, text):
        return not text or self.row(id_)["label"] is not None


@pytest.fixture(scope="module")
def archive():
    # Compiling kernels may take longer than a shard's time-out.
    warm_up(BITS)
    return Fixture()


@pytest.fixture(scope="module", params=[1, 2, 5])
def client(archive, request):
    snapshot = Snapshot.of(archive.archive, archive.shards(request.param), Deal(request.param), StubEncoder())
    with serving(Engine(snapshot)) as gateway, Client(gateway.address, timeout_s=60) as made:
        yield made


def pages(client, by, **fields):
    """Return all hits, three at a time, and the last answer."""
    hits, answers = [], list(client.rank_pages(by, k=3, **fields))
    for answer in answers:
        assert answer.coverage.fraction == 1
        assert [hit.rank for hit in answer.hits] == list(range(1, len(answer.hits) + 1))
        hits += answer.hits
    return hits, answers[-1]


@pytest.mark.parametrize("text", ["", KNOWN])
def test_by_a_linear_function(archive, client, text):
    by = Linear((3, -7, 0, 100, -32768), scale=0.25, offset=-10.5)
    scores = {
        id_: by.offset + by.scale * int(vector.astype(np.int64) @ np.array(by.weights))
        for id_, vector in archive.vector_of.items()
        if vector is not None and archive.passes(id_, text)
    }
    expected = sorted(scores, key=lambda id_: (-scores[id_], id_))
    hits, last = pages(client, by, filter=text)
    assert [(hit.id, hit.score) for hit in hits] == [(id_, scores[id_]) for id_ in expected]
    assert (last.ranked_rows, last.rows_within) == (len(scores), len(scores))
    assert last.matching_rows == (sum(archive.passes(id_, text) for id_ in archive.vector_of) if text else None)

    # A cut-off that a score equals lets its row in.
    limit = scores[expected[20]]
    hits, last = pages(client, by, filter=text, min_score=limit)
    assert [hit.id for hit in hits] == [id_ for id_ in expected if scores[id_] >= limit]
    assert (last.ranked_rows, last.rows_within) == (len(scores), len(hits))
    just_above = float(np.nextafter(limit, np.inf))
    assert client.rank(by, filter=text, min_score=just_above).rows_within == sum(s > limit for s in scores.values())

    unsure = client.rank(Linear(by.weights, by.scale, by.offset, least_certain=True), k=100, filter=text)
    assert {hit.id: hit.score for hit in unsure.hits} == scores
    magnitudes = [abs(hit.score) for hit in unsure.hits]
    assert all(b >= a - by.scale for a, b in itertools.pairwise(magnitudes))


def haversine(lon, lat, row):
    one, two = math.radians(lat), math.radians(row["lat"])
    east = math.radians(row["lon"] - lon)
    half = math.sin((two - one) / 2) ** 2 + math.cos(one) * math.cos(two) * math.sin(east / 2) ** 2
    return 2 * 6_371_008.8 * math.asin(math.sqrt(min(1.0, half)))


@pytest.mark.parametrize("place", [(0, 0), (179.9, 60), (540 - 360.1, -89.9), (-360, 45.5)])
def test_near_a_place(archive, client, place):
    rows = {id_: archive.row(id_) for id_ in archive.vector_of}
    metres = {id_: haversine(*place, row) for id_, row in rows.items() if row["lon"] is not None}
    hits, last = pages(client, Place(*place))
    assert {hit.id for hit in hits} == metres.keys()
    assert last.ranked_rows == len(metres)
    for hit in hits:
        assert hit.score == pytest.approx(metres[hit.id], abs=0.01)
    assert [hit.score for hit in hits] == sorted(hit.score for hit in hits)
    limit = hits[10].score
    near, last = pages(client, Place(*place, max_distance_m=limit))
    assert [hit.id for hit in near] == [hit.id for hit in hits if hit.score <= limit]
    assert last.rows_within == len(near)


def test_at_random(archive, client):
    hits, last = pages(client, Shuffle(5))
    assert sorted(hit.id for hit in hits) == sorted(archive.ids.tolist())
    assert [hit.id for hit in hits] == [hit.id for hit in client.rank(Shuffle(5), k=1000).hits]
    assert [hit.id for hit in hits] != [hit.id for hit in client.rank(Shuffle(6), k=1000).hits]
    assert hits[0].score is None
    assert last.ranked_rows == NUM


@pytest.mark.parametrize("newest", [False, True])
def test_by_time(archive, client, newest):
    rows = {id_: archive.row(id_)["datetime"] for id_ in archive.vector_of}
    known = {id_: time.timestamp() for id_, time in rows.items() if time is not None}
    expected = sorted(known, key=lambda id_: (-known[id_] if newest else known[id_], id_))
    hits, _ = pages(client, TimeOrder(newest_first=newest))
    assert [hit.id for hit in hits] == expected


def test_the_same_place_at_other_times(archive, client):
    row = next(archive.row(id_) for id_ in sorted(archive.vector_of) if archive.row(id_)["lon"] is not None)
    hits = client.rank(TimeOrder(same_place_as=row["key"]), k=100).hits
    same = [
        id_
        for id_ in archive.vector_of
        if (archive.row(id_)["lon"], archive.row(id_)["lat"]) == (row["lon"], row["lat"])
    ]
    assert sorted(hit.id for hit in hits) == sorted(same)
    without = next(archive.row(id_) for id_ in archive.vector_of if archive.row(id_)["lon"] is None)
    with pytest.raises(InvalidQuery, match="has no place"):
        client.rank(TimeOrder(same_place_as=without["key"]))
    with pytest.raises(KeyNotFound):
        client.rank(TimeOrder(same_place_as="absent"))


@pytest.mark.parametrize("text", ["", KNOWN])
def test_numbers_of_rows(archive, client, text):
    code = archive.codes[3]
    distances = np.bitwise_count(archive.codes ^ code).sum(axis=1).tolist()
    rows = [d for d, id_ in zip(distances, archive.ids.tolist(), strict=True) if archive.passes(id_, text)]
    counts = client.distances(code=code.tobytes(), filter=text)
    assert counts.rows == tuple(rows.count(d) for d in range(BITS + 1))
    assert counts.matching_rows == (len(rows) if text else None)
    assert counts.coverage.fraction == 1
    for radius in range(BITS + 1):
        near = client.search(code=code.tobytes(), radius=radius, k=1000, filter=text)
        assert len(near.hits) == sum(counts.rows[: radius + 1])

    passing = [archive.row(id_) for id_ in archive.vector_of if archive.passes(id_, text)]
    labels = Counter(row["label"] for row in passing)
    groups = client.count_by("label", text)
    assert groups.without == labels.pop(None, 0)
    assert list(groups.rows.items()) == sorted(labels.items(), key=lambda group: (-group[1], group[0]))
    months = Counter(f"{row['datetime']:%Y-%m}" for row in passing if row["datetime"])
    assert list(client.count_by("month", text).rows.items()) == sorted(months.items())
    years = Counter(f"{row['datetime']:%Y}" for row in passing if row["datetime"])
    assert list(client.count_by("year", text).rows.items()) == sorted(years.items())


def test_rows_by_id_and_their_vectors(archive, client):
    ids = archive.ids[:10].tolist()
    rows = client.get(ids=[*ids, 10**9, 2**64 - 1], include=("vector", "code"))
    assert [row.id for row in rows.values()] == ids
    for row in rows.values():
        vector = archive.vector_of[row.id]
        assert row.stored_vector == (None if vector is None else vector.tobytes())
    hit = client.search(code=archive.codes[1].tobytes(), k=1, include=("vector",)).hits[0]
    vector = archive.vector_of[hit.id]
    assert hit.extra.get("vector") == (None if vector is None else vector.tobytes())
    description = client.describe()
    assert (description.vector_dims, description.vector_scale, description.has_views) == (DIMS, 0.01, False)


@pytest.mark.parametrize(
    ("by", "fields", "words"),
    [
        (Linear((1, 2)), {}, "have 5 components, got 2 weights"),
        (Linear(()), {}, "give a weight for each component"),
        (Linear((40_000, 0, 0, 0, 0)), {}, "from -32,768 to 32,767, got 40000"),
        (Linear((32_767,) * 600), {}, "at most 16,777,215, got 19,660,200"),
        (Linear((1,) * 5, scale=0), {}, "a finite number above 0, got 0"),
        (Linear((1,) * 5, offset=math.nan), {}, "a finite number, got nan"),
        (Linear((1,) * 5), {"min_score": math.inf}, "a finite number, got inf"),
        (Linear((1,) * 5, least_certain=True), {"min_score": 1.0}, "has no smallest score"),
        (Place(0, 91), {}, "from -90 to 90, got 91"),
        (Place(math.nan, 0), {}, "from -360 to 360, got nan"),
        (Place(0, 0, max_distance_m=-1), {}, "metres from 0, got -1"),
        (Place(0, 0), {"min_score": 1.0}, "belongs to an order by Linear"),
        (Shuffle(-1), {}, "from 0 to"),
        (Shuffle(), {"k": 0}, "k is a whole number from 1 to 10,000"),
        (Shuffle(), {"k": 1001, "include": ("vector",)}, "at most 1,000 hits"),
        (Shuffle(), {"filter": "colour = 1"}, "colour"),
        (Shuffle(), {"after": (1, -2)}, "a cursor is the key and the id"),
        (TimeOrder(same_place_as="a" * 5000), {}, "4,096"),
        ("label", {}, "one of Linear, Place, Shuffle, TimeOrder"),
    ],
)
def test_wrong_rankings(client, by, fields, words):
    with pytest.raises(InvalidQuery, match=re.escape(words)):
        client.rank(by, **fields)


def test_wrong_calls(client):
    for call, words in (
        (lambda: client.count_by("colour"), "label, month or year"),
        (lambda: client.get(["a"], ids=[1]), "give keys or ids, got both"),
        (lambda: client.get(), "give keys or ids, got neither"),
        (lambda: client.get(ids=[-1]), "an id is a whole number"),
        (lambda: client.distances(), "give"),
        (lambda: client.distances(code=b"123"), "16"),
        (lambda: client.encode(), "give exactly one of image, text and vector, got none"),
        (lambda: client.encode(text="a", vector=[1.0]), "image, text and vector, got text and vector"),
    ):
        with pytest.raises(InvalidQuery, match=re.escape(words)):
            call()


def test_an_archive_without_vectors():
    case = Fixture()
    plain = MemoryArchive(case.ids, case.codes, BITS)
    host = ShardHost.of_rows(case.ids, plain.take(case.ids, plain.columns), BITS, version=MemoryArchive.version)
    snapshot = Snapshot.of(plain, [LocalShardClient(host, MemoryArchive.version)], Deal(1), StubEncoder())
    with serving(Engine(snapshot)) as gateway, Client(gateway.address) as client:
        assert client.describe().vector_dims == 0
        with pytest.raises(InvalidQuery, match="the archive has no stored vectors"):
            client.rank(Linear((1,) * DIMS))
        assert "vector" not in client.rank(Shuffle(), include=("vector",)).hits[0].extra


class Failing:
    """A shard that does not answer."""

    num_replicas = num_healthy = 1
    num_segments = num_bytes = num_merges = num_evaluations = 0

    def __init__(self, shard):
        self.num_rows = shard.num_rows

    def __getattr__(self, name):
        if name.endswith("_now"):
            raise AttributeError(name)

        async def fail(*_):
            raise ConnectionError("gone")

        return fail


def test_a_partial_answer(archive):
    shards = archive.shards(3)
    shards[1] = Failing(shards[1])
    snapshot = Snapshot.of(archive.archive, shards, Deal(3), StubEncoder())
    with serving(Engine(snapshot)) as gateway, Client(gateway.address, timeout_s=60) as client:
        share = 1 - shards[1].num_rows / NUM
        answer = client.rank(Shuffle(1), k=100)
        assert answer.coverage.fraction == pytest.approx(share)
        assert len(answer.hits) == NUM - shards[1].num_rows
        counts = client.distances(Query(code=archive.codes[0].tobytes()))
        assert counts.coverage == answer.coverage
        assert sum(counts.rows) == len(answer.hits)
        groups = client.count_by("label")
        assert groups.coverage == answer.coverage
        assert sum(groups.rows.values()) + groups.without == len(answer.hits)
        for call in (
            lambda: client.rank(Shuffle(1), min_coverage=1),
            lambda: client.distances(code=archive.codes[0].tobytes(), min_coverage=1),
            lambda: client.count_by("label", min_coverage=1),
        ):
            with pytest.raises(Unavailable, match=r"min_coverage is 1\.000"):
                call()
