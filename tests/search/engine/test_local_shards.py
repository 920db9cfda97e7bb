"""Shards in this process: what the event loop does itself, and what it leaves to threads."""

import asyncio

import numpy as np
from search_parts import StubEncoder, random_codes

from orbithash.encoders.archive.archive import Archive
from orbithash.search.engine.backend import LocalBackend
from orbithash.search.engine.engine import Engine
from orbithash.search.protocol.queries import Query
from orbithash.search.segments.versions import source


def test_rows_of_hits_are_read_from_the_archive_in_threads_only(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "MAX_ROWS_IN_MEMORY", 0)
    codes = random_codes(np.random.default_rng(1), 50, 16)
    keys = [f"k{number}" for number in range(50)]
    archive = Archive.create(tmp_path / "archive", 16, "m" * 32)
    ids = archive.upsert(Archive.table(codes, 16, keys, keys))

    async def scenario():
        backend = LocalBackend(archive, StubEncoder(), 2)
        try:
            snapshot = await backend.at(archive.version)
            rows = [shard.hits_now(ids[snapshot.deal.owner(ids) == n], ()) for n, shard in enumerate(snapshot.shards)]
            answer = await Engine(snapshot).search(Query(code=codes[7].tobytes(), k=1), 30.0)
            assert answer.hits[0].distance == 0
            return rows
        finally:
            await backend.close()

    assert asyncio.run(scenario()) == [None, None]
    monkeypatch.undo()
    assert [len(rows) for rows in asyncio.run(scenario())] == [25, 25]
