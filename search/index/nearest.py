"""The rows nearest to a query, collected code by code: kernels that other kernels call."""

# numba reads the types from the arguments.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"
# ruff: noqa: ANN001, ANN201, ANN202
import numba
import numpy as np

from orbithash.encoders.compiled import Kernel

__all__ = ["first_rows", "offer", "unload"]

_LOWEST_32 = np.uint64(0xFFFFFFFF)


@numba.njit(nogil=True)
def _has(bits, row):
    """Return whether a row belongs to a set; a set without bits contains all rows."""
    return len(bits) == 0 or (bits[row >> 3] >> (row & 7)) & 1 == 1


@numba.njit(nogil=True)
def offer(distance, code, starts, rows, alive, passing, after_distance, after_row, heap, size, tally):
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
def unload(heap, size, tally, distances, rows):
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
    heap, tally, size = np.empty(len(distances), np.uint64), np.zeros(radius + 1, np.int64), np.int64(0)
    for i in range(len(codes)):
        if near[i] <= radius:
            size = offer(near[i], codes[i], starts, rows, alive, passing, after_distance, after_row, heap, size, tally)
    return size, unload(heap, size, tally, distances, numbers)
