"""`bench rescore`: how much of the float ranking rescoring a shortlist of codes brings back, at which bytes a row.

The truth is the k rows of the largest cosine, of float32 vectors; vectors are read or generated in chunks and never all
in memory. A shortlist has the first ceil(k * oversampling) rows by Hamming distance and all that tie with the last, as
in a search. The rival is RaBitQ of FAISS (one bit for each dimension and two floats a row), by its own ranking and with
its shortlist rescored by the same stored vectors.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from orbithash.cluster.bench.report import environment, print_table, show, write_results
from orbithash.cluster.output import say, track
from orbithash.encoders.codes import Codes, check_bits, hamming, num_bytes, pack
from orbithash.encoders.errors import InputError
from orbithash.encoders.vectors import cosine_scores

__all__ = ["OVERSAMPLINGS", "RescoreBench", "bench_rescore", "show_rescore"]

K = 10
OVERSAMPLINGS = (1, 2, 4, 8, 16, 32, 64)
# Recall at this oversampling, with codes of this length, that the measurement is compared with.
TARGET, TARGET_OVERSAMPLING, TARGET_BITS = 0.97, 8, 128

CHUNK_ROWS = 50_000
# Rows to which means, directions, rotations and the projection are fitted: the first ones.
FITTED_ROWS = 20_000

# The generated vectors: a mixture of Gaussians in a random subspace of the intrinsic dimension, with isotropic noise.
NUM_CLUSTERS, WITHIN, NOISE = 1000, 0.5, 0.01

Rows = npt.NDArray[np.float32]
Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RescoreBench:
    """Settings of `bench rescore`.

    Attributes:
        rows, dims, intrinsic: number, dimensions and intrinsic dimension of generated vectors.
        bits: length of the ITQ codes.
        vector_dims: dimensions of the stored vectors.
        queries: number of queries, which are not among the rows.
        embeddings: .npy file of vectors [N, D] to use in place of generated ones; `rows` and `dims` are then ignored.
    """

    rows: int = 1_000_000
    dims: int = 768
    intrinsic: int = 32
    bits: int = TARGET_BITS
    vector_dims: int = 64
    queries: int = 200
    embeddings: Path | None = None

    def check(self) -> None:
        """Raise `InputError` for an invalid setting."""
        check_bits(self.bits)
        for name, value, least in (
            ("--rows", self.rows, 100),
            ("--dims", self.dims, 2),
            ("--intrinsic", self.intrinsic, 1),
            ("--vector-dims", self.vector_dims, 1),
            ("--queries", self.queries, 1),
        ):
            if value < least:
                raise InputError(f"{name} is {value}; at least {least} is needed")
        if self.embeddings is None and self.intrinsic > self.dims:
            raise InputError(f"--intrinsic is {self.intrinsic}, more than --dims {self.dims}")


def _read(path: Path) -> npt.NDArray[Any]:
    """Return the vectors [N, D] of a .npy file, mapped into memory."""
    try:
        vectors: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a .npy file that can be read ({error})") from error
    if vectors.ndim != 2 or not np.issubdtype(vectors.dtype, np.floating):
        raise InputError(f"{path}: float [N, D] is needed, got {vectors.dtype} {vectors.shape}")
    return vectors


class _Source:
    """The queries [Q, D], and the rows in chunks, the same at every pass. All are of unit length."""

    def __init__(self, settings: RescoreBench) -> None:
        from orbithash.trainers.methods.label_free.projections import unit

        self._unit, self._settings = unit, settings
        if settings.embeddings is None:
            rng = np.random.default_rng(0)
            basis = np.linalg.qr(rng.standard_normal((settings.dims, settings.intrinsic)))[0]
            self._basis = basis.T.astype(np.float32)
            self._centres = rng.standard_normal((NUM_CLUSTERS, settings.intrinsic)).astype(np.float32)
            self.num_rows, self.dims = settings.rows, settings.dims
            self.queries = self._generated(settings.queries, seed=-1)
            self.name = (
                f"mixture of {NUM_CLUSTERS} Gaussians in {settings.intrinsic} of {settings.dims} dimensions, seed 0"
            )
        else:
            self._file = _read(settings.embeddings)
            self.num_rows, self.dims = len(self._file) - settings.queries, self._file.shape[1]
            if self.num_rows < K * max(OVERSAMPLINGS):
                raise InputError(
                    f"{settings.embeddings} has {len(self._file)} vectors; {K * max(OVERSAMPLINGS)} and "
                    f"{settings.queries} queries are needed; give a larger file or fewer --queries"
                )
            chosen = np.random.default_rng(0).permutation(len(self._file))
            self._rows = np.sort(chosen[settings.queries :])
            self.queries = unit(np.asarray(self._file[np.sort(chosen[: settings.queries])], np.float32))
            self.name = settings.embeddings.name

    def chunks(self) -> Iterator[tuple[int, Rows]]:
        """Yield the number of the first row, and the rows, of each chunk."""
        for start in range(0, self.num_rows, CHUNK_ROWS):
            stop = min(start + CHUNK_ROWS, self.num_rows)
            if self._settings.embeddings is None:
                yield start, self._generated(stop - start, seed=start)
            else:
                yield start, self._unit(np.asarray(self._file[self._rows[start:stop]], np.float32))

    def _generated(self, count: int, seed: int) -> Rows:
        rng = np.random.default_rng([1, seed + 1])
        clusters = rng.integers(0, NUM_CLUSTERS, count)
        inner = self._centres[clusters] + WITHIN * rng.standard_normal((count, self._settings.intrinsic), np.float32)
        return self._unit(inner @ self._basis + NOISE * rng.standard_normal((count, self.dims), np.float32))


@dataclass
class _Method:
    """Codes of the rows and the queries, and how one query's shortlist is scored again.

    Attributes:
        make: rows float32 [N, D] to codes uint8 [N, B].
        num_bytes: bytes of a row: its code and its stored vector.
        codes: of all rows.
    """

    make: Callable[[Rows], Codes]
    num_bytes: int
    codes: Codes
    recalls: dict[int, list[float]] = field(default_factory=lambda: {o: [] for o in OVERSAMPLINGS})
    sizes: dict[int, list[int]] = field(default_factory=lambda: {o: [] for o in OVERSAMPLINGS})


def bench_rescore(settings: RescoreBench, out: Path | None = None) -> dict[str, Any]:
    """Measure and return the result; with `out`, write results.json and a plot there."""
    settings.check()
    source = _Source(settings)
    result = {
        **environment("rescore", "orbithash", "faiss-cpu", "numpy"),
        "vectors": source.name,
        "rows": source.num_rows,
        "dims": source.dims,
        "queries": len(source.queries),
        "vector_dims": settings.vector_dims,
        **_measure(settings, source),
    }
    if out is not None:
        from orbithash.cluster.bench.plots import recall_over_oversampling

        write_results(result, out)
        recall_over_oversampling(result["methods"], result["limit"], out / "rescore.png")
    return result


def show_rescore(result: dict[str, Any], as_json: bool) -> None:
    """Print a result as JSON or as a table."""
    if as_json:
        show(result, True)
        return
    show({name: value for name, value in result.items() if name != "methods"}, False)
    columns = ("method", "bytes/row", *(f"x{oversampling}" for oversampling in OVERSAMPLINGS))
    rows = [
        (name, str(each["bytes"]), *(f"{each['recall'][str(oversampling)]:.4f}" for oversampling in OVERSAMPLINGS))
        for name, each in result["methods"].items()
    ]
    print_table(columns, rows, width=120)
    print(f"recall@{K} against the float cosine, by oversampling; limit: the stored vectors rank all rows")


def _measure(settings: RescoreBench, source: _Source) -> dict[str, Any]:
    import faiss
    import torch

    from orbithash.encoders.networks.projection import Projection

    sample = next(source.chunks())[1][:FITTED_ROWS]
    say("fitting")
    projection = Projection.fit(torch.from_numpy(sample), settings.vector_dims)

    def quantised(rows: Rows) -> npt.NDArray[np.int8]:
        vectors: npt.NDArray[np.int8] = projection.quantise(torch.from_numpy(rows)).numpy()
        return vectors

    dims = projection.spec.dims
    methods = {
        name: _Method(make, width + dims, np.empty((source.num_rows, width), np.uint8))
        for name, (make, width) in _codes_of(sample, settings.bits).items()
    }
    rabitq: Any = faiss.IndexRaBitQ(source.dims, faiss.METRIC_INNER_PRODUCT)
    rabitq.train(sample)
    vectors = np.empty((source.num_rows, dims), np.int8)
    truth = _Nearest(len(source.queries))
    with track("reading", source.num_rows, "rows") as advance_to:
        for start, rows in source.chunks():
            truth.add(source.queries @ rows.T, start)
            vectors[start : start + len(rows)] = quantised(rows)
            for method in methods.values():
                method.codes[start : start + len(rows)] = method.make(rows)
            rabitq.add(rows)
            advance_to(start + len(rows), "")
    queries = quantised(source.queries)
    best = _Nearest(len(queries))
    for start in range(0, source.num_rows, CHUNK_ROWS):
        rows = vectors[start : start + CHUNK_ROWS].astype(np.float32)
        lengths = np.maximum(np.linalg.norm(rows, axis=1), 1)
        best.add(queries.astype(np.float32) @ rows.T / lengths, start)
    limit = [len(np.intersect1d(*pair)) / K for pair in zip(best.numbers, truth.numbers, strict=True)]
    with track("searching", len(queries), "queries") as advance_to:
        encoded = {name: method.make(source.queries) for name, method in methods.items()}
        for query, nearest in enumerate(truth.numbers):
            for name, method in methods.items():
                distances = hamming(encoded[name][query : query + 1], method.codes)[0]
                for oversampling, shortlist in _shortlists(distances):
                    method.recalls[oversampling].append(_recall(nearest, shortlist, queries[query], vectors))
                    method.sizes[oversampling].append(len(shortlist))
            advance_to(query + 1, "")
    say("RaBitQ")
    _, found = rabitq.search(source.queries, K * max(OVERSAMPLINGS))
    own = [len(np.intersect1d(row[:K], nearest)) / K for row, nearest in zip(found, truth.numbers, strict=True)]
    results: dict[str, dict[str, Any]] = {
        name: {
            "bytes": method.num_bytes,
            "recall": {str(o): float(np.mean(values)) for o, values in method.recalls.items()},
            "shortlist": {str(o): float(np.mean(sizes)) for o, sizes in method.sizes.items()},
        }
        for name, method in methods.items()
    }
    results["RaBitQ alone"] = {
        "bytes": rabitq.code_size,
        "recall": {str(oversampling): float(np.mean(own)) for oversampling in OVERSAMPLINGS},
    }
    results["RaBitQ"] = {"bytes": rabitq.code_size + dims, "recall": {}}
    for oversampling in OVERSAMPLINGS:
        each = zip(truth.numbers, found[:, : K * oversampling], queries, strict=True)
        recalls = [_recall(nearest, shortlist, query, vectors) for nearest, shortlist, query in each]
        results["RaBitQ"]["recall"][str(oversampling)] = float(np.mean(recalls))
    return {
        "limit": float(np.mean(limit)),
        "target": _verdict(results[f"ITQ {settings.bits} bits"]["recall"], settings.bits),
        "methods": results,
    }


def _codes_of(sample: Rows, bits: int) -> Mapping[str, tuple[Callable[[Rows], Codes], int]]:
    """Return by name how rows become codes, and the bytes of a code; fitted to a sample."""
    from orbithash.trainers.methods.label_free.projections import itq_rotation, mean_row, principal_directions

    mean = mean_row(sample).astype(np.float32)
    directions = principal_directions(sample - mean, bits).T.astype(np.float32)
    inner: Rows = ((sample - mean) @ directions).astype(np.float32)
    rotated = directions @ itq_rotation(inner, seed=0).astype(np.float32)
    length = rotated.shape[1]
    return {
        f"ITQ {length} bits": (lambda rows: pack((rows - mean) @ rotated >= 0), num_bytes(length)),
        f"signs of all {sample.shape[1]}": (lambda rows: pack(rows >= mean), num_bytes(sample.shape[1])),
    }


class _Nearest:
    """The rows of the largest scores of each query: `numbers` int64 [Q, K]."""

    def __init__(self, num_queries: int) -> None:
        self._scores = np.full((num_queries, K), -np.inf, np.float32)
        self.numbers: Numbers = np.zeros((num_queries, K), np.int64)

    def add(self, scores: npt.NDArray[np.float32], start: int) -> None:
        """Take the scores [Q, N] of rows `start` and following into account."""
        best = np.argpartition(-scores, min(K, scores.shape[1] - 1), axis=1)[:, :K]
        joined = np.concatenate([self._scores, np.take_along_axis(scores, best, 1)], axis=1)
        numbers = np.concatenate([self.numbers, best + start], axis=1)
        order = np.argsort(-joined, axis=1, kind="stable")[:, :K]
        self._scores, self.numbers = (np.take_along_axis(values, order, 1) for values in (joined, numbers))


def _shortlists(distances: npt.NDArray[np.int32]) -> Iterator[tuple[int, Numbers]]:
    """Yield each oversampling and the rows of its shortlist, with all that tie with the last."""
    covered = np.bincount(distances).cumsum()
    for oversampling in OVERSAMPLINGS:
        radius = int(covered.searchsorted(min(K * oversampling, len(distances))))
        yield oversampling, np.flatnonzero(distances <= radius)


def _recall(nearest: Numbers, shortlist: Numbers, query: npt.NDArray[np.int8], vectors: npt.NDArray[np.int8]) -> float:
    """Return the share of the nearest rows among the first K of a shortlist in the order of its scores."""
    scores = cosine_scores(query, vectors[shortlist])
    best = shortlist[np.lexsort((shortlist, -scores))[:K]]
    return len(np.intersect1d(best, nearest)) / K


def _verdict(recall: Mapping[str, float], bits: int) -> str:
    reached = recall[str(TARGET_OVERSAMPLING)]
    if bits != TARGET_BITS:
        return f"none for {bits} bits"
    return f"{reached:.4f} at x{TARGET_OVERSAMPLING}, {'at least' if reached >= TARGET else 'below'} {TARGET}"
