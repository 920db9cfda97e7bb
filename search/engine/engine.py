"""Answer queries: validate, compute the code, search all shards, and merge their answers."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeVar

import numpy as np

from orbithash.encoders.codes import Codes, Encoded
from orbithash.search.engine.batching import MAX_BATCH, Batcher
from orbithash.search.engine.fan_out import MAX_SHORT_K, FanOut, Found, Group
from orbithash.search.engine.owners import hits_now, read_hits, read_values
from orbithash.search.engine.query_codes import check_code, encode_query
from orbithash.search.engine.rescoring import COLUMNS, check_rescore, num_with_ties, ranked
from orbithash.search.engine.snapshot import Snapshot
from orbithash.search.index.answers import Scope
from orbithash.search.index.merge import Merged, MergedLists
from orbithash.search.observer import Observer
from orbithash.search.protocol.errors import DeadlineExceeded, Overloaded, SearchError, Unavailable
from orbithash.search.protocol.hits import RowHits
from orbithash.search.protocol.queries import Answer, Coverage, Cursor, Query, Rescore, has_large

__all__ = ["MAX_READS", "SHARD_TIMEOUT_S", "Engine"]

Covered = TypeVar("Covered", bound="_Covering")

# Default timeout of a shard, seconds.
SHARD_TIMEOUT_S = 5.0

# Maximum number of reads of the whole archive at a time: rankings and counts.
MAX_READS = 64


class _Covering(Protocol):
    """An answer that says which part of the archive it covers."""

    @property
    def coverage(self) -> Coverage: ...


class Engine:
    """Answers queries over a snapshot.

    Belongs to one event loop. A shard that fails or exceeds its time-out does not fail a search: the `coverage` of the
    answer reports which part of the archive was searched.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        *,
        max_fan_outs: int = 1,
        max_waiting: int = 1024,
        shard_timeout_s: float = SHARD_TIMEOUT_S,
        observer: Observer | None = None,
    ) -> None:
        """Create an engine without contacting the shards.

        Args:
            snapshot: the snapshot to search until `swap`.
            max_fan_outs: maximum number of batches in flight to the shards. One gave the most queries per second on two
                cores, because its batches grow largest; with replicas, use one per replica.
            max_waiting: maximum number of queries that wait for a batch; further ones raise `Overloaded`.
            shard_timeout_s: seconds after which a shard counts as failed, even if the query has more time.
            observer: receives the metrics of the engine, the service and the gateway.
        """
        self.observer = observer or Observer()
        self._snapshot = snapshot
        self._shard_timeout_s = shard_timeout_s
        self._num_reads = 0
        self._fan_out = FanOut(shard_timeout_s, self.observer)
        self._batcher: Batcher[Codes, Found] = Batcher(
            self._fan_out.search, max_fan_outs, max_waiting, on_batch=self.observer.batch
        )

    @property
    def snapshot(self) -> Snapshot:
        """The snapshot that new searches use."""
        return self._snapshot

    @property
    def num_waiting(self) -> int:
        """Number of queries that wait for a batch."""
        return self._batcher.num_waiting

    def swap(self, snapshot: Snapshot) -> None:
        """Use `snapshot` for searches that begin from now on."""
        self._snapshot = snapshot

    async def search(self, query: Query, timeout_s: float) -> Answer:
        """Return the answer to one query within `timeout_s`.

        Raises `InvalidQuery`, `KeyNotFound`, `Overloaded` or `DeadlineExceeded`, and `Unavailable` if every shard
        failed, a shard with rows of hits failed, or the answer covers less of the archive than the query requires.
        """
        started = time.perf_counter()
        query.check()
        snapshot = self._snapshot
        found = None
        if timeout_s > 0 and (code := _quick_code(snapshot, query)) is not None:
            results = self._fan_out.search_now(code[None], [query.k], Group(snapshot, _scope_of(snapshot, query)))
            if results is not None:
                found = results[0]
                answer = self._answer_now(snapshot, query, found, started)
                if answer is not None:
                    return answer
        return await self._search_later(snapshot, query, timeout_s, started, found)

    async def search_many(self, queries: Sequence[Query], timeout_s: float) -> list[Answer | SearchError]:
        """Return the answer or the error of each query, see `search`. Short searches share batches."""
        started = time.perf_counter()
        snapshot = self._snapshot
        outcomes: dict[int, Answer | SearchError] = {}
        found = self._search_many_now(snapshot, queries, outcomes, started) if timeout_s > 0 else {}

        async def search(place: int) -> None:
            try:
                query = queries[place]
                outcomes[place] = await self._search_later(snapshot, query, timeout_s, started, found.get(place))
            except SearchError as error:
                outcomes[place] = error

        await asyncio.gather(*(search(place) for place in range(len(queries)) if place not in outcomes))
        return [outcomes[place] for place in range(len(queries))]

    async def read(self, read: Callable[[Snapshot, float], Awaitable[Covered]], timeout_s: float) -> Covered:
        """Return what `read(snapshot, seconds)` returns within `timeout_s`.

        It is called again if it failed, or its answer is partial, on a snapshot that has been replaced meanwhile:
        shards keep a limited number of versions. Raises what `read` raises, `DeadlineExceeded`, and `Overloaded` while
        `MAX_READS` are in progress.
        """
        if timeout_s <= 0:
            raise DeadlineExceeded("the deadline had passed before the call began")
        if self._num_reads >= MAX_READS:
            self.observer.count("shed_queries")
            raise Overloaded(f"{MAX_READS} rankings and counts are in progress; try again later", retry_after_s=1.0)
        deadline = asyncio.get_running_loop().time() + timeout_s
        self._num_reads += 1
        try:
            async with asyncio.timeout_at(deadline) as scope:
                snapshot = self._snapshot
                try:
                    with snapshot.usage:
                        answer = await read(snapshot, timeout_s)
                except Unavailable:
                    if snapshot is self._snapshot:
                        raise
                else:
                    if answer.coverage.fraction == 1 or snapshot is self._snapshot:
                        return answer
                snapshot = self._snapshot
                with snapshot.usage:
                    return await read(snapshot, deadline - asyncio.get_running_loop().time())
        except TimeoutError:
            if not scope.expired():
                raise
            raise DeadlineExceeded(f"no answer within {timeout_s:.3g} s") from None
        finally:
            self._num_reads -= 1

    def _search_many_now(
        self, snapshot: Snapshot, queries: Sequence[Query], outcomes: dict[int, Answer | SearchError], started: float
    ) -> dict[int, Found]:
        """Put the outcomes of invalid queries and of short searches into `outcomes`, by their place among the queries.

        Returns the results of short searches whose rows must be read from the archive.
        """
        batches: dict[tuple[Scope, int], list[tuple[int, Codes]]] = {}
        for place, query in enumerate(queries):
            try:
                query.check()
                if (code := _quick_code(snapshot, query)) is not None:
                    key = _scope_of(snapshot, query), query.k.bit_length()
                    batches.setdefault(key, []).append((place, code))
            except SearchError as error:
                outcomes[place] = error
        found: dict[int, Found] = {}
        for (scope, _), items in batches.items():
            for start in range(0, len(items), MAX_BATCH):
                places, codes = zip(*items[start : start + MAX_BATCH], strict=True)
                ks = [queries[place].k for place in places]
                results = self._fan_out.search_now(np.stack(codes), ks, Group(snapshot, scope))
                found.update(zip(places, results or (), strict=results is not None))
        for place, result in found.items():
            try:
                answer = self._answer_now(snapshot, queries[place], result, started)
                if answer is not None:
                    outcomes[place] = answer
            except SearchError as error:
                outcomes[place] = error
        return found

    async def _search_later(
        self, snapshot: Snapshot, query: Query, timeout_s: float, started: float, found: Found | None
    ) -> Answer:
        """Answer a query that passes `Query.check`, in a batch with others unless its result is `found`."""
        if timeout_s <= 0:
            raise DeadlineExceeded("the deadline had passed before the search began")
        deadline = asyncio.get_running_loop().time() + timeout_s
        try:
            async with asyncio.timeout_at(deadline) as scope:
                try:
                    with snapshot.usage:
                        answer = await self._answer(snapshot, query, deadline, started, found)
                except Unavailable:
                    if snapshot is self._snapshot:
                        raise
                else:
                    if answer.coverage.fraction == 1 or snapshot is self._snapshot:
                        return answer
                # Shards keep a limited number of versions, and may have dropped the one of the search.
                snapshot = self._snapshot
                with snapshot.usage:
                    return await self._answer(snapshot, query, deadline, started, None)
        except Overloaded:
            self.observer.count("shed_queries")
            raise
        except TimeoutError:
            if not scope.expired():
                raise
            raise DeadlineExceeded(f"no answer within {timeout_s:.3g} s") from None

    def _answer_now(self, snapshot: Snapshot, query: Query, found: Found, started: float) -> Answer | None:
        """Return the answer with a result, or None if the rows of its hits must be read from the archive."""
        assert isinstance(found.hits, MergedLists), "a short search"
        ids = np.array(found.hits.ids, np.uint64)
        rows = hits_now(snapshot, ids, query.include)
        return None if rows is None else self._answer_with(snapshot, query, found, rows, started)

    async def _answer(
        self, snapshot: Snapshot, query: Query, deadline: float, started: float, found: Found | None
    ) -> Answer:
        if found is None:
            encoded = await encode_query(query, snapshot, with_outputs=query.rescore == "asymmetric")
            if query.rescore:
                return await self._answer_rescored(snapshot, query, query.rescore, encoded, deadline, started)
            group = Group(snapshot, _scope_of(snapshot, query))
            found = await self._batcher.submit(encoded.codes[0], query.k, group, deadline)
        rows = found.hits.rows if isinstance(found.hits, MergedLists) else None
        if rows is None:
            ids = np.asarray(found.hits.ids, np.uint64)
            rows = hits_now(snapshot, ids, query.include) if snapshot.quick_shards else None
        if rows is None:
            rows = await read_hits(snapshot, ids, query.include, self._time_of_reads(deadline))
        return self._answer_with(snapshot, query, found, rows, started)

    async def _answer_rescored(
        self, snapshot: Snapshot, query: Query, rescore: Rescore, encoded: Encoded, deadline: float, started: float
    ) -> Answer:
        check_rescore(rescore, encoded, snapshot.archive.vector is not None)

        async def search(size: int, radius: int | None) -> tuple[Merged, Found]:
            group = Group(snapshot, Scope(radius, None, query.filter))
            found = await self._batcher.submit(encoded.codes[0], size, group, deadline)
            distances, ids = np.asarray(found.hits.distances, np.int32), np.asarray(found.hits.ids, np.uint64)
            return Merged(distances, ids, found.hits.ties), found

        shortlist, found = await search(query.shortlist_size, query.radius)
        if (size := num_with_ties(shortlist)) > len(shortlist.ids):
            # Again, with all rows that tie with the last one.
            shortlist, found = await search(size, int(shortlist.distances[-1]))
        with self.observer.stage("rescore"):
            values = await read_values(snapshot, shortlist.ids, COLUMNS[rescore], self._time_of_reads(deadline))
            best = await asyncio.to_thread(ranked, rescore, encoded, shortlist, values, query.k)
            rows = await read_hits(snapshot, best.hits.ids, query.include, self._time_of_reads(deadline))
        scores = [None if score != score else score for score in best.scores.tolist()]
        answer = self._answer_with(snapshot, query, found._replace(hits=best.hits), rows, started, scores)
        return answer._replace(next=None, shortlist_radius=best.radius, is_shortlist_bounded=best.is_bounded)

    def _time_of_reads(self, deadline: float) -> float:
        """Return the seconds until a shard that reads rows has failed."""
        return min(self._shard_timeout_s, max(0.0, deadline - asyncio.get_running_loop().time()))

    def _answer_with(
        self,
        snapshot: Snapshot,
        query: Query,
        found: Found,
        rows: Sequence[bytes],
        started: float,
        scores: Sequence[float | None] | None = None,
    ) -> Answer:
        """Return the answer with a result and the rows of its hits.

        Raises `Unavailable` if its coverage is below the required minimum.
        """
        hits, coverage, num_matching = found
        distances = hits.distances if isinstance(hits, MergedLists) else hits.distances.tolist()
        if coverage.searched_rows < coverage.total_rows:
            if coverage.fraction < query.min_coverage:
                raise Unavailable(
                    f"{coverage.fraction:.3f} of the archive could be searched, min_coverage is "
                    f"{query.min_coverage:.3f}; try again later"
                )
            self.observer.count("partial_answers")
        archive = snapshot.archive
        return Answer(
            RowHits(distances, rows, scores),
            hits.ties,
            coverage,
            1e3 * (time.perf_counter() - started),
            archive.model_id,
            archive.version,
            Cursor(distances[-1], int(hits.ids[-1])) if len(distances) == query.k else None,
            num_matching,
            snapshot.is_exact,
        )


def _quick_code(snapshot: Snapshot, query: Query) -> Codes | None:
    """Return the code uint8 [B] of a query that the shards may be able to answer at once; None for any other query.

    Raises `InvalidQuery` for a code of another length.
    """
    if query.code is None or query.rescore or query.k > MAX_SHORT_K or not snapshot.quick_shards:
        return None
    return None if has_large(query.include) else check_code(query.code, snapshot.archive.bits)


def _scope_of(snapshot: Snapshot, query: Query) -> Scope:
    # Shards that are near are asked for the rows of the merged hits only, and so are all for many and for large rows.
    with_rows = not snapshot.quick_shards and query.k <= MAX_SHORT_K and not has_large(query.include)
    return Scope(query.radius, query.after, query.filter, query.include if with_rows else (), with_rows)
