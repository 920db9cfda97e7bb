"""Answer queries: validate, compute the code, search all shards, merge, and look up the columns of the hits."""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from orbithash.encoders.codes import Codes, Encoded
from orbithash.search.engine.batching import Batcher
from orbithash.search.engine.protocols import QuickShardClient, Scope, ShardClient
from orbithash.search.engine.query_codes import check_code, encode_query
from orbithash.search.engine.rescoring import COLUMNS, Ranked, check_rescore, num_with_ties, ranked
from orbithash.search.engine.row_cache import RowValues
from orbithash.search.engine.snapshot import Snapshot
from orbithash.search.index.host import Selection
from orbithash.search.index.merge import Merged, merge
from orbithash.search.index.shard import ShardAnswer
from orbithash.search.observer import Observer
from orbithash.search.protocol.errors import DeadlineExceeded, Overloaded, Unavailable
from orbithash.search.protocol.queries import Answer, Coverage, Cursor, Hit, Query, Rescore

__all__ = ["SHARD_TIMEOUT_S", "Engine"]

logger = logging.getLogger(__name__)

# Share of the time until the deadline that shards get; the rest is for the merge and the columns of the hits.
_SHARDS_SHARE = 0.9

# Default timeout of a shard, seconds.
SHARD_TIMEOUT_S = 5.0

# Maximum number of hits that are merged in the event loop: a thread would cost more.
_FEW_HITS = 4096


class _Group:
    """Snapshot and scope of a batch; queries with equal groups share batches.

    `is_shortlist`: the rows are rescored, so that their columns are not needed yet.
    """

    def __init__(self, snapshot: Snapshot, scope: Scope, is_shortlist: bool = False) -> None:
        self.snapshot = snapshot
        self.scope = scope
        self.is_shortlist = is_shortlist
        filter_token = scope.selection and scope.selection.token
        self._key = (id(snapshot), scope.radius, scope.after, filter_token, scope.include, is_shortlist)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Group) and self._key == other._key


