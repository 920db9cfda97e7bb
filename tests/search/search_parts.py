"""Helpers of the tests of search: random cases, their oracle, an archive in memory, and a running gateway."""

import asyncio
import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa

from orbithash.encoders.archive.storage import schema_of
from orbithash.encoders.codes import Encoded, outputs_of
from orbithash.encoders.vectors import VectorSpec
from orbithash.search.engine.backend import LocalShardClient
from orbithash.search.engine.engine import Engine
from orbithash.search.engine.snapshot import Snapshot
from orbithash.search.gateway.gateway import Gateway, start_gateway
from orbithash.search.gateway.limits import GatewayLimits
from orbithash.search.gateway.protection import Protection
from orbithash.search.index.answers import NO_HIT, ShardAnswer
from orbithash.search.index.exact import warm_up
from orbithash.search.protocol.hits import row_of
from orbithash.search.protocol.queries import Hit
from orbithash.search.segments.dealing import Deal
from orbithash.search.segments.host import ShardHost
from orbithash.search.segments.segment import Segment
from orbithash.search.service.service import Service, Target


@dataclass
class Case:
    bits: int
    ids: np.ndarray
    codes: np.ndarray
    queries: np.ndarray
    ks: list[int]
    num_shards: int


def random_codes(rng, num_rows, bits):
    return np.packbits(rng.integers(0, 2, (num_rows, bits), dtype=np.uint8), axis=1)


def random_case(seed, max_rows=3000):
    """Return a case of any width, with equal codes, equal distances, unordered and large ids, and fewer rows than k."""
    rng = np.random.default_rng(seed)
    bits = int(
        rng.choice([8, 9, 12, 16, 20, 31, 32, 48, 63, 64, 65, 100, 128, 255, 256, 511, 512, rng.integers(8, 513)])
    )
    num_rows = int(rng.choice([0, 1, 2, 7, 100, 1000, rng.integers(0, max_rows + 1), max_rows]))
    pool = random_codes(rng, max(1, int(rng.choice([1, 3, 50, max_rows]))), bits)
    codes = pool[rng.integers(0, len(pool), num_rows)]
    match seed % 4:
        case 1:  # Rows near the codes of the pool.
            codes = codes ^ np.packbits(rng.random((num_rows, bits)) < 2 / bits, axis=1)
        case 2:  # Many distinct codes at one distance, so that ties reach beyond any first guess.
            flips = np.zeros((num_rows, bits), np.uint8)
            np.put_along_axis(flips, np.sort(rng.integers(0, bits, (num_rows, 2)), axis=1), 1, axis=1)
            codes = pool[:1] ^ np.packbits(flips, axis=1)
    first = [0, 2**63 - 1000, 2**64 - 10**7][seed % 3]
    ids = np.array([first + row for row in random.Random(seed).sample(range(10**7), num_rows)], np.uint64)
    queries = np.concatenate([random_codes(rng, 2, bits), pool[:1], codes[:1]])
    ks = [1, 2, int(rng.integers(3, 200)), num_rows, num_rows + 7]
    return Case(bits, ids, codes, queries, [k for k in ks if k], int(rng.integers(1, 9)))


def oracle(ids, codes, query, k):
    """Return hits [(distance, id)] and ties at the cut-off, computed with Python integers and `sorted`."""
    query_bits = int.from_bytes(query.tobytes())
    every = [
        ((int.from_bytes(code.tobytes()) ^ query_bits).bit_count(), int(row))
        for row, code in zip(ids, codes, strict=True)
    ]
    hits = sorted(every)[:k]
    return hits, sum(distance == hits[-1][0] for distance, _ in every) if hits else 0


def rows_of(answer: ShardAnswer, i: int):
    """Return the i-th query of a shard's answer in the form of `oracle`."""
    is_hit = answer.distances[i] != NO_HIT
    assert (is_hit[:-1] >= is_hit[1:]).all()
    return list(zip(answer.distances[i][is_hit].tolist(), answer.ids[i][is_hit].tolist(), strict=True)), int(
        answer.ties[i]
    )


def hits_of(answer):
    """Return an answer of an engine or a client in the form of `oracle`."""
    assert [hit.rank for hit in answer.hits] == list(range(1, len(answer.hits) + 1))
    return [(hit.distance, hit.id) for hit in answer.hits], answer.ties_at_cutoff


