"""A query to its answer: check it, make it a code, ask all shards, merge, and look up what the hits are.

The engine knows shards only by the protocol `ShardClient`, an archive only by `ArchiveReader`, and the model only as
the function that makes codes of images.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from orbithash.encoders.codes import Codes, check_codes
from orbithash.encoders.errors import ImageError, InputError
from orbithash.search.batching import Batcher
from orbithash.search.errors import DeadlineExceeded, InvalidQuery, KeyNotFound, Unavailable
from orbithash.search.merge import cut, merge
from orbithash.search.queries import Answer, Coverage, Hit, Query
from orbithash.search.shard import Ids, Shard, ShardAnswer

__all__ = ["ArchiveReader", "Engine", "LocalShardClient", "ShardClient"]

logger = logging.getLogger(__name__)

# Of the time a query has, the part that shards get; the rest is for the merge and the look-up of the hits.
_SHARDS_SHARE = 0.9
_HIT_COLUMNS = ["key", "label", "lon", "lat", "datetime"]


class ShardClient(Protocol):
    """A shard, wherever it is."""

    @property
    def num_rows(self) -> int:
        """Rows of the shard, known also while it does not answer."""

    async def search(self, queries: Codes, k: int, timeout_s: float) -> ShardAnswer:
        """As `Shard.search`. The caller turns to other things after `timeout_s`; any exception is a failed shard."""


class ArchiveReader(Protocol):
    """What the engine reads of an archive (`orbithash.encoders.archive.Archive`): one version, unchanging."""

    @property
    def bits(self) -> int:
        """Bits of a code."""

    @property
    def model_id(self) -> str:
        """The model that made the codes."""

    @property
    def version(self) -> int:
        """The version that is read."""

    @property
    def num_rows(self) -> int:
        """Rows of that version."""

    def find(self, key: str) -> int | None:
        """The id of the row with this key."""

    def take(self, ids: Ids, columns: list[str]) -> Any:
        """A `pyarrow.Table` of the rows with these ids, in their order."""


class LocalShardClient:
    """A shard in this process, searched in a thread: FAISS lets go of the interpreter's lock."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard

    @property
    def num_rows(self) -> int:
        """Rows of the shard."""
        return self._shard.num_rows

    async def search(self, queries: Codes, k: int, timeout_s: float) -> ShardAnswer:
        """As `Shard.search`. A scan cannot be stopped half-way: after `timeout_s` it ends unheard."""
        async with asyncio.timeout(timeout_s):
            return await asyncio.to_thread(self._shard.search, queries, k)


@dataclass(frozen=True)
class _Found:
    """What a batch found for one of its queries."""

    hits: tuple[Hit, ...]
    ties_at_cutoff: int
    coverage: Coverage


