"""What simple methods make of the same features: the figures a learned code has to beat.

Every baseline gets the features of one frozen backbone, is fitted on the training part alone and ranks the same
database for the same queries. Rows are scaled to length 1 first, so that all of them approximate the cosine:

- `cosine`: the float features themselves, the most that any code of them can be expected to keep;
- `sign`: the sign of every dimension, less the mean of the training part; more bytes than the code;
- `sign_truncated`: the first `bits` of those;
- `lsh`: the signs of `bits` Gaussian projections (Charikar 2002);
- `pca_sign`: the signs of the first `bits` principal components;
- `itq`: the same components after the rotation that loses least by taking signs, 50 iterations (Gong and Lazebnik
  2011);
- `pq`: product quantisation, a byte for each of `bits / 8` pieces, the query not quantised (Jegou et al. 2011).

Items at equal distance tie, and the tie-aware expectation is taken over them as for codes. Float distances hardly ever
tie.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from orbithash.encoders.codes import check_bits, hamming, pack
from orbithash.encoders.errors import InputError
from orbithash.trainers.metrics.average_precision import Histograms, average_precision, hits_at
from orbithash.trainers.metrics.metrics import DEFINITIONS
from orbithash.trainers.metrics.retrieval import CHUNK_PAIRS, Labels, check_labels, labelled, shared_labels

__all__ = ["BASELINES", "distance_histograms", "evaluate_baselines", "itq_rotation"]

Rows = npt.NDArray[np.float32]

ITQ_ITERATIONS = 50
# Centroids of one piece: a byte's worth.
PQ_CENTROIDS = 256
# Rows projected at once.
_CHUNK_ROWS = 16_384


class _Features:
    """The features of the three parts, and the two forms in which baselines see a few rows of them at a time."""

    def __init__(self, train: Rows, query: Rows, database: Rows, seed: int) -> None:
        self.query, self.database, self.seed = query, database, seed
        self.mean = unit(train).mean(0, dtype=np.float64).astype(np.float32)
        self.train = self.centred(train)

    def centred(self, rows: Rows) -> Rows:
        """Rows of length 1 less the mean of the training part's."""
        centred: Rows = unit(rows) - self.mean
        return centred


@dataclass(frozen=True)
class _Ranker:
    """A fitted baseline: bytes an item, and the distances [q, N] from some queries float32 [q, D] to the database."""

    bytes: int
    distances: Callable[[Rows], npt.NDArray[Any]]


def evaluate_baselines(
    features: Mapping[str, Rows],
    labels: Mapping[str, Labels],
    bits: int,
    exclude: npt.NDArray[np.integer] | None = None,
    seed: int = 0,
    cutoffs: Sequence[int] = (20, 100),
) -> dict[str, dict[str, Any]]:
    """Figures of every baseline.

    Args:
        features: float32 [N, D] of "train", "query" and "database", from one backbone.
        labels: of "query", each with a label, and "database"; see `retrieval`.
        bits: length of the code to compare with.
        exclude: integers [Q], what each query leaves out of its ranking; see `Retrieval`.
        seed: of the projections, the rotation and the centroids.
        cutoffs: the k of average precision.

    Returns:
        {name: {"bytes": bytes an item, "metrics": {"ap_min@20": mean over the queries, …}}}, or, for a baseline that
        these features or this length do not allow, {name: {"left_out": why}}.

    Raises:
        InputError: features or labels that do not fit each other.
    """
    check_bits(bits)
    _check(features, labels)
    parts = _Features(features["train"], features["query"], features["database"], seed)
    found: dict[str, dict[str, Any]] = {}
    for name, fit in BASELINES.items():
        ranker = fit(parts, bits)
        if isinstance(ranker, str):
            found[name] = {"left_out": ranker}
        else:
            chunks = _histograms(ranker, parts, labels, exclude)
            found[name] = {"bytes": ranker.bytes, "metrics": _means(chunks, cutoffs)}
    return found


def unit(rows: Rows) -> Rows:
    """Rows scaled to length 1; a row of zeros stays."""
    scaled: Rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return scaled


def distance_histograms(distances: npt.NDArray[Any], relevant: npt.NDArray[np.bool_]) -> Histograms:
    """`Histograms` of distances of any kind [Q, N] and relevance bool [Q, N]; what is infinitely far is left out.

    Neighbouring distances at which all items are relevant, or none is, share a column: their order changes no figure,
    and there are far fewer columns than distances.
    """
    rows = [_compact(*pair) for pair in zip(distances, relevant, strict=True)]
    counts = np.zeros((2, len(rows), max(1, *(row.shape[1] for row in rows))), np.int64)
    for i, row in enumerate(rows):
        counts[:, i, : row.shape[1]] = row
    return Histograms(counts[0], counts[1])


