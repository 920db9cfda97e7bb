"""FAISS indexes over the distinct codes of a shard, by name.

"flat" and "multi-hash" are exact: "flat" compares a query with every code, "multi-hash" answers small radii from hash
tables and everything else as "flat". "ivf" and "hnsw" are approximate: they compare a query with some of the codes, so
they can miss hits, and answers depend on the number of shards. An index cannot be updated: it is built again after each
change of the rows and for each filter, which takes long for "ivf" and "hnsw". "gpu-flat" is "flat" on a GPU and
requires faiss-gpu.
"""

from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from orbithash.encoders.codes import Codes
from orbithash.encoders.errors import InputError

__all__ = ["INDEXES", "CodeIndex", "Near", "Within", "build_index", "is_exact_index"]

Distances = npt.NDArray[np.int32]
Numbers = npt.NDArray[np.int64]

# Multi-index hashing: limits on the bits of a part, whose table has up to 2^bits buckets, and the number of flipped
# bits that a search tries in each part.
_MIN_PART_BITS, _MAX_PART_BITS, _FLIPS = 8, 24, 1

# Number of lists of "ivf", as a multiple of the square root of the number of codes, and the share that a query probes.
_LISTS_PER_ROOT, _PROBED_SHARE = 1.0, 1 / 16

# Links per code in the graph of "hnsw", and the number of candidates that a query keeps.
_LINKS, _CANDIDATES = 32, 256

# Largest k of the selection kernel of FAISS on a GPU.
_MAX_GPU_K = 2048


class Near(NamedTuple):
    """Nearest codes of Q queries: distances int32 [Q, k], ascending, and code numbers int64 [Q, k] (-1: no code)."""

    distances: Distances
    numbers: Numbers


class Within(NamedTuple):
    """Codes near each of Q queries, concatenated: query q has those from limits[q] to limits[q + 1], in any order."""

    limits: Numbers
    distances: Distances
    numbers: Numbers


class CodeIndex(Protocol):
    """Index over distinct codes, numbered from 0 in input order. A search uses only the calling thread."""

    is_exact: bool

    def nearest(self, queries: Codes, k: int) -> Near:
        """Return the `k` nearest codes of each query uint8 [Q, B]; k is at most the number of codes."""

    def within(self, queries: Codes, radius: int) -> Within:
        """Return the codes at most `radius` bits from each query uint8 [Q, B]."""

    def is_quick_within(self, radius: int) -> bool:
        """Return whether `within` is faster than `nearest` for queries of this radius."""


class _Flat:
    """Linear scan of all codes."""

    is_exact = True

    def __init__(self, codes: Codes) -> None:
        import faiss

        self._flat = faiss.IndexBinaryFlat(8 * codes.shape[1])
        self._flat.add(codes)

    def nearest(self, queries: Codes, k: int) -> Near:
        _one_thread()
        return Near(*self._flat.search(queries, k))

    def within(self, queries: Codes, radius: int) -> Within:
        return _range_search(self._flat, queries, radius)

    def is_quick_within(self, radius: int) -> bool:
        return False


