"""The engines that `bench search` compares: orbithash, FAISS, numpy, and others if they are installed.

All get the same codes and run on one core.
"""

import contextlib
import importlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from orbithash.encoders.codes import Codes
from orbithash.search.index.answers import NO_HIT
from orbithash.search.segments.segment import Segment

__all__ = [
    "DEFAULT_ENGINES",
    "ENGINES",
    "Engine",
    "EngineInput",
    "EngineKind",
    "distances_to",
    "nearest_rows",
    "one_core",
    "words_of",
]

RowNumbers = npt.NDArray[np.int64]

# Milvus Lite refuses larger messages.
_ROWS_PER_INSERT = 20_000


@dataclass(frozen=True)
class EngineInput:
    """The input of an engine: codes uint8 [N, B], the maximum distance of a hit (None: no limit), an empty folder."""

    codes: Codes
    bits: int
    radius: int | None
    folder: Path


class Engine(ABC):
    """A search engine over the codes.

    Attributes:
        num_bytes: size of the index; None: measured as growth of the process's resident memory.
        bytes_are: what `num_bytes` counts, in words.
    """

    num_bytes: int | None = None
    bytes_are = "growth of resident memory"

    @abstractmethod
    def search(self, queries: Codes, k: int) -> Any:
        """Return the engine's own answer for queries uint8 [Q, B]. This call is timed."""

    def rows(self, answer: Any) -> RowNumbers:
        """Return the row numbers int64 [Q, at most k] of an answer; -1 marks a missing hit."""
        return np.asarray(answer, np.int64)


class _Orbithash(Engine):
    def __init__(self, given: EngineInput, index: str) -> None:
        self._radius = given.radius
        self._segment = Segment.build(np.arange(len(given.codes), dtype=np.uint64), given.codes, given.bits, index)
        if index == "exact":
            # All arrays are known; FAISS does not report the size of its lists and graphs.
            self.num_bytes, self.bytes_are = self._segment.num_bytes, "ids, codes, rows and tables"

    def search(self, queries: Codes, k: int) -> Any:
        return self._segment.search(queries, k, self._radius)

    def rows(self, answer: Any) -> RowNumbers:
        return np.where(answer.distances == NO_HIT, -1, answer.ids.astype(np.int64))


class _Faiss(Engine):
    def __init__(self, given: EngineInput) -> None:
        import faiss

        faiss.omp_set_num_threads(1)
        self._index = faiss.IndexBinaryFlat(8 * given.codes.shape[1])
        self._index.add(given.codes)

    def search(self, queries: Codes, k: int) -> Any:
        return self._index.search(queries, k)

    def rows(self, answer: Any) -> RowNumbers:
        return np.asarray(answer[1], np.int64)


class _Numpy(Engine):
    bytes_are = "the codes"

    def __init__(self, given: EngineInput) -> None:
        self._words = words_of(given.codes)
        self.num_bytes = given.codes.nbytes

    def search(self, queries: Codes, k: int) -> Any:
        return [self._nearest(query, k) for query in words_of(queries)]

    def _nearest(self, query: npt.NDArray[Any], k: int) -> RowNumbers:
        distances = distances_to(self._words, query)
        rows = np.argpartition(distances, k - 1)[:k]
        return rows[np.lexsort((rows, distances[rows]))]


class _Usearch(Engine):
    bytes_are = "the codes"

    def __init__(self, given: EngineInput) -> None:
        from usearch.index import MetricKind, search

        self._codes, self.num_bytes = given.codes, given.codes.nbytes
        self._search, self._metric = search, MetricKind.Hamming

    def search(self, queries: Codes, k: int) -> Any:
        return self._search(self._codes, queries, k, self._metric, exact=True, threads=1)

    def rows(self, answer: Any) -> RowNumbers:
        return np.atleast_2d(answer.keys).astype(np.int64)


