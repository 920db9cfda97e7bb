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
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator,assignment"
# ruff: noqa: ANN001, ANN201, ANN202, D417
import numba
import numpy as np

from orbithash.encoders.compiled import Kernel, count_ones
from orbithash.search.index.nearest import offer, unload

__all__ = ["AUTO", "PROBE", "SCAN", "fill_table", "search_codes"]

# How a search may look for codes: by cost, only in the tables, only by the scan.
AUTO, PROBE, SCAN = 0, 1, 2

# Costs of reading the bounds of a bucket and one of its codes, in the time of the scan for one word of a code, measured
# with 10^6 and 10^7 codes: 25 to 40 ns against 0.2 to 0.26 ns.
_BUCKET_COST, _CODE_COST = 120.0, 120.0
# In a batch of at least 8 queries, the scan takes this share of that time for each.
_MIN_BATCH, _BATCH_SHARE = 8, 0.4

# A search takes at most 1.2 times as long as the scan: probing is given up for the scan after this share of the
# time of the scan, unless counting the codes that are left to read, which may take another share, shows that the rest
# ends before the scan would.
_PROBING_SHARE, _COUNTING_SHARE, _FINISHING_SHARE = 0.12, 0.08, 0.8

# Codes of a block of the scan, 16 KiB per word, and of a group that is looked at one by one.
_BLOCK, _GROUP = 2048, 32
# Buckets, and codes, that are read before they are used: independent reads overlap.
_BUCKETS_AT_ONCE, _CODES_AT_ONCE = 256, 512


@numba.njit(nogil=True)
def _distance(words, code, query, num_words):
    """Return the distance of the code of this number from the query."""
    total = np.uint64(0)
    for word in range(num_words):
        total += count_ones(words[code * num_words + word] ^ query[word])
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
def _binomial(n, r):
    result = 1.0
    for i in range(r):
        result *= (n - i) / (i + 1)
    return result


