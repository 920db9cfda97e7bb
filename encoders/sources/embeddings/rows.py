"""Rows of a table of embeddings as arrays: no Python object is made for each row."""

import datetime as dt
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from orbithash.encoders.errors import InputError
from orbithash.encoders.keys import MAX_KEY_CHARS, key_problem
from orbithash.encoders.sources.embeddings.layouts import Columns
from orbithash.encoders.sources.geometry_columns import GeometryColumn
from orbithash.encoders.sources.listings import parse_time

__all__ = ["Chunk", "EmbeddingRows", "RowReader", "unreadable"]

Vectors = npt.NDArray[np.float32]

# Bytes of the vectors of a batch, as float32.
_BATCH_BYTES = 32 * 2**20
# Rows of a batch with further columns, which may be thumbnails of some kilobytes.
_BATCH_ROWS = 2**12


@dataclass(frozen=True)
class Chunk:
    """A range of rows of one file, made of whole row groups.

    Attributes:
        path: absolute path of the file.
        name: path relative to the table.
        first: number of the first row in the file.
        stop: number of the last row, plus one.
        groups: numbers of the row groups.
    """

    path: str
    name: str
    first: int
    stop: int
    groups: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return self.stop - self.first


@dataclass(frozen=True)
class EmbeddingRows:
    """Some rows of a table.

    Attributes:
        first: number of the first row in its file.
        keys: Arrow array of text [N]; a row without an id has a key made of its file and number.
        vectors: float32 [N, D]; zeros where there is a problem; None if they were not read.
        columns: Arrow arrays by the name of the archive's column; an absent one is unknown for all rows.
        problems: why a row cannot be used, by its position.
        others: Arrow arrays of the further columns that were asked for, as they are in the file.
    """

    first: int
    keys: Any
    vectors: Vectors | None
    columns: dict[str, Any]
    problems: dict[int, str]
    others: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RowReader:
    """Reads rows of the files of a table; can be sent to other processes.

    Attributes:
        columns: which column holds what.
        dims: dimensions of a vector.
        geometry: the geometry column; None without one.
        prefix: put before all keys, with a slash.
    """

    columns: Columns
    dims: int
    geometry: GeometryColumn | None = None
    prefix: str = ""

    def read(
        self, chunk: Chunk, *, vectors: bool = True, places: bool = True, others: Sequence[str] = ()
    ) -> Iterator[EmbeddingRows]:
        """Yield the rows of a chunk in batches; without vectors or without places and texts, these are not read.

        Args:
            chunk: the rows.
            vectors: read the vectors.
            places: read places and texts.
            others: names of further columns to read.

        Raises:
            InputError: the file is damaged.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        texts = dict(self.columns.others) if places else {"id": self.columns.others.get("id")}
        names = {name for name in (*texts.values(), *others) if name is not None}
        names |= set(self.columns.vector) if vectors else set()
        names |= {self.geometry.name} if places and self.geometry is not None else set()
        size = max(1, _BATCH_BYTES // (4 * self.dims)) if vectors else _BATCH_ROWS if others else 2**17
        first = chunk.first
        try:
            with pq.ParquetFile(chunk.path) as file:
                if not names:
                    yield self._without_columns(chunk)
                    return
                for batch in file.iter_batches(size, row_groups=list(chunk.groups), columns=sorted(names)):
                    rows = self._rows(batch, chunk.name, first, vectors, places)
                    yield replace(rows, others={name: batch[name] for name in others})
                    first += len(batch)
        except (pa.ArrowException, OSError) as error:
            raise unreadable(chunk.path, error) from error

    def _without_columns(self, chunk: Chunk) -> EmbeddingRows:
        """Return the rows of a table without ids, of which only the keys are asked for."""
        return EmbeddingRows(chunk.first, self._numbered(chunk.name, chunk.first, chunk.num_rows), None, {}, {})

    def _rows(self, batch: Any, name: str, first: int, with_vectors: bool, with_places: bool) -> EmbeddingRows:
        problems: dict[int, str] = {}
        keys = self._keys(batch, name, first, problems)
        vectors = self._vectors(batch, problems) if with_vectors else None
        columns = self._columns(batch, problems) if with_places else {}
        return EmbeddingRows(first, keys, vectors, columns, problems)

    def _numbered(self, name: str, first: int, count: int) -> Any:
        """Return keys `FILE#ROW`."""
        import pyarrow as pa
        import pyarrow.compute as pc

        numbers = pa.array(np.arange(first, first + count)).cast(pa.string())
        start = f"{self.prefix.rstrip('/')}/" if self.prefix else ""
        return pc.binary_join_element_wise(start + name, numbers, "#")

    def _keys(self, batch: Any, name: str, first: int, problems: dict[int, str]) -> Any:
        """Return the keys of a batch; note problems of ids that cannot be keys."""
        import pyarrow as pa
        import pyarrow.compute as pc

        numbered = self._numbered(name, first, len(batch))
        column = self.columns.others.get("id")
        if column is None:
            return numbered
        keys = _text(batch[column])
        if self.prefix:
            keys = pc.binary_join_element_wise(pa.scalar(self.prefix.rstrip("/")), keys, "/")
        for row in np.flatnonzero(keys.is_null().to_numpy(zero_copy_only=False)).tolist():
            problems[row] = f"column {column} is null"
        lengths = pc.utf8_length(keys)
        is_good = pc.and_(
            pc.utf8_is_printable(keys), pc.and_(pc.greater(lengths, 0), pc.less_equal(lengths, MAX_KEY_CHARS))
        )
        for row in np.flatnonzero(~is_good.fill_null(True).to_numpy(zero_copy_only=False)).tolist():
            if problem := key_problem(keys[row].as_py()):
                problems[row] = problem
        return pc.coalesce(keys, numbered)

    def _vectors(self, batch: Any, problems: dict[int, str]) -> Vectors:
        """Return the vectors; zeros, and a problem, where the length is wrong or a number is not finite."""
        import pyarrow as pa
        import pyarrow.compute as pc

        if len(self.columns.vector) > 1:
            parts = [
                self._decoded(batch[name].fill_null(_MISSING[str(batch[name].type)])) for name in self.columns.vector
            ]
            vectors = np.stack(parts, axis=1)
        else:
            column = batch[self.columns.vector[0]]
            column = getattr(column, "storage", column)
            lengths = pc.list_value_length(column)
            is_good = pc.equal(lengths, self.dims).fill_null(False).to_numpy(zero_copy_only=False)
            if not is_good.all():
                for row in np.flatnonzero(~is_good).tolist():
                    length = lengths[row].as_py()
                    problems.setdefault(
                        row,
                        "its vector is null"
                        if length is None
                        else f"its vector has {length} dimensions; the table's vectors have {self.dims}",
                    )
                column = column.filter(pa.array(is_good))
            flat = column.flatten()
            if flat.null_count:
                flat = flat.cast(pa.float32()).fill_null(np.nan)
            vectors = self._decoded(flat).reshape(-1, self.dims)
            if not is_good.all():
                found, vectors = vectors, np.zeros((len(batch), self.dims), np.float32)
                vectors[is_good] = found
        squares = np.einsum("ij,ij->i", vectors, vectors)
        # Only these few rows are looked at more closely: squares of finite numbers can overflow or vanish, too.
        for row in np.flatnonzero(~(np.isfinite(squares) & (squares > 0))).tolist():
            if not np.isfinite(vectors[row]).all():
                problems.setdefault(row, "its vector has a number that is NaN, null or infinite as float32")
            elif not vectors[row].any():
                problems.setdefault(row, "its vector has only zeros, which have no direction")
            if row in problems and vectors[row].any():
                # The numbers may be those of Arrow's buffer, which is not writeable.
                vectors = vectors if vectors.flags.writeable else vectors.copy()
                vectors[row] = 0
        return vectors

    def _decoded(self, numbers: Any) -> Vectors:
        """Return Arrow numbers as float32."""
        import pyarrow.types as types

        values = numbers.to_numpy(zero_copy_only=False)
        with np.errstate(over="ignore"):
            decoded: Vectors = values.astype(np.float32, copy=False)
        if self.columns.quantisation == "signed-square" and types.is_int8(numbers.type):
            # https://developers.google.com/earth-engine/datasets/catalog/GOOGLE_SATELLITE_EMBEDDING_V1_ANNUAL: -128 is
            # no data.
            decoded = np.where(values == -128, np.float32("nan"), np.sign(decoded) * (decoded / np.float32(127.5)) ** 2)
        return decoded

    def _columns(self, batch: Any, problems: dict[int, str]) -> dict[str, Any]:
        """Return the columns of the archive that the table has."""
        import pyarrow as pa

        others, columns = self.columns.others, {}
        for role in ("label", "caption", "uri"):
            if role in others:
                columns[role] = _text(batch[others[role]])
        if "time" in others:
            columns["datetime"] = _times(batch[others["time"]], problems)
        lon, lat = (self._degrees(batch, role) for role in ("lon", "lat"))
        with np.errstate(invalid="ignore"):
            is_beyond = (np.abs(lon) > 360) | (np.abs(lat) > 90)
            for row in np.flatnonzero(is_beyond).tolist():
                problems.setdefault(
                    row,
                    f"lon {lon[row]:g} and lat {lat[row]:g}; degrees from -360 to 360 and from -90 to 90 are allowed",
                )
            lon = np.where(np.abs(lon) > 180, (lon + 180) % 360 - 180, lon)
        if self.geometry is not None:
            places = self.geometry.place_arrays(batch[self.geometry.name])
            for row, problem in places.problems.items():
                problems.setdefault(row, problem)
            # The centre of the geometry where the table has neither number.
            unknown = np.isnan(lon) & np.isnan(lat)
            lon, lat = np.where(unknown, places.lon, lon), np.where(unknown, places.lat, lat)
            columns["footprint"] = pa.array(places.footprint, pa.binary())
        if self.geometry is not None or {"lon", "lat"} & set(others):
            columns["lon"], columns["lat"] = (pa.array(degrees, from_pandas=True) for degrees in (lon, lat))
        return columns

    def _degrees(self, batch: Any, role: str) -> npt.NDArray[np.float64]:
        """Return the column of longitudes or latitudes, float64 [N]; NaN where it is unknown."""
        import pyarrow as pa

        if role not in self.columns.others:
            return np.full(len(batch), np.nan)
        column: npt.NDArray[np.float64] = (
            batch[self.columns.others[role]].cast(pa.float64()).fill_null(np.nan).to_numpy(zero_copy_only=False)
        )
        return column


# In place of a null in a column with one number of each vector; the row is then refused.
_MISSING = {"halffloat": np.nan, "float": np.nan, "double": np.nan, "int8": -128}


def unreadable(path: str, error: Exception) -> InputError:
    """Return the error for a file that is not Parquet, or damaged."""
    return InputError(f"{path} is not a readable Parquet file: {str(error).splitlines()[0]}")


def _text(column: Any) -> Any:
    """Return a column of text, numbers or a dictionary of these as Arrow strings."""
    import pyarrow as pa
    import pyarrow.types as types

    kind = column.type
    return column.cast(kind.value_type if types.is_dictionary(kind) else kind).cast(pa.string())


def _times(column: Any, problems: dict[int, str]) -> Any:
    """Return a column of times as Arrow timestamps in microseconds, UTC; note a problem of text that is no time."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.types as types

    kind = column.type
    column = column.cast(kind.value_type) if types.is_dictionary(kind) else column
    micros, utc = pa.timestamp("us"), pa.timestamp("us", "UTC")
    if types.is_timestamp(column.type):
        # Without a zone, times are UTC.
        return column.cast(utc if column.type.tz else micros, safe=False).cast(utc)
    if types.is_date(column.type):
        return column.cast(micros).cast(utc)
    encoded = column.cast(pa.string()).dictionary_encode()
    values: list[dt.datetime | None] = []
    wrong: dict[int, str] = {}
    for number, text in enumerate(encoded.dictionary.to_pylist()):
        try:
            values.append(parse_time(text) if text.strip() else None)
        except ValueError as error:
            wrong[number] = str(error)
            values.append(None)
    if wrong:
        numbers = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
        for row in np.flatnonzero(np.isin(numbers, list(wrong))).tolist():
            problems.setdefault(row, wrong[int(numbers[row])])
    return pc.take(pa.array(values, utc), encoded.indices)
