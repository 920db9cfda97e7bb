"""The first rows of a shard in an order."""

from collections.abc import Sequence

import numpy as np

from orbithash.encoders.compiled import read_only
from orbithash.search.index.ranking_kernels import NUM_RANKED, NUM_WITHIN, SIZE
from orbithash.search.index.rankings import Order, Ranked, merge_ranked
from orbithash.search.segments import bits
from orbithash.search.segments.bits import Bits
from orbithash.search.segments.rankings.keys import ALL_ROWS, check_order, ordered_chunks
from orbithash.search.segments.segment import Segment
from orbithash.search.segments.selections import Selected
from orbithash.search.segments.stop import Stop
from orbithash.search.segments.versions.shard_version import ShardVersion

__all__ = ["rank", "rank_segment"]

_MIN_KEY, _MAX_KEY = np.iinfo(np.int64).min, np.iinfo(np.int64).max

_NOTHING = Ranked(np.empty(0, np.int64), np.empty(0, np.uint64), 0, 0, None, 0)


def rank(
    shard: ShardVersion,
    selected: Sequence[Selected] | None,
    order: Order,
    k: int,
    max_key: int | None,
    after: tuple[int, int] | None,
    stop: Stop,
) -> Ranked:
    """Return the k first rows of a shard in an order; see `ShardClient.rank`.

    Args:
        shard: the rows.
        selected: the rows that pass a filter, of each segment; None: all.
        order: what the keys of rows are computed from.
        k: maximum number of rows.
        max_key: largest key of a row; None: no limit.
        after: return only rows after this (key, id); None: from the first.
        stop: checked between chunks of rows.
    """
    check_order(order)
    best = _NOTHING
    for number, part in enumerate(shard.parts):
        chosen = bits.both(part.alive, None if selected is None else selected[number].passing)
        # Rows beyond the k-th of one segment cannot be among the k first of all.
        bound = int(best.keys[-1]) if 0 < k == len(best.keys) else _MAX_KEY
        best = merge_ranked([best, rank_segment(part.segment, chosen, order, k, max_key, after, bound, stop)], k)
    num_matching = None if selected is None else shard.num_matching(selected)
    return best._replace(num_matching=num_matching, num_rows=shard.num_rows)


def rank_segment(
    segment: Segment,
    chosen: Bits | None,
    order: Order,
    k: int,
    max_key: int | None,
    after: tuple[int, int] | None,
    bound: int,
    stop: Stop,
) -> Ranked:
    """Return the first rows of a segment, at most k, among the chosen ones (None: all) with a key up to `bound`.

    `num_ranked` and `num_within` count rows beyond the bound, too. See `rank`.
    """
    after_key, after_row = _MIN_KEY, -1
    if after is not None:
        after_key, after_row = _clipped(after[0]), segment.ids.num_up_to(after[1]) - 1
    capacity = min(k, segment.num_rows)
    keys, rows, counts = np.empty(capacity, np.int64), np.empty(capacity, np.int64), np.zeros(3, np.int64)
    largest = _MAX_KEY if max_key is None else _clipped(max_key)
    bits_ = ALL_ROWS if chosen is None else read_only(chosen)
    for chunk in ordered_chunks(order, segment):
        stop.check()
        arguments = (*chunk.values, chunk.num_rows, chunk.first, chunk.known)
        chunk.offer(*arguments, bits_, largest, after_key, after_row, bound, keys, rows, counts)
    size, num_ranked, num_within = (int(counts[place]) for place in (SIZE, NUM_RANKED, NUM_WITHIN))
    in_order = np.lexsort((rows[:size], keys[:size]))
    return Ranked(keys[in_order], segment.ids_of(rows[in_order]), num_ranked, num_within, None, 0)


def _clipped(key: int) -> int:
    """Return a key that fits into int64, which all keys of rows do."""
    return min(max(int(key), _MIN_KEY), _MAX_KEY)
