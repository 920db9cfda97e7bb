"""Rows by key and filter, updates of columns, and deletion by filter, over a real archive."""

import asyncio
from contextlib import suppress
from datetime import UTC, datetime

import pytest
from search_parts import StubEncoder

from orbithash.encoders.archive.archive import Archive
from orbithash.search.engine.backend import LocalBackend
from orbithash.search.protocol.errors import InvalidQuery, Overloaded
from orbithash.search.protocol.queries import Query
from orbithash.search.protocol.rows import Row, RowUpdate
from orbithash.search.service import writer as writer_module
from orbithash.search.service.service import Target, open_service

WHEN = datetime(2024, 5, 1, tzinfo=UTC)
FULL = Row(
    key="full",
    code=b"\x01\x02",
    uri="file:///full",
    label="harbor",
    caption="boats",
    datetime=WHEN,
    lon=3.0,
    lat=51.0,
    thumbnail=b"jpeg",
)
EVERYTHING = ("uri", "caption", "thumbnail", "footprint", "code")


def run(folder, scenario, opened=None):
    """Run `scenario(service)` over an archive at `folder` with the row FULL and ten rows k0 to k9."""

    async def main():
        Archive.open_or_create(folder, 16, "m" * 32)

        async def open_backend(target):
            backend = LocalBackend(Archive.open(target.archive), StubEncoder(), target.num_shards)
            return opened(backend) if opened else backend

        service = await open_service(open_backend, Target(str(folder), "", 2))
        try:
            label = ("beach", "river")
            rows = [Row(key=f"k{i}", code=bytes([i, 0]), label=label[i % 2]) for i in range(10)]
            await service.upsert([FULL, *rows])
            await scenario(service)
        finally:
            await service.close()

    asyncio.run(main())


def test_rows_by_key(tmp_path):
    async def scenario(service):
        full, k3 = (await service.get(["full", "nowhere", "k3"], EVERYTHING)).rows
        assert full.id is not None
        assert full == Row(**{**vars(FULL), "id": full.id})
        assert (k3.key, k3.label, k3.uri, k3.code, k3.caption) == ("k3", "river", "k3", b"\x03\x00", None)
        (plain,) = (await service.get(["full"], ())).rows
        assert (plain.label, plain.datetime, plain.uri, plain.code, plain.thumbnail) == ("harbor", WHEN, "", None, None)
        for keys, include, field in (
            ([], (), "keys"),
            (["k"] * 1001, (), "keys"),
            ([""], (), "key"),
            (["k1"], ("colour",), "include"),
        ):
            with pytest.raises(InvalidQuery, match=f"^{field}: "):
                await service.get(keys, include)

    run(tmp_path / "a", scenario)


def test_counts_and_pages(tmp_path):
    async def scenario(service):
        assert (await service.count(""))[0] == 11
        assert (await service.count("label = 'beach'"))[0] == 5
        with pytest.raises(InvalidQuery, match="filter"):
            await service.count("no filter at all")
        for text, number in (("", 11), ("label = 'beach'", 5), ("label = 'glacier'", 0)):
            for limit in (1, 2, 5, 11, 1000):
                rows, after = [], None
                while True:
                    page, after, _ = await service.scroll(text, after, limit, ("caption",))
                    assert len(page) <= limit
                    rows += page
                    if after is None:
                        break
                assert len(rows) == number
                assert [row.id for row in rows] == sorted({row.id for row in rows})
        # Rows that are deleted between two pages are missing, and no other.
        page, after, _ = await service.scroll("", None, 4, ())
        await service.delete([page[0].key, "k9"])
        rest, _, _ = await service.scroll("", after, 1000, ())
        assert len(rest) == 11 - 4 - 1
        for limit in (0, 1001):
            with pytest.raises(InvalidQuery, match="limit"):
                await service.scroll("", None, limit, ())

    run(tmp_path / "a", scenario)


def test_an_update_changes_the_named_columns_only(tmp_path):
    async def scenario(service):
        done = await service.update(
            [
                RowUpdate("full", {"label": "port", "caption": None, "lat": 52.0}),
                RowUpdate("nowhere", {"label": "x"}),
                RowUpdate("full", {"uri": None}),
            ]
        )
        assert (done.updated, done.removed) == (1, 0)
        (row,) = (await service.get(["full"], EVERYTHING)).rows
        assert row == Row(**{**vars(FULL), "id": row.id, "label": "port", "caption": None, "lat": 52.0, "uri": "full"})
        assert (await service.get(["nowhere"], ())).rows == []
        # Searches and filters see it.
        assert (await service.search(Query(code=b"\x01\x02", k=1), 10.0)).hits[0].label == "port"
        assert (await service.count("label = 'port'"))[0] == 1
        for columns, field in (
            ({}, "columns"),
            ({"colour": 1}, "columns"),
            ({"lon": 400.0}, "lon"),
            ({"code": b"ab"}, "columns"),
        ):
            with pytest.raises(InvalidQuery, match=f"^{field}: "):
                await service.update([RowUpdate("full", columns)])

    run(tmp_path / "a", scenario)


