"""Numbers of items by distance, and rankings by distance: passes over all pairs, a few queries at a time."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from orbithash.trainers.metrics.average_precision import Counts, Histograms
from orbithash.trainers.metrics.kernels import count_items, rank_items
from orbithash.trainers.metrics.retrieval import Retrieval

__all__ = ["Ranking", "count_gains", "rank_histograms", "rankings"]

# Queries that pass over the database together.
_QUERIES_AT_ONCE = 16

# Number of pairs of query and database item whose ranking is worth a call of another thread.
_PAIRS_AT_ONCE = 2**16


class Ranking(NamedTuple):
    """The ranking of a query by distance, without its excluded item; ties are in the order of the database.

    Attributes:
        counts: number of items at each distance, int64 [K+1].
        items: positions in the database of the first R items, int64 [R].
        gains: number of classes that each of them shares with the query, int16 [R].
    """

    counts: Counts
    items: Counts
    gains: npt.NDArray[np.int16]


def rank_histograms(retrieval: Retrieval) -> Histograms:
    """Return the numbers of items and relevant items at each distance 0..K from each query."""
    counts = count_gains(retrieval, slice(None), 2)
    return Histograms(counts.sum(2), counts[:, :, 1].copy())


def count_gains(retrieval: Retrieval, queries: slice, levels: int) -> Counts:
    """Return the number of items at each distance with each gain, int64 [q, K+1, levels].

    The gain of an item is the number of classes that it shares with the query, at most `levels` - 1.
    """
    import torch

    packed = retrieval.packed
    rows = range(len(packed.queries))[queries]
    counts = np.empty((len(rows), retrieval.bits + 1, levels), np.int64)

    def count(start: int) -> None:
        part = slice(rows.start + start, min(rows.start + start + _QUERIES_AT_ONCE, rows.stop))
        count_items(
            packed.queries[part],
            packed.words,
            packed.query_labels[part],
            packed.labels,
            packed.is_single,
            packed.excluded[part],
            counts[start : start + _QUERIES_AT_ONCE],
        )

    # Ray sets torch's number of threads to a worker's share of the CPUs.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(count, range(0, len(rows), _QUERIES_AT_ONCE)))
    return counts


def rankings(retrieval: Retrieval, limit: int | None = None, counts: Counts | None = None) -> Iterator[Ranking]:
    """Yield the ranking of each query, at most its first `limit` items.

    `counts` int64 [Q, K+1] are the numbers of items of `rank_histograms`, where they are known. Queries are ranked in
    threads, several at once if the database is small, a little ahead of the one that is yielded.
    """
    import torch

    packed, num_queries = retrieval.packed, len(retrieval.query_codes)
    num_threads = torch.get_num_threads()

    def rank(query: int, counts: Counts) -> Ranking:
        length = int(counts.sum()) if limit is None else min(limit, int(counts.sum()))
        items, gains = np.empty(length, np.int64), np.empty(length, np.int16)
        rank_items(
            packed.queries[query],
            packed.words,
            packed.query_labels[query],
            packed.labels,
            packed.is_single,
            packed.excluded[query],
            np.cumsum(counts) - counts,
            items,
            gains,
        )
        return Ranking(counts, items, gains)

    def rank_all(first: int, counts: Counts) -> list[Ranking]:
        return [rank(query, of_query) for query, of_query in enumerate(counts, first)]

    at_once = max(1, min(_QUERIES_AT_ONCE, _PAIRS_AT_ONCE // len(retrieval.database_codes)))
    with ThreadPoolExecutor(num_threads) as pool:
        ahead: deque[Future[list[Ranking]]] = deque()
        for start in range(0, num_queries, block := _QUERIES_AT_ONCE * num_threads):
            part = slice(start, min(start + block, num_queries))
            known = count_gains(retrieval, part, 2).sum(2) if counts is None else counts[part]
            for offset in range(0, len(known), at_once):
                if len(ahead) > num_threads:
                    yield from ahead.popleft().result()
                ahead.append(pool.submit(rank_all, start + offset, known[offset : offset + at_once]))
        while ahead:
            yield from ahead.popleft().result()