class MemoryArchive:
    """An `ArchiveReader` in memory. Every third row has only a key and a code."""

    model_id = "model-of-the-test"
    version = 7

    def __init__(self, ids, codes, bits, vectors=None):
        """`vectors`: a list of int8 [d] or None; every row gets one."""
        self.bits = bits
        self.vector = None if vectors is None else VectorSpec(len(next(v for v in vectors if v is not None)), 0.01)
        self.num_rows = len(ids)
        self._schema = schema_of(bits, "", self.vector)
        self._rows = {int(row): self._row(int(row), code) for row, code in zip(ids, codes, strict=True)}
        for row, vector in zip(ids, vectors or [], strict=False):
            self._rows[int(row)]["vector"] = None if vector is None else vector.tolist()
        self._ids = {row["key"]: id_ for id_, row in self._rows.items()}

    @staticmethod
    def _row(id_, code):
        known = id_ % 3 != 0
        return {
            "key": f"place/{id_}.tif",
            "code": code.tolist(),
            "uri": f"file:///place/{id_}.tif",
            "caption": f"a picture of {id_}" if known else None,
            "thumbnail": b"jpeg" if known else None,
            "footprint": None,
            "label": f"class {id_ % 5}" if known else None,
            "lon": id_ % 360 - 180.0 if known else None,
            "lat": id_ % 180 - 90.0 if known else None,
            "datetime": datetime(2020, 1, 1, tzinfo=UTC) + timedelta(seconds=id_ % 10**8, microseconds=id_ % 7)
            if known
            else None,
        }

    @property
    def columns(self):
        return [name for name in self._schema.names if name != "stamp"]

    def row(self, id_):
        return self._rows[id_]

    def find(self, keys):
        return {key: self._ids[key] for key in keys if key in self._ids}

    def exist(self, ids):
        return np.array([int(id_) in self._rows for id_ in ids], bool)

    def take(self, ids: np.ndarray, columns: Sequence[str]):
        rows = [self._rows[row] for row in ids.tolist()]
        schema = pa.schema([self._schema.field(name) for name in columns])
        return pa.table({name: [row[name] for row in rows] for name in columns}, schema=schema)

    def scan(self, columns, among=None):
        wanted = self._rows if among is None else self._rows.keys() & set(among.tolist())
        ids = np.array(list(wanted), np.uint64)
        return ids, self.take(ids, columns)

    def scan_batches(self, columns, among=None):
        yield self.scan(columns, among)


class StubEncoder:
    """A `QueryEncoder` that calls functions of the test, which return codes or an `Encoded`."""

    has_text = True
    num_features = 4
    embedding = None
    has_views = False

    def __init__(self, images=None, texts=None, vectors=None):
        self._functions = {"image": images, "text": texts, "vector": vectors}

    async def encode(self, kind, items, with_outputs=False):
        assert self._functions[kind] is not None, f"this test sends no {kind}"
        encoded = await self._functions[kind](items)
        if isinstance(encoded, Encoded):
            return encoded
        outputs = outputs_of(encoded, 8 * encoded.shape[1]) if with_outputs else None
        return Encoded(encoded, outputs, None)

    async def view(self, source, max_side):
        return None

    async def cover(self, source, cells):
        return None

    async def encode_rows(self, images):
        return await self.encode("image", images), [b"thumbnail of " + image for image in images]


def local_shards(case: Case, num_shards=None, index="exact"):
    """Return clients of shards of a case, in this process."""
    deal = Deal(num_shards or case.num_shards)
    archive = MemoryArchive(case.ids, case.codes, case.bits)
    hosts = []
    for number in range(deal.num_shards):
        ids = case.ids[deal.part(case.ids, number)]
        table = archive.take(ids, archive.columns)
        hosts.append(ShardHost.of_rows(ids, table, case.bits, index, MemoryArchive.version))
    return [LocalShardClient(host, MemoryArchive.version) for host in hosts]


def snapshot_of(case: Case, shards, encoder=None):
    archive = MemoryArchive(case.ids, case.codes, case.bits)
    return Snapshot.of(archive, shards, Deal(len(shards)), encoder or StubEncoder())


def local_engine(case: Case, encode_images=None, encode_texts=None, **options):
    # As a server does before it listens: compiling may take longer than the time limit of a search.
    warm_up(case.bits)
    return Engine(snapshot_of(case, local_shards(case), StubEncoder(encode_images, encode_texts)), **options)


def build_shards(ids, codes, bits, num_shards, index="exact"):
    """Return segments that together have all rows."""
    parts = [Deal(num_shards).part(ids, number) for number in range(num_shards)]
    return [Segment.build(ids[part], codes[part], bits, index) for part in parts]


def small_case(num_rows=40, bits=16, num_shards=2):
    rng = np.random.default_rng(5)
    codes = random_codes(rng, num_rows, bits)
    return Case(bits, np.arange(num_rows, dtype=np.uint64), codes, codes[:3], [5], num_shards)