@numba.njit(nogil=True)
def _next_mask(mask):
    """Return the next larger number with as many ones; a very large one after 0."""
    if mask == 0:
        return np.int64(1) << 62
    lowest = mask & -mask
    ripple = mask + lowest
    return (((ripple ^ mask) >> 2) // lowest) | ripple


@numba.njit(nogil=True)
def _cost_to_finish(offsets, parts, keys, first_flips, first_part, bound, max_buckets):
    """Return the cost of probing from this step on until all codes up to distance `bound` are known.

    It is infinite if more than `max_buckets` would have to be counted.
    """
    num_parts = len(parts) - 1
    num_buckets = 0.0
    num_codes = np.int64(0)
    # The buckets are counted first, then their codes.
    for is_counted in (False, True):
        for flips in range(first_flips, parts[1] + 1):
            table = 0
            for part in range(num_parts):
                width = parts[part + 1] - parts[part]
                if num_parts * flips + part - 1 >= bound:
                    break
                if flips <= width and (flips > first_flips or part >= first_part):
                    if is_counted:
                        mask = (np.int64(1) << flips) - 1
                        while mask < 1 << width:
                            bucket = table + (np.int64(keys[part]) ^ mask)
                            num_codes += np.int64(offsets[bucket + 1]) - np.int64(offsets[bucket])
                            mask = _next_mask(mask)
                    else:
                        num_buckets += _binomial(width, flips)
                        if num_buckets > max_buckets:
                            return np.inf
                table += (1 << width) + 1
    return num_buckets * _BUCKET_COST + num_codes * _CODE_COST


@numba.njit(nogil=True)
def _probe(
    query, words, starts, rows, offsets, numbers, parts, alive, passing, after_distance, after_row, radius, heap, tally,
    scan_cost, lows, highs, codes, distances, keys,
):  # fmt: skip
    """Search in the tables, step by step; return the size of the heap, -1 if the scan is cheaper."""
    num_words, num_parts = len(query), len(parts) - 1
    num_codes = len(words) // num_words
    for part in range(num_parts):
        keys[part] = _key(query, np.int64(0), parts[part], parts[part + 1])
    # Of type int64 and not literal, for which numba would compile the functions once more.
    size = np.int64(0)
    bound, spent, budget = radius, 0.0, _PROBING_SHARE * scan_cost
    for flips in range(parts[1] + 1):
        next_table = 0
        for part in range(num_parts):
            if num_parts * flips + part - 1 >= bound:
                return size
            width = parts[part + 1] - parts[part]
            table = next_table
            next_table += (1 << width) + 1
            if flips > width:
                continue
            cost = _binomial(width, flips) * (_BUCKET_COST + _CODE_COST * num_codes / (1 << width))
            mask = (np.int64(1) << flips) - 1
            while mask < 1 << width:
                count, total = 0, 0
                while spent + cost <= budget and mask < 1 << width and count < _BUCKETS_AT_ONCE:
                    bucket = table + (np.int64(keys[part]) ^ mask)
                    low, high = np.int64(offsets[bucket]), np.int64(offsets[bucket + 1])
                    lows[count], highs[count] = low, high
                    total += high - low
                    count += 1
                    mask = _next_mask(mask)
                # From here on the cost is known and no estimate.
                cost = count * _BUCKET_COST + total * _CODE_COST
                if count == 0 or spent + cost > budget:
                    to_finish = _cost_to_finish(
                        offsets, parts, keys, flips, part, bound, _COUNTING_SHARE * scan_cost / _BUCKET_COST
                    )
                    if spent + to_finish > _FINISHING_SHARE * scan_cost:
                        return -1
                    budget = np.inf
                spent += cost
                cost = 0.0
                i = 0
                while i < count:
                    num_read = np.int64(0)
                    while i < count and num_read < _CODES_AT_ONCE:
                        low = lows[i]
                        high = min(highs[i], low + _CODES_AT_ONCE - num_read)
                        for place in range(low, high):
                            codes[num_read] = place if part == 0 else np.int64(numbers[(part - 1) * num_codes + place])
                            num_read += 1
                        lows[i] = high
                        i += high == highs[i]
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
            distances[i] = np.int64(count_ones(words[codes[i]] ^ query[0]))
    else:
        for i in range(num_read):
            distances[i] = _distance(words, codes[i], query, num_words)
    for i in range(num_read):
        if distances[i] <= bound and not _is_seen(words, codes[i] * num_words, keys, parts, flips, part):
            size = offer(
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
            if np.int64(count_ones(key ^ keys[other])) <= (flips if other < part else flips - 1):
                return True
    return False


@numba.njit(nogil=True)
def _compare_block(block, query, distances):
    """Write the distances of a block of codes uint64 [N, W] from the query; return the smallest."""
    # LLVM vectorises the loops over a constant number of words.
    count, num_words = block.shape
    least = np.uint64(0xFFFF)
    if num_words == 1:
        only, column = query[0], block.reshape(count)
        for i in range(count):
            distance = count_ones(column[i] ^ only)
            distances[i] = np.uint16(distance)
            least = min(least, distance)
    elif num_words == 2:
        first, second = query[0], query[1]
        for i in range(count):
            distance = count_ones(block[i, 0] ^ first) + count_ones(block[i, 1] ^ second)
            distances[i] = np.uint16(distance)
            least = min(least, distance)
    elif num_words == 4:
        first, second, third, fourth = query[0], query[1], query[2], query[3]
        for i in range(count):
            distance = (
                count_ones(block[i, 0] ^ first)
                + count_ones(block[i, 1] ^ second)
                + count_ones(block[i, 2] ^ third)
                + count_ones(block[i, 3] ^ fourth)
            )
            distances[i] = np.uint16(distance)
            least = min(least, distance)
    else:
        for i in range(count):
            distance = np.uint64(0)
            for word in range(num_words):
                distance += count_ones(block[i, word] ^ query[word])
            distances[i] = np.uint16(distance)
            least = min(least, distance)
    return np.int64(least)


@numba.njit(nogil=True)
def _scan(
    queries, chosen, words, starts, rows, alive, passing, after_distance, after_row, radius, heaps, sizes, tallies
):
    """Search for the chosen queries by comparing them with all codes."""
    num_words = queries.shape[1]
    num_codes = len(words) // num_words
    distances = np.empty(_BLOCK, np.uint16)
    bounds = np.full(len(queries), radius, np.int64)
    for begin in range(0, num_codes, _BLOCK):
        end = min(begin + _BLOCK, num_codes)
        block = words[begin * num_words : end * num_words].reshape((end - begin, num_words))
        for query in chosen:
            bound = bounds[query]
            if _compare_block(block, queries[query], distances) > bound:
                continue
            heap, tally, size = heaps[query], tallies[query], sizes[query]
            for group in range(0, end - begin, _GROUP):
                near = distances[group : min(group + _GROUP, end - begin)]
                # Vectorised, and cheaper than a look at each.
                least = np.uint16(0xFFFF)
                for i in range(len(near)):
                    least = min(least, near[i])
                if least > bound:
                    continue
                for i in range(len(near)):
                    if near[i] <= bound:
                        size = offer(
                            np.int64(near[i]), begin + group + i, starts, rows, alive, passing,
                            after_distance, after_row, heap, size, tally,
                        )  # fmt: skip
                        if size == len(heap):
                            bound = min(radius, np.int64(heap[0] >> np.uint64(32)))
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
        scan_cost = np.inf if how == PROBE else len(words) * (1.0 if num_queries < _MIN_BATCH else _BATCH_SHARE)
        lows, highs = np.empty(_BUCKETS_AT_ONCE, np.int64), np.empty(_BUCKETS_AT_ONCE, np.int64)
        codes, found = np.empty(_CODES_AT_ONCE, np.int64), np.empty(_CODES_AT_ONCE, np.int64)
        keys = np.empty(len(parts) - 1, np.uint64)
        for query in range(num_queries):
            size = _probe(
                queries[query], words, starts, rows, offsets, numbers, parts, alive, passing, after_distance,
                after_row, radius, heaps[query], tallies[query], scan_cost, lows, highs, codes, found, keys,
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
        ties[query] = unload(heaps[query], sizes[query], tallies[query], distances[query], numbers_of_rows[query])
    return distances, numbers_of_rows, ties, num_chosen


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
