"""The first rows in an order: kernels that compute the keys of rows and keep the smallest ones.

Each kernel reads a chunk of consecutive rows of a segment, without copying its column, and offers the rows that are
chosen and have a value to a heap. The rows in the heap do not depend on the order of the chunks.

Keys are the same on every processor: sums are of integers, and distances are computed by additions, multiplications,
divisions and square roots, which IEEE 754 defines exactly. Sine and arcsine are the polynomials of FreeBSD's msun
(k_sin.c, k_cos.c, e_asin.c), which are accurate to about one unit in the last place.
"""

# numba reads the types from the arguments.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"
# ruff: noqa: ANN001, ANN202, D417
import math

import numba
import numpy as np

from orbithash.encoders.compiled import Kernel

__all__ = ["NUM_RANKED", "NUM_WITHIN", "SIZE", "offer_hashes", "offer_numbers", "offer_places", "offer_products"]

# Places in the array of counts: rows in the heap, rows with a key, rows whose key is at most the largest one.
SIZE, NUM_RANKED, NUM_WITHIN = 0, 1, 2

# Rows whose keys are computed before they are offered; the keys stay in the first-level cache.
_BLOCK = 1024

_EARTH_RADIUS_MM = 6_371_008.8e3
_RADIANS = math.pi / 180

