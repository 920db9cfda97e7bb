"""Helpers of the tests of shards: a host in memory whose calls a test can delay, and servers in this process."""

import contextlib

import numpy as np
import pyarrow as pa

from orbithash.search.index.answers import NO_HIT, ShardAnswer
from orbithash.search.protocol.errors import InvalidQuery
from orbithash.search.segments.host import HostStatus, VersionGone
from orbithash.search.shards.client import Connection, RemoteShardClient
from orbithash.search.shards.server import ShardServer

TOKEN = "the token of the tests"


class MemoryHost:
    """Has the interface of a `ShardHost`. Versions are given; a filter is `id < N`, which is never ready at once.

    `before(stop)` runs at the start of each search, in its thread.
    """

    def __init__(self, versions, before=lambda stop: None):
        """`versions`: (ids, codes) by version; none is held before `follow`."""
        self.versions = versions
        self.before = before
        self.held = {}
        self.follows = []

    def follow(self, version):
        self.follows.append(version)
        self.held[version] = self.versions[version]
        return len(self.held[version][0])

    def holds(self, version):
        return version in self.held

    def _rows(self, version):
        if version not in self.held:
            raise VersionGone(f"version {version} is not held")
        return self.held[version]

    def num_rows(self, version):
        return len(self._rows(version)[0])

    def is_ready(self, version, filter_text):
        return not filter_text

    @staticmethod
    def _passing(ids, text):
        if not text:
            return np.ones(len(ids), bool)
        if not text.startswith("id < "):
            raise InvalidQuery(("filter", f"got {text!r}"))
        return ids < np.uint64(int(text[5:]))

    def search(self, version, queries, k, scope, stop):
        ids, codes = self._rows(version)
        self.before(stop)
        passing = self._passing(ids, scope.filter)
        found, width = [], 0
        for query in queries:
            distances = np.bitwise_count(codes[passing] ^ query).sum(axis=1, dtype=np.int64)
            rows = sorted(zip(distances.tolist(), ids[passing].tolist(), strict=True))
            rows = [row for row in rows if scope.radius is None or row[0] <= scope.radius]
            rows = [row for row in rows if scope.after is None or row > scope.after]
            hits = rows[:k]
            ties = sum(distance == hits[-1][0] for distance, _ in rows) if hits else 0
            found.append((hits, ties))
            width = max(width, len(hits))
        answer_distances = np.full((len(queries), width), NO_HIT, np.int32)
        answer_ids = np.zeros((len(queries), width), np.uint64)
        for place, (hits, _) in enumerate(found):
            for column, (distance, id_) in enumerate(hits):
                answer_distances[place, column], answer_ids[place, column] = distance, id_
        ties = np.array([ties for _, ties in found], np.int64)
        rows = ()
        if scope.with_rows:
            rows = tuple(self._row(id_) for hits, _ in found for _, id_ in hits)
        num_matching = int(passing.sum()) if scope.filter else None
        return ShardAnswer(answer_distances, answer_ids, ties, rows, num_matching)

    @staticmethod
    def _row(id_):
        return b"row %d" % id_

    def hits(self, version, ids, include, stop):
        self._rows(version)
        return [self._row(id_) for id_ in ids.tolist()]

    def read(self, version, ids, columns, stop):
        self._rows(version)
        return pa.table({name: [f"{name} {id_}" for id_ in ids.tolist()] for name in columns})

    def count(self, version, filter_text, stop):
        return int(self._passing(self._rows(version)[0], filter_text).sum())

    def scroll(self, version, filter_text, after, limit, stop):
        ids = np.sort(self._rows(version)[0])
        ids = ids[self._passing(ids, filter_text)]
        return ids[ids > np.uint64(after)][:limit] if after is not None else ids[:limit]

    def status(self):
        versions = tuple(sorted(self.held))
        num_rows = len(self.held[versions[-1]][0]) if versions else 0
        return HostStatus(num_rows, 1, 1000, versions)

    def close(self):
        pass


@contextlib.asynccontextmanager
async def served(host, number=0, limits=None, version=None):
    """Serve a host at a free port of this process; yields the server and a connection to it."""
    server = ShardServer(host, number, TOKEN, limits)
    address = await server.start("127.0.0.1")
    connection = Connection(number, TOKEN)
    await connection.connect(address)
    try:
        yield server, connection
    finally:
        await connection.close()
        await server.stop()


async def client_at(connection, version):
    """Return a client of a version, which the shard follows first."""
    return RemoteShardClient(connection, version, await connection.follow(version, 30))
