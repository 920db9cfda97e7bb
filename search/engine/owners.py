"""Read rows by id from the shards that hold them.

Other than a search, a read has no part of an answer to give: it fails if one of these shards does not answer.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from orbithash.encoders.archive.tables import fixed_size_rows
from orbithash.search.engine.rescoring import Values
from orbithash.search.engine.snapshot import Snapshot
from orbithash.search.index.answers import Ids
from orbithash.search.protocol.errors import InvalidQuery, Overloaded, Unavailable
from orbithash.search.protocol.queries import has_large
from orbithash.search.shards.interface import ShardClient

__all__ = ["ask_shards", "hits_now", "is_refusal", "read_hits", "read_values"]

logger = logging.getLogger(__name__)

# Maximum number of rows of one call of a shard; with columns of up to some 100 KiB a row.
_MAX_ROWS, _MAX_LARGE_ROWS = 4096, 64

Result = TypeVar("Result")


def hits_now(snapshot: Snapshot, ids: Ids, include: Sequence[str]) -> list[bytes] | None:
    """Return the rows as `read_hits`, or None if a shard cannot read them without blocking the event loop."""
    shards = snapshot.quick_shards
    if len(shards) == 1:
        return shards[0].hits_now(ids, include)
    owners = snapshot.deal.owner(ids)
    rows: list[bytes] = [b""] * len(ids)
    for number, shard in enumerate(shards):
        places = np.flatnonzero(owners == number)
        if len(places):
            part = shard.hits_now(ids[places], include)
            if part is None:
                return None
            for place, row in zip(places.tolist(), part, strict=True):
                rows[place] = row
    return rows


async def read_hits(snapshot: Snapshot, ids: Ids, include: Sequence[str], timeout_s: float) -> list[bytes]:
    """Return the serialised rows with these ids, in their order, as `ShardAnswer.rows`.

    Raises `Unavailable` if a shard that holds one of them does not answer within `timeout_s`, or `Overloaded`.
    """
    rows: list[bytes] = [b""] * len(ids)

    async def read(shard: ShardClient, part: Ids) -> list[bytes]:
        return await shard.hits(part, include, timeout_s)

    size = _MAX_LARGE_ROWS if has_large(include) else _MAX_ROWS
    for places, part in await _read(snapshot, ids, size, read, timeout_s):
        for place, row in zip(places.tolist(), part, strict=True):
            rows[place] = row
    return rows


async def read_values(snapshot: Snapshot, ids: Ids, column: str, timeout_s: float) -> Values:
    """Return the values of a column of lists of one size (code, vector); raises as `read_hits`."""

    async def read(shard: ShardClient, part: Ids) -> Values:
        return fixed_size_rows((await shard.read(part, [column], timeout_s))[column])

    parts = await _read(snapshot, ids, _MAX_ROWS, read, timeout_s)
    if not parts:
        return np.zeros((0, 1), np.int8), np.zeros(0, np.bool_)
    _, (first, _) = parts[0]
    rows, is_known = np.empty((len(ids), first.shape[1]), first.dtype), np.empty(len(ids), np.bool_)
    for places, part in parts:
        rows[places], is_known[places] = part
    return rows, is_known


async def _read(
    snapshot: Snapshot,
    ids: Ids,
    size: int,
    read: Callable[[ShardClient, Ids], Awaitable[Result]],
    timeout_s: float,
) -> list[tuple[npt.NDArray[np.int64], Result]]:
    """Call `read(shard, ids)` with at most `size` ids of each shard at a time; return the places of the ids too."""
    if not len(ids):
        return []
    owners = snapshot.deal.owner(ids)
    parts = []
    for number in np.unique(owners).tolist():
        places = np.flatnonzero(owners == number)
        shard = snapshot.shards[number]
        parts += [(shard, places[start : start + size]) for start in range(0, len(places), size)]
    results = await ask_shards([read(shard, ids[places]) for shard, places in parts], timeout_s)
    return [(places, result) for (_, places), result in zip(parts, results, strict=True)]


async def ask_shards(calls: Sequence[Awaitable[Result]], timeout_s: float) -> list[Result]:
    """Return the results of calls of shards.

    Raises `InvalidQuery` and `Overloaded` as the shards do, and `Unavailable` for other failures.
    """
    tasks = [asyncio.ensure_future(_within(call, timeout_s)) for call in calls]
    try:
        return list(await asyncio.gather(*tasks))
    except Exception as error:
        if is_refusal(error):
            raise
        logger.warning("a shard did not answer: %s", str(error).partition("\n")[0] or type(error).__name__)
        raise Unavailable("a shard that holds some of the rows does not answer; try again later") from error
    finally:
        for task in tasks:
            task.cancel()


def is_refusal(error: BaseException) -> bool:
    """Return whether a shard refused a call, so that its error is the answer; otherwise the shard failed."""
    return isinstance(error, InvalidQuery | Overloaded)


async def _within(call: Awaitable[Result], timeout_s: float) -> Result:
    async with asyncio.timeout(timeout_s):
        return await call
