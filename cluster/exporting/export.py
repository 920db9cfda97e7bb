"""Export an archive to files that other programs read: GeoParquet, STAC, GeoJSON, CSV.

    positions of all rows -> ranges of the Hilbert curve -> rows by range -> sorted -> files

Rows are read from the archive once, and wait on the disk beside the output until all rows of their range are known.
Memory is that of one range; on Ray Data, of one range for each task.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orbithash.cluster.exporting.description import MODEL_ITEM, describe_codes
from orbithash.cluster.exporting.parts import PART_BYTES, FileKind, part_name
from orbithash.cluster.exporting.ranges import Ranges, divide
from orbithash.cluster.exporting.rows import RowReader
from orbithash.cluster.exporting.sorting import in_order
from orbithash.cluster.output import track
from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.errors import InputError
from orbithash.encoders.files import new_file, new_folder, write_file
from orbithash.encoders.places.code_description import CodeDescription
from orbithash.encoders.places.columns import ARCHIVE_COLUMNS, check_columns
from orbithash.encoders.places.contents import Contents
from orbithash.encoders.places.geoparquet import ROW_GROUP_BYTES
from orbithash.encoders.places.stac import Catalog, collection_of, file_item

__all__ = ["FORMATS", "Export", "ExportOptions", "export"]

# By the ending of the output's name; "": a folder.
_ENDINGS = {".parquet": "parquet", ".geoparquet": "parquet", ".json": "items", ".geojson": "geojson", ".csv": "csv"}
FORMATS = ("parquet", "stac", "items", "geojson", "csv")
# Columns of formats of text, unless others are chosen: no vectors and no pictures.
_TEXT_COLUMNS = ("id", "label", "datetime", "lon", "lat", "uri", "caption", "code")


@dataclass(frozen=True)
class ExportOptions:
    """What to export, and how.

    Attributes:
        format_name: one of `FORMATS`; None: by the ending of the output's name, a folder of STAC without one.
        version: version of the archive; None: the newest.
        filter: CQL2 text that rows have to pass; "": none.
        columns: columns to write beside the key and the place; None: all that the format is made for.
        model: folder of the model that made the codes, for its description.
        licence: licence of the codes that a STAC collection states, an SPDX identifier; "other": not stated.
        source: address of the source images that a STAC collection states; "": not stated.
        workers: minimum and maximum number of tasks of Ray Data; None: this process alone.
        part_bytes: bytes of the columns of a part, in memory.
        row_group_bytes: bytes of the columns of a row group of GeoParquet.
    """

    format_name: str | None = None
    version: int | None = None
    filter: str = ""
    columns: Sequence[str] | None = None
    model: Path | None = None
    licence: str = "other"
    source: str = ""
    workers: tuple[int, int] | None = None
    part_bytes: int = PART_BYTES
    row_group_bytes: int = ROW_GROUP_BYTES


@dataclass
class Export:
    """What was written.

    Attributes:
        archive_version: the version that was read.
        format_name: one of `FORMATS`.
        out: the file or folder.
        files: number of files with rows.
        contents: the rows.
        description: the codes.
    """

    archive_version: int
    format_name: str
    out: Path
    description: CodeDescription
    files: int = 0
    contents: Contents = field(default_factory=Contents)

    def to_json(self) -> dict[str, Any]:
        """Return the values for --json."""
        return {
            "archive_version": self.archive_version,
            "format": self.format_name,
            "out": str(self.out),
            "files": self.files,
            **self.contents.to_json(),
            "is_stac": self.contents.is_stac,
            "codes": self.description.to_json(),
        }

    def __str__(self) -> str:
        contents = self.contents
        files = f" in {self.files:,} files" if self.files > 1 else ""
        text = f"{self.out}: wrote {contents.rows:,} rows of version {self.archive_version}{files}"
        lacking = [
            f"{number:,} rows have no {what}"
            for number, what in ((contents.without_place, "place"), (contents.without_time, "time"))
            if number
        ]
        if lacking:
            text += f"; {' and '.join(lacking)}"
        if contents.unusable_outlines:
            text += f"; footprints that are not valid outlines became points: {contents.unusable_outlines:,}"
        if self.format_name != "csv" and self.format_name != "geojson":
            what = {"items": "each item is valid STAC"}.get(self.format_name, "it is valid stac-geoparquet")
            if contents.is_stac:
                text += f"; {what}"
            elif contents.rows:
                text += "; STAC requires a place and a time of each row"
        return text


def export(archive: str, out: Path, options: ExportOptions | None = None) -> Export:
    """Write the rows of an archive to a file, or to a folder, in the order of the Hilbert curve.

    Files and folders appear whole or not at all. Memory does not grow with the number of rows. The rows and their
    order are the same for any number of workers.

    Args:
        archive: folder or URI.
        out: the file, which is replaced if it exists; a folder must be new or empty.
        options: what to export, and how.

    Raises:
        InputError: an archive that cannot be read, an output that cannot be written, an invalid option.
    """
    options = options or ExportOptions()
    if options.filter:
        from orbithash.search.segments.filters.expressions import parse_filter

        parse_filter(options.filter)
    format_name = _format(out, options)
    is_folder = format_name == "stac" or options.workers is not None
    opened = Archive.open(archive, options.version)
    _check_out(out, opened.path, is_folder=is_folder)
    description = describe_codes(opened, options.model)
    columns = _columns(options.columns, format_name, description)
    catalog = Catalog(Path(opened.path).name or "archive", options.licence, options.source)
    if format_name == "stac" and options.model and (options.model / MODEL_ITEM).is_file():
        catalog = dataclasses.replace(catalog, model_href="./model.json")
    file_format = "parquet" if is_folder else format_name
    kind = FileKind(file_format, columns, description, catalog, options.row_group_bytes)
    reader = RowReader(opened.path, opened.version, columns, options.filter)
    result = Export(opened.version, format_name, out, description)
    job = _Job(reader, kind, options, opened.num_rows, result)
    with _one_line(out):
        if is_folder:
            with new_folder(out) as folder:
                job.write_folder(folder)
        else:
            with new_file(out) as part:
                job.write_file(part)
    return result


@dataclass
class _Job:
    """An export whose options are valid; `result` grows with it."""

    reader: RowReader
    kind: FileKind
    options: ExportOptions
    num_rows: int
    result: Export

    def write_file(self, path: Path) -> None:
        """Write all rows to one file."""

        def tables() -> Iterator[Any]:
            for _, slices in self._ranges_in_order(path.parent):
                yield from slices

        with path.open("wb") as file:
            self.result.contents = self.kind.write(file, tables())
        self.result.files = 1

    def write_folder(self, folder: Path) -> None:
        """Write parts, and for STAC the collection and an item for each part."""
        is_stac = self.result.format_name == "stac"
        data = folder / "data" if is_stac else folder
        data.mkdir(exist_ok=True)
        items: dict[str, Contents] = {}
        for number, contents in self._parts(data):
            items[part_name(number)] = contents
            self.result.contents.merge(contents)
        self.result.files = len(items)
        if is_stac:
            self._write_stac(folder, items)

    def _parts(self, data: Path) -> Iterator[tuple[int, Contents]]:
        """Write the parts; yield their numbers and contents."""
        if self.options.workers is None:
            for number, slices in self._ranges_in_order(data):
                with (data / f"{part_name(number)}.parquet").open("wb") as file:
                    contents = self.kind.write(file, slices)
                yield number, contents
            return
        from orbithash.cluster.exporting.on_ray import parts_on_ray

        ranges, count, row_bytes = self._divide()
        if not count:
            # Readers need a file with the columns.
            content, contents = self.kind.write_bytes([])
            (data / f"{part_name(0)}.parquet").write_bytes(content)
            yield 0, contents
            return
        portions = list(self.reader.portions(row_bytes))
        with track("exporting", count, "rows") as advance_to:
            done = 0
            for number, content, contents in parts_on_ray(
                self.reader, portions, ranges, self.kind, self.options.workers
            ):
                (data / f"{part_name(number)}.parquet").write_bytes(content)
                done += contents.rows
                advance_to(done, "")
                yield number, contents

    def _write_stac(self, folder: Path, items: dict[str, Contents]) -> None:
        version_time = self.reader.version_time()
        description, catalog = self.kind.description, self.kind.catalog
        for name in sorted(items):
            href = f"../data/{name}.parquet"
            item = file_item(name, href, catalog, description, items[name], version_time)
            write_file(folder / "items" / f"{name}.json", _json(item), durable=False)
        links = [f"./items/{name}.json" for name in sorted(items)]
        collection = collection_of(catalog, description, self.result.contents, links)
        if catalog.model_href and self.options.model:
            content = (self.options.model / MODEL_ITEM).read_bytes()
            write_file(folder / "model.json", content, durable=False)
        write_file(folder / "collection.json", _json(collection), durable=False)

    def _ranges_in_order(self, folder: Path) -> Iterator[tuple[int, Iterator[Any]]]:
        """Yield each range and slices of its rows; show the progress of reading."""
        ranges, count, row_bytes = self._divide()
        with track("exporting", count, "rows") as advance_to:

            def tables() -> Iterator[Any]:
                done = 0
                for portion in self.reader.portions(row_bytes):
                    table = self.reader.read(portion)
                    yield table
                    done += len(table)
                    advance_to(done, "")

            yield from in_order(tables(), ranges, folder)

    def _divide(self) -> tuple[Ranges, int, float]:
        """Return the ranges of the parts, the number of rows, and the mean size of a row."""
        row_bytes = self.reader.row_bytes()
        ranges, count = divide(self.reader.positions(), self.num_rows, row_bytes, self.options.part_bytes)
        return ranges, count, row_bytes


def _format(out: Path, options: ExportOptions) -> str:
    """Return the format of the output; `InputError` for an unknown one."""
    ending = out.suffix.lower()
    name = options.format_name or _ENDINGS.get(ending, "" if ending else "stac")
    if name not in FORMATS:
        given = f"--format is {name}" if name else f"{out.name} has the ending {out.suffix}"
        raise InputError(
            f"{given}; .parquet, .geojson, .csv, .json (STAC items), a folder without an ending (STAC collection), or "
            f"--format {', '.join(FORMATS)} is allowed"
        )
    if options.workers is not None and name not in ("parquet", "stac"):
        raise InputError(
            f"--workers writes a folder of parts, which {name} has not; choose parquet or stac, or omit it"
        )
    return name


def _columns(chosen: Sequence[str] | None, format_name: str, description: CodeDescription) -> tuple[str, ...]:
    if chosen is not None:
        return check_columns(chosen, description)
    columns = ARCHIVE_COLUMNS if format_name in ("parquet", "stac") else _TEXT_COLUMNS
    return tuple(name for name in columns if name != "vector" or description.vector_dims)


def _check_out(out: Path, archive: str, *, is_folder: bool) -> None:
    """Raise `InputError` for an output that would overwrite something else."""
    # A path has lost the second slash.
    if re.match(r"[a-z][a-z0-9]+:/", str(out)):
        raise InputError(f"{out} is in an object store; export to a local file or folder, and copy it there")
    if "://" not in archive and (out.resolve() == Path(archive) or Path(archive) in out.resolve().parents):
        raise InputError(f"{out} lies in the archive {archive}; choose another place")
    if is_folder and (out.is_file() or (out.is_dir() and any(out.iterdir()))):
        what = "a file" if out.is_file() else "not empty"
        raise InputError(f"{out} is {what}; an export of several files needs a new or an empty folder")
    if not is_folder and out.is_dir():
        raise InputError(f"{out} is a folder; give the name of a file, or --format stac")


@contextmanager
def _one_line(out: Path) -> Iterator[None]:
    """Turn errors of the operating system into an `InputError` of one line."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror or error}") from error


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, allow_nan=False) + "\n"
