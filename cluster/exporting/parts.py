"""Parts of an export: what a file holds, and how it is written; free of Ray."""

import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from orbithash.encoders.places.code_description import CodeDescription
from orbithash.encoders.places.contents import Contents
from orbithash.encoders.places.geoparquet import ROW_GROUP_BYTES
from orbithash.encoders.places.stac import Catalog
from orbithash.encoders.places.writers import open_writer

__all__ = ["PART_BYTES", "FileKind", "part_name"]

# Bytes of the columns of a part. A process that writes a part needs about three times this memory.
PART_BYTES = 2 * ROW_GROUP_BYTES


@dataclass(frozen=True)
class FileKind:
    """What the files of an export are.

    Attributes:
        format_name: one of `orbithash.encoders.places.writers.MEDIA_TYPES`.
        columns: columns of the rows.
        description: the codes.
        catalog: the STAC collection of the rows.
        row_group_bytes: bytes of a row group of GeoParquet.
    """

    format_name: str
    columns: tuple[str, ...]
    description: CodeDescription
    catalog: Catalog
    row_group_bytes: int = ROW_GROUP_BYTES

    def write(self, file: Any, tables: Iterable[pa.Table]) -> Contents:
        """Write a file; return what it holds."""
        writer = open_writer(
            self.format_name,
            file,
            self.description,
            columns=self.columns,
            catalog=self.catalog,
            row_group_bytes=self.row_group_bytes,
        )
        for table in tables:
            writer.write_table(table)
        writer.close()
        return writer.contents

    def write_bytes(self, tables: Iterable[pa.Table]) -> tuple[bytes, Contents]:
        """Return the bytes of a file, and what it holds."""
        file = io.BytesIO()
        contents = self.write(file, tables)
        return file.getvalue(), contents


def part_name(number: int) -> str:
    """Return the name of a part without its ending; names sort as their numbers."""
    return f"part-{number:05d}"
