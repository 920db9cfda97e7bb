"""Simple baselines on the backbone's features, which a learned code has to beat.

Every baseline gets the features of one frozen backbone, is fitted on the training part alone and ranks the same
database for the same queries. Rows are scaled to unit length first, so that all baselines approximate the cosine. The
mathematics of the binary ones is that of the methods of the same names (`trainers.methods.label_free.projections`):

- `cosine`: the float features, an upper bound for codes of these features;
- `sign`: the signs of all dimensions, centred with the mean of the training part; more bytes than the code;
- `sign_truncated`: the first `bits` of these signs;
- `lsh`: the signs of `bits` Gaussian projections (Charikar 2002);
- `pca_sign`: the signs of the first `bits` principal components;
- `itq`: the same components after the rotation with the smallest quantisation error, 50 iterations (Gong and Lazebnik
  2011);
- `pq`: product quantisation, one byte for each of `bits / 8` subspaces, with unquantised queries (Jegou et al. 2011).

The metrics are expectations over the order of items at equal distance, as for codes. Float distances rarely tie.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from orbithash.encoders.codes import check_bits, num_bytes, pack
from orbithash.encoders.errors import InputError
from orbithash.trainers.evaluation.comparison import HEADLINE, HEADLINE_K, BaselineResult
from orbithash.trainers.methods.label_free.projections import (
    Matrix,
    Rows,
    itq_rotation,
    mean_row,
    principal_directions,
    random_directions,
    unit,
)
from orbithash.trainers.metrics.average_precision import Counts, Floats, Histograms, average_precision, hits_at
from orbithash.trainers.metrics.code_statistics import code_statistics
from orbithash.trainers.metrics.metrics import DEFINITIONS, add_nearest, nearest_class_counts
from orbithash.trainers.metrics.rankings import count_gains
from orbithash.trainers.metrics.retrieval import (
    CHUNK_PAIRS,
    Labels,
    Retrieval,
    check_labels,
    labelled,
    num_labels,
    shared_labels,
)

__all__ = ["BASELINES", "distance_histograms", "evaluate_baselines"]

# Number of centroids of one subspace, the values of a byte.
PQ_CENTROIDS = 256
# Number of rows projected at once.
_CHUNK_ROWS = 16_384


class _Features:
    """The features of training part, queries and database, and the centring that baselines share."""

    def __init__(self, train: Rows, query: Rows, database: Rows, seed: int) -> None:
        self.query, self.database, self.seed = query, database, seed
        self.mean = mean_row(unit(train)).astype(np.float32)
        self.train = self.centred(train)
        self._directions: dict[int, Matrix] = {}

    def centred(self, rows: Rows) -> Rows:
        """Return rows scaled to unit length, minus the mean of the training part."""
        centred: Rows = unit(rows) - self.mean
        return centred

    def principal_directions(self, count: int) -> Matrix | str:
        """Return the first `count` principal directions [count, D] of the training part, or why there are fewer."""
        num_rows, num_features = self.train.shape
        if count > num_features:
            return f"{count} bits are more than the {num_features} features"
        if count not in self._directions:
            self._directions[count] = principal_directions(self.train, count)
        directions = self._directions[count]
        if len(directions) < count:
            return f"{num_rows} training images vary in fewer than {count} directions"
        return directions


@dataclass(frozen=True)
class _Distances:
    """A fitted baseline by any distance: bytes per item, and the function from queries [q, D] to distances [q, N]."""

    bytes: int
    of: Callable[[Rows], npt.NDArray[Any]]


@dataclass(frozen=True)
class _Codes:
    """A fitted baseline by Hamming distance: codes uint8 [N, bytes] of the queries and the database."""

    query: npt.NDArray[np.uint8]
    database: npt.NDArray[np.uint8]

    @property
    def bytes(self) -> int:
        """Bytes per item."""
        return int(self.database.shape[1])


_Ranker = _Distances | _Codes


def evaluate_baselines(
    features: Mapping[str, Rows],
    labels: Mapping[str, Labels],
    bits: int,
    exclude: npt.NDArray[np.integer] | None = None,
    seed: int = 0,
    cutoffs: Sequence[int] = (20, 100),
) -> dict[str, BaselineResult | str]:
    """Return the result of every baseline by name, or the reason why it is not possible.

    Args:
        features: float32 [N, D] of "train", "query" and "database", from one backbone.
        labels: labels of "query", all known, and "database"; see `retrieval`.
        bits: length of the code to compare with.
        exclude: integers [Q], the item to exclude from each query's ranking; see `Retrieval`.
        seed: seed of the projections, the rotation and the centroids.
        cutoffs: the k of average precision.

    Raises:
        InputError: features or labels are inconsistent.
    """
    check_bits(bits)
    _check(features, labels)
    parts = _Features(features["train"], features["query"], features["database"], seed)
    results: dict[str, BaselineResult | str] = {}
    for name, fit in BASELINES.items():
        ranker = fit(parts, bits)
        results[name] = ranker if isinstance(ranker, str) else _result(ranker, parts, labels, bits, exclude, cutoffs)
    return results


def distance_histograms(distances: npt.NDArray[Any], relevant: npt.NDArray[np.bool_]) -> Histograms:
    """Return `Histograms` of distances of any type [Q, N] and relevance bool [Q, N]; infinite distances are excluded.

    Consecutive distances at which all items are relevant, or none, share a column. That does not change any metric and
    leaves far fewer columns than distances.
    """
    # The order of items at equal distance has no effect here.
    order = distances.argsort(axis=1)
    ascending = np.take_along_axis(distances, order, 1)
    is_ranked = ascending < np.inf
    starts = is_ranked.copy()
    starts[:, 1:] &= ascending[:, 1:] != ascending[:, :-1]
    is_hit = np.take_along_axis(relevant, order, 1) & is_ranked
    # Excluded items are at the end of a row, where they add nothing to its last group.
    first = np.flatnonzero(starts)
    items, hits = (np.add.reduceat(of_items.ravel(), first, dtype=np.int64) for of_items in (is_ranked, is_hit))
    return _merged(len(distances), first // distances.shape[1], items, hits)


def _merged(num_queries: int, rows: Counts, items: Counts, hits: Counts) -> Histograms:
    """Return `Histograms` in which consecutive groups of equal relevance share a column.

    `rows`, `items` and `hits` int64 [G] are the query of each group, ascending, and its numbers of items, at least 1,
    and of relevant items.
    """
    mixed = (hits > 0) & (hits < items)
    begins = mixed.copy()
    begins[:1] = True
    begins[1:] |= mixed[:-1] | ((hits[1:] > 0) != (hits[:-1] > 0)) | (rows[1:] != rows[:-1])
    first = np.flatnonzero(begins)
    rows = rows[first]
    columns = np.arange(len(rows)) - rows.searchsorted(rows)
    counts = np.zeros((2, num_queries, columns.max(initial=0) + 1), np.int64)
    for of_kind, of_groups in zip(counts, (items, hits), strict=True):
        of_kind[rows, columns] = np.add.reduceat(of_groups, first)
    return Histograms(counts[0], counts[1])


def _result(
    ranker: _Ranker,
    parts: _Features,
    labels: Mapping[str, Labels],
    bits: int,
    exclude: npt.NDArray[np.integer] | None,
    cutoffs: Sequence[int],
) -> BaselineResult:
    """Return the result of one baseline, computed for chunks of queries."""
    measures = [*((d, k) for k in dict.fromkeys((HEADLINE_K, *cutoffs)) for d in DEFINITIONS), ("ap_min", None)]
    values: dict[str, list[npt.NDArray[np.float64]]] = {}
    num_classes = max(map(num_labels, labels.values()))
    nearest = np.zeros((num_classes, num_classes))
    if isinstance(ranker, _Codes):
        chunks = _rank_by_code(ranker, parts, labels, exclude, nearest)
    else:
        chunks = _rank_by_distance(ranker, parts, labels, exclude, nearest)
    for chunk in chunks:
        for definition, k in measures:
            values.setdefault(f"{definition}@{k or 'all'}", []).append(average_precision(chunk, k, definition))
        for k in dict.fromkeys((1, HEADLINE_K, *cutoffs)):
            values.setdefault(f"precision@{k}", []).append(hits_at(chunk, k) / k)
    by_query = {name: np.concatenate(chunk_values) for name, chunk_values in values.items()}
    return BaselineResult(
        bytes=ranker.bytes,
        metrics={name: float(of_queries.mean()) for name, of_queries in by_query.items()},
        scores=by_query[HEADLINE],
        nearest=nearest,
        codes=code_statistics(ranker.database, bits)
        if isinstance(ranker, _Codes) and ranker.bytes == num_bytes(bits)
        else None,
    )


def _rank_by_distance(
    ranker: _Distances,
    parts: _Features,
    labels: Mapping[str, Labels],
    exclude: npt.NDArray[np.integer] | None,
    nearest: Floats,
) -> Iterator[Histograms]:
    """Yield the histograms of chunks of queries; add to `nearest` as `add_nearest`."""
    for queries in _chunks(parts):
        distances = ranker.of(parts.query[queries]).astype(np.float32)
        if exclude is not None:
            positions = exclude[queries]
            rows_excluding = np.flatnonzero(positions >= 0)
            distances[rows_excluding, positions[rows_excluding]] = np.inf
        chunk_labels = labels["query"][queries]
        is_nearest = (distances == distances.min(1, keepdims=True)) & np.isfinite(distances)
        nearest_rows, nearest_items = np.nonzero(is_nearest)
        add_nearest(nearest, nearest_rows, nearest_items, chunk_labels, labels["database"])
        yield distance_histograms(distances, shared_labels(chunk_labels, labels["database"]) > 0)


def _rank_by_code(
    ranker: _Codes,
    parts: _Features,
    labels: Mapping[str, Labels],
    exclude: npt.NDArray[np.integer] | None,
    nearest: Floats,
) -> Iterator[Histograms]:
    """As `_rank_by_distance`."""
    # Pad bits are equal in all codes.
    bits = 8 * ranker.bytes
    retrieval = Retrieval(
        ranker.query, ranker.database, labels["query"], labels["database"], bits, exclude, max_bits=bits
    )
    nearest += nearest_class_counts(retrieval, len(nearest), chunk_pairs=CHUNK_PAIRS)
    for queries in _chunks(parts):
        items, hits = np.moveaxis(count_gains(retrieval, queries, 2), 2, 0)
        items = items + hits
        rows, columns = np.nonzero(items)
        yield _merged(len(items), rows, items[rows, columns], hits[rows, columns])


def _chunks(parts: _Features) -> Iterator[slice]:
    """Yield chunks of queries, at most `CHUNK_PAIRS` pairs with the database but at least one query each."""
    rows = max(1, CHUNK_PAIRS // len(parts.database))
    for start in range(0, len(parts.query), rows):
        yield slice(start, start + rows)


def _cosine(parts: _Features, bits: int) -> _Ranker:
    lengths = np.maximum(np.linalg.norm(parts.database, axis=1), np.finfo(np.float32).tiny)
    return _Distances(
        parts.database.shape[1] * parts.database.itemsize, lambda query: -(unit(query) @ parts.database.T) / lengths
    )


def _sign(parts: _Features, bits: int) -> _Ranker:
    return _binary(parts, lambda centred: centred)


def _sign_truncated(parts: _Features, bits: int) -> _Ranker | str:
    if bits > len(parts.mean):
        return f"{bits} bits are more than the {len(parts.mean)} features"
    return _binary(parts, lambda centred: centred[:, :bits])


def _lsh(parts: _Features, bits: int) -> _Ranker:
    return _binary(parts, _onto(random_directions(bits, len(parts.mean), parts.seed)))


def _pca_sign(parts: _Features, bits: int) -> _Ranker | str:
    directions = parts.principal_directions(bits)
    return directions if isinstance(directions, str) else _binary(parts, _onto(directions))


def _itq(parts: _Features, bits: int) -> _Ranker | str:
    directions = parts.principal_directions(bits)
    if isinstance(directions, str):
        return directions
    rotation = itq_rotation(_onto(directions)(parts.train), parts.seed)
    return _binary(parts, _onto(rotation.T @ directions))


def _pq(parts: _Features, bits: int) -> _Ranker | str:
    if bits % 8:
        return f"{bits} bits are not a whole number of bytes, one per subspace"
    if bits // 8 > len(parts.mean):
        return f"{bits // 8} subspaces are more than the {len(parts.mean)} features"
    if len(parts.train) < PQ_CENTROIDS:
        return f"{len(parts.train)} training images are fewer than the {PQ_CENTROIDS} centroids of a subspace"
    import faiss

    num_subspaces = bits // 8
    # Subspaces have equal width; columns of zeros fill the last one and change no distance.
    padding = ((0, 0), (0, -len(parts.mean) % num_subspaces))
    quantizer: Any = faiss.ProductQuantizer(len(parts.mean) + padding[1][1], num_subspaces, 8)
    quantizer.cp.seed = parts.seed
    # Without this, faiss warns about few training rows for each subspace.
    quantizer.cp.min_points_per_centroid = 1
    quantizer.train(np.pad(parts.train, padding))
    codes = np.concatenate([quantizer.compute_codes(np.pad(rows, padding)) for rows in _centred_chunks(parts)])
    # Computed once per distinct code, so that equal codes have exactly equal distances.
    distinct, inverse = np.unique(codes, axis=0, return_inverse=True)
    centres = quantizer.decode(distinct)
    lengths = (centres**2).sum(1)

    def distances(query: Rows) -> npt.NDArray[Any]:
        products = np.pad(parts.centred(query), padding) @ centres.T
        to_items: npt.NDArray[Any] = (lengths - 2 * products)[:, inverse.ravel()]
        return to_items

    return _Distances(num_subspaces, distances)


# In the order of the report: float features, codes of more bytes than the learned code, codes of as many bytes.
BASELINES: dict[str, Callable[[_Features, int], _Ranker | str]] = {
    "cosine": _cosine,
    "sign": _sign,
    "sign_truncated": _sign_truncated,
    "lsh": _lsh,
    "pca_sign": _pca_sign,
    "itq": _itq,
    "pq": _pq,
}


def _binary(parts: _Features, project: Callable[[Rows], Rows]) -> _Codes:
    """Return the signs of the projected rows."""
    database = [pack(project(rows) >= 0) for rows in _centred_chunks(parts)]
    query = [pack(project(parts.centred(parts.query[rows])) >= 0) for rows in _chunks(parts)]
    return _Codes(np.concatenate(query), np.concatenate(database))


def _onto(directions: Matrix) -> Callable[[Rows], Rows]:
    """Return the projection of centred rows [N, D] onto directions [K, D]."""
    matrix = directions.T.astype(np.float32)
    return lambda rows: rows @ matrix


def _centred_chunks(parts: _Features) -> Iterator[Rows]:
    for start in range(0, len(parts.database), _CHUNK_ROWS):
        yield parts.centred(parts.database[start : start + _CHUNK_ROWS])


def _check(features: Mapping[str, Rows], labels: Mapping[str, Labels]) -> None:
    for part in ("train", "query", "database"):
        rows = features[part]
        if rows.dtype != np.float32 or rows.ndim != 2 or rows.shape[1] != features["train"].shape[1] or not len(rows):
            shapes = ", ".join(f"{name} {rows.dtype} {rows.shape}" for name, rows in features.items())
            raise InputError(f"features must be float32 [N, D] with the same D for every part, got {shapes}")
        if not np.isfinite(rows).all():
            raise InputError(f"the features of {part} contain values that are not finite")
    for part in ("query", "database"):
        check_labels(labels[part], len(features[part]), f"{part} labels")
    if not labelled(labels["query"]).all():
        raise InputError("every query needs a label; remove queries without one")
