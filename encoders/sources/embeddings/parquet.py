"""Parquet files of one table: which files and row groups there are, chunks of rows, ids that occur twice."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from orbithash.encoders.errors import InputError
from orbithash.encoders.sources.embeddings.key_hashes import hash_keys, repeated
from orbithash.encoders.sources.embeddings.rows import Chunk, RowReader, unreadable
from orbithash.encoders.sources.folders import is_shown, natural

__all__ = ["PARQUET_SUFFIXES", "KeyedTable", "find_files", "is_data", "open_parquet"]

PARQUET_SUFFIXES = (".parquet", ".geoparquet", ".gpq", ".pq")

# Rows of a chunk, unless a row group has more.
_CHUNK_ROWS = 2**16

# Repeated keys that an error names.
_MAX_NAMED = 3


@dataclass(frozen=True)
class KeyedTable:
    """A file or a folder of Parquet files whose rows have ids.

    Attributes:
        root: the file or the folder, absolute; for files that STAC items name, the folder of their collection.
        files: the files with their row groups' numbers of rows, in natural order of their names.
        reader: reads rows.
    """

    root: Path
    files: tuple[tuple[Path, tuple[int, ...]], ...]
    reader: RowReader

    @property
    def num_rows(self) -> int:
        """Number of rows of all files."""
        return sum(sum(counts) for _, counts in self.files)

    def chunks(self) -> Iterator[Chunk]:
        """Yield the chunks of all files; the same files always have the same chunks."""
        for path, counts in self.files:
            name = path.name if path == self.root else Path(os.path.relpath(path, self.root)).as_posix()
            starts = np.cumsum([0, *counts]).tolist()
            bounds = [0]
            for group in range(1, len(counts)):
                if starts[group + 1] - starts[bounds[-1]] > _CHUNK_ROWS:
                    bounds.append(group)
            for begin, end in pairwise([*bounds, len(counts)]):
                if starts[end] > starts[begin]:
                    yield Chunk(str(path), name, starts[begin], starts[end], tuple(range(begin, end)))

    def check_keys(self) -> int:
        """Return the number of rows; needs 8 bytes of memory for each.

        Raises:
            InputError: a key occurs twice.
        """
        parts = [hash_keys(rows.keys) for chunk in self.chunks() for rows in self._keys(chunk)]
        num_rows, twice = repeated(parts)
        if len(twice):
            # Rarely different keys with one hash.
            counts: dict[str, int] = {}
            for chunk in self.chunks():
                for rows in self._keys(chunk):
                    for position in np.flatnonzero(np.isin(hash_keys(rows.keys), twice)).tolist():
                        key = rows.keys[position].as_py()
                        counts[key] = counts.get(key, 0) + 1
            if several := {key: count for key, count in counts.items() if count > 1}:
                first = ", ".join(f"{key!r} ({count} times)" for key, count in list(several.items())[:_MAX_NAMED])
                raise InputError(
                    f"{self.root}: {len(several)} ids occur more than once (first: {first}); ids must be unique; "
                    "another column can be chosen as the table's option id"
                )
        return num_rows

    def _keys(self, chunk: Chunk) -> Iterator[Any]:
        return self.reader.read(chunk, vectors=False, places=False)


def find_files(root: Path) -> list[Path]:
    """Return the Parquet files of a table: `root` itself, or all files below the folder `root` in natural order.

    Raises:
        InputError: no such file or folder, or a folder without Parquet files.
    """
    if not root.exists():
        raise InputError(f"{root} does not exist")
    paths = [root] if root.is_file() else _parquet_files(root)
    if not paths:
        raise InputError(f"{root} has no Parquet file ({', '.join(PARQUET_SUFFIXES)})")
    return paths


def open_parquet(path: Path) -> Any:
    """Return an open `ParquetFile`; `InputError` for a file that is not Parquet, or damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise unreadable(str(path), error) from error


def _parquet_files(root: Path) -> list[Path]:
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if is_data(name)]
        found += [Path(folder, name) for name in names if is_data(name) and name.lower().endswith(PARQUET_SUFFIXES)]
    return sorted(found, key=lambda path: natural(path.relative_to(root).as_posix()))


def is_data(name: str) -> bool:
    """Return whether a file or folder of this name can belong to a table."""
    # Programs that write folders of Parquet files put their own files there under such names.
    return is_shown(name) and not name.startswith("_")
