"""The exact search of codes, compiled by numba: multi-index hashing and, where that would cost more, a scan.

A code of K bits is cut into m parts. A code at distance d of the query differs in at most floor(d / m) bits of at least
one part (Norouzi, Punjani, Fleet, "Fast exact search in Hamming space with multi-index hashing", TPAMI 2014). Step
(r, t) reads the buckets of part t whose keys differ from the query's in r bits; after it, all codes up to distance
m * r + t are known. The search ends when the k-th row lies within the known distance.

A code that several parts find is counted at the first of these steps, which follows from the code itself, so that
nothing is remembered of the codes that were seen.

The scan passes a block of codes, which stays in the first-level cache, by all queries that need it.
"""

# numba reads the types from the arguments.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc"
# ruff: noqa: ANN001, ANN201, ANN202, D417
from typing import Any

import numba
import numpy as np
from numba.core import types
from numba.extending import intrinsic

from orbithash.search.index.compiled import Kernel

__all__ = ["AUTO", "PROBE", "SCAN", "fill_table", "first_rows", "search_codes"]

# How a search may look for codes: by cost, only in the tables, only by the scan.
AUTO, PROBE, SCAN = 0, 1, 2

# Costs, in the time in which the scan passes over one word of a code.
_BUCKET_COST, _CODE_COST = 16, 12
# The tables are given up when they have taken this share of the time of the scan.
_PROBING_SHARE = 0.12

# Codes of a block of the scan, 16 KiB per word, and of a group that is looked at one by one.
_BLOCK, _GROUP = 2048, 32
# Buckets, and codes, that are read before they are used: independent reads overlap.
_BUCKETS_AT_ONCE, _CODES_AT_ONCE = 256, 512

_LOWEST_32 = np.uint64(0xFFFFFFFF)