class MemoryShard:
    """A `ShardClient` over some rows of an archive in memory, that computes all distances. It knows no filters."""

    num_replicas = num_healthy = 1
    num_segments = num_bytes = num_merges = num_evaluations = 0

    def __init__(self, archive, ids, codes):
        self._archive = archive
        order = np.argsort(ids)
        self._ids, self._codes = ids[order], codes[order]
        self.num_rows = len(ids)

    async def search(self, queries, k, scope, timeout_s):
        assert not scope.filter
        distances = np.full((len(queries), min(k, self.num_rows)), NO_HIT, np.int32)
        ids, ties, rows = np.zeros(distances.shape, np.uint64), np.zeros(len(queries), np.int64), []
        for number, query in enumerate(queries):
            every = np.bitwise_count(self._codes ^ query).sum(axis=1).astype(np.int64)
            hits = [
                (distance, id_)
                for distance, id_ in sorted(zip(every.tolist(), self._ids.tolist(), strict=True))
                if (scope.radius is None or distance <= scope.radius)
                and (scope.after is None or (distance, id_) > scope.after)
            ]
            for place, (distance, id_) in enumerate(hits[:k]):
                distances[number, place], ids[number, place] = distance, id_
            if near := hits[:k]:
                ties[number] = sum(distance == near[-1][0] for distance, _ in hits)
            if scope.with_rows and near:
                rows += self._hits([id_ for _, id_ in near], scope.include)
        return ShardAnswer(distances, ids, ties, tuple(rows))

    async def hits(self, ids, include, timeout_s):
        return self._hits(ids.tolist(), include)

    def _hits(self, ids, include):
        table = self._archive.take(np.array(ids, np.uint64), ["key", "label", "lon", "lat", "datetime", *include])
        return [row_of(Hit(0, 0, id_, **hit_columns(row))) for id_, row in zip(ids, table.to_pylist(), strict=True)]

    async def read(self, ids, columns, timeout_s):
        assert np.isin(ids, self._ids).all()
        return self._archive.take(ids, list(columns))

    async def scroll(self, filter_text, after, limit, timeout_s):
        return self._ids[self._ids > -1 if after is None else self._ids > after][:limit]


def hit_columns(row):
    """Return the columns of a row of an archive as fields of a `Hit`."""
    named = {name: row.pop(name) for name in ("key", "label", "lon", "lat", "datetime")}
    return {**named, "extra": {name: bytes(value) if name == "code" else value for name, value in row.items()}}


def memory_shards(case: Case, num_shards=None, archive=None):
    """Return clients of shards of a case that compute all distances."""
    num_shards = num_shards or case.num_shards
    archive = archive or MemoryArchive(case.ids, case.codes, case.bits)
    owners = Deal(num_shards).owner(case.ids)
    return [MemoryShard(archive, case.ids[owners == n], case.codes[owners == n]) for n in range(num_shards)]


class StubShard:
    """A shard client that awaits a function of the test before each call of another client."""

    num_replicas = num_healthy = 1
    num_segments = num_bytes = num_merges = num_evaluations = 0

    def __init__(self, shard, before):
        self.shard = shard
        self.num_rows = shard.num_rows
        self.before = before
        # Of searches.
        self.calls = []

    async def search(self, queries, k, scope, timeout_s):
        self.calls.append((len(queries), k, timeout_s))
        await self.before()
        return await self.shard.search(queries, k, scope, timeout_s)

    async def hits(self, ids, include, timeout_s):
        await self.before()
        return await self.shard.hits(ids, include, timeout_s)

    async def read(self, ids, columns, timeout_s):
        await self.before()
        return await self.shard.read(ids, columns, timeout_s)

    async def scroll(self, filter_text, after, limit, timeout_s):
        await self.before()
        return await self.shard.scroll(filter_text, after, limit, timeout_s)


class StubBackend:
    """The backend of an engine whose archive does not change."""

    index = "flat"
    archive = encoder = None


@contextmanager
def serving(
    engine: Engine, limits: GatewayLimits | None = None, protection: Protection | None = None
) -> Iterator[Gateway]:
    """Run a gateway on a free port, in an event loop of its own thread, for blocking clients."""

    async def start():
        service = Service(Target("", "", 2), StubBackend(), engine, None)
        return await start_gateway(service, "127.0.0.1:0", limits=limits, protection=protection)

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        gateway = asyncio.run_coroutine_threadsafe(start(), loop).result(120)
        try:
            yield gateway
        finally:
            # A server that is left running keeps the process from ending.
            asyncio.run_coroutine_threadsafe(gateway.stop(grace_s=0), loop).result(120)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
