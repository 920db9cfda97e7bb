"""Filters that take long: limits, cancellation, and queries beside them."""

import asyncio
import threading

import numpy as np
import pytest
from search_parts import MemoryArchive, local_shards, small_case

from orbithash.search.engine import selections as selections_module
from orbithash.search.engine.engine import Engine
from orbithash.search.engine.selections import Selections
from orbithash.search.engine.snapshot import Snapshot
from orbithash.search.protocol.errors import InvalidQuery, Overloaded
from orbithash.search.protocol.queries import Query


class SlowArchive(MemoryArchive):
    """Scans come in many batches, each of which waits for the test."""

    def __init__(self, case):
        super().__init__(case.ids, case.codes, case.bits)
        self.may_go_on = threading.Event()
        self.num_batches = 0
        self.began = threading.Semaphore(0)
        self.num_running = self.most_running = 0

    def scan_batches(self, columns, among=None):
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        self.began.release()
        try:
            ids, table = self.scan(columns, among)
            for row in range(len(ids)):
                assert self.may_go_on.wait(60)
                self.num_batches += 1
                yield ids[row : row + 1], table.slice(row, 1)
        finally:
            self.num_running -= 1


def slow_engine():
    case = small_case()
    archive = SlowArchive(case)
    shards = local_shards(case)
    snapshot = Snapshot.of(archive, shards, None)
    return Engine(snapshot), archive


async def until(condition):
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.001)


def test_a_key_query_does_not_wait_for_filters_that_were_given_up():
    async def scenario():
        engine, archive = slow_engine()
        filters = [
            asyncio.create_task(engine.search(Query(key="place/1.tif", filter=f"lon < -{number}"), 60.0))
            for number in range(40)
        ]
        # Of the filters two are evaluated, and none of them can go on.
        await asyncio.to_thread(lambda: [archive.began.acquire(timeout=60) for _ in range(2)])
        assert len((await engine.search(Query(key="place/1.tif", k=3), 60.0)).hits) == 3
        for task in filters:
            # As a deadline does.
            task.cancel()
        await asyncio.gather(*filters, return_exceptions=True)
        assert len((await engine.search(Query(key="place/1.tif", k=3), 60.0)).hits) == 3
        archive.may_go_on.set()
        # The two that run stop at their next batch; the others never begin.
        await until(lambda: archive.num_running == 0)
        assert archive.most_running == 2
        assert archive.num_batches <= 2
        answer = await engine.search(Query(key="place/1.tif", filter="lon < -0"), 60.0)
        assert answer.matching_rows == sum(
            archive.row(id_)["lon"] is not None and archive.row(id_)["lon"] < 0 for id_ in range(40)
        )

    asyncio.run(scenario())


def test_one_query_that_leaves_does_not_stop_a_filter_that_others_wait_for():
    async def scenario():
        engine, archive = slow_engine()
        selections = engine.snapshot.selections
        impatient, patient = (asyncio.create_task(selections.get("label = 'class 1'")) for _ in range(2))
        await asyncio.to_thread(archive.began.acquire, timeout=60)
        impatient.cancel()
        with pytest.raises(asyncio.CancelledError):
            await impatient
        archive.may_go_on.set()
        assert (await patient).ids.tolist() == [id_ for id_ in range(40) if archive.row(id_)["label"] == "class 1"]
        assert archive.num_batches == 40

    asyncio.run(scenario())


def test_a_filter_that_was_given_up_is_evaluated_when_it_is_needed_again():
    async def scenario():
        engine, archive = slow_engine()
        selections = engine.snapshot.selections
        first = asyncio.create_task(selections.get("lon < -0"))
        await asyncio.to_thread(archive.began.acquire, timeout=60)
        first.cancel()
        # In the same turn of the event loop as the cancellation, and after it.
        await asyncio.sleep(0)
        second = asyncio.create_task(selections.get("lon < -0"))
        archive.may_go_on.set()
        assert len((await second).ids)
        # From a version in which it was given up to the next one.
        archive.may_go_on.clear()
        third = asyncio.create_task(selections.get("lon < -1"))
        await asyncio.sleep(0)
        later = selections.after(archive, np.array([3], np.uint64))
        third.cancel()
        archive.may_go_on.set()
        expected = [id_ for id_ in range(40) if (archive.row(id_)["lon"] or 0) < -1]
        assert (await later.get("lon < -1")).ids.tolist() == expected

    asyncio.run(scenario())


def test_too_many_filters_are_refused(monkeypatch):
    monkeypatch.setattr(selections_module, "_MAX_PENDING", 3)

    async def scenario():
        engine, archive = slow_engine()
        selections = engine.snapshot.selections
        waiting = [asyncio.create_task(selections.get(f"lon < -{number}")) for number in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="3 filters are being evaluated"):
            await selections.get("lon < -3")
        # The limit holds for all versions together, and not for a filter that is being evaluated.
        with pytest.raises(Overloaded):
            await selections.after(archive, np.array([3], np.uint64)).get("lon < -4")
        waiting.append(asyncio.create_task(selections.get("lon < -0")))
        archive.may_go_on.set()
        assert len(await asyncio.gather(*waiting)) == 4
        assert len((await selections.get("lon < -3")).ids)

    asyncio.run(scenario())


def test_an_invalid_filter_is_refused_while_others_are_evaluated():
    async def scenario():
        engine, archive = slow_engine()
        waiting = [asyncio.create_task(engine.snapshot.selections.get(f"lon < -{number}")) for number in range(5)]
        await asyncio.to_thread(archive.began.acquire, timeout=60)
        with pytest.raises(InvalidQuery, match="no column 'colour'"):
            await engine.search(Query(key="place/1.tif", filter="colour = 'red'"), 60.0)
        archive.may_go_on.set()
        await asyncio.gather(*waiting)

    asyncio.run(scenario())


def test_a_failure_is_not_kept():
    async def scenario():
        case = small_case()
        failures = iter([MemoryError("no room")])

        class Failing(MemoryArchive):
            def scan_batches(self, columns, among=None):
                for failure in failures:
                    raise failure
                return super().scan_batches(columns, among)

        selections = Selections(Failing(case.ids, case.codes, case.bits))
        gone = asyncio.create_task(selections.get("lon < -0"))
        await asyncio.sleep(0)
        with pytest.raises(MemoryError):
            await gone
        assert len((await selections.get("lon < -0")).ids)

    asyncio.run(scenario())


def test_recent_filters_are_evaluated_for_a_version_that_was_loaded():
    async def scenario():
        case = small_case()
        archive = MemoryArchive(case.ids, case.codes, case.bits)
        before = Selections(archive)
        for number in range(20):
            await before.get(f"lon < -{number}")
        await before.get("lon < -2")
        scanned = []

        class Counting(MemoryArchive):
            def scan_batches(self, columns, among=None):
                scanned.append(columns)
                return super().scan_batches(columns, among)

        after = await before.reloaded(Counting(case.ids, case.codes, case.bits))
        assert len(scanned) == 8
        for number in (2, 19, 18, 17, 16, 15, 14, 13):
            await after.get(f"lon < -{number}")
        assert len(scanned) == 8
        await after.get("lon < -1")
        assert len(scanned) == 9

    asyncio.run(scenario())
