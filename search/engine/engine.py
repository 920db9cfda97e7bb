"""Answer queries: validate, compute the code, search all shards, and merge their answers."""

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from orbithash.encoders.codes import Codes, Encoded
from orbithash.search.engine.batching import MAX_BATCH, Batcher
from orbithash.search.engine.owners import is_refusal, read_hits, read_values
from orbithash.search.engine.query_codes import check_code, encode_query
from orbithash.search.engine.rescoring import COLUMNS, check_rescore, num_with_ties, ranked
from orbithash.search.engine.snapshot import Snapshot
from orbithash.search.index.answers import Scope, ShardAnswer
from orbithash.search.index.merge import Merged, MergedRows, merge, merge_rows
from orbithash.search.observer import Observer
from orbithash.search.protocol.errors import DeadlineExceeded, Overloaded, SearchError, Unavailable
from orbithash.search.protocol.hits import RowHits
from orbithash.search.protocol.queries import Answer, Coverage, Cursor, Query, Rescore, has_large
from orbithash.search.shards.interface import ShardClient

__all__ = ["SHARD_TIMEOUT_S", "Engine"]

logger = logging.getLogger(__name__)

# Share of the time until the deadline that shards get for a search; the rest is for the merge and the rows of the hits.
_SHARDS_SHARE = 0.9

# Default timeout of a shard, seconds.
SHARD_TIMEOUT_S = 5.0

# Maximum number of hits that are merged in the event loop: a thread would cost more.
_FEW_HITS = 4096

# Maximum k of searches whose shards send the rows of their hits. With more, or with columns of up to some 100 KiB a
# row, only the rows of the merged hits are read.
_MAX_K_WITH_ROWS = 256


class _Group(NamedTuple):
    """What queries have in common that share a batch."""

    snapshot: Snapshot
    scope: Scope