def test_changes_of_one_commit_apply_in_order(tmp_path):
    async def scenario(service):
        async with service._served.writer.lock:
            waiting = [
                asyncio.create_task(change)
                for change in (
                    service.update([RowUpdate("k0", {"label": "first"})]),
                    service.update([RowUpdate("k0", {"caption": "second"})]),
                    service.upsert([Row(key="new", code=b"ab", label="x")]),
                    service.update([RowUpdate("new", {"caption": "third"})]),
                    service.delete(["k1"]),
                    service.update([RowUpdate("k1", {"label": "gone"})]),
                    service.delete(["k1", "new"]),
                    service.upsert([Row(key="new", code=b"cd")]),
                )
            ]
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        done = await asyncio.gather(*waiting)
        assert len({each.version for each in done}) == 1, "one commit"
        assert [(each.removed, each.updated) for each in done] == [
            (0, 1),
            (0, 1),
            (0, 0),
            (0, 1),
            (1, 0),
            (0, 0),
            (1, 0),
            (0, 0),
        ]
        k0, new = (await service.get(["k0", "k1", "new"], EVERYTHING)).rows
        assert (k0.label, k0.caption, k0.code) == ("first", "second", b"\x00\x00")
        assert (new.label, new.caption, new.code) == (None, None, b"cd")

    run(tmp_path / "a", scenario)


def test_deletion_by_filter(tmp_path, monkeypatch):
    monkeypatch.setattr("orbithash.search.service.service._MAX_DELETE", 2)

    async def scenario(service):
        steps = [step async for step in service.delete_matching("label = 'beach'")]
        assert [(number, done.removed) for number, done in steps] == [(2, 2), (2, 2), (1, 1)]
        assert (await service.count("label = 'beach'"))[0] == 0
        assert (await service.count(""))[0] == 6
        assert [number async for number, _ in service.delete_matching("label = 'beach'")] == [0]
        for text in ("", "no filter at all"):
            with pytest.raises(InvalidQuery, match="filter"):
                [step async for step in service.delete_matching(text)]
        assert (await service.count(""))[0] == 6

    run(tmp_path / "a", scenario)


@pytest.mark.parametrize("limit", ["_MAX_WAITING", "_MAX_WAITING_BYTES"])
def test_changes_that_wait_are_limited_in_rows_and_in_bytes(tmp_path, monkeypatch, limit):
    async def scenario(service):
        monkeypatch.setattr(writer_module, limit, {"_MAX_WAITING": 2, "_MAX_WAITING_BYTES": 3000}[limit])
        rows = [Row(key=f"new{i}", code=b"ab", thumbnail=bytes(1000)) for i in range(4)]
        async with service._served.writer.lock:
            waiting = [asyncio.create_task(service.upsert([row])) for row in rows[:2]]
            await asyncio.sleep(0)
            with pytest.raises(Overloaded, match=r"2 rows of 2,\d+ bytes wait"):
                await service.upsert(rows[2:])
        await asyncio.gather(*waiting)
        # Nothing waits any more.
        monkeypatch.setattr(writer_module, "_MAX_WAITING_BYTES", 2 * 1100)
        await service.upsert(rows[2:])

    run(tmp_path / "a", scenario)


class SlowBackend:
    """A backend whose snapshot is ready when the test says so; counts what is open."""

    def __init__(self, backend, gate, loading, is_open):
        self._backend, self._gate, self._loading, self._open = backend, gate, loading, is_open
        self._open.append(self)

    def __getattr__(self, name):
        return getattr(self._backend, name)

    async def at(self, version):
        self._loading.set()
        await self._gate.wait()
        return await self._backend.at(version)

    async def close(self):
        self._open.remove(self)


def test_a_refresh_is_completed_after_its_caller_has_gone(tmp_path):
    gates = []

    async def scenario(service):
        gate, loading = asyncio.Event(), asyncio.Event()
        gates.append((gate, loading, []))
        caller = asyncio.create_task(service.refresh(num_shards=3))
        await loading.wait()
        caller.cancel()
        with suppress(asyncio.CancelledError):
            await caller
        assert len(service.describe().shards) == 2
        gate.set()
        # The next refresh waits for the one in progress.
        assert len((await service.refresh()).shards) == 3

    run(tmp_path / "a", scenario, lambda backend: SlowBackend(backend, *gates[0]) if gates else backend)


def test_a_move_that_is_cancelled_closes_the_new_backend(tmp_path):
    gates, is_open = [], []

    async def scenario(service):
        gate, loading = asyncio.Event(), asyncio.Event()
        gates.append((gate, loading, is_open))
        caller = asyncio.create_task(service.refresh(num_shards=3))
        await loading.wait()
        assert len(is_open) == 1
        gate.set()
        async with service._served.writer.lock:
            # The move waits for the lock.
            while service._refreshing.locked() and len(service._served.writer.lock._waiters or ()) == 0:
                await asyncio.sleep(0)
            await service.close()
            assert is_open == []
        with pytest.raises(asyncio.CancelledError):
            await caller

    run(tmp_path / "a", scenario, lambda backend: SlowBackend(backend, *gates[0]) if gates else backend)
