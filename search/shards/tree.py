"""Search very many shards through one of them on each node, the head, which merges the answers of its neighbours.

A gateway that asks each shard itself spends its time on calls and on the merge. A head asks the other shards of its
node and merges their answers with its own; the gateway merges the answers of the nodes.
"""

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from orbithash.encoders.codes import Codes
from orbithash.search.index.answers import Scope, ShardAnswer
from orbithash.search.protocol.errors import InvalidQuery, Overloaded
from orbithash.search.shards.health import Link
from orbithash.search.shards.interface import ShardClient, Unreachable
from orbithash.search.shards.messages import answer_from_pb, parsed, search_request
from orbithash.search.shards.neighbours import SHARE, merged
from orbithash.search.shards.replicas import waiting_for
from orbithash.v1 import shards_pb2 as pb

__all__ = ["Tree"]

# Number of times that the shards of a failed head, or neighbours that did not answer, are asked again elsewhere. What
# pings find lost during a search does not count: that happens once for each replica at most.
_MAX_RETRIES = 2


@dataclass(frozen=True)
class _Group:
    """Replicas of different shards on one node; the first one is the head."""

    links: Sequence[Link]

    @property
    def numbers(self) -> list[int]:
        return [link.connection.number for link in self.links]


class Tree:
    """All shards in one version as one `Branch`: each node is asked through a head.

    A head that fails is replaced by another replica within the same search. Shards that do not answer in time are
    missing from the answer, and its `num_rows` and `num_shards` say so.
    """

    def __init__(self, links: Sequence[Sequence[Link]], shards: Sequence[ShardClient], version: int) -> None:
        """Create a tree of the replicas `links` of each shard; `shards` are the clients of the shards."""
        self._links = links
        self._shards = shards
        self._version = version
        self._turn = 0
        self.num_rows = sum(shard.num_rows for shard in shards)

    async def search(self, queries: Codes, k: int, scope: Scope, timeout_s: float) -> ShardAnswer:
        """See `Branch`. Raises an error if no shard answers."""
        self._turn += 1
        request = search_request(self._version, queries, k, scope)
        search = _Search(self._links, request, self._turn, asyncio.get_running_loop().time() + SHARE * timeout_s)
        answers = await search.ask(range(len(self._links)))
        if not answers:
            raise search.failure or Unreachable("no shard answers")
        numbers = [number for _, part in answers for number in part]
        answer = await merged([answer for answer, _ in answers], k)
        return replace(
            answer, num_rows=sum(self._shards[number].num_rows for number in numbers), num_shards=len(numbers)
        )


class _Search:
    """One search of a tree: answers of groups of shards, and the replicas that failed so far."""

    def __init__(self, links: Sequence[Sequence[Link]], request: Any, turn: int, deadline: float) -> None:
        self._links = links
        self._request = request
        self._turn = turn
        self._deadline = deadline
        self._failed: set[Link] = set()
        self.failure: Exception | None = None

    async def ask(self, numbers: Sequence[int], num_retries: int = 0) -> list[tuple[ShardAnswer, list[int]]]:
        """Return answers, each with the numbers of its shards; shards that do not answer are in none of them."""
        groups = self._groups(numbers)
        if len(groups) == 1:
            return await self._ask_group(groups[0], num_retries)
        tasks = [asyncio.create_task(self._ask_group(group, num_retries)) for group in groups]
        try:
            return [answer for answers in await asyncio.gather(*tasks) for answer in answers]
        finally:
            for task in tasks:
                task.cancel()

    def _groups(self, numbers: Sequence[int]) -> list[_Group]:
        """Return one replica of each shard that has one to ask, by node."""
        by_node: dict[str, list[Link]] = defaultdict(list)
        failed_nodes = {link.connection.node for link in self._failed}
        for number in numbers:
            of_shard = self._links[number]
            # Each replica of a shard in turn.
            order = [of_shard[(self._turn + place) % len(of_shard)] for place in range(len(of_shard))]
            usable = [link for link in order if not link.replica.is_silent and link not in self._failed]
            if usable:
                # Where one has failed the others may fail as well, one after the other.
                link = min(usable, key=lambda each: (not each.replica.is_healthy, each.connection.node in failed_nodes))
                by_node[link.connection.node].append(link)
        groups = []
        for links in by_node.values():
            # Each shard of a node is the head in turn; without others, only healthy ones.
            heads = [link for link in links if link.replica.is_healthy] or links
            head = heads[self._turn % len(heads)]
            groups.append(_Group([head, *(link for link in links if link is not head)]))
        return groups

    async def _ask_group(self, group: _Group, num_retries: int) -> list[tuple[ShardAnswer, list[int]]]:
        timeout_s = self._deadline - asyncio.get_running_loop().time()
        if timeout_s <= 0:
            self.failure = self.failure or TimeoutError("the shards did not answer in time")
            return []
        head, numbers = group.links[0], group.numbers
        answers: list[tuple[ShardAnswer, list[int]]] = []
        silent: list[Link] = []
        head.replica.num_in_flight += 1
        try:
            async with asyncio.timeout(timeout_s):
                # When a neighbour is lost, the search does not wait for it either.
                response = await waiting_for([link.replica for link in group.links], self._call(group, timeout_s))
            missing = set(response.missing)
            answers.append((answer_from_pb(response), [number for number in numbers if number not in missing]))
            head.replica.answered()
            failed = [link for link in group.links if link.connection.number in missing]
        except (InvalidQuery, Overloaded):
            raise
        except Exception as error:
            self.failure = error
            missing = set(numbers)
            silent = [link for link in group.links if link.replica.is_silent]
            failed = silent or [head]
        finally:
            head.replica.num_in_flight -= 1
        for link in failed:
            link.replica.failed()
        self._failed.update(failed)
        if missing and num_retries < _MAX_RETRIES:
            answers += await self.ask(sorted(missing), num_retries + (not silent))
        return answers

    async def _call(self, group: _Group, timeout_s: float) -> Any:
        head, *others = group.links
        request = pb.ShardSearchRequest()
        request.CopyFrom(self._request)
        for link in others:
            request.neighbours.add(number=link.connection.number, address=link.connection.address or "")
        data = await head.connection.call("Search", request.SerializeToString(), timeout_s)
        return parsed(pb.ShardSearchResponse, data)