class _Result(NamedTuple):
    """Result of one query of a batch.

    Attributes:
        found: its hits, with their rows if the scope asks for them.
        coverage: the part of the archive that was searched.
        num_matching: number of rows that pass the filter; None without a filter.
    """

    found: Merged | MergedRows
    coverage: Coverage
    num_matching: int | None


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
        self._batcher: Batcher[Codes, _Result] = Batcher(
            self._search_batch, max_fan_outs, max_waiting, on_batch=self.observer.batch
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
        if timeout_s > 0 and (code := _quick_code(snapshot, query)) is not None:
            results = self._search_now(code[None], [query.k], _Group(snapshot, _scope_of(query)))
            if results is not None:
                return self._answer_with(snapshot, query, results[0], started)
        return await self._search_later(snapshot, query, timeout_s, started)

    async def search_many(self, queries: Sequence[Query], timeout_s: float) -> list[Answer | SearchError]:
        """Return the answer or the error of each query, see `search`. Short searches share batches."""
        started = time.perf_counter()
        snapshot = self._snapshot
        outcomes = self._search_many_now(snapshot, queries, started) if timeout_s > 0 else {}

        async def search(place: int) -> None:
            try:
                outcomes[place] = await self._search_later(snapshot, queries[place], timeout_s, started)
            except SearchError as error:
                outcomes[place] = error

        await asyncio.gather(*(search(place) for place in range(len(queries)) if place not in outcomes))
        return [outcomes[place] for place in range(len(queries))]

    def _search_many_now(
        self, snapshot: Snapshot, queries: Sequence[Query], started: float
    ) -> dict[int, Answer | SearchError]:
        """Return the outcomes of invalid queries and of short searches, by their place among the queries."""
        outcomes: dict[int, Answer | SearchError] = {}
        batches: dict[tuple[Scope, int], list[tuple[int, Codes]]] = {}
        for place, query in enumerate(queries):
            try:
                query.check()
                if (code := _quick_code(snapshot, query)) is not None:
                    batches.setdefault((_scope_of(query), query.k.bit_length()), []).append((place, code))
            except SearchError as error:
                outcomes[place] = error
        for (scope, _), items in batches.items():
            for start in range(0, len(items), MAX_BATCH):
                places, codes = zip(*items[start : start + MAX_BATCH], strict=True)
                ks = [queries[place].k for place in places]
                results = self._search_now(np.stack(codes), ks, _Group(snapshot, scope))
                for place, result in zip(places, results or (), strict=results is not None):
                    try:
                        outcomes[place] = self._answer_with(snapshot, queries[place], result, started)
                    except SearchError as error:
                        outcomes[place] = error
        return outcomes

    async def _search_later(self, snapshot: Snapshot, query: Query, timeout_s: float, started: float) -> Answer:
        """Answer a query that passes `Query.check`, in a batch with others."""
        if timeout_s <= 0:
            raise DeadlineExceeded("the deadline had passed before the search began")
        deadline = asyncio.get_running_loop().time() + timeout_s
        try:
            with snapshot.usage:
                async with asyncio.timeout_at(deadline) as scope:
                    return await self._answer(snapshot, query, deadline, started)
        except Overloaded:
            self.observer.count("shed_queries")
            raise
        except TimeoutError:
            if not scope.expired():
                raise
            raise DeadlineExceeded(f"no answer within {timeout_s:.3g} s") from None

    async def _answer(self, snapshot: Snapshot, query: Query, deadline: float, started: float) -> Answer:
        encoded = await encode_query(query, snapshot, with_outputs=query.rescore == "asymmetric")
        if query.rescore:
            return await self._answer_rescored(snapshot, query, query.rescore, encoded, deadline, started)
        group = _Group(snapshot, _scope_of(query))
        result = await self._batcher.submit(encoded.codes[0], query.k, group, deadline)
        if isinstance(result.found, Merged):
            rows = await read_hits(snapshot, result.found.ids, query.include, self._time_of_reads(deadline))
            result = result._replace(found=_with_rows(result.found, rows))
        return self._answer_with(snapshot, query, result, started)

    async def _answer_rescored(
        self, snapshot: Snapshot, query: Query, rescore: Rescore, encoded: Encoded, deadline: float, started: float
    ) -> Answer:
        check_rescore(rescore, encoded, snapshot.archive.vector is not None)

        async def search(size: int, radius: int | None) -> tuple[Merged, _Result]:
            group = _Group(snapshot, Scope(radius, None, query.filter))
            result = await self._batcher.submit(encoded.codes[0], size, group, deadline)
            assert isinstance(result.found, Merged), "a scope without rows"
            return result.found, result

        shortlist, result = await search(query.shortlist_size, query.radius)
        if (size := num_with_ties(shortlist)) > len(shortlist.ids):
            # Again, with all rows that tie with the last one.
            shortlist, result = await search(size, int(shortlist.distances[-1]))
        with self.observer.stage("rescore"):
            values = await read_values(snapshot, shortlist.ids, COLUMNS[rescore], self._time_of_reads(deadline))
            best = await asyncio.to_thread(ranked, rescore, encoded, shortlist, values, query.k)
            rows = await read_hits(snapshot, best.hits.ids, query.include, self._time_of_reads(deadline))
        scores = [None if score != score else score for score in best.scores.tolist()]
        answer = self._answer_with(snapshot, query, result._replace(found=_with_rows(best.hits, rows)), started)
        return answer._replace(
            hits=RowHits(best.hits.distances.tolist(), rows, scores),
            next=None,
            shortlist_radius=best.radius,
            is_shortlist_bounded=best.is_bounded,
        )

    def _time_of_reads(self, deadline: float) -> float:
        """Return the seconds until a shard that reads rows has failed."""
        return min(self._shard_timeout_s, max(0.0, deadline - asyncio.get_running_loop().time()))

    def _answer_with(self, snapshot: Snapshot, query: Query, result: _Result, started: float) -> Answer:
        """Return the answer with a result that has rows.

        Raises `Unavailable` if its coverage is below the required minimum.
        """
        found, coverage, num_matching = result
        assert isinstance(found, MergedRows), "rows were read"
        if coverage.searched_rows < coverage.total_rows:
            if coverage.fraction < query.min_coverage:
                raise Unavailable(
                    f"{coverage.fraction:.3f} of the archive could be searched, min_coverage is "
                    f"{query.min_coverage:.3f}; try again later"
                )
            self.observer.count("partial_answers")
        distances, ids, rows, ties = found
        archive = snapshot.archive
        return Answer(
            RowHits(distances, rows),
            ties,
            coverage,
            1e3 * (time.perf_counter() - started),
            archive.model_id,
            archive.version,
            Cursor(distances[-1], ids[-1]) if len(ids) == query.k else None,
            num_matching,
            snapshot.is_exact,
        )

    def _search_now(self, codes: Codes, ks: Sequence[int], group: _Group) -> Sequence[_Result] | None:
        """Search as `_search_batch`, or return None if that would block the event loop for long.

        For short searches, waiting for others, tasks and a time limit would cost more than the search.
        """
        begun = time.perf_counter()
        k, answers = max(ks), []
        for branch in group.snapshot.quick_branches:
            answer = branch.search_now(codes, k, group.scope)
            if answer is None:
                return None
            answers.append(answer)
        scanned = time.perf_counter()
        results = _results(answers, ks, _coverage(group.snapshot, answers), group.scope)
        observer = self.observer
        observer.batch(len(ks), 0.0)
        observer.took("scan", scanned - begun)
        observer.took("merge", time.perf_counter() - scanned)
        return results

    async def _search_batch(
        self, items: Sequence[Codes], ks: Sequence[int], group: _Group, timeout_s: float
    ) -> Sequence[_Result]:
        snapshot, scope = group
        time_s = _SHARDS_SHARE * timeout_s
        if not scope.filter:
            # The first search under a filter tests it on all rows, which may take longer than a failure may.
            time_s = min(time_s, self._shard_timeout_s)
        with self.observer.stage("fan_out"):
            answers = await self._search_shards(snapshot.branches, np.stack(items), max(ks), scope, time_s)
        coverage = _coverage(snapshot, answers)
        complete = [answer for answer in answers if answer is not None]
        with self.observer.stage("merge"):
            if len(ks) * max(ks) > _FEW_HITS:
                return await asyncio.to_thread(_results, complete, ks, coverage, scope)
            return _results(complete, ks, coverage, scope)

    async def _search_shards(
        self, shards: Sequence[ShardClient], codes: Codes, k: int, scope: Scope, timeout_s: float
    ) -> list[ShardAnswer | None]:
        """Return the answer of each shard, None for a failed one; raise if all failed or one refused the search."""

        async def search(shard: ShardClient) -> ShardAnswer:
            with self.observer.stage("scan"):
                async with asyncio.timeout(timeout_s):
                    return await shard.search(codes, k, scope, timeout_s)

        outcomes = await asyncio.gather(*map(search, shards), return_exceptions=True)
        failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        for failure in failures:
            if is_refusal(failure):
                raise failure
        self.observer.count("failed_shard_calls", len(failures))
        for number, outcome in enumerate(outcomes):
            if isinstance(outcome, BaseException):
                reason = str(outcome).partition("\n")[0] or type(outcome).__name__
                logger.warning("shard %d of %d did not answer: %s", number, len(outcomes), reason)
        if len(failures) == len(outcomes):
            if all(isinstance(failure, TimeoutError) for failure in failures):
                raise DeadlineExceeded(f"none of {len(outcomes)} shards answered within {timeout_s:.3g} s")
            raise Unavailable(f"none of {len(outcomes)} shards could answer; try again later")
        return [None if isinstance(outcome, BaseException) else outcome for outcome in outcomes]


def _quick_code(snapshot: Snapshot, query: Query) -> Codes | None:
    """Return the code uint8 [B] of a query that the shards may be able to answer at once; None for any other query.

    Raises `InvalidQuery` for a code of another length.
    """
    if query.code is None or query.rescore or query.k > _MAX_K_WITH_ROWS or not snapshot.quick_branches:
        return None
    return None if has_large(query.include) else check_code(query.code, snapshot.archive.bits)


def _scope_of(query: Query) -> Scope:
    with_rows = query.k <= _MAX_K_WITH_ROWS and not has_large(query.include)
    return Scope(query.radius, query.after, query.filter, query.include if with_rows else (), with_rows)


def _coverage(snapshot: Snapshot, answers: Sequence[ShardAnswer | None]) -> Coverage:
    """Return the coverage of the answers of the snapshot's branches, None for one that failed."""
    num_rows = num_shards = 0
    for branch, answer in zip(snapshot.branches, answers, strict=True):
        if answer is not None:
            num_rows += branch.num_rows if answer.num_rows is None else answer.num_rows
            num_shards += answer.num_shards
    return Coverage(num_rows, snapshot.num_rows, num_shards, len(snapshot.shards))


def _results(answers: Sequence[ShardAnswer], ks: Sequence[int], coverage: Coverage, scope: Scope) -> list[_Result]:
    """Merge the answers of shards into the result of each query."""
    num_matching = sum(answer.num_matching or 0 for answer in answers) if scope.filter else None
    merged: Sequence[Merged | MergedRows] = merge_rows(answers, ks) if scope.with_rows else merge(answers, ks)
    return [_Result(found, coverage, num_matching) for found in merged]


def _with_rows(found: Merged, rows: list[bytes]) -> MergedRows:
    return MergedRows(found.distances.tolist(), found.ids.tolist(), rows, found.ties)