class Engine:
    """Answers queries over `shards`, which together hold the codes of `archive`.

    Belongs to one event loop. Shards that fail or are late do not fail a search: the answer's `coverage` says what was
    searched.
    """

    def __init__(
        self,
        shards: Sequence[ShardClient],
        archive: ArchiveReader,
        encode_images: Callable[[list[bytes]], Awaitable[Codes]],
        *,
        max_fan_outs: int = 1,
        max_waiting: int = 1024,
        shard_timeout_s: float = 5.0,
    ) -> None:
        """Builds an engine; nothing is asked of the shards yet.

        Args:
            shards: at least one.
            archive: the version of the archive whose codes the shards hold.
            encode_images: encoded image files to their codes uint8 [N, B]. Raises `ImageError` itself (no wrapper
                around it) for a file that is no image the model takes: its message goes to whoever asked.
            max_fan_outs: batches in flight to the shards at a time. One gave the most queries per second on two cores,
                because its batches grow largest; with replicas, one for each.
            max_waiting: queries that may queue behind them before new ones are refused as `Overloaded`.
            shard_timeout_s: a shard that is silent for so long counts as failed, even if the query has more time.
        """
        self._num_rows = sum(shard.num_rows for shard in shards)
        assert shards, "an engine needs a shard"
        assert self._num_rows == archive.num_rows, "the shards hold another version of the archive"
        self._shards = shards
        self._archive = archive
        self._encode_images = encode_images
        self._shard_timeout_s = shard_timeout_s
        self._batcher: Batcher[_Found] = Batcher(self._search_batch, max_fan_outs, max_waiting)

    async def search(self, query: Query, timeout_s: float) -> Answer:
        """The answer to one query within `timeout_s`.

        Raises `InvalidQuery`, `KeyNotFound`, `Overloaded` or `DeadlineExceeded`, and `Unavailable` when every shard
        failed.
        """
        started = time.perf_counter()
        query.check()
        if timeout_s <= 0:
            raise DeadlineExceeded("the deadline had passed before the search began")
        deadline = asyncio.get_running_loop().time() + timeout_s
        try:
            async with asyncio.timeout_at(deadline) as scope:
                code = await self._code(query)
                found = await self._batcher.submit(code, query.k, deadline)
        except TimeoutError:
            if not scope.expired():
                raise
            raise DeadlineExceeded(f"no answer within {timeout_s:.3g} s") from None
        return Answer(
            found.hits,
            found.ties_at_cutoff,
            found.coverage,
            1e3 * (time.perf_counter() - started),
            self._archive.model_id,
            self._archive.version,
        )

    async def _code(self, query: Query) -> Codes:
        """The query's code uint8 [B]."""
        if query.image is not None:
            try:
                codes = await self._encode_images([query.image])
            except ImageError as error:
                raise InvalidQuery(("image", str(error))) from error
            image_code: Codes = codes[0]
            return image_code
        if query.key is not None:
            return await asyncio.to_thread(self._code_of_key, query.key)
        code = np.frombuffer(query.code or b"", np.uint8)
        try:
            return check_codes(code, self._archive.bits)
        except InputError as error:
            raise InvalidQuery(("code", str(error))) from error

    def _code_of_key(self, key: str) -> Codes:
        row = self._archive.find(key)
        if row is None:
            raise KeyNotFound(f"no row of the archive has the key {key!r}")
        table = self._archive.take(np.array([row], np.uint64), ["code"])
        code: Codes = np.array(table.column("code").to_pylist()[0], np.uint8)
        return code

    async def _search_batch(self, codes: Codes, ks: Sequence[int], timeout_s: float) -> Sequence[_Found]:
        answers = await self._ask_shards(codes, max(ks), min(_SHARDS_SHARE * timeout_s, self._shard_timeout_s))
        searched = [shard.num_rows for shard, answer in zip(self._shards, answers, strict=True) if answer is not None]
        coverage = Coverage(sum(searched), self._num_rows, len(searched), len(self._shards))
        given = [answer for answer in answers if answer is not None]
        return await asyncio.to_thread(self._found, given, ks, coverage)

    async def _ask_shards(self, codes: Codes, k: int, timeout_s: float) -> list[ShardAnswer | None]:
        """Each shard's answer, None for those that failed. An error only when all did."""
        outcomes = await asyncio.gather(
            *(asyncio.wait_for(shard.search(codes, k, timeout_s), timeout_s) for shard in self._shards),
            return_exceptions=True,
        )
        failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        for number, outcome in enumerate(outcomes):
            if isinstance(outcome, BaseException):
                reason = str(outcome).partition("\n")[0] or type(outcome).__name__
                logger.warning("shard %d of %d did not answer: %s", number, len(outcomes), reason)
        if len(failures) == len(outcomes):
            if all(isinstance(failure, TimeoutError) for failure in failures):
                raise DeadlineExceeded(f"none of {len(outcomes)} shards answered within {timeout_s:.3g} s")
            raise Unavailable(f"none of {len(outcomes)} shards could answer; try again later")
        return [None if isinstance(outcome, BaseException) else outcome for outcome in outcomes]

    def _found(self, answers: Sequence[ShardAnswer], ks: Sequence[int], coverage: Coverage) -> list[_Found]:
        merged = merge(answers, max(ks))
        each = [
            cut(ShardAnswer(merged.distances[i : i + 1], merged.ids[i : i + 1], merged.ties[i : i + 1]), k)
            for i, k in enumerate(ks)
        ]
        rows = self._rows(np.unique(np.concatenate([answer.ids[0] for answer in each])))
        found = []
        for answer in each:
            pairs = zip(answer.ids[0].tolist(), answer.distances[0].tolist(), strict=True)
            hits = tuple(
                replace(rows[id_], rank=rank, distance=distance) for rank, (id_, distance) in enumerate(pairs, 1)
            )
            found.append(_Found(hits, int(answer.ties[0]), coverage))
        return found

    def _rows(self, ids: Ids) -> dict[int, Hit]:
        """Each id's row as a hit whose rank and distance are still to be filled in."""
        if not len(ids):
            return {}
        table = self._archive.take(ids, _HIT_COLUMNS)
        columns = [table.column(name).to_pylist() for name in _HIT_COLUMNS]
        return {id_: Hit(0, 0, id_, *row) for id_, row in zip(ids.tolist(), zip(*columns, strict=True), strict=True)}