def _compact(distances: npt.NDArray[Any], relevant: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Items and relevant items of one query, int64 [2, G], nearest first."""
    order = np.argsort(distances, kind="stable")
    sorted_distances = distances[order]
    if np.issubdtype(distances.dtype, np.floating):
        order = order[: np.searchsorted(sorted_distances, np.inf)]
        sorted_distances = sorted_distances[: len(order)]
    if not len(order):
        return np.zeros((2, 0), np.int64)
    counts = np.stack([np.ones(len(order), np.int64), relevant[order].astype(np.int64)])
    starts = np.flatnonzero(np.concatenate([[True], sorted_distances[1:] != sorted_distances[:-1]]))
    counts = np.add.reduceat(counts, starts, axis=1)
    items, hits = counts
    mixed = (hits > 0) & (hits < items)
    begins = np.concatenate([[True], (hits[1:] > 0) != (hits[:-1] > 0)]) | mixed
    begins[1:] |= mixed[:-1]
    merged: npt.NDArray[np.int64] = np.add.reduceat(counts, np.flatnonzero(begins), axis=1)
    return merged


def _histograms(
    ranker: _Ranker, parts: _Features, labels: Mapping[str, Labels], exclude: npt.NDArray[np.integer] | None
) -> Iterator[Histograms]:
    rows = max(1, CHUNK_PAIRS // len(parts.database))
    for start in range(0, len(parts.query), rows):
        queries = slice(start, start + rows)
        distances = ranker.distances(parts.query[queries]).astype(np.float32)
        if exclude is not None:
            left_out = exclude[queries]
            found = np.flatnonzero(left_out >= 0)
            distances[found, left_out[found]] = np.inf
        yield distance_histograms(distances, shared_labels(labels["query"][queries], labels["database"]) > 0)


def _means(histograms: Iterator[Histograms], cutoffs: Sequence[int]) -> dict[str, float]:
    measures = [(d, k) for k in dict.fromkeys(cutoffs) for d in DEFINITIONS]
    values: dict[str, list[npt.NDArray[np.float64]]] = {}
    for chunk in histograms:
        for definition, k in [*measures, ("ap_min", None)]:
            values.setdefault(f"{definition}@{k or 'all'}", []).append(average_precision(chunk, k, definition))
        for k in dict.fromkeys((1, *cutoffs)):
            values.setdefault(f"precision@{k}", []).append(hits_at(chunk, k) / k)
    return {name: float(np.concatenate(of_queries).mean()) for name, of_queries in values.items()}


def _cosine(parts: _Features, bits: int) -> _Ranker:
    lengths = np.maximum(np.linalg.norm(parts.database, axis=1), np.finfo(np.float32).tiny)
    return _Ranker(
        parts.database.shape[1] * parts.database.itemsize, lambda query: -(unit(query) @ parts.database.T) / lengths
    )


def _sign(parts: _Features, bits: int) -> _Ranker:
    return _binary(parts, lambda centred: centred)


def _sign_truncated(parts: _Features, bits: int) -> _Ranker | str:
    if bits > len(parts.mean):
        return f"{bits} bits are more than the {len(parts.mean)} features"
    return _binary(parts, lambda centred: centred[:, :bits])


def _lsh(parts: _Features, bits: int) -> _Ranker:
    shape = len(parts.mean), bits
    directions = np.random.default_rng(parts.seed).standard_normal(shape, np.float32)
    return _binary(parts, lambda centred: centred @ directions)


def _pca_sign(parts: _Features, bits: int) -> _Ranker | str:
    components = _principal_components(parts, bits)
    return components if isinstance(components, str) else _binary(parts, components)


def _itq(parts: _Features, bits: int) -> _Ranker | str:
    components = _principal_components(parts, bits)
    if isinstance(components, str):
        return components
    rotation = itq_rotation(components(parts.train), parts.seed)
    return _binary(parts, lambda centred: components(centred) @ rotation)


def itq_rotation(rows: Rows, seed: int) -> Rows:
    """The rotation float32 [K, K] that brings rows float32 [N, K] nearest to their signs, from a random start.

    By turns the signs are taken and the rotation is solved for (orthogonal Procrustes). faiss.ITQMatrix is not used:
    its loss (1.15) does not fall from iteration to iteration and ends above what this reaches.
    """
    num_bits = rows.shape[1]
    rotation = np.linalg.qr(np.random.default_rng(seed).standard_normal((num_bits, num_bits)))[0].astype(np.float32)
    for _ in range(ITQ_ITERATIONS):
        signs = np.where(rows @ rotation >= 0, np.float32(1), np.float32(-1))
        left, _, right = np.linalg.svd(rows.T @ signs)
        rotation = left @ right
    return rotation


def _pq(parts: _Features, bits: int) -> _Ranker | str:
    if bits % 8:
        return f"{bits} bits are no whole number of bytes, of which each quantises one piece"
    if bits // 8 > len(parts.mean):
        return f"{bits // 8} pieces are more than the {len(parts.mean)} features"
    if len(parts.train) < PQ_CENTROIDS:
        return f"{len(parts.train)} training images are fewer than the {PQ_CENTROIDS} centroids of a byte"
    import faiss

    num_pieces = bits // 8
    # Pieces are of one length: columns of zeros fill the last and move no distance.
    padding = ((0, 0), (0, -len(parts.mean) % num_pieces))
    quantizer: Any = faiss.ProductQuantizer(len(parts.mean) + padding[1][1], num_pieces, 8)
    quantizer.cp.seed = parts.seed
    # Fewer than faiss would like are what there is; it says so for each piece.
    quantizer.cp.min_points_per_centroid = 1
    quantizer.train(np.pad(parts.train, padding))
    codes = np.concatenate([quantizer.compute_codes(np.pad(rows, padding)) for rows in _centred_chunks(parts)])
    # Equal codes get the very same distance: each is computed once.
    distinct, places = np.unique(codes, axis=0, return_inverse=True)
    centres = quantizer.decode(distinct)
    lengths = (centres**2).sum(1)

    def distances(query: Rows) -> npt.NDArray[Any]:
        products = np.pad(parts.centred(query), padding) @ centres.T
        found: npt.NDArray[Any] = (lengths - 2 * products)[:, places.ravel()]
        return found

    return _Ranker(num_pieces, distances)


# From the float features over more bytes than the code to as many as the code.
BASELINES: dict[str, Callable[[_Features, int], _Ranker | str]] = {
    "cosine": _cosine,
    "sign": _sign,
    "sign_truncated": _sign_truncated,
    "lsh": _lsh,
    "pca_sign": _pca_sign,
    "itq": _itq,
    "pq": _pq,
}


def _binary(parts: _Features, project: Callable[[Rows], Rows]) -> _Ranker:
    """Signs of the projected rows, compared by Hamming distance."""
    database = np.concatenate([pack(project(rows) >= 0) for rows in _centred_chunks(parts)])
    return _Ranker(database.shape[1], lambda query: hamming(pack(project(parts.centred(query)) >= 0), database))


def _principal_components(parts: _Features, count: int) -> Callable[[Rows], Rows] | str:
    """What projects centred rows onto the first `count` principal components of the training part."""
    num_rows, num_features = parts.train.shape
    if count > num_features:
        return f"{count} bits are more than the {num_features} features"
    if count >= num_rows:
        return f"{num_rows} training images span fewer than {count} dimensions"
    import faiss

    components = faiss.PCAMatrix(num_features, count)
    components.train(parts.train)
    return lambda rows: components.apply(rows)


def _centred_chunks(parts: _Features) -> Iterator[Rows]:
    for start in range(0, len(parts.database), _CHUNK_ROWS):
        yield parts.centred(parts.database[start : start + _CHUNK_ROWS])


def _check(features: Mapping[str, Rows], labels: Mapping[str, Labels]) -> None:
    for part in ("train", "query", "database"):
        rows = features[part]
        if rows.dtype != np.float32 or rows.ndim != 2 or rows.shape[1] != features["train"].shape[1] or not len(rows):
            shapes = ", ".join(f"{name} {rows.dtype} {rows.shape}" for name, rows in features.items())
            raise InputError(f"features are float32 [N, D] of one D for every part, got {shapes}")
        if not np.isfinite(rows).all():
            raise InputError(f"the features of {part} hold values that are not finite")
    for part in ("query", "database"):
        check_labels(labels[part], len(features[part]), f"{part} labels")
    if not labelled(labels["query"]).all():
        raise InputError("every query needs a label; leave out those that have none")
