"""Limits of the queries of one call."""

from collections.abc import Sequence

from orbithash.search.protocol.errors import InvalidQuery
from orbithash.search.protocol.queries import (
    MAX_BATCH_HITS,
    MAX_K,
    MAX_LARGE_ROWS,
    MAX_QUERIES,
    MAX_SHORTLIST,
    Query,
    has_large,
)

__all__ = ["check_batch", "check_num_queries"]


def check_num_queries(count: int) -> None:
    """Raise `InvalidQuery` unless the number of queries of a call is allowed."""
    if not 1 <= count <= MAX_QUERIES:
        raise InvalidQuery(("requests", f"a call has 1 to {MAX_QUERIES} queries, got {count}"))


def check_batch(queries: Sequence[Query]) -> None:
    """Raise `InvalidQuery` unless the queries of a call, and the hits that they ask for, are within the limits."""
    check_num_queries(len(queries))
    if (num_hits := sum(map(_num_hits, queries))) > MAX_BATCH_HITS:
        raise InvalidQuery(
            (
                "requests",
                f"the queries of a call may ask for {MAX_BATCH_HITS:,} hits and rows of shortlists in total, got "
                f"{num_hits:,}",
            )
        )
    if (num_large := sum(query.k for query in queries if has_large(query.include))) > MAX_LARGE_ROWS:
        raise InvalidQuery(
            (
                "requests",
                f"at most {MAX_LARGE_ROWS:,} hits with thumbnails or footprints of all queries together, got "
                f"{num_large:,}",
            )
        )


def _num_hits(query: Query) -> int:
    """Return the number of rows that a query asks for, 0 for an invalid one, which gets an error of its own."""
    is_valid = 0 < query.k <= MAX_K and 1 <= query.oversampling <= MAX_SHORTLIST
    return query.shortlist_size if is_valid else 0