@intrinsic
def _count_ones(typing_context: Any, word: Any) -> Any:
    """Return the number of ones of a word uint64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), generate


@numba.njit(nogil=True)
def _distance(words, code, query, num_words):
    """Return the distance of the code of this number from the query."""
    total = np.uint64(0)
    for word in range(num_words):
        total += _count_ones(words[code * num_words + word] ^ query[word])
    return np.int64(total)


@numba.njit(nogil=True)
def _key(words, first, begin, end):
    """Return the bits from `begin` to `end`, at most 32, of the code whose words begin at `first`."""
    word, last = begin >> 6, (end - 1) >> 6
    ones = (np.uint64(1) << np.uint64(end - begin)) - np.uint64(1)
    after = np.uint64(63 - ((end - 1) & 63))
    key = words[first + last] >> after
    if word != last:
        key |= words[first + word] << (np.uint64(64) - after)
    return key & ones


@numba.njit(nogil=True)
def _has(bits, row):
    """Return whether a row belongs to a set; a set without bits contains all rows."""
    return len(bits) == 0 or (bits[row >> 3] >> (row & 7)) & 1 == 1


@numba.njit(nogil=True)
def _offer(distance, code, starts, rows, alive, passing, after_distance, after_row, heap, size, tally):
    """Add the rows of a code at this distance to the heap of the nearest; return the size of the heap.

    The heap holds distance << 32 | row, the largest first. `tally` counts the searched rows by distance.
    """
    if distance < after_distance:
        return size
    place, end = code, code + 1
    if len(starts):
        place, end = np.int64(starts[code]), np.int64(starts[code + 1])
    all_count = len(alive) == 0 and len(passing) == 0 and distance > after_distance
    while place < end:
        row = np.int64(rows[place])
        place += 1
        if not all_count:
            if distance == after_distance and row <= after_row:
                continue
            if not (_has(alive, row) and _has(passing, row)):
                continue
        tally[distance] += 1
        key = np.uint64(distance) << np.uint64(32) | np.uint64(row)
        if size < len(heap):
            i = size
            size += 1
            while i > 0 and heap[(i - 1) >> 1] < key:
                heap[i] = heap[(i - 1) >> 1]
                i = (i - 1) >> 1
            heap[i] = key
        elif key < heap[0]:
            _replace_largest(heap, size, key)
        elif all_count:
            # Rows of a code ascend.
            tally[distance] += end - place
            break
    return size


@numba.njit(nogil=True)
def _replace_largest(heap, size, key):
    i = 0
    while True:
        child = 2 * i + 1
        if child >= size:
            break
        if child + 1 < size and heap[child + 1] > heap[child]:
            child += 1
        if heap[child] <= key:
            break
        heap[i] = heap[child]
        i = child
    heap[i] = key


@numba.njit(nogil=True)
def _binomial(n, r):
    result = 1.0
    for i in range(r):
        result *= (n - i) / (i + 1)
    return result


@numba.njit(nogil=True)
def _probe(
    query, words, starts, rows, offsets, numbers, parts, alive, passing, after_distance, after_row, radius, heap, tally,
    budget, lows, highs, codes, distances, keys,
):  # fmt: skip
    """Search in the tables, part by part and flip by flip; return the size of the heap, -1 if the scan is cheaper."""
    num_words, num_parts = len(query), len(parts) - 1
    num_codes = len(words) // num_words
    for part in range(num_parts):
        keys[part] = _key(query, 0, parts[part], parts[part + 1])
    size, bound, spent = 0, radius, 0.0
    for flips in range(parts[1] + 1):
        first_bucket = 0
        for part in range(num_parts):
            known = num_parts * flips + part - 1
            if known >= bound:
                return size
            width = parts[part + 1] - parts[part]
            num_buckets = 1 << width
            table = first_bucket
            first_bucket += num_buckets + 1
            if flips > width:
                continue
            num_masks = _binomial(width, flips)
            if spent + num_masks * (_BUCKET_COST + _CODE_COST * num_codes / num_buckets) > budget:
                return -1
            mask = (np.int64(1) << flips) - 1
            while mask < num_buckets:
                count, total = 0, 0
                while mask < num_buckets and count < _BUCKETS_AT_ONCE:
                    bucket = table + (np.int64(keys[part]) ^ mask)
                    low, high = np.int64(offsets[bucket]), np.int64(offsets[bucket + 1])
                    lows[count], highs[count] = low, high
                    total += high - low
                    count += 1
                    if mask == 0:
                        mask = num_buckets
                    else:
                        # The next larger number with as many ones.
                        lowest = mask & -mask
                        ripple = mask + lowest
                        mask = (((ripple ^ mask) >> 2) // lowest) | ripple
                spent += count * _BUCKET_COST + total * _CODE_COST
                if spent > budget:
                    return -1
                num_read = 0
                for i in range(count):
                    for place in range(lows[i], highs[i]):
                        codes[num_read] = place if part == 0 else np.int64(numbers[(part - 1) * num_codes + place])
                        num_read += 1
                        if num_read == _CODES_AT_ONCE:
                            size, bound = _compare(
                                query, words, starts, rows, parts, alive, passing, after_distance, after_row, radius,
                                heap, size, tally, codes, num_read, distances, keys, flips, part, bound,
                            )  # fmt: skip
                            num_read = 0
                size, bound = _compare(
                    query, words, starts, rows, parts, alive, passing, after_distance, after_row, radius,
                    heap, size, tally, codes, num_read, distances, keys, flips, part, bound,
                )  # fmt: skip
    return size


@numba.njit(nogil=True)
def _compare(
    query, words, starts, rows, parts, alive, passing, after_distance, after_row, radius,
    heap, size, tally, codes, num_read, distances, keys, flips, part, bound,
):  # fmt: skip
    """Offer the codes that step (flips, part) has read to the heap; return its size and the largest useful distance."""
    num_words = len(query)
    if num_words == 1:
        for i in range(num_read):
            distances[i] = np.int64(_count_ones(words[codes[i]] ^ query[0]))
    else:
        for i in range(num_read):
            distances[i] = _distance(words, codes[i], query, num_words)
    for i in range(num_read):
        if distances[i] <= bound and not _is_seen(words, codes[i] * num_words, keys, parts, flips, part):
            size = _offer(
                distances[i], codes[i], starts, rows, alive, passing, after_distance, after_row, heap, size, tally
            )
            if size == len(heap):
                bound = min(radius, np.int64(heap[0] >> np.uint64(32)))
    return size, bound


@numba.njit(nogil=True)
def _is_seen(words, first, keys, parts, flips, part):
    """Return whether a step before (flips, part) finds the code whose words begin at `first`."""
    for other in range(len(parts) - 1):
        if other != part:
            key = _key(words, first, parts[other], parts[other + 1])
            if np.int64(_count_ones(key ^ keys[other])) <= (flips if other < part else flips - 1):
                return True
    return False


@numba.njit(nogil=True)
def _near_in_block(words, begin, end, query, bound, distances):
    """Write the distances of a block of codes; return how many are at most `bound`."""
    num_words, count = len(query), 0
    if num_words == 1:
        only = query[0]
        for i in range(end - begin):
            distance = np.uint16(_count_ones(words[begin + i] ^ only))
            distances[i] = distance
            count += distance <= bound
    elif num_words == 2:
        first, second = query[0], query[1]
        for i in range(end - begin):
            at = 2 * (begin + i)
            distance = np.uint16(_count_ones(words[at] ^ first) + _count_ones(words[at + 1] ^ second))
            distances[i] = distance
            count += distance <= bound
    else:
        for i in range(end - begin):
            distance = np.uint16(_distance(words, begin + i, query, num_words))
            distances[i] = distance
            count += distance <= bound
    return count


@numba.njit(nogil=True)
def _scan(
    queries, chosen, words, starts, rows, alive, passing, after_distance, after_row, radius, heaps, sizes, tallies
):
    """Search for the chosen queries by comparing them with all codes."""
    num_codes = len(words) // queries.shape[1]
    distances = np.empty(_BLOCK, np.uint16)
    bounds = np.full(len(queries), radius, np.int64)
    for begin in range(0, num_codes, _BLOCK):
        end = min(begin + _BLOCK, num_codes)
        for query in chosen:
            heap, tally, bound, size = heaps[query], tallies[query], bounds[query], sizes[query]
            left = _near_in_block(words, begin, end, queries[query], np.uint16(bound), distances)
            group = 0
            while left > 0:
                stop = min(group + _GROUP, end - begin)
                count = 0
                for i in range(group, stop):
                    count += distances[i] <= np.uint16(bound)
                if count:
                    for i in range(group, stop):
                        if distances[i] <= bound:
                            size = _offer(
                                np.int64(distances[i]), begin + i, starts, rows, alive, passing,
                                after_distance, after_row, heap, size, tally,
                            )  # fmt: skip
                            if size == len(heap):
                                bound = min(radius, np.int64(heap[0] >> np.uint64(32)))
                group = stop
                if group >= end - begin:
                    break
            bounds[query], sizes[query] = bound, size


@Kernel
def search_codes(
    queries, words, starts, rows, offsets, numbers, parts, alive, passing, after_distance, after_row, radius, count, how
):
    """Return the `count` nearest searched rows of each query: distances, row numbers, ties; and how many were scanned.

    Args:
        queries: uint64 [Q, W].
        words, starts, rows: arrays of `CodeRows`, flat; without `starts`, each code has one row.
        offsets: uint32, the tables of all parts one after another, each with the place of the first code of each
            bucket and of the end.
        numbers: uint32, code numbers in the order of their buckets, part by part from the second: the codes
            themselves are in the order of the first.
        parts: int64 [m + 1], the bits at which parts begin, and the end; empty: no tables.
        alive, passing: sets of rows; empty: all.
        after_distance, after_row: only rows after this place in the order; -1: from the first.
        radius: largest distance of a row.
        count: number of rows in the answer of a query; the rest is filled up with `NO_HIT` and row 0.
        how: `AUTO`, `PROBE` or `SCAN`.
    """
    num_queries = len(queries)
    heaps = np.empty((num_queries, count), np.uint64)
    sizes = np.zeros(num_queries, np.int64)
    tallies = np.zeros((num_queries, radius + 1), np.int64)
    chosen = np.empty(num_queries, np.int64)
    num_chosen = 0
    if len(parts) == 0 or how == SCAN or (how == AUTO and count == len(rows)):
        for query in range(num_queries):
            chosen[query] = query
        num_chosen = num_queries
    else:
        budget = _PROBING_SHARE * len(words) if how == AUTO else np.inf
        lows, highs = np.empty(_BUCKETS_AT_ONCE, np.int64), np.empty(_BUCKETS_AT_ONCE, np.int64)
        codes, found = np.empty(_CODES_AT_ONCE, np.int64), np.empty(_CODES_AT_ONCE, np.int64)
        keys = np.empty(len(parts) - 1, np.uint64)
        for query in range(num_queries):
            size = _probe(
                queries[query], words, starts, rows, offsets, numbers, parts, alive, passing, after_distance,
                after_row, radius, heaps[query], tallies[query], budget, lows, highs, codes, found, keys,
            )  # fmt: skip
            if size < 0:
                tallies[query] = 0
                chosen[num_chosen] = query
                num_chosen += 1
            else:
                sizes[query] = size
    if num_chosen:
        _scan(
            queries, chosen[:num_chosen], words, starts, rows, alive, passing, after_distance, after_row, radius, heaps,
            sizes, tallies,
        )  # fmt: skip
    distances = np.full((num_queries, count), np.iinfo(np.int32).max, np.int32)
    numbers_of_rows = np.zeros((num_queries, count), np.uint32)
    ties = np.zeros(num_queries, np.int64)
    for query in range(num_queries):
        ties[query] = _unload(heaps[query], sizes[query], tallies[query], distances[query], numbers_of_rows[query])
    return distances, numbers_of_rows, ties, num_chosen


@numba.njit(nogil=True)
def _unload(heap, size, tally, distances, rows):
    """Write the rows of the heap in ascending order; return the number of ties with the last."""
    ties = tally[heap[0] >> np.uint64(32)] if size else 0
    for place in range(size - 1, -1, -1):
        largest = heap[0]
        distances[place] = largest >> np.uint64(32)
        rows[place] = largest & _LOWEST_32
        _replace_largest(heap, place, heap[place])
    return ties


@Kernel
def first_rows(near, codes, starts, rows, alive, passing, after_distance, after_row, radius, distances, numbers):
    """Write the nearest searched rows of codes int64 [C] at distances `near` int64 [C] into the last two arguments.

    Returns the number of rows and the number of ties. The other arguments are those of `search_codes`.
    """
    heap, tally, size = np.empty(len(distances), np.uint64), np.zeros(radius + 1, np.int64), 0
    for i in range(len(codes)):
        if near[i] <= radius:
            size = _offer(near[i], codes[i], starts, rows, alive, passing, after_distance, after_row, heap, size, tally)
    return size, _unload(heap, size, tally, distances, numbers)


@Kernel
def fill_table(words, num_words, begin, end, offsets, numbers) -> None:
    """Fill the table of the part from bit `begin` to bit `end`; without `numbers` only the offsets, zero before."""
    num_codes = len(words) // num_words
    for code in range(num_codes):
        offsets[_key(words, code * num_words, begin, end) + np.uint64(1)] += np.uint32(1)
    for bucket in range(1, len(offsets)):
        offsets[bucket] += offsets[bucket - 1]
    if len(numbers):
        for code in range(num_codes):
            bucket = _key(words, code * num_words, begin, end)
            numbers[offsets[bucket]] = code
            offsets[bucket] += np.uint32(1)
        # Each offset is now that of the next bucket.
        for bucket in range(len(offsets) - 1, 0, -1):
            offsets[bucket] = offsets[bucket - 1]
        offsets[0] = 0
