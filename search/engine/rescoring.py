"""Rank a shortlist of the nearest rows again: by stored vectors, or by the outputs of the query's head.

The shortlist is the first ceil(k * oversampling) rows by (distance, id) and all rows that tie with the last of them, at
most `MAX_SHORTLIST`. It is the same for every number of shards and replicas, and scores follow from exact integers, so
that the order of the hits is the same too.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from orbithash.encoders.codes import Encoded
from orbithash.encoders.vectors import asymmetric_distances, cosine_scores
from orbithash.search.index.merge import Merged
from orbithash.search.protocol.errors import InvalidQuery
from orbithash.search.protocol.queries import MAX_SHORTLIST, Rescore

__all__ = ["COLUMNS", "Ranked", "Values", "check_rescore", "num_with_ties", "ranked"]

# The column that each way of rescoring reads.
COLUMNS: dict[Rescore, str] = {"vector": "vector", "asymmetric": "code"}

# Values of a column of lists of one size: rows [N, size], zeros where unknown, and which are known, bool [N].
Values = tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]


class Ranked(NamedTuple):
    """Rows of a shortlist in their new order.

    Attributes:
        hits: the first k rows; its `ties` is that of the shortlist.
        scores: float64 [k]; NaN for a row without a stored vector.
        radius: distance of the last row of the shortlist; None for an empty one.
        is_bounded: whether rows that tie with the last of the shortlist were left out, because there were too many.
    """

    hits: Merged
    scores: npt.NDArray[np.float64]
    radius: int | None
    is_bounded: bool


def check_rescore(rescore: Rescore, encoded: Encoded, has_vectors: bool) -> None:
    """Raise `InvalidQuery` if the query, one row, or the archive lacks what rescoring needs."""
    if rescore != "vector":
        return
    if not has_vectors:
        raise InvalidQuery(
            (
                "rescore",
                "this archive has no stored vectors; use rescore asymmetric, or encode it with a model that makes them "
                "(setting vector_dims)",
            )
        )
    if encoded.vectors is None:
        raise InvalidQuery(
            (
                "rescore",
                "the query has no stored vector, as a code, a row written by its code, or a sentence of another space "
                "than the images'; use rescore asymmetric, or another example",
            )
        )


def num_with_ties(shortlist: Merged) -> int:
    """Return the number of rows up to the distance of the last row of a shortlist, at most `MAX_SHORTLIST`."""
    num_nearer = int(shortlist.distances.searchsorted(shortlist.distances[-1])) if len(shortlist.ids) else 0
    return min(num_nearer + shortlist.ties, MAX_SHORTLIST)


def ranked(rescore: Rescore, encoded: Encoded, shortlist: Merged, values: Values, k: int) -> Ranked:
    """Return the first k rows of a shortlist in the order of their scores.

    `vector`: cosines, descending; rows without a vector last. `asymmetric`: asymmetric distances, ascending. Rows of
    equal score are ordered by id, rows without a vector by (distance, id). `values` are those of the
    column in `COLUMNS`.
    """
    distances, ids = shortlist.distances, shortlist.ids
    rows, is_known = values
    if not len(ids):
        return Ranked(shortlist, np.zeros(0), None, is_bounded=False)
    if rescore == "vector":
        assert encoded.vectors is not None, "checked by check_rescore"
        scores = cosine_scores(encoded.vectors[0], rows)
        scores[~is_known] = np.nan
        # lexsort puts NaN last.
        order = np.lexsort((ids, np.where(is_known, 0, distances), -scores))[:k]
    else:
        assert encoded.outputs is not None, "requested by the engine"
        scores = asymmetric_distances(encoded.outputs[0], rows).astype(np.float64)
        order = np.lexsort((ids, scores))[:k]
    num_nearer = int(distances.searchsorted(distances[-1]))
    return Ranked(
        Merged(distances[order], ids[order], shortlist.ties),
        scores[order],
        int(distances[-1]),
        num_nearer + shortlist.ties > len(ids),
    )