class _Lance(Engine):
    """A scan of a column, as LanceDB does without an index."""

    bytes_are = "files"

    def __init__(self, given: EngineInput) -> None:
        import lance
        import pyarrow as pa

        column = pa.FixedSizeListArray.from_arrays(pa.array(given.codes.reshape(-1)), given.codes.shape[1])
        self._dataset = lance.write_dataset(pa.table({"code": column}), given.folder / "codes.lance")
        self.num_bytes = sum(path.stat().st_size for path in given.folder.rglob("*") if path.is_file())

    def search(self, queries: Codes, k: int) -> Any:
        return [self._nearest(query, k) for query in queries]

    def _nearest(self, query: Codes, k: int) -> Any:
        nearest = {"column": "code", "q": query, "k": k, "metric": "hamming", "use_index": False}
        return self._dataset.to_table(columns=["_distance"], nearest=nearest, with_row_id=True)

    def rows(self, answer: Any) -> RowNumbers:
        return np.stack([table["_rowid"].to_numpy() for table in answer]).astype(np.int64)


class _MilvusLite(Engine):
    bytes_are = "files"

    def __init__(self, given: EngineInput) -> None:
        from pymilvus import DataType, MilvusClient

        self._client = MilvusClient(str(given.folder / "milvus.db"))
        schema = self._client.create_schema(auto_id=False)
        schema.add_field("row", DataType.INT64, is_primary=True)
        schema.add_field("code", DataType.BINARY_VECTOR, dim=8 * given.codes.shape[1])
        index = self._client.prepare_index_params()
        index.add_index("code", index_type="BIN_FLAT", metric_type="HAMMING")
        self._client.create_collection("codes", schema=schema, index_params=index)
        for start in range(0, len(given.codes), _ROWS_PER_INSERT):
            part = given.codes[start : start + _ROWS_PER_INSERT]
            rows = [{"row": start + number, "code": code.tobytes()} for number, code in enumerate(part)]
            self._client.insert("codes", rows)
        self._client.load_collection("codes")
        self.num_bytes = sum(path.stat().st_size for path in given.folder.rglob("*") if path.is_file())

    def search(self, queries: Codes, k: int) -> Any:
        return self._client.search(
            "codes",
            data=[query.tobytes() for query in queries],
            anns_field="code",
            limit=k,
            search_params={"metric_type": "HAMMING"},
        )

    def rows(self, answer: Any) -> RowNumbers:
        return np.array([[hit["row"] for hit in hits] for hits in answer], np.int64)


class _SqliteVec(Engine):
    """A scan of a virtual table of bit vectors in memory. apsw, as not every Python's sqlite3 loads extensions."""

    bytes_are = "the database"

    def __init__(self, given: EngineInput) -> None:
        import apsw
        import sqlite_vec

        self._database = apsw.Connection(":memory:")
        self._database.enable_load_extension(True)
        self._database.load_extension(sqlite_vec.loadable_path())
        self._database.execute(f"CREATE VIRTUAL TABLE codes USING vec0(code bit[{8 * given.codes.shape[1]}])")
        rows = ((row, code.tobytes()) for row, code in enumerate(given.codes))
        with self._database:
            self._database.executemany("INSERT INTO codes(rowid, code) VALUES (?, vec_bit(?))", rows)
        sizes = self._database.execute("SELECT page_count * page_size FROM pragma_page_count, pragma_page_size")
        self.num_bytes = next(sizes)[0]

    def search(self, queries: Codes, k: int) -> Any:
        statement = "SELECT rowid FROM codes WHERE code MATCH vec_bit(?) AND k = ? ORDER BY distance"
        return [list(self._database.execute(statement, (query.tobytes(), k))) for query in queries]

    def rows(self, answer: Any) -> RowNumbers:
        return np.array([[row for (row,) in hits] for hits in answer], np.int64)


