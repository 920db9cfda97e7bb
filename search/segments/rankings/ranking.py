"""The first rows of a shard in an order."""

from collections.abc import Sequence

import numpy as np

from orbithash.search.index.rankings import Order, Ranked, merge_ranked
from orbithash.search.segments import bits
from orbithash.search.segments.rankings.keys import keyed_rows
from orbithash.search.segments.selections import Selected
from orbithash.search.segments.stop import Stop
from orbithash.search.segments.versions.shard_version import ShardVersion

__all__ = ["rank"]


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
    best = Ranked(np.empty(0, np.int64), np.empty(0, np.uint64), 0, 0, None, 0)
    for number, part in enumerate(shard.parts):
        segment = part.segment
        chosen = bits.both(part.alive, None if selected is None else selected[number].passing)
        is_chosen = None if chosen is None else bits.to_mask(chosen, segment.num_rows)
        for first, keys, are_known in keyed_rows(order, segment):
            stop.check()
            if is_chosen is not None:
                are_known = are_known & is_chosen[first : first + len(keys)]
            rows, keys = first + np.flatnonzero(are_known), keys[are_known]
            num_ranked = len(keys)
            if max_key is not None:
                rows, keys = rows[keys <= max_key], keys[keys <= max_key]
            num_within, ids = len(keys), segment.ids_of(rows)
            if after is not None:
                is_later = (keys > after[0]) | ((keys == after[0]) & (ids > np.uint64(after[1])))
                keys, ids = keys[is_later], ids[is_later]
            best = merge_ranked([best, Ranked(keys, ids, num_ranked, num_within, None, 0)], k)
    num_matching = None if selected is None else shard.num_matching(selected)
    return best._replace(num_matching=num_matching, num_rows=shard.num_rows)
