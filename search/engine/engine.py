"""A query to its answer: check it, make it a code, ask all shards, merge, and look up what the hits are."""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from orbithash.encoders.codes import Codes, check_codes, num_bytes, pack, unpack
from orbithash.encoders.errors import InputError
from orbithash.search.engine.batching import Batcher
from orbithash.search.engine.hits import Known
from orbithash.search.engine.snapshot import ArchiveReader, QuickShardClient, Scope, ShardClient, Snapshot
from orbithash.search.index.host import Rows
from orbithash.search.index.merge import Merged, merge
from orbithash.search.index.shard import ShardAnswer
from orbithash.search.observer import Observer
from orbithash.search.protocol.errors import DeadlineExceeded, InvalidQuery, KeyNotFound, SearchError, Unavailable
from orbithash.search.protocol.queries import Answer, Coverage, Cursor, Example, Hit, Query

__all__ = ["Engine"]

logger = logging.getLogger(__name__)

# Of the time a query has, the part that shards get; the rest is for the merge and the look-up of the hits.
_SHARDS_SHARE = 0.9

# Hits that are merged in the event loop itself: less work than a thread costs.
_FEW_HITS = 4096


class _Group:
    """What a batch has in common."""

    def __init__(self, snapshot: Snapshot, scope: Scope) -> None:
        self.snapshot = snapshot
        self.scope = scope
        rows = scope.rows and scope.rows.token
        self._key = (id(snapshot), scope.radius, scope.after, rows, scope.include)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Group) and self._key == other._key


@dataclass(frozen=True)
class _Found:
    """What a batch found for one of its queries."""

    hits: tuple[Hit, ...]
    ties_at_cutoff: int
    coverage: Coverage


