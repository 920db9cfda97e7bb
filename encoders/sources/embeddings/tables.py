"""Tables of embeddings: a Parquet file, or a folder of them, whose rows are vectors with ids, places and texts.

Rows are read in chunks of whole row groups, so that a table of any size is never in memory as a whole.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orbithash.encoders.errors import InputError
from orbithash.encoders.sources.embeddings.layouts import Columns, TableOptions, find_columns, has_vectors, vector_dims
from orbithash.encoders.sources.embeddings.parquet import (
    PARQUET_SUFFIXES,
    KeyedTable,
    find_files,
    is_data,
    open_parquet,
)
from orbithash.encoders.sources.embeddings.rows import RowReader, unreadable
from orbithash.encoders.sources.geometry_columns import GeometryColumn
from orbithash.encoders.sources.listings import image_suffixes

__all__ = ["EmbeddingTable", "is_embedding_table"]


def is_embedding_table(source: Path) -> bool:
    """Return whether `source` is a Parquet file, or a folder of Parquet files with vectors and not of images."""
    if source.is_file():
        return source.name.lower().endswith(PARQUET_SUFFIXES)
    first = _file_before_images(source)
    try:
        return first is not None and has_vectors(open_parquet(first).schema_arrow)
    except InputError:
        return False


@dataclass(frozen=True)
class EmbeddingTable(KeyedTable):
    """A table whose rows are vectors."""

    @classmethod
    def open(cls, source: Path | str, options: Sequence[str] = (), prefix: str = "") -> "EmbeddingTable":
        """Open a table; only the footers of its files are read, and the first vectors.

        Args:
            source: a Parquet file, or a folder of them.
            options: texts `ROLE=COLUMN`, `layout=NAME`, `name=NAME` (see `TableOptions`).
            prefix: put before all keys, as PREFIX/KEY.

        Raises:
            InputError: no such file, a damaged one, no rows, no column of vectors or several, or files that differ in
                columns, dimensions or embedding.
        """
        root, asked = Path(source).absolute(), TableOptions.parse(options)
        files, reader = [], None
        for path in find_files(root):
            with open_parquet(path) as file:
                try:
                    columns = find_columns(file.schema_arrow, asked)
                except InputError as error:
                    raise InputError(f"{path}: {error}") from error
                counts = tuple(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))
                dims = _dims(file, columns, path)
                if not sum(counts) or dims is None:
                    continue
                geometry = GeometryColumn.find(file, path, has_place={"lon", "lat"} <= columns.others.keys())
            found = RowReader(columns, dims, geometry, prefix)
            if reader is not None and (difference := _difference(reader, found)):
                raise InputError(f"{path} and {files[0][0].name} are not parts of one table: {difference}")
            reader = reader or found
            files.append((path, counts))
        if reader is None:
            raise InputError(f"{root} has no rows with a vector")
        return cls(root, tuple(files), reader)

    @property
    def dims(self) -> int:
        """Dimensions of a vector."""
        return self.reader.dims

    @property
    def embedding(self) -> str:
        """Name of the embedding; "" if the table does not say."""
        return self.reader.columns.embedding

    @property
    def origin(self) -> str:
        """Address of the embedding's model or data; "" if the table does not say."""
        return self.reader.columns.origin

    def __str__(self) -> str:
        """Return what the table is, for a message."""
        return f"{self.num_rows:,} vectors of {self.dims} dimensions ({self.embedding or 'of no stated embedding'})"

    def check_embedding(self, name: str, dims: int, origin: str = "") -> None:
        """Raise `InputError` if the vectors are not those of an embedding of this name and these dimensions.

        Names are compared where both are known.
        """
        of = f"{name or 'an embedding without a name'} of {dims} dimensions" + (f" ({origin})" if origin else "")
        if self.dims != dims:
            raise InputError(f"{self.root} has vectors of {self.dims} dimensions; the model takes {of}")
        if name and self.embedding and name != self.embedding:
            raise InputError(
                f"{self.root} has vectors of the embedding {self.embedding}; the model takes {of}; if both are the "
                f"same, give the table's option name={name}"
            )


def _dims(file: Any, columns: Columns, path: Path) -> int | None:
    """Return the dimensions of a file's vectors; None if it has no vector."""
    import pyarrow as pa

    if len(columns.vector) > 1:
        return len(columns.vector)
    (name,) = columns.vector
    dims = vector_dims(file.schema_arrow.field(name).type)
    if dims:
        return dims
    try:
        for batch in file.iter_batches(64, columns=[name]):
            column = getattr(batch[name], "storage", batch[name])
            if lengths := [length for length in column.value_lengths().to_pylist() if length]:
                return int(lengths[0])
    except (pa.ArrowException, OSError) as error:
        raise unreadable(str(path), error) from error
    return None


def _difference(first: RowReader, other: RowReader) -> str:
    """Return what differs between two files of a table; "" if they belong together."""
    if first.dims != other.dims:
        return f"their vectors have {other.dims} and {first.dims} dimensions"
    if first.columns.embedding != other.columns.embedding:
        return f"they hold the embeddings {other.columns.embedding!r} and {first.columns.embedding!r}"
    if first.columns != other.columns or first.geometry != other.geometry:
        return "their columns differ in names or kinds"
    return ""


def _file_before_images(root: Path) -> Path | None:
    """Return a Parquet file of the first folder below `root` that has any; None if images come first."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if is_data(name))
        if any(name.lower().endswith(image_suffixes()) for name in names):
            return None
        if files := [name for name in names if is_data(name) and name.lower().endswith(PARQUET_SUFFIXES)]:
            return Path(folder, min(files))
    return None
