"""The FAISS indexes that a shard can keep its distinct codes in, by name.

Two are exact: "flat" compares a query with every code, and "multi-hash" answers small radii from tables of parts of the
codes and everything else as "flat". "ivf" and "hnsw" look at some of the codes only: they may miss hits, so an answer
then depends on how rows are spread over shards. "gpu-flat" is "flat" on a GPU, where faiss-gpu and a GPU are there.
"""

from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from orbithash.encoders.codes import Codes
from orbithash.encoders.errors import InputError

__all__ = ["INDEXES", "CodeIndex", "Near", "Within", "build_index", "is_exact_index"]

Distances = npt.NDArray[np.int32]
Numbers = npt.NDArray[np.int64]

# Multi-index hashing: bits of a part, which has a table of up to 2^bits buckets, and bits flipped of each when asked.
_MIN_PART_BITS, _MAX_PART_BITS, _FLIPS = 8, 24, 1

# Lists of "ivf" for each square root of the number of codes, and the share of them that a query looks at.
_LISTS_PER_ROOT, _PROBED_SHARE = 1.0, 1 / 16

# Links of a code in the graph of "hnsw", and candidates that a query keeps.
_LINKS, _CANDIDATES = 32, 256

# The most that the kernel of FAISS on a GPU can select.
_MAX_GPU_K = 2048


class Near(NamedTuple):
    """The nearest codes of Q queries: distances int32 [Q, k], ascending, and code numbers int64 [Q, k], -1 for none."""

    distances: Distances
    numbers: Numbers


class Within(NamedTuple):
    """The codes near each of Q queries, flat: those of query q lie from limits[q] to limits[q + 1], in any order."""

    limits: Numbers
    distances: Distances
    numbers: Numbers


class CodeIndex(Protocol):
    """Distinct codes, numbered from 0 in the order in which they were given. A search uses the calling thread only."""

    is_exact: bool

    def nearest(self, queries: Codes, k: int) -> Near:
        """The `k` nearest codes of each query uint8 [Q, B]; k is at most the number of codes."""

    def within(self, queries: Codes, radius: int) -> Within:
        """The codes at most `radius` away."""

    def is_quick_within(self, radius: int) -> bool:
        """Whether `within` is better than `nearest` for a query of this radius."""


class _Flat:
    """A scan of all codes."""

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
    """Multi-index hashing (Norouzi et al., CVPR 2012) beside a scan.

    A code at distance r of the query differs from it in at most r // parts bits of one of its parts. Each part has a
    table; asked with up to `_FLIPS` flipped bits, the tables together know every code up to `_reach`.
    """

    def __init__(self, codes: Codes) -> None:
        import faiss

        super().__init__(codes)
        bits = 8 * codes.shape[1]
        wanted = max(_MIN_PART_BITS, min(_MAX_PART_BITS, int(np.log2(max(2, len(codes))))))
        num_parts = max(1, bits // wanted)
        self._tables = faiss.IndexBinaryMultiHash(bits, num_parts, min(wanted, bits // num_parts))
        self._tables.nflip = _FLIPS
        self._tables.add(codes)
        self._reach = num_parts * (_FLIPS + 1) - 1

    def within(self, queries: Codes, radius: int) -> Within:
        return _range_search(self._tables if self.is_quick_within(radius) else self._flat, queries, radius)

    def is_quick_within(self, radius: int) -> bool:
        return bool(radius <= self._reach)


class _Ivf:
    """Codes in lists by the nearest of some centres; a query looks at the lists of the centres nearest to it."""

    is_exact = False

    def __init__(self, codes: Codes) -> None:
        import faiss

        _one_thread()
        bits, num_lists = 8 * codes.shape[1], max(1, int(_LISTS_PER_ROOT * len(codes) ** 0.5))
        self._centres = faiss.IndexBinaryFlat(bits)
        self._index = faiss.IndexBinaryIVF(self._centres, bits, num_lists)
        # FAISS recommends 39 codes a list, and says so where there are fewer.
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
    """A graph of near codes, walked towards the query."""

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
        """The graph knows no radius: what is near enough among the candidates."""
        near = self.nearest(queries, min(_CANDIDATES, self._index.ntotal))
        found = (near.numbers >= 0) & (near.distances <= radius)
        limits = np.concatenate([[0], np.cumsum(found.sum(axis=1))])
        return Within(limits, near.distances[found], near.numbers[found])

    def is_quick_within(self, radius: int) -> bool:
        return False


class _GpuFlat(_Flat):
    """A scan on the first GPU. What its kernel cannot do, the scan on the CPU does."""

    def __init__(self, codes: Codes) -> None:
        import faiss

        super().__init__(codes)
        if not getattr(faiss, "get_num_gpus", lambda: 0)():
            raise InputError("the index gpu-flat needs a GPU and faiss-gpu; choose flat")
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
    """The index of this name over distinct codes uint8 [N, B]; `InputError` for an unknown one."""
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
    """OpenMP keeps this number for each thread that calls it.

    The cores are shared with other searches, and spinning for each other costs more than a second core gains.
    """
    import faiss

    faiss.omp_set_num_threads(1)


def _range_search(index: Any, queries: Codes, radius: int) -> Within:
    _one_thread()
    # FAISS leaves out what lies at the radius itself.
    limits, distances, numbers = index.range_search(queries, radius + 1)
    return Within(limits.astype(np.int64), distances.astype(np.int32), numbers)