class Engine:
    """Answers queries over a snapshot.

    Belongs to one event loop. Shards that fail or are late do not fail a search: the answer's `coverage` says what was
    searched.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        *,
        max_fan_outs: int = 1,
        max_waiting: int = 1024,
        shard_timeout_s: float = 5.0,
        observer: Observer | None = None,
    ) -> None:
        """Builds an engine; nothing is asked of the shards yet.

        Args:
            snapshot: what is searched until `swap`.
            max_fan_outs: batches in flight to the shards at a time. One gave the most queries per second on two cores,
                because its batches grow largest; with replicas, one for each.
            max_waiting: queries that may queue behind them before new ones are refused as `Overloaded`.
            shard_timeout_s: a shard that is silent for so long counts as failed, even if the query has more time.
            observer: is told of the work, and of the service's and the gateway's around it.
        """
        self.observer = observer or Observer()
        self._snapshot = snapshot
        self._shard_timeout_s = shard_timeout_s
        self._batcher: Batcher[_Found] = Batcher(self._search_batch, max_fan_outs, max_waiting, self.observer)

    @property
    def snapshot(self) -> Snapshot:
        """What a search that begins now is over."""
        return self._snapshot

    @property
    def num_waiting(self) -> int:
        """Queries that wait for a batch."""
        return self._batcher.num_waiting

    def swap(self, snapshot: Snapshot) -> None:
        """Searches that begin from now on are over `snapshot`."""
        self._snapshot = snapshot

    async def search(self, query: Query, timeout_s: float) -> Answer:
        """The answer to one query within `timeout_s`.

        Raises `InvalidQuery`, `KeyNotFound`, `Overloaded` or `DeadlineExceeded`, and `Unavailable` when every shard
        failed or too few answered.
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
            with snapshot.uses:
                async with asyncio.timeout_at(deadline) as scope:
                    answer = await self._answer(snapshot, query, deadline)
        except TimeoutError:
            if not scope.expired():
                raise
            raise DeadlineExceeded(f"no answer within {timeout_s:.3g} s") from None
        return answer._replace(took_ms=1e3 * (time.perf_counter() - started))

    async def _answer(self, snapshot: Snapshot, query: Query, deadline: float) -> Answer:
        rows = await snapshot.selections.rows(query.filter) if query.filter else None
        code = await self._code(snapshot, query)
        scope = Scope(query.radius, query.after, rows, query.include)
        found = await self._batcher.submit(code, query.k, _Group(snapshot, scope), deadline)
        return self._checked(snapshot, query, found, rows)

    def _answer_now(self, snapshot: Snapshot, query: Query) -> Answer | None:
        """The answer, where it takes a moment only: a code and short scans. None for all else.

        What waits for others, even for a moment, costs the event loop more than such a scan.
        """
        if query.code is None or query.filter or query.include or not snapshot.quick_shards:
            return None
        if 2 * snapshot.rows.num_known < snapshot.num_rows:
            # The scan would often be in vain: rows must be read, which takes its time.
            return None
        code = _checked_code(query.code, snapshot.archive.bits)
        given = self._answers_now(snapshot.quick_shards, code[None], [query.k], Scope(query.radius, query.after))
        if not given:
            return None
        with self.observer.stage("merge"):
            merged = merge(given, [query.k])
            known = snapshot.rows.known(_ids(merged))
        if known is None:
            return None
        self.observer.batch(1, 0.0)
        coverage = Coverage(snapshot.num_rows, snapshot.num_rows, len(given), len(given))
        return self._checked(snapshot, query, _hits(merged, known, {}, coverage)[0], None)

    def _checked(self, snapshot: Snapshot, query: Query, found: _Found, rows: Rows | None) -> Answer:
        """The answer that was found, where it covers enough."""
        if found.coverage.fraction < query.min_coverage:
            raise Unavailable(
                f"{found.coverage.fraction:.3f} of the archive could be searched, min_coverage is "
                f"{query.min_coverage:.3f}; try again later"
            )
        if found.coverage.fraction < 1:
            self.observer.count("partial_answers")
        last = found.hits[-1] if len(found.hits) == query.k else None
        return Answer(
            found.hits,
            found.ties_at_cutoff,
            found.coverage,
            0.0,
            snapshot.archive.model_id,
            snapshot.archive.version,
            None if last is None else Cursor(last.distance, last.id),
            None if rows is None else len(rows.ids),
            snapshot.is_exact,
        )

    async def _code(self, snapshot: Snapshot, query: Query) -> Codes:
        """The code uint8 [B] that is searched for."""
        if not query.positives:
            codes = await self._codes(snapshot, [query])
            code: Codes = codes[0]
            return code
        codes = await self._codes(snapshot, (*query.positives, *query.negatives))
        signs = 2 * unpack(codes, snapshot.archive.bits).astype(np.int64) - 1
        num_positives, num_negatives = len(query.positives), len(query.negatives)
        # The difference of two shares over a common denominator, so that even means even.
        votes = signs[:num_positives].sum(axis=0) * max(1, num_negatives)
        votes -= signs[num_positives:].sum(axis=0) * num_positives
        return pack(np.where(votes == 0, signs[0] > 0, votes > 0))

    async def _codes(self, snapshot: Snapshot, examples: Sequence[Example]) -> Codes:
        """Codes uint8 [N, B] of examples."""
        codes = np.zeros((len(examples), num_bytes(snapshot.archive.bits)), np.uint8)
        for kind in ("image", "text", "key", "code"):
            places = [place for place, example in enumerate(examples) if getattr(example, kind) is not None]
            if places:
                try:
                    codes[places] = await _encode(snapshot, kind, [getattr(examples[place], kind) for place in places])
                except SearchError:
                    raise
                except InputError as error:
                    raise InvalidQuery((kind, str(error))) from error
        return codes

    async def _search_batch(self, codes: Codes, ks: Sequence[int], group: _Group, timeout_s: float) -> Sequence[_Found]:
        shards = group.snapshot.shards
        with self.observer.stage("fan_out"):
            # A turn of the event loop for each shard would cost more than short scans do.
            answers: Sequence[ShardAnswer | None] = self._answers_now(
                group.snapshot.quick_shards, codes, ks, group.scope
            )
            if not answers:
                answers = await self._ask_shards(
                    shards, codes, max(ks), group.scope, min(_SHARDS_SHARE * timeout_s, self._shard_timeout_s)
                )
        searched = [shard.num_rows for shard, answer in zip(shards, answers, strict=True) if answer is not None]
        coverage = Coverage(sum(searched), group.snapshot.num_rows, len(searched), len(shards))
        given = [answer for answer in answers if answer is not None]
        with self.observer.stage("merge"):
            if len(ks) * max(ks) > _FEW_HITS:
                return await asyncio.to_thread(lambda: _with_rows(group, merge(given, ks), coverage))
            merged = merge(given, ks)
            known = None if group.scope.include else group.snapshot.rows.known(_ids(merged))
            if known is None:
                return await asyncio.to_thread(_with_rows, group, merged, coverage)
            return _hits(merged, known, {}, coverage)

    def _answers_now(
        self, shards: Sequence[QuickShardClient], codes: Codes, ks: Sequence[int], scope: Scope
    ) -> list[ShardAnswer]:
        """Each shard's answer, nothing where one of them would take its time."""
        answers = []
        for shard in shards:
            with self.observer.stage("scan"):
                answer = shard.search_now(codes, max(ks), scope)
            if answer is None:
                return []
            answers.append(answer)
        return answers

    async def _ask_shards(
        self, shards: Sequence[ShardClient], codes: Codes, k: int, scope: Scope, timeout_s: float
    ) -> list[ShardAnswer | None]:
        """Each shard's answer, None for those that failed. An error only when all did."""

        async def ask(shard: ShardClient) -> ShardAnswer:
            with self.observer.stage("scan"):
                async with asyncio.timeout(timeout_s):
                    return await shard.search(codes, k, scope, timeout_s)

        outcomes = await asyncio.gather(*map(ask, shards), return_exceptions=True)
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