class _QdrantEdge(Engine):
    """Exact search of bits as bytes by the Manhattan distance, as Qdrant has no Hamming distance."""

    bytes_are = "files"

    def __init__(self, given: EngineInput) -> None:
        import qdrant_edge as qdrant

        self._qdrant = qdrant
        vectors = qdrant.EdgeVectorParams(
            size=8 * given.codes.shape[1],
            distance=qdrant.Distance.Manhattan,
            datatype=qdrant.VectorStorageDatatype.Uint8,
        )
        config = qdrant.EdgeConfig(vectors=vectors, max_search_threads=1)
        self._shard = qdrant.EdgeShard.create(str(given.folder / "qdrant"), config)
        for start in range(0, len(given.codes), _ROWS_PER_INSERT):
            bits = np.unpackbits(given.codes[start : start + _ROWS_PER_INSERT], axis=1).tolist()
            points = [qdrant.Point(start + number, vector) for number, vector in enumerate(bits)]
            self._shard.update(qdrant.UpdateOperation.upsert_points(points))
        self._shard.flush()
        self.num_bytes = sum(path.stat().st_blocks * 512 for path in given.folder.rglob("*") if path.is_file())

    def search(self, queries: Codes, k: int) -> Any:
        exact = self._qdrant.SearchParams(exact=True)
        nearest = [self._qdrant.Query.Nearest(vector) for vector in np.unpackbits(queries, axis=1).tolist()]
        return [self._shard.search(self._qdrant.SearchRequest(query, k, params=exact)) for query in nearest]

    def rows(self, answer: Any) -> RowNumbers:
        return np.array([[point.id for point in hits] for hits in answer], np.int64)


@dataclass(frozen=True)
class EngineKind:
    """The constructor of an engine, the modules it imports and the PyPI packages that contain them ("": orbithash)."""

    make: Callable[[EngineInput], Engine]
    modules: tuple[str, ...] = ("faiss",)
    package: str = ""

    @property
    def is_installed(self) -> bool:
        """Whether the modules can be imported."""
        with contextlib.suppress(ImportError):
            for name in self.modules:
                importlib.import_module(name)
            return True
        return False


ENGINES: dict[str, EngineKind] = {
    "exact": EngineKind(lambda given: _Orbithash(given, "exact"), ("numba",)),
    "faiss-flat": EngineKind(_Faiss),
    "usearch": EngineKind(_Usearch, ("usearch",), "usearch"),
    "sqlite-vec": EngineKind(_SqliteVec, ("apsw", "sqlite_vec"), "apsw sqlite-vec"),
    "qdrant-edge": EngineKind(_QdrantEdge, ("qdrant_edge",), "qdrant-edge-py"),
    "flat": EngineKind(lambda given: _Orbithash(given, "flat")),
    "ivf": EngineKind(lambda given: _Orbithash(given, "ivf")),
    "hnsw": EngineKind(lambda given: _Orbithash(given, "hnsw")),
    "numpy": EngineKind(_Numpy, ()),
    "lance": EngineKind(_Lance, ("lance",), "pylance"),
    "milvus-lite": EngineKind(_MilvusLite, ("pymilvus", "milvus_lite"), "pymilvus milvus-lite"),
}

# Exact engines of libraries that search in the caller's process.
DEFAULT_ENGINES = ("exact", "faiss-flat", "usearch", "sqlite-vec", "qdrant-edge")


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Bind this process and the threads that it starts to one core; some engines have no setting for that."""
    # Lance reads these variables when it is imported.
    os.environ.update(LANCE_CPU_THREADS="1", LANCE_IO_THREADS="1")
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def words_of(codes: Codes) -> npt.NDArray[Any]:
    """Return the codes [N, B] as uint64 words if B is a multiple of 8, else unchanged."""
    return codes.view(np.uint64) if codes.shape[1] % 8 == 0 else codes


def distances_to(words: npt.NDArray[Any], query: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the Hamming distances [N] of one code to all; both in the form of `words_of`."""
    counts: npt.NDArray[Any] = np.bitwise_count(words ^ query)
    return counts[:, 0] if counts.shape[1] == 1 else counts.sum(axis=1, dtype=np.uint16)


def nearest_rows(codes: Codes, queries: Codes, k: int, radius: int | None = None) -> RowNumbers:
    """Return the row numbers of the exact answer, ordered by (distance, row): int64 [Q, k], -1 after the last hit."""
    words, rows = words_of(codes), np.full((len(queries), k), -1, np.int64)
    for number, query in enumerate(words_of(queries)):
        distances = distances_to(words, query)
        last = np.partition(distances, k - 1)[k - 1] if radius is None else radius
        near = np.flatnonzero(distances <= last)
        near = near[np.lexsort((near, distances[near]))][:k]
        rows[number, : len(near)] = near
    return rows
