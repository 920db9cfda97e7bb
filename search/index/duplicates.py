"""Find near-duplicates in an archive: groups of rows connected by small distances."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from orbithash.encoders.codes import Codes, check_codes
from orbithash.encoders.errors import InputError
from orbithash.search.index.answers import Ids
from orbithash.search.index.indexes import range_search

__all__ = ["duplicate_groups"]

Numbers = npt.NDArray[np.int64]

_QUERIES_AT_ONCE = 256
# Links collected before they are merged into groups; 16 bytes each.
_MAX_LINKS = 10_000_000
# Multi-index hashing: limits on the bits of a part of a code, and number of bits that are flipped in each part.
_MIN_PART_BITS, _MAX_PART_BITS, _FLIPS = 8, 24, 1


def duplicate_groups(ids: Ids, codes: Codes, bits: int, radius: int) -> list[Ids]:
    """Return the ids of each group of two or more near-duplicates, ascending.

    Groups are sorted by size, largest first, then by smallest id. Two rows are in one group if a chain of rows connects
    them in which neighbours are at most `radius` bits apart; the ends of a chain may be farther apart. The time is
    linear in the number of rows for a radius of a few bits, and quadratic for a large one.

    Args:
        ids: uint64 [N].
        codes: uint8 [N, ceil(bits/8)], packed.
        bits: bits of a code.
        radius: maximum distance of neighbours in bits, from 0 (equal codes) to `bits`.

    Raises:
        InputError: `radius` is out of range or the codes do not have `bits` bits.
    """
    check_codes(codes, bits)
    if not 0 <= radius <= bits:
        raise InputError(f"the radius is {radius} bits; it must be from 0 to the {bits} bits of a code")
    if not len(ids):
        return []
    width = codes.shape[1]
    # Each distinct code is one node.
    keys = np.ascontiguousarray(codes).view(f"S{width}").reshape(-1)
    distinct, node_of = np.unique(keys, return_inverse=True)
    nodes = distinct.view(np.uint8).reshape(-1, width)
    group_of = np.arange(len(nodes))
    if radius:
        for links in _links(nodes, radius):
            group_of = _connected(group_of, links)
    row_groups = group_of[node_of]
    order = np.lexsort((ids, row_groups))
    bounds = np.flatnonzero(np.diff(row_groups[order])) + 1
    groups = [group for group in np.split(ids[order], bounds) if len(group) > 1]
    return sorted(groups, key=lambda group: (-len(group), int(group[0])))


def _links(nodes: Codes, radius: int) -> Iterator[Numbers]:
    """Yield the pairs [2, L] of nodes at most `radius` apart, each pair once, in batches."""
    index = _faiss_index(nodes, radius)
    batches: list[Numbers] = []
    num_links = 0
    for start in range(0, len(nodes), _QUERIES_AT_ONCE):
        found = range_search(index, nodes[start : start + _QUERIES_AT_ONCE], radius)
        here = start + np.repeat(np.arange(len(found.limits) - 1), np.diff(found.limits))
        is_ordered = here < found.numbers
        batches.append(np.stack([here[is_ordered], found.numbers[is_ordered]]))
        num_links += batches[-1].shape[1]
        if num_links > _MAX_LINKS:
            yield np.concatenate(batches, axis=1)
            batches, num_links = [], 0
    if batches:
        yield np.concatenate(batches, axis=1)


def _faiss_index(codes: Codes, radius: int) -> Any:
    """Return an index of FAISS that finds all codes within the radius.

    For a small radius, hash tables of parts of the codes (Norouzi et al., CVPR 2012): a code at distance r from the
    query differs from it in at most r // parts bits of at least one part. For a larger one, a linear scan.
    """
    import faiss

    bits = 8 * codes.shape[1]
    part_bits = max(_MIN_PART_BITS, min(_MAX_PART_BITS, int(np.log2(max(2, len(codes))))))
    num_parts = max(1, bits // part_bits)
    if radius < num_parts * (_FLIPS + 1):
        index: Any = faiss.IndexBinaryMultiHash(bits, num_parts, min(part_bits, bits // num_parts))
        index.nflip = _FLIPS
    else:
        index = faiss.IndexBinaryFlat(bits)
    index.add(codes)
    return index


def _connected(group_of: Numbers, links: Numbers) -> Numbers:
    """Return the group of each node after groups connected by `links` were merged."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    size = int(group_of.max()) + 1
    ends = group_of[links]
    graph = coo_array((np.ones(ends.shape[1], np.bool_), (ends[0], ends[1])), shape=(size, size))
    _, labels = connected_components(graph, directed=False)
    connected: Numbers = labels[group_of].astype(np.int64)
    return connected