class _MultiHash(_Flat):
    """Multi-index hashing (Norouzi et al., CVPR 2012) for small radii, a linear scan for other queries.

    Codes are cut into parts. A code at distance r from the query differs from it in at most r // parts bits of at least
    one part. Each part has a hash table; searched with up to `_FLIPS` flipped bits, the tables together contain every
    code up to distance `_reach`.
    """

    def __init__(self, codes: Codes) -> None:
        import faiss

        super().__init__(codes)
        bits = 8 * codes.shape[1]
        part_bits = max(_MIN_PART_BITS, min(_MAX_PART_BITS, int(np.log2(max(2, len(codes))))))
        num_parts = max(1, bits // part_bits)
        self._tables = faiss.IndexBinaryMultiHash(bits, num_parts, min(part_bits, bits // num_parts))
        self._tables.nflip = _FLIPS
        self._tables.add(codes)
        self._reach = num_parts * (_FLIPS + 1) - 1

    def within(self, queries: Codes, radius: int) -> Within:
        return _range_search(self._tables if self.is_quick_within(radius) else self._flat, queries, radius)

    def is_quick_within(self, radius: int) -> bool:
        return bool(radius <= self._reach)


class _Ivf:
    """Inverted lists: each code is in the list of its nearest centre; a query scans the lists of the nearest ones."""

    is_exact = False

    def __init__(self, codes: Codes) -> None:
        import faiss

        _one_thread()
        bits, num_lists = 8 * codes.shape[1], max(1, int(_LISTS_PER_ROOT * len(codes) ** 0.5))
        self._centres = faiss.IndexBinaryFlat(bits)
        self._index = faiss.IndexBinaryIVF(self._centres, bits, num_lists)
        # FAISS recommends 39 codes per list and warns if there are fewer.
        self._index.cp.min_points_per_centroid = 1
        self._index.nprobe = max(1, round(num_lists * _PROBED_SHARE))
        if len(codes):
            self._index.train(codes)
            self._index.add(codes)

    def nearest(self, queries: Codes, k: int) -> Near:
        _one_thread()
        return Near(*self._index.search(queries, k))

    def within(self, queries: Codes, radius: int) -> Within:
        return _range_search(self._index, queries, radius)

    def is_quick_within(self, radius: int) -> bool:
        return True


class _Hnsw:
    """Hierarchical navigable small-world graph of codes."""

    is_exact = False

    def __init__(self, codes: Codes) -> None:
        import faiss

        _one_thread()
        self._index = faiss.IndexBinaryHNSW(8 * codes.shape[1], _LINKS)
        self._index.hnsw.efSearch = _CANDIDATES
        self._index.add(codes)

    def nearest(self, queries: Codes, k: int) -> Near:
        _one_thread()
        return Near(*self._index.search(queries, k))

    def within(self, queries: Codes, radius: int) -> Within:
        """Return the candidates within the radius: the graph has no range search."""
        near = self.nearest(queries, min(_CANDIDATES, self._index.ntotal))
        found = (near.numbers >= 0) & (near.distances <= radius)
        limits = np.concatenate([[0], np.cumsum(found.sum(axis=1))])
        return Within(limits, near.distances[found], near.numbers[found])

    def is_quick_within(self, radius: int) -> bool:
        return False


class _GpuFlat(_Flat):
    """Linear scan on the first GPU; on the CPU for range searches and for k above the kernel's limit."""

    def __init__(self, codes: Codes) -> None:
        import faiss

        super().__init__(codes)
        if not getattr(faiss, "get_num_gpus", lambda: 0)():
            raise InputError("the index gpu-flat requires a GPU and faiss-gpu; choose flat")
        self._resources: Any = faiss.StandardGpuResources()
        self._gpu: Any = faiss.GpuIndexBinaryFlat(self._resources, self._flat)

    def nearest(self, queries: Codes, k: int) -> Near:
        return super().nearest(queries, k) if k > _MAX_GPU_K else Near(*self._gpu.search(queries, k))


INDEXES: dict[str, type[_Flat] | type[_Ivf] | type[_Hnsw]] = {
    "flat": _Flat,
    "multi-hash": _MultiHash,
    "ivf": _Ivf,
    "hnsw": _Hnsw,
    "gpu-flat": _GpuFlat,
}


def build_index(name: str, codes: Codes) -> CodeIndex:
    """Return the index of this name over distinct codes uint8 [N, B]; raise `InputError` for an unknown name."""
    _check_name(name)
    return INDEXES[name](codes)


def is_exact_index(name: str) -> bool:
    """Return whether the index of this name compares a query with every code; `InputError` for an unknown name."""
    _check_name(name)
    return INDEXES[name].is_exact


def _check_name(name: str) -> None:
    if name not in INDEXES:
        raise InputError(f"unknown index {name!r}; there are {', '.join(INDEXES)}")


def _one_thread() -> None:
    """Limit FAISS to one OpenMP thread. OpenMP stores the limit per calling thread, so each search sets it.

    Searches run side by side on all cores; waiting for each other at barriers would cost more than it gains.
    """
    import faiss

    faiss.omp_set_num_threads(1)


def _range_search(index: Any, queries: Codes, radius: int) -> Within:
    _one_thread()
    # The radius of FAISS is exclusive.
    limits, distances, numbers = index.range_search(queries, radius + 1)
    return Within(limits.astype(np.int64), distances.astype(np.int32), numbers)
