"""Passes over all pairs of queries and database items, compiled by numba, in memory that does not grow with the pairs.

Codes and labels of the database have one row for each word, so that a loop over items uses vector instructions.

The gain of an item is the number of classes that it shares with the query. A label is a bit for each class; or, with
`is_single`, one word that only items of the same class have.
"""

# numba reads the types from the arguments.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"
# ruff: noqa: ANN001, ANN202, D417
import numba
import numpy as np

from orbithash.encoders.compiled import Kernel, count_ones

__all__ = ["count_items", "rank_items"]

# Database items that all queries pass before the next ones: they stay in the first-level cache.
_BLOCK = 1024

# Numbers of one query that are counted in turn: an addition then seldom waits for the last one of the same number.
_TABLES = 4


@numba.njit(nogil=True)
def _fill_distances(query, words, begin, end, distances):
    for i in range(end - begin):
        distances[i] = 0
    for word in range(len(query)):
        column, of_query = words[word], query[word]
        for i in range(end - begin):
            distances[i] += np.uint32(count_ones(column[np.uint64(begin + i)] ^ of_query))


@numba.njit(nogil=True)
def _fill_gains(query_label, labels, is_single, begin, end, gains):
    if is_single:
        column, of_query = labels[0], query_label[0]
        for i in range(end - begin):
            gains[i] = np.uint32(column[np.uint64(begin + i)] == of_query)
        return
    for i in range(end - begin):
        gains[i] = 0
    for word in range(len(query_label)):
        column, of_query = labels[word], query_label[word]
        for i in range(end - begin):
            gains[i] += np.uint32(count_ones(column[np.uint64(begin + i)] & of_query))


@Kernel
def count_items(queries, words, query_labels, labels, is_single, excluded, counts) -> None:
    """Write the number of items of each query at each distance with each gain, at most `levels` - 1.

    Args:
        queries, words: codes of the queries and of the database, uint64 [Q, W] and [W, N].
        query_labels, labels: their labels, uint64 [Q, L] and [L, N].
        excluded: int64 [Q], the item that a query does not rank; -1: none.
        counts: int64 [Q, bits + 1, levels], written.
    """
    num_queries, num_distances, levels = counts.shape
    cells, gains = np.empty(_BLOCK, np.uint32), np.empty(_BLOCK, np.uint32)
    tables = np.zeros((num_queries, _TABLES, num_distances * levels), np.uint32)
    num_items = words.shape[1]
    for begin in range(0, num_items, _BLOCK):
        end = min(begin + _BLOCK, num_items)
        for number in range(num_queries):
            _fill_distances(queries[number], words, begin, end, cells)
            _fill_gains(query_labels[number], labels, is_single, begin, end, gains)
            for i in range(end - begin):
                cells[i] = cells[i] * np.uint32(levels) + min(gains[i], np.uint32(levels - 1))
            first, second, third, fourth = (
                tables[number, 0], tables[number, 1], tables[number, 2], tables[number, 3]
            )  # fmt: skip
            whole = (end - begin) // _TABLES * _TABLES
            for i in range(0, whole, _TABLES):
                first[cells[i]] += np.uint32(1)
                second[cells[i + 1]] += np.uint32(1)
                third[cells[i + 2]] += np.uint32(1)
                fourth[cells[i + 3]] += np.uint32(1)
            for i in range(whole, end - begin):
                first[cells[i]] += np.uint32(1)
    for number in range(num_queries):
        for cell in range(num_distances * levels):
            counts[number, cell // levels, cell % levels] = tables[number, :, cell].sum()
        item = excluded[number]
        if item >= 0:
            _fill_distances(queries[number], words, item, item + 1, cells)
            _fill_gains(query_labels[number], labels, is_single, item, item + 1, gains)
            counts[number, np.int64(cells[0]), min(np.int64(gains[0]), levels - 1)] -= 1


@Kernel
def rank_items(query, words, query_label, labels, is_single, excluded, places, items, gains) -> None:
    """Write the first items of a query's ranking and the gain of each; ties are in the order of the database.

    Args:
        query, words, query_label, labels, is_single, excluded: as in `count_items`, of one query.
        places: int64 [bits + 1], the number of items nearer than each distance; changed.
        items: int64 [R], written; R is at most the length of the ranking.
        gains: int16 [R], written.
    """
    distances, gains_of_block = np.empty(_BLOCK, np.uint32), np.empty(_BLOCK, np.uint32)
    num_items = words.shape[1]
    for begin in range(0, num_items, _BLOCK):
        end = min(begin + _BLOCK, num_items)
        _fill_distances(query, words, begin, end, distances)
        _fill_gains(query_label, labels, is_single, begin, end, gains_of_block)
        for i in range(end - begin):
            place = places[distances[i]]
            if place < len(items) and begin + i != excluded:
                places[distances[i]] = place + 1
                items[place] = begin + i
                gains[place] = gains_of_block[i]