def _codes_of_keys(archive: ArchiveReader, keys: Sequence[str]) -> Codes:
    rows = archive.find(keys)
    if absent := [key for key in keys if key not in rows]:
        raise KeyNotFound(f"no row of the archive has the key {absent[0]!r}")
    table = archive.take(np.array([rows[key] for key in keys], np.uint64), ["code"])
    codes: Codes = np.array(table.column("code").to_pylist(), np.uint8)
    return codes


async def _encode(snapshot: Snapshot, kind: str, values: list[Any]) -> Codes:
    if kind == "image":
        return await snapshot.encoder.encode_images(values)
    if kind == "text":
        return await snapshot.encoder.encode_texts(values)
    if kind == "key":
        return await asyncio.to_thread(_codes_of_keys, snapshot.archive, values)
    return np.stack([_checked_code(code, snapshot.archive.bits) for code in values])


def _checked_code(code: bytes, bits: int) -> Codes:
    """As uint8 [B]; `InvalidQuery` for a code of another length."""
    try:
        return check_codes(np.frombuffer(code, np.uint8), bits)
    except InputError as error:
        raise InvalidQuery(("code", str(error))) from error


def _ids(answers: Sequence[Merged]) -> list[int]:
    return [id_ for answer in answers for id_ in answer.ids.tolist()]


def _with_rows(group: _Group, answers: Sequence[Merged], coverage: Coverage) -> list[_Found]:
    """Each answer with what the archive knows of its rows."""
    rows, ids = group.snapshot.rows, _ids(answers)
    return _hits(answers, rows.read(ids), rows.extras(ids, group.scope.include), coverage)


def _hits(
    answers: Sequence[Merged], rows: Known, extras: dict[int, dict[str, Any]], coverage: Coverage
) -> list[_Found]:
    nothing: dict[str, Any] = {}
    return [
        _Found(
            tuple(
                Hit._make((rank, distance, id_, *rows[id_], extras.get(id_, nothing)))
                for rank, (id_, distance) in enumerate(
                    zip(answer.ids.tolist(), answer.distances.tolist(), strict=True), 1
                )
            ),
            answer.ties,
            coverage,
        )
        for answer in answers
    ]
