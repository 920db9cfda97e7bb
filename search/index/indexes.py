"""FAISS indexes over the distinct codes of a segment, by name.

"flat" is exact: it compares a query with every code; "gpu-flat" is the same on a GPU and requires faiss-gpu. "ivf" and
"hnsw" are approximate: they compare a query with some of the codes, so they can miss hits, and answers depend on the
number of shards and segments. They are built with each segment, which takes long.
"""

from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from orbithash.encoders.codes import Codes
from orbithash.encoders.errors import InputError

__all__ = ["INDEXES", "CodeIndex", "Near", "Within", "build_index", "range_search"]

Distances = npt.NDArray[np.int32]
Numbers = npt.NDArray[np.int64]

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
        return range_search(self._flat, queries, radius)

    def is_quick_within(self, radius: int) -> bool:
        return False


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
        return range_search(self._index, queries, radius)

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
    "ivf": _Ivf,
    "hnsw": _Hnsw,
    "gpu-flat": _GpuFlat,
}


def build_index(name: str, codes: Codes) -> CodeIndex:
    """Return the index of this name, one of `INDEXES`, over distinct codes uint8 [N, B]."""
    return INDEXES[name](codes)


def _one_thread() -> None:
    """Limit FAISS to one OpenMP thread. OpenMP stores the limit per calling thread, so each search sets it.

    Searches run side by side on all cores; waiting for each other at barriers would cost more than it gains.
    """
    import faiss

    faiss.omp_set_num_threads(1)


def range_search(index: Any, queries: Codes, radius: int) -> Within:
    """Return the codes at most `radius` bits from each query, found by an index of FAISS."""
    _one_thread()
    # The radius of FAISS is exclusive.
    limits, distances, numbers = index.range_search(queries, radius + 1)
    return Within(limits.astype(np.int64), distances.astype(np.int32), numbers)
