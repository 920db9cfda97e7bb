"""Files of the rows behind a gateway. Needs pyarrow and shapely, which the extra `web` installs."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, get_args

from orbithash.encoders.errors import InputError
from orbithash.encoders.files import new_file
from orbithash.search.protocol.description import Description
from orbithash.search.protocol.queries import Column
from orbithash.search.protocol.rows import Row

if TYPE_CHECKING:
    from orbithash.encoders.places.code_description import CodeDescription
    from orbithash.encoders.places.columns import PlaceRow

__all__ = ["PAGE_ROWS", "RowFile", "describe_codes", "row_file"]

# Rows that are requested and written at a time: with thumbnails some megabytes.
PAGE_ROWS = 500


class RowFile:
    """A file of places that is being written.

    Attributes:
        columns: columns to request of the rows.
        num_rows: number of rows so far.
    """

    def __init__(self, format_name: str, file: BinaryIO, description: Description) -> None:
        from orbithash.encoders.places.columns import ARCHIVE_COLUMNS
        from orbithash.encoders.places.writers import open_writer

        # The stamp of a row stays with its archive. Formats of text are not made for vectors and pictures.
        absent = {"stamp"} | ({"thumbnail", "vector"} if format_name != "parquet" else set())
        absent |= set() if description.vector_dims else {"vector"}
        columns = [name for name in ARCHIVE_COLUMNS if name not in absent]
        self.columns = tuple(name for name in get_args(Column) if name not in absent)
        self.num_rows = 0
        self._is_closed = False
        self._writer = open_writer(format_name, file, describe_codes(description), columns=columns)

    def write(self, rows: Iterable[Row]) -> None:
        """Write rows that were read with `columns`."""
        places = [_place(row) for row in rows]
        self._writer.write(places)
        self.num_rows += len(places)

    def close(self) -> None:
        """Write the end of the file; again, it has no effect."""
        if not self._is_closed:
            self._is_closed = True
            self._writer.close()


@contextmanager
def row_file(out: str | Path, description: Description) -> Iterator[RowFile]:
    """Yield a file of the format that the ending of `out` names; it appears whole when the block ends, or not at all.

    Raises:
        InputError: another ending, or a file that cannot be written.
    """
    from orbithash.encoders.places.writers import format_of

    path = Path(out)
    format_name = format_of(path)
    try:
        with new_file(path) as part, part.open("wb") as file:
            rows = RowFile(format_name, file, description)
            yield rows
            rows.close()
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error


def describe_codes(description: Description) -> "CodeDescription":
    """Return what a file states about the codes of the archive behind a gateway."""
    from orbithash.encoders.places.code_description import CodeDescription

    has_vectors = description.vector_dims > 0
    return CodeDescription(
        description.bits,
        description.model_id,
        vector_dims=description.vector_dims if has_vectors else None,
        vector_scale=description.vector_scale if has_vectors else None,
        embedding=description.embedding or "",
    )


def _place(row: Row) -> "PlaceRow":
    return {
        "id": row.id or 0,
        "key": row.key,
        "label": row.label,
        "caption": row.caption,
        "uri": row.uri,
        "datetime": row.datetime,
        "lon": row.lon,
        "lat": row.lat,
        "footprint": row.footprint,
        "code": None if row.code is None else bytes(row.code),
        "vector": row.stored_vector,
        "thumbnail": row.thumbnail,
    }