_GOLDEN, _FIRST, _SECOND = (np.uint64(value) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@numba.njit(nogil=True)
def _has(bits, row):
    """Return 1 if a row belongs to a set, else 0; a set without bits has all rows."""
    return np.int64(1) if len(bits) == 0 else np.int64((bits[row >> 3] >> (row & 7)) & 1)


@numba.njit(nogil=True)
def _list_rows(rows, begin, end, first, known, chosen):
    """List the rows of a chunk from `begin` to `end` that are known and chosen; return their number."""
    if len(known) == 0 and len(chosen) == 0:
        for row in range(begin, end):
            rows[row - begin] = row
        return end - begin
    count = 0
    for row in range(begin, end):
        # Without a branch: which rows are chosen cannot be predicted.
        rows[count] = row
        count += _has(known, row) & _has(chosen, first + row)
    return count


@numba.njit(nogil=True)
def _is_before(key, row, other_key, other_row):
    return key < other_key or (key == other_key and row < other_row)


@numba.njit(nogil=True)
def _insert(heap_keys, heap_rows, i, key, row):
    """Put a row at place i of the heap, which has no row there, or above it."""
    while i > 0:
        parent = (i - 1) >> 1
        if not _is_before(heap_keys[parent], heap_rows[parent], key, row):
            break
        heap_keys[i], heap_rows[i] = heap_keys[parent], heap_rows[parent]
        i = parent
    heap_keys[i], heap_rows[i] = key, row


@numba.njit(nogil=True)
def _replace_last(heap_keys, heap_rows, key, row):
    """Put a row in the place of the last one of a full heap."""
    i, size = 0, len(heap_keys)
    while True:
        child = 2 * i + 1
        if child >= size:
            break
        if child + 1 < size and _is_before(
            heap_keys[child], heap_rows[child], heap_keys[child + 1], heap_rows[child + 1]
        ):
            child += 1
        if not _is_before(key, row, heap_keys[child], heap_rows[child]):
            break
        heap_keys[i], heap_rows[i] = heap_keys[child], heap_rows[child]
        i = child
    heap_keys[i], heap_rows[i] = key, row


@numba.njit(nogil=True)
def _offer(keys, rows, count, first, max_key, after_key, after_row, bound, heap_keys, heap_rows, counts):
    """Offer `count` rows with their keys to the heap, which keeps the first ones with the last one on top."""
    num_within, least = 0, np.int64(np.iinfo(np.int64).max)
    for i in range(count):
        num_within += keys[i] <= max_key
        least = min(least, keys[i])
    counts[NUM_RANKED] += count
    counts[NUM_WITHIN] += num_within
    size, capacity = counts[SIZE], len(heap_keys)
    bound = min(bound, max_key)
    if size == capacity:
        bound = min(bound, heap_keys[0]) if capacity else least - 1
    if num_within == 0 or least > bound:
        return
    for i in range(count):
        key, row = keys[i], first + rows[i]
        if key > bound or key < after_key or (key == after_key and row <= after_row):
            continue
        if size < capacity:
            _insert(heap_keys, heap_rows, size, key, row)
            size += 1
        elif _is_before(key, row, heap_keys[0], heap_rows[0]):
            _replace_last(heap_keys, heap_rows, key, row)
        if size == capacity:
            bound = min(bound, heap_keys[0])
    counts[SIZE] = size


@numba.njit(nogil=True)
def _product(values, weights, row):
    """Return the dot product of a vector and the weights as int64."""
    # A slice, and sums of int32, so that LLVM multiplies and adds pairs of int16 with one instruction.
    dims = len(weights)
    vector = values[row * dims : (row + 1) * dims]
    total = np.int32(0)
    for i in range(dims):
        total = np.int32(total + np.int32(np.int32(vector[i]) * np.int32(weights[i])))
    return np.int64(total)


@Kernel
def offer_products(
    values, weights, pivot, has_pivot, num_rows, first, known, chosen, max_key, after_key, after_row, bound,
    heap_keys, heap_rows, counts,
) -> None:  # fmt: skip
    """Offer rows by the dot product of their vectors and weights.

    Args:
        values: int8 [num_rows * d], the vectors one after the other.
        weights: int16 [d]; the sum of their magnitudes is below 2^24, so that sums fit into int32.
        pivot: the key is the magnitude of the difference from it if `has_pivot`, else minus the product.
        num_rows: number of rows of the chunk.
        first: number of the first row in the segment.
        known: bits of the rows of the chunk that have a value; empty: all.
        chosen: bits of the rows of the segment that exist and pass the filter; empty: all.
        max_key: largest key of a row.
        after_key, after_row: only rows after this place in the order.
        bound: rows with a larger key are of no use, although they count.
        heap_keys, heap_rows: int64 [k], the heap.
        counts: int64 [3], see `SIZE`, `NUM_RANKED` and `NUM_WITHIN`.
    """
    rows, keys = np.empty(_BLOCK, np.int64), np.empty(_BLOCK, np.int64)
    for begin in range(0, num_rows, _BLOCK):
        count = _list_rows(rows, begin, min(begin + _BLOCK, num_rows), first, known, chosen)
        if count == min(_BLOCK, num_rows - begin):
            # All rows: without their numbers, vectors are read faster.
            for i in range(count):
                keys[i] = _product(values, weights, begin + i)
        else:
            for i in range(count):
                keys[i] = _product(values, weights, rows[i])
        for i in range(count):
            keys[i] = abs(keys[i] - pivot) if has_pivot else -keys[i]
        _offer(keys, rows, count, first, max_key, after_key, after_row, bound, heap_keys, heap_rows, counts)


@Kernel
def offer_numbers(
    values, sign, num_rows, first, known, chosen, max_key, after_key, after_row, bound, heap_keys, heap_rows, counts
) -> None:
    """Offer rows by a number int64 [num_rows] times `sign`; see `offer_products`."""
    rows, keys = np.empty(_BLOCK, np.int64), np.empty(_BLOCK, np.int64)
    for begin in range(0, num_rows, _BLOCK):
        count = _list_rows(rows, begin, min(begin + _BLOCK, num_rows), first, known, chosen)
        for i in range(count):
            keys[i] = sign * values[rows[i]]
        _offer(keys, rows, count, first, max_key, after_key, after_row, bound, heap_keys, heap_rows, counts)


@numba.njit(nogil=True)
def _mixed(state):
    """Return the number that splitmix64 makes of a state uint64 (Steele, Lea, Flood, OOPSLA 2014)."""
    mixed = state + _GOLDEN
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _FIRST
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _SECOND
    return mixed ^ (mixed >> np.uint64(31))


@Kernel
def offer_hashes(
    ids, seed, num_rows, first, known, chosen, max_key, after_key, after_row, bound, heap_keys, heap_rows, counts
) -> None:
    """Offer rows by the upper 63 bits of a hash of a seed and their id uint64 [num_rows]; see `offer_products`."""
    rows, keys = np.empty(_BLOCK, np.int64), np.empty(_BLOCK, np.int64)
    seed_hash = _mixed(seed)
    for begin in range(0, num_rows, _BLOCK):
        count = _list_rows(rows, begin, min(begin + _BLOCK, num_rows), first, known, chosen)
        for i in range(count):
            keys[i] = np.int64(_mixed(ids[rows[i]] ^ seed_hash) >> np.uint64(1))
        _offer(keys, rows, count, first, max_key, after_key, after_row, bound, heap_keys, heap_rows, counts)


# Inlined, and with selections in the place of branches, so that LLVM computes several distances at once.
@numba.njit(nogil=True, forceinline=True)
def _sine(degrees):
    """Return the sine of an angle from 0 to 90 degrees."""
    x = (degrees if degrees < 45.0 else 45.0) * _RADIANS
    z = x * x
    sine = x + z * x * (
        -1.66666666666666324348e-01
        + z
        * (
            8.33333333332248946124e-03
            + z
            * (
                -1.98412698298579493134e-04
                + z * (2.75573137070700676789e-06 + z * (-2.50507602534068634195e-08 + z * 1.58969099521155010221e-10))
            )
        )
    )
    x = (90.0 - (degrees if degrees > 45.0 else 45.0)) * _RADIANS
    z = x * x
    cosine = 1.0 - (
        0.5 * z
        - z
        * z
        * (
            4.16666666666666019037e-02
            + z
            * (
                -1.38888888888741095749e-03
                + z
                * (
                    2.48015872894767294178e-05
                    + z
                    * (-2.75573143513906633035e-07 + z * (2.08757232129817482790e-09 + z * -1.13596475577881948265e-11))
                )
            )
        )
    )
    return sine if degrees <= 45.0 else cosine


# Without the check of divisors that "python" adds.
@numba.njit(nogil=True, forceinline=True, error_model="numpy")
def _arcsine(x):
    """Return the arcsine of a number from 0 to 1 in radians."""
    is_large = x > 0.5
    z = (1.0 - x) * 0.5 if is_large else x * x
    root = math.sqrt(z)
    root = root if is_large else x
    p = z * (
        1.66666666666666657415e-01
        + z
        * (
            -3.25565818622400915405e-01
            + z
            * (
                2.01212532134862925881e-01
                + z * (-4.00555345006794114027e-02 + z * (7.91534994289814532176e-04 + z * 3.47933107596021167570e-05))
            )
        )
    )
    q = 1.0 + z * (
        -2.40339491173441421878e00
        + z * (2.02094576023350569471e00 + z * (-6.88283971605453293030e-01 + z * 7.70381505559019352791e-02))
    )
    angle = root + root * (p / q)
    return math.pi / 2 - 2.0 * angle if is_large else angle


@numba.njit(nogil=True, forceinline=True)
def _millimetres(lon, lat, other_lon, other_lat, cosine_of_other_lat):
    """Return the great-circle distance of two places in degrees, rounded to millimetres.

    Longitudes are from -360 to 360 and latitudes from -90 to 90.
    """
    degrees = abs(lon - other_lon)
    turned = abs(360.0 - degrees)
    degrees = degrees if degrees < turned else turned
    turned = abs(720.0 - degrees)
    degrees = degrees if degrees < turned else turned
    east_west = _sine(degrees * 0.5)
    north_south = _sine(abs(lat - other_lat) * 0.5)
    # The cosine of a latitude is the sine of its distance from the pole.
    cosines = _sine(90.0 - abs(lat)) * cosine_of_other_lat
    haversine = north_south * north_south + cosines * (east_west * east_west)
    haversine = haversine if haversine < 1.0 else 1.0
    return np.int64(2.0 * _EARTH_RADIUS_MM * _arcsine(math.sqrt(haversine)) + 0.5)


@Kernel
def offer_places(
    lons, lats, lon, lat, num_rows, first, known, chosen, max_key, after_key, after_row, bound,
    heap_keys, heap_rows, counts,
) -> None:  # fmt: skip
    """Offer rows by the distance of their places, float64 [num_rows], from a place; see `offer_products`.

    Rows without a latitude from -90 to 90 and a longitude from -360 to 360 degrees have no key.
    """
    rows, keys = np.empty(_BLOCK, np.int64), np.empty(_BLOCK, np.int64)
    block_lons, block_lats = np.empty(_BLOCK, np.float64), np.empty(_BLOCK, np.float64)
    cosine = _sine(90.0 - abs(lat))
    for begin in range(0, num_rows, _BLOCK):
        count = _list_rows(rows, begin, min(begin + _BLOCK, num_rows), first, known, chosen)
        # The comparison is false for NaN.
        num_valid = 0
        for i in range(count):
            rows[num_valid] = rows[i]
            num_valid += (abs(lats[rows[i]]) <= 90.0) & (abs(lons[rows[i]]) <= 360.0)
        for i in range(num_valid):
            block_lons[i], block_lats[i] = lons[rows[i]], lats[rows[i]]
        for i in range(num_valid):
            keys[i] = _millimetres(block_lons[i], block_lats[i], lon, lat, cosine)
        _offer(keys, rows, num_valid, first, max_key, after_key, after_row, bound, heap_keys, heap_rows, counts)
