"""Tables of codes: a Parquet file, or a folder of them, with packed codes, their description, ids, places and texts.

The files of `orbithash export` keep all that an archive has of a row; their rows are read unchanged.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from orbithash.encoders.codes import Codes, check_codes
from orbithash.encoders.errors import InputError
from orbithash.encoders.places.code_description import BIT_ORDERS, FOOTER_KEY, CodeDescription
from orbithash.encoders.places.geometry import is_nested_deeply
from orbithash.encoders.sources.codes.code_options import CodeOptions
from orbithash.encoders.sources.embeddings.layouts import TableOptions, find_columns
from orbithash.encoders.sources.embeddings.parquet import PARQUET_SUFFIXES, KeyedTable, find_files, open_parquet
from orbithash.encoders.sources.embeddings.rows import Chunk, EmbeddingRows, RowReader
from orbithash.encoders.sources.geometry_columns import GeometryColumn
from orbithash.encoders.sources.listings import locate
from orbithash.encoders.sources.remote import is_remote
from orbithash.encoders.sources.stac.documents import STAC_SUFFIXES, Documents, is_item
from orbithash.encoders.vectors import VectorSpec

__all__ = ["CodeRows", "CodeTable", "describes_codes"]

# Further columns of an archive that a table may have, and their Arrow types.
_FURTHER = ("vector", "thumbnail", "stamp", "footprint")
# Says which rows have a footprint; the geometry of the others is their centre.
_HAS_FOOTPRINT = "has_footprint"
# Each byte with its bits in the opposite order.
_REVERSED = np.packbits(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), axis=1)[:, 0]


@dataclass(frozen=True)
class CodeRows:
    """Some rows of a table of codes.

    Attributes:
        keys: Arrow array of text [N].
        codes: packed codes of the archive's bit order, uint8 [N, B]; zeros where there is a problem.
        columns: Arrow arrays by the name of the archive's column; an absent one is unknown for all rows.
        problems: why a row cannot be used, by its position.
    """

    keys: Any
    codes: Codes
    columns: dict[str, Any]
    problems: dict[int, str]


@dataclass(frozen=True)
class CodeTable(KeyedTable):
    """A table whose rows are codes.

    Attributes:
        description: what its codes are.
        code: name of the column of codes.
        geometry: name of the column whose bytes are footprints where `has_footprint` says so; "" without one.
        further: names of the further columns that are read.
    """

    description: CodeDescription
    code: str
    geometry: str
    further: tuple[str, ...]

    @classmethod
    def open(
        cls, source: Path | str, codes: Sequence[str] = (), columns: Sequence[str] = (), prefix: str = ""
    ) -> "CodeTable":
        """Open a table; only the footers of its files are read.

        Args:
            source: a Parquet file, a folder of them, or a STAC collection or item whose assets are such files.
            codes: texts `NAME=VALUE` (see `CodeOptions`).
            columns: texts `ROLE=COLUMN` (see `TableOptions`).
            prefix: put before all keys, as PREFIX/KEY.

        Raises:
            InputError: no such file, a damaged one, no column of codes, codes that are not described, or files that
                differ in columns or in the description of their codes.
        """
        options, asked = CodeOptions.parse(codes), TableOptions.parse(columns)
        root, paths = _files_of(Path(source).absolute())
        opened: CodeTable | None = None
        files: list[tuple[Path, tuple[int, ...]]] = []
        for path in paths:
            with open_parquet(path) as file:
                counts = tuple(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))
                try:
                    table = cls._of(root, file, path, options, asked, prefix)
                except InputError as error:
                    raise error if str(error).startswith(str(path)) else InputError(f"{path}: {error}") from error
            if opened is not None and table != opened:
                what = "in their columns" if table.description == opened.description else "in what their codes are"
                raise InputError(f"{path} and {files[0][0].name} are not parts of one table: they differ {what}")
            opened = opened or table
            files.append((path, counts))
        assert opened is not None, "a table has a file"
        return cls(root, tuple(files), opened.reader, opened.description, opened.code, opened.geometry, opened.further)

    @classmethod
    def _of(
        cls, root: Path, file: Any, path: Path, options: CodeOptions, asked: TableOptions, prefix: str
    ) -> "CodeTable":
        """Return the table of one open file, without its rows."""
        import pyarrow.types as types

        schema = file.schema_arrow
        if options.column not in schema.names:
            raise InputError(f"there is no column {options.column} of codes; the columns are {', '.join(schema.names)}")
        description = options.describe(schema)
        columns = find_columns(schema, asked, has_vector=False)
        if "id" not in columns.others:
            raise InputError(f"there is no column id or key; the columns are {', '.join(schema.names)}")
        geometry = GeometryColumn.find(file, path, has_place={"lon", "lat"} <= columns.others.keys())
        further = tuple(name for name in _FURTHER if name in schema.names)
        if description.vector_dims is None:
            further = tuple(name for name in further if name != "vector")
        elif "vector" not in further:
            raise InputError(
                f"its codes are described as having vectors of {description.vector_dims} dimensions, and "
                "there is no column vector"
            )
        footprints = ""
        is_exact = _HAS_FOOTPRINT in schema.names and types.is_boolean(schema.field(_HAS_FOOTPRINT).type)
        if is_exact and geometry is not None and (geometry.encoding, geometry.crs) == ("wkb", None):
            # The footprint is read as it is, and the place is that of the columns lon and lat.
            footprints = geometry.name
            geometry, further = None, (*further, _HAS_FOOTPRINT, footprints)
        reader = RowReader(columns, 0, geometry, prefix)
        return cls(root, (), reader, description, options.column, footprints, further)

    @property
    def vector(self) -> VectorSpec | None:
        """The stored vectors; None without any."""
        dims, scale = self.description.vector_dims, self.description.vector_scale
        return None if dims is None or scale is None else VectorSpec(dims, scale)

    def __str__(self) -> str:
        """Return what the table is, for a message."""
        return f"{self.num_rows:,} codes of {self.description.bits} bits (model {self.description.model_id})"

    def check(self) -> int:
        """Return the number of rows; reads the ids and the codes of all rows.

        Raises:
            InputError: a key occurs twice, or a code does not fit the description.
        """
        for chunk in self.chunks():
            for rows in self.reader.read(chunk, vectors=False, places=False, others=[self.code]):
                self._codes(rows, chunk, {})
        return self.check_keys()

    def read(self, chunk: Chunk) -> Iterator[CodeRows]:
        """Yield the rows of a chunk in batches. Raises `InputError` for a damaged file."""
        for rows in self.reader.read(chunk, vectors=False, others=[self.code, *self.further]):
            problems = dict(rows.problems)
            codes = self._codes(rows, chunk, problems)
            yield CodeRows(rows.keys, codes, {**rows.columns, **self._further(rows, problems)}, problems)

    def uris(self, chunk: Chunk) -> Iterator[tuple[Any, Any]]:
        """Yield keys and URIs of the rows of a chunk as Arrow arrays; the URI of a row without one is None."""
        import pyarrow as pa

        name = self.reader.columns.others.get("uri")
        for rows in self.reader.read(chunk, vectors=False, places=False, others=[name] if name else []):
            yield rows.keys, rows.others[name] if name else pa.nulls(len(rows.keys), pa.string())

    def _codes(self, rows: EmbeddingRows, chunk: Chunk, problems: dict[int, str]) -> Codes:
        """Return the codes of a batch in the archive's bit order; note a problem of rows without a code.

        Raises:
            InputError: a code of another length, or with a pad bit that is set.
        """
        codes, known = _byte_rows(rows.others[self.code], self.description.num_bytes, chunk, rows.first)
        for row in np.flatnonzero(~known).tolist():
            problems.setdefault(row, "its code is null")
        if self.description.bit_order != BIT_ORDERS[0]:
            codes = _REVERSED[codes]
        try:
            return check_codes(codes, self.description.bits)
        except InputError as error:
            raise InputError(f"{chunk.path}: {error}; bits or order of the codes are not as described") from error

    def _further(self, rows: EmbeddingRows, problems: dict[int, str]) -> dict[str, Any]:
        """Return the columns of an archive that only files of codes have."""
        import pyarrow as pa
        import pyarrow.compute as pc

        found = {name: rows.others[name] for name in self.further if name in ("thumbnail", "footprint", "stamp")}
        columns = {name: column.cast(pa.string() if name == "stamp" else pa.binary()) for name, column in found.items()}
        if self.geometry:
            outlines = getattr(rows.others[self.geometry], "storage", rows.others[self.geometry]).cast(pa.binary())
            has_footprint = rows.others[_HAS_FOOTPRINT].fill_null(False)
            exact = pc.if_else(has_footprint, outlines, pa.scalar(None, pa.binary()))
            columns["footprint"] = pc.coalesce(columns["footprint"], exact) if "footprint" in columns else exact
        for row, outline in enumerate(columns["footprint"].to_pylist() if "footprint" in columns else ()):
            if outline is not None and is_nested_deeply(outline):
                problems.setdefault(row, "its footprint has collections that are nested too deeply")
        if "vector" in self.further:
            columns["vector"] = self._vectors(rows.others["vector"], problems)
        return columns

    def _vectors(self, column: Any, problems: dict[int, str]) -> Any:
        """Return stored vectors as an Arrow array of lists of one size; note a problem of those of another length."""
        import pyarrow as pa
        import pyarrow.compute as pc

        column = getattr(column, "storage", column)
        dims = self.description.vector_dims
        lengths = pc.list_value_length(column)
        wrong = pc.not_equal(lengths, dims).fill_null(False).to_numpy(zero_copy_only=False)
        for row in np.flatnonzero(wrong).tolist():
            problems.setdefault(row, f"its vector has {lengths[row].as_py()} dimensions; {dims} are described")
        if wrong.any():
            column = pc.if_else(pa.array(wrong), pa.scalar(None, column.type), column)
        try:
            return column.cast(pa.list_(pa.int8(), dims))
        except pa.ArrowException as error:
            raise InputError(f"{self.root}: its column vector is not one of int8: {_line(error)}") from error


def _files_of(source: Path) -> tuple[Path, list[Path]]:
    """Return the root of a table and its Parquet files; `InputError` without any."""
    if not source.name.lower().endswith(STAC_SUFFIXES) or source.is_dir():
        return source, find_files(source)
    found: dict[Path, None] = {}
    for feature in Documents([source]).features():
        assets = feature.content.get("assets") if is_item(feature.content) else None
        for asset in assets.values() if isinstance(assets, dict) else ():
            href = asset.get("href") if isinstance(asset, dict) else None
            if isinstance(href, str) and href.partition("?")[0].lower().endswith(PARQUET_SUFFIXES):
                if is_remote(href):
                    raise InputError(f"{feature.file} names {href}, which is remote: copy it to this machine")
                found[Path(locate(href, feature.file.parent))] = None
    if not found:
        raise InputError(f"{source} has no item with a Parquet file of codes ({', '.join(PARQUET_SUFFIXES)})")
    return source.parent, list(found)


def describes_codes(source: Path) -> bool:
    """Return whether a Parquet file, or the first one of a folder, has a footer that describes its codes."""
    try:
        first = find_files(source)[0]
        if not first.name.lower().endswith(PARQUET_SUFFIXES):
            return False
        with open_parquet(first) as file:
            return FOOTER_KEY.encode() in (file.schema_arrow.metadata or {})
    except InputError:
        return False


def _byte_rows(column: Any, size: int, chunk: Chunk, first: int) -> tuple[Codes, npt.NDArray[np.bool_]]:
    """Return lists or strings of `size` bytes as uint8 [N, size], zeros where null, and which are known, bool [N]."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.types as types

    column = getattr(column, "storage", column)
    kind = column.type
    known: npt.NDArray[np.bool_] = column.is_valid().to_numpy(zero_copy_only=False)
    codes = np.zeros((len(column), size), np.uint8)
    is_binary = types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind)
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    if not is_binary and not (is_list and types.is_uint8(kind.value_type)):
        raise InputError(f"{chunk.path}: its codes are of type {kind}; lists of uint8 and binary are allowed")
    present = column.filter(pa.array(known))
    lengths = pc.binary_length(present) if is_binary else pc.list_value_length(present)
    wrong = np.flatnonzero(pc.not_equal(lengths, size).to_numpy(zero_copy_only=False))
    if len(wrong):
        row = first + int(np.flatnonzero(known)[wrong[0]])
        raise InputError(
            f"{chunk.path}: the code of row {row} has {lengths[int(wrong[0])].as_py()} bytes; as described "
            f"it has {size}"
        )
    if is_binary:
        flat = np.frombuffer(b"".join(present.to_pylist()), np.uint8)
    else:
        values = present.flatten()
        if values.null_count:
            raise InputError(f"{chunk.path}: a byte of a code is null")
        flat = values.to_numpy(zero_copy_only=False)
    codes[known] = flat.reshape(-1, size)
    return codes, known


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
