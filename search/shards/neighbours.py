"""The part of a head: ask the other shards of its node, and merge their answers with its own."""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Sequence
from typing import Any

import numpy as np

from orbithash.search.index.answers import NO_HIT, ShardAnswer
from orbithash.search.index.merge import merge
from orbithash.search.protocol.errors import InvalidQuery, Overloaded
from orbithash.search.shards.client import Connection
from orbithash.search.shards.messages import answer_from_pb, answer_to_pb, parsed
from orbithash.v1 import shards_pb2 as pb

__all__ = ["SHARE", "Neighbours", "merged"]

# Share of the time-out of a search that those have who are asked in turn: the rest is for the merge and the way back.
SHARE = 0.9

# Maximum number of hits that are merged in the event loop: a thread would cost more.
_FEW_HITS = 4096

# Connections to neighbours that a shard keeps.
_MAX_CONNECTIONS = 4096


class Neighbours:
    """The way from a head to the other shards of its node. Belongs to one event loop."""

    def __init__(self, token: str) -> None:
        self._token = token
        self._connections: OrderedDict[tuple[int, str], Connection] = OrderedDict()

    async def search(self, request: Any, own: Awaitable[ShardAnswer], timeout_s: float) -> bytes:
        """Return the serialised response to a `ShardSearchRequest` with neighbours. `own`: the answer of the head.

        Raises the error of `own`. A neighbour that fails is reported in the response.
        """
        neighbours = list(request.neighbours)
        plain = pb.ShardSearchRequest()
        plain.CopyFrom(request)
        del plain.neighbours[:]
        data = plain.SerializeToString()

        async def ask(neighbour: Any) -> ShardAnswer:
            connection = await self._connection(neighbour.number, neighbour.address)
            async with asyncio.timeout(SHARE * timeout_s):
                response = await connection.call("Search", data, SHARE * timeout_s)
            return answer_from_pb(parsed(pb.ShardSearchResponse, response))

        tasks = [asyncio.ensure_future(own), *(asyncio.create_task(ask(each)) for each in neighbours)]
        try:
            mine, *outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            for task in tasks:
                task.cancel()
        if isinstance(mine, BaseException):
            raise mine
        answers, missing = [mine], []
        for neighbour, outcome in zip(neighbours, outcomes, strict=True):
            if not isinstance(outcome, BaseException):
                answers.append(outcome)
            elif _is_refusal(outcome):
                raise outcome
            else:
                missing.append(neighbour.number)
        response = answer_to_pb(await merged(answers, request.k))
        response.missing.extend(missing)
        serialised: bytes = response.SerializeToString()
        return serialised

    async def close(self) -> None:
        """Close all connections."""
        connections, self._connections = self._connections, OrderedDict()
        for connection in connections.values():
            await connection.close()

    async def _connection(self, number: int, address: str) -> Connection:
        key = (number, address)
        if (connection := self._connections.get(key)) is not None:
            self._connections.move_to_end(key)
            return connection
        connection = self._connections[key] = Connection(number, self._token)
        await connection.connect(address)
        while len(self._connections) > _MAX_CONNECTIONS:
            _, oldest = self._connections.popitem(last=False)
            await oldest.close()
        return connection


async def merged(answers: Sequence[ShardAnswer], k: int) -> ShardAnswer:
    """Return the answer of several shards together, which is that of one shard with all their rows."""
    if sum(answer.ids.size for answer in answers) <= _FEW_HITS:
        return _merge_answers(answers, k)
    return await asyncio.to_thread(_merge_answers, answers, k)


def _merge_answers(answers: Sequence[ShardAnswer], k: int) -> ShardAnswer:
    first = answers[0]
    found = merge(answers, [k] * len(first.ties))
    width = max((len(each.ids) for each in found), default=0)
    distances = np.full((len(found), width), NO_HIT, np.int32)
    ids = np.zeros((len(found), width), np.uint64)
    for place, each in enumerate(found):
        distances[place, : len(each.ids)], ids[place, : len(each.ids)] = each.distances, each.ids
    rows: list[bytes] = []
    if any(answer.rows for answer in answers):
        # A row is the same for every query.
        row_of: dict[int, bytes] = {}
        for answer in answers:
            row_of.update(zip(answer.ids[answer.distances != NO_HIT].tolist(), answer.rows, strict=True))
        rows = [row_of[id_] for each in found for id_ in each.ids.tolist()]
    return ShardAnswer(
        distances,
        ids,
        np.array([each.ties for each in found], np.int64),
        tuple(rows),
        None if first.num_matching is None else sum(answer.num_matching or 0 for answer in answers),
        None if any(answer.num_rows is None for answer in answers) else sum(answer.num_rows or 0 for answer in answers),
        sum(answer.num_shards for answer in answers),
    )


def _is_refusal(error: BaseException) -> bool:
    """Return whether the search itself is refused; otherwise a shard failed."""
    return isinstance(error, InvalidQuery | Overloaded)
