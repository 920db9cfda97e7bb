"""Search all shards of a snapshot for a batch of queries, and merge their answers."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from orbithash.encoders.codes import Codes
from orbithash.search.engine.owners import is_refusal
from orbithash.search.engine.snapshot import Snapshot
from orbithash.search.index.answers import Scope, ShardAnswer
from orbithash.search.index.merge import Merged, MergedLists, merge, merge_lists
from orbithash.search.observer import Observer
from orbithash.search.protocol.errors import DeadlineExceeded, Unavailable
from orbithash.search.protocol.queries import Coverage
from orbithash.search.shards.interface import Branch

__all__ = ["MAX_SHORT_K", "SHARDS_SHARE", "FanOut", "Found", "Group", "ask_all"]

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# Share of the time until the deadline that shards get for a search; the rest is for the merge and the rows of the hits.
SHARDS_SHARE = 0.9

# Maximum number of hits that are merged in the event loop: a thread would cost more.
_FEW_HITS = 4096

# Maximum k for which hits are lists, shards send the rows of their hits, and a search may be answered at once.
MAX_SHORT_K = 256


class Group(NamedTuple):
    """What queries have in common that share a batch."""

    snapshot: Snapshot
    scope: Scope


class Found(NamedTuple):
    """Result of one query of a batch.

    Attributes:
        hits: with their rows if the scope asks for them; arrays above `MAX_SHORT_K`.
        coverage: the part of the archive that was searched.
        num_matching: number of rows that pass the filter; None without a filter.
    """

    hits: Merged | MergedLists
    coverage: Coverage
    num_matching: int | None


class FanOut:
    """Sends batches of queries to all shards.

    A shard that fails or exceeds its time-out does not fail a search: the coverage reports what was searched.
    """

    def __init__(self, shard_timeout_s: float, observer: Observer) -> None:
        """`shard_timeout_s`: seconds after which a shard counts as failed, even if the batch has more time."""
        self._shard_timeout_s = shard_timeout_s
        self._observer = observer

    def search_now(self, codes: Codes, ks: Sequence[int], group: Group) -> Sequence[Found] | None:
        """Search as `search`, or return None if that would block the event loop for long.

        For short searches, waiting for others, tasks and a time limit would cost more than the search.
        """
        begun = time.perf_counter()
        snapshot, scope = group
        k, answers = max(ks), []
        for shard in snapshot.quick_shards:
            answer = shard.search_now(codes, k, scope)
            if answer is None:
                return None
            answers.append(answer)
        scanned = time.perf_counter()
        found = _merged(answers, ks, _coverage(snapshot, answers), scope)
        self._observer.batch(len(ks), 0.0)
        self._observer.took("scan", scanned - begun)
        self._observer.took("merge", time.perf_counter() - scanned)
        return found

    async def search(
        self, codes: Sequence[Codes], ks: Sequence[int], group: Group, timeout_s: float
    ) -> Sequence[Found]:
        """Return the `ks[q]` nearest rows of each query.

        Raises `Unavailable` or `DeadlineExceeded` if all shards failed, and the error of a shard that refuses it.
        """
        snapshot, scope = group
        time_s = SHARDS_SHARE * timeout_s
        if not scope.filter:
            # The first search under a filter tests it on all rows, which may take longer than a failure may.
            time_s = min(time_s, self._shard_timeout_s)
        with self._observer.stage("fan_out"):
            answers = await self._ask(snapshot.branches, np.stack(codes), max(ks), scope, time_s)
        coverage = _coverage(snapshot, answers)
        complete = [answer for answer in answers if answer is not None]
        with self._observer.stage("merge"):
            if len(ks) * max(ks) > _FEW_HITS:
                return await asyncio.to_thread(_merged, complete, ks, coverage, scope)
            return _merged(complete, ks, coverage, scope)

    async def _ask(
        self, branches: Sequence[Branch], codes: Codes, k: int, scope: Scope, timeout_s: float
    ) -> list[ShardAnswer | None]:
        """Return the answer of each branch, None for a failed one."""

        async def search(branch: Branch) -> ShardAnswer:
            with self._observer.stage("scan"):
                return await branch.search(codes, k, scope, timeout_s)

        return await ask_all(list(map(search, branches)), timeout_s, self._observer)


async def ask_all(calls: Sequence[Awaitable[Result]], timeout_s: float, observer: Observer) -> list[Result | None]:
    """Return the answer of each shard, None for one that fails or takes longer.

    Raises `Unavailable` or `DeadlineExceeded` if all shards failed, and the error of a shard that refuses its call.
    """

    async def within(call: Awaitable[Result]) -> Result:
        async with asyncio.timeout(timeout_s):
            return await call

    outcomes = await asyncio.gather(*map(within, calls), return_exceptions=True)
    failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    for failure in failures:
        if is_refusal(failure):
            raise failure
    observer.count("failed_shard_calls", len(failures))
    for number, outcome in enumerate(outcomes):
        if isinstance(outcome, BaseException):
            reason = str(outcome).partition("\n")[0] or type(outcome).__name__
            logger.warning("shard %d of %d did not answer: %s", number, len(outcomes), reason)
    if len(failures) == len(outcomes):
        if all(isinstance(failure, TimeoutError) for failure in failures):
            raise DeadlineExceeded(f"none of {len(outcomes)} shards answered within {timeout_s:.3g} s")
        raise Unavailable(f"none of {len(outcomes)} shards could answer; try again later")
    return [None if isinstance(outcome, BaseException) else outcome for outcome in outcomes]


def _coverage(snapshot: Snapshot, answers: Sequence[ShardAnswer | None]) -> Coverage:
    """Return the coverage of the answers of the snapshot's branches, None for one that failed."""
    num_rows = num_shards = 0
    for branch, answer in zip(snapshot.branches, answers, strict=True):
        if answer is not None:
            num_rows += branch.num_rows if answer.num_rows is None else answer.num_rows
            num_shards += answer.num_shards
    return Coverage(num_rows, snapshot.num_rows, num_shards, len(snapshot.shards))


def _merged(answers: Sequence[ShardAnswer], ks: Sequence[int], coverage: Coverage, scope: Scope) -> list[Found]:
    """Merge the answers of shards into the result of each query."""
    num_matching = sum(answer.num_matching or 0 for answer in answers) if scope.filter else None
    hits: Sequence[Merged | MergedLists]
    if scope.with_rows or max(ks) <= MAX_SHORT_K:
        hits = merge_lists(answers, ks, scope.with_rows)
    else:
        hits = merge(answers, ks)
    return [Found(of_query, coverage, num_matching) for of_query in hits]