@dataclass(frozen=True)
class _Result:
    """Result of one query of a batch: its rows, the hits with their columns (none for a shortlist), the coverage."""

    rows: Merged
    hits: tuple[Hit, ...]
    coverage: Coverage


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
        self._batcher: Batcher[Encoded, _Result] = Batcher(
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
        failed or the answer covers less of the archive than the query requires.
        """
        started = time.perf_counter()
        query.check()
        if timeout_s <= 0:
            raise DeadlineExceeded("the deadline had passed before the search began")
        snapshot = self._snapshot
        if (answer := self._answer_now(snapshot, query)) is not None:
            return answer._replace(took_ms=1e3 * (time.perf_counter() - started))
        deadline = asyncio.get_running_loop().time() + timeout_s
        try:
            with snapshot.usage:
                async with asyncio.timeout_at(deadline) as scope:
                    answer = await self._answer(snapshot, query, deadline)
        except Overloaded:
            self.observer.count("shed_queries")
            raise
        except TimeoutError:
            if not scope.expired():
                raise
            raise DeadlineExceeded(f"no answer within {timeout_s:.3g} s") from None
        return answer._replace(took_ms=1e3 * (time.perf_counter() - started))

    async def _answer(self, snapshot: Snapshot, query: Query, deadline: float) -> Answer:
        selection = await snapshot.selections.get(query.filter) if query.filter else None
        encoded = await encode_query(query, snapshot, with_outputs=query.rescore == "asymmetric")
        if query.rescore:
            return await self._answer_rescored(snapshot, query, query.rescore, encoded, selection, deadline)
        scope = Scope(query.radius, query.after, selection, query.include)
        result = await self._batcher.submit(encoded, query.k, _Group(snapshot, scope), deadline)
        return self._answer_with(snapshot, query, result, selection)

    async def _answer_rescored(
        self,
        snapshot: Snapshot,
        query: Query,
        rescore: Rescore,
        encoded: Encoded,
        selection: Selection | None,
        deadline: float,
    ) -> Answer:
        check_rescore(rescore, encoded, snapshot.archive.vector is not None)

        async def search(size: int, radius: int | None) -> _Result:
            group = _Group(snapshot, Scope(radius, None, selection), is_shortlist=True)
            return await self._batcher.submit(encoded, size, group, deadline)

        result = await search(query.shortlist_size, query.radius)
        if (size := num_with_ties(result.rows)) > len(result.rows.ids):
            # Again, with all rows that tie with the last one.
            result = await search(size, int(result.rows.distances[-1]))
        shortlist, coverage = result.rows, result.coverage

        def rank() -> tuple[Ranked, _Result]:
            values = snapshot.column_caches[COLUMNS[rescore]].read(shortlist.ids)
            best = ranked(rescore, encoded, shortlist, values, query.k)
            group = _Group(snapshot, Scope(include=query.include))
            return best, _read_results(group, [best.hits], coverage)[0]

        with self.observer.stage("rescore"):
            best, result = await asyncio.to_thread(rank)
        scores = [None if score != score else score for score in best.scores.tolist()]
        hits = tuple(hit._replace(score=score) for hit, score in zip(result.hits, scores, strict=True))
        answer = self._answer_with(snapshot, query, replace(result, hits=hits), selection)
        return answer._replace(next=None, shortlist_radius=best.radius, is_shortlist_bounded=best.is_bounded)

    def _answer_now(self, snapshot: Snapshot, query: Query) -> Answer | None:
        """Return the answer to a query by code if the scans are short; None for any other query.

        Waiting for other queries would cost the event loop more than such a scan.
        """
        if query.code is None or query.filter or query.include or query.rescore or not snapshot.quick_shards:
            return None
        if 2 * snapshot.row_cache.num_cached < snapshot.num_rows:
            # Often the scan would be wasted, because rows of hits must be read from the archive.
            return None
        code = check_code(query.code, snapshot.archive.bits)
        answers = self._search_now(snapshot.quick_shards, code[None], [query.k], Scope(query.radius, query.after))
        if not answers:
            return None
        with self.observer.stage("merge"):
            merged = merge(answers, [query.k])
            values = snapshot.row_cache.cached(_ids(merged))
        if values is None:
            return None
        self.observer.batch(1, 0.0)
        coverage = Coverage(snapshot.num_rows, snapshot.num_rows, len(answers), len(answers))
        return self._answer_with(snapshot, query, _results(merged, values, {}, coverage)[0], None)

    def _answer_with(self, snapshot: Snapshot, query: Query, result: _Result, selection: Selection | None) -> Answer:
        """Return the answer with this result; raise `Unavailable` if its coverage is below the required minimum."""
        if result.coverage.fraction < query.min_coverage:
            raise Unavailable(
                f"{result.coverage.fraction:.3f} of the archive could be searched, min_coverage is "
                f"{query.min_coverage:.3f}; try again later"
            )
        if result.coverage.fraction < 1:
            self.observer.count("partial_answers")
        last = result.hits[-1] if len(result.hits) == query.k else None
        return Answer(
            result.hits,
            result.rows.ties,
            result.coverage,
            0.0,
            snapshot.archive.model_id,
            snapshot.archive.version,
            None if last is None else Cursor(last.distance, last.id),
            None if selection is None else len(selection.ids),
            snapshot.is_exact,
        )

    async def _search_batch(
        self, items: Sequence[Encoded], ks: Sequence[int], group: _Group, timeout_s: float
    ) -> Sequence[_Result]:
        shards, codes = group.snapshot.shards, Encoded.joined(items).codes
        with self.observer.stage("fan_out"):
            # Short scans cost less than the turns of the event loop that concurrent calls need.
            answers: Sequence[ShardAnswer | None] = self._search_now(
                group.snapshot.quick_shards, codes, ks, group.scope
            )
            if not answers:
                answers = await self._search_shards(
                    shards, codes, max(ks), group.scope, min(_SHARDS_SHARE * timeout_s, self._shard_timeout_s)
                )
        searched = [shard.num_rows for shard, answer in zip(shards, answers, strict=True) if answer is not None]
        coverage = Coverage(sum(searched), group.snapshot.num_rows, len(searched), len(shards))
        complete = [answer for answer in answers if answer is not None]
        with self.observer.stage("merge"):
            if len(ks) * max(ks) > _FEW_HITS:
                return await asyncio.to_thread(lambda: _read_results(group, merge(complete, ks), coverage))
            merged = merge(complete, ks)
            if group.is_shortlist:
                return _read_results(group, merged, coverage)
            values = None if group.scope.include else group.snapshot.row_cache.cached(_ids(merged))
            if values is None:
                return await asyncio.to_thread(_read_results, group, merged, coverage)
            return _results(merged, values, {}, coverage)

    def _search_now(
        self, shards: Sequence[QuickShardClient], codes: Codes, ks: Sequence[int], scope: Scope
    ) -> list[ShardAnswer]:
        """Return the answers of all shards, or an empty list if one of them would block the event loop for long."""
        answers = []
        for shard in shards:
            with self.observer.stage("scan"):
                answer = shard.search_now(codes, max(ks), scope)
            if answer is None:
                return []
            answers.append(answer)
        return answers

    async def _search_shards(
        self, shards: Sequence[ShardClient], codes: Codes, k: int, scope: Scope, timeout_s: float
    ) -> list[ShardAnswer | None]:
        """Return the answer of each shard, None for a failed one; raise only if all failed."""

        async def search(shard: ShardClient) -> ShardAnswer:
            with self.observer.stage("scan"):
                async with asyncio.timeout(timeout_s):
                    return await shard.search(codes, k, scope, timeout_s)

        outcomes = await asyncio.gather(*map(search, shards), return_exceptions=True)
        failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
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


def _ids(answers: Sequence[Merged]) -> list[int]:
    return [id_ for answer in answers for id_ in answer.ids.tolist()]


def _read_results(group: _Group, answers: Sequence[Merged], coverage: Coverage) -> list[_Result]:
    """Return the results with the columns of their rows, which are read from the archive if they are not cached.

    Those of a shortlist have no columns.
    """
    if group.is_shortlist:
        return [_Result(rows, (), coverage) for rows in answers]
    row_cache, ids = group.snapshot.row_cache, _ids(answers)
    return _results(answers, row_cache.read(ids), row_cache.extras(ids, group.scope.include), coverage)


def _results(
    answers: Sequence[Merged], values: RowValues, extras: dict[int, dict[str, Any]], coverage: Coverage
) -> list[_Result]:
    no_extras: dict[str, Any] = {}
    return [
        _Result(
            answer,
            tuple(
                Hit._make((rank, distance, id_, *values[id_], extras.get(id_, no_extras), None))
                for rank, (id_, distance) in enumerate(
                    zip(answer.ids.tolist(), answer.distances.tolist(), strict=True), 1
                )
            ),
            coverage,
        )
        for answer in answers
    ]
