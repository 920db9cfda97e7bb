"""The images of a manifest as columns of Arrow: a row becomes an object only where one asks for it.

A million images with paths of 30 characters take 102 MB as columns, and 445 MB as objects.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Self, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

__all__ = ["SCHEMA", "Image", "Images", "LabelLists"]

# `id` is null where it is the path. All columns but id and those of the second source have a value in every row.
SCHEMA = pa.schema(
    [
        ("id", pa.large_string()),
        ("path", pa.large_string()),
        ("labels", pa.list_(pa.int32())),
        ("split", pa.dictionary(pa.int8(), pa.string())),
        ("sha256", pa.binary(32)),
        ("captions", pa.list_(pa.large_string())),
        ("second", pa.large_string()),
        # Of variable size: a column of fixed size would take 32 bytes for each image without a second source.
        ("second_sha256", pa.binary()),
    ]
)
OPTIONAL = {"id", "second", "second_sha256"}

# Rows that become objects at once, and rows that are hashed at once.
_BLOCK, _HASHED = 2**12, 2**16


@dataclasses.dataclass(frozen=True)
class Image:
    """An image of a manifest. Paths are relative to the data folder.

    `path` is a file, or a folder with one file per band. `labels` are the indices of the image's classes, empty if they
    are unknown. `split` is train, validation, test or database. `captions` are sentences about the image; `second` is
    the image of a second source of the same place, `second_sha256` its hash.
    """

    id: str
    path: str
    labels: tuple[int, ...]
    split: str
    sha256: str
    captions: tuple[str, ...] = ()
    second: str | None = None
    second_sha256: str | None = None

    @property
    def label(self) -> int:
        """Index of its first class; -1 if it is unknown."""
        return self.labels[0] if self.labels else -1


class LabelLists(NamedTuple):
    """The labels of N images: `counts` int64 [N], and the labels of all images one after another, `values` int32."""

    counts: npt.NDArray[np.int64]
    values: npt.NDArray[np.int32]


class Images(Sequence[Image]):
    """A selection of the rows of a table with `SCHEMA`, in any order.

    A row number gives an `Image`; a slice, row numbers int64 [M] or a mask bool [N] give `Images` of the same table.
    """

    def __init__(self, table: pa.Table, rows: npt.NDArray[np.int64] | None = None) -> None:
        """Select these rows of a table; None: all rows."""
        self._table, self._rows = table, rows

    @classmethod
    def of(cls, images: Iterable[Image]) -> Self:
        """Return the columns of images."""
        rows = list(images)
        columns = {
            field.name: [getattr(image, field.name) for image in rows]
            for field in dataclasses.fields(Image)
            if not field.name.endswith("sha256")
        }
        return cls.of_columns(
            **columns,
            sha256=[bytes.fromhex(image.sha256) for image in rows],
            second_sha256=[None if (sha256 := i.second_sha256) is None else bytes.fromhex(sha256) for i in rows],
        )

    @classmethod
    def of_columns(
        cls,
        *,
        id: Sequence[str],
        path: Sequence[str],
        labels: Sequence[Sequence[int]],
        split: Sequence[str],
        sha256: Sequence[bytes],
        captions: Sequence[Sequence[str]],
        second: Sequence[str | None],
        second_sha256: Sequence[bytes | None],
    ) -> Self:
        """Return images, given the fields of `Image` for each of them; hashes as 32 bytes."""
        columns = {
            "id": [None if own == name else own for own, name in zip(id, path, strict=True)],
            "path": path,
            "labels": labels,
            "split": split,
            "sha256": sha256,
            "captions": captions,
            "second": second,
            "second_sha256": second_sha256,
        }
        return cls(pa.table([pa.array(columns[field.name], field.type) for field in SCHEMA], schema=SCHEMA))

    def __len__(self) -> int:
        return self._table.num_rows if self._rows is None else len(self._rows)

    @overload
    def __getitem__(self, key: int) -> Image: ...

    @overload
    def __getitem__(self, key: slice | npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> Self: ...

    def __getitem__(self, key: int | slice | npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> Image | Self:
        if isinstance(key, slice | np.ndarray):
            return type(self)(self._table, self._row_numbers()[key])
        row = range(len(self))[key] if self._rows is None else int(self._rows[key])
        return _image({name: self._table[name][row].as_py() for name in SCHEMA.names})

    def __iter__(self) -> Iterator[Image]:
        for start in range(0, len(self), _BLOCK):
            stop = min(start + _BLOCK, len(self))
            block = self[start:stop].table() if self._rows is not None else self._table.slice(start, stop - start)
            yield from map(_image, block.to_pylist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Images) and self.digest() == other.digest()

    __hash__ = None  # type: ignore[assignment]

    def __add__(self, other: "Images") -> Self:
        """Return the images of two selections of one table, one after the other."""
        assert self._table is other._table, "selections of one manifest"
        return type(self)(self._table, np.concatenate([self._row_numbers(), other._row_numbers()]))

    def table(self) -> pa.Table:
        """Return the rows as a table with `SCHEMA`."""
        selected: pa.Table = self._table if self._rows is None else self._table.take(pa.array(self._rows))
        return selected

    def part(self, *splits: str) -> Self:
        """Return the images of these parts, in their order."""
        is_in: npt.NDArray[np.bool_] = pc.is_in(
            self._column("split"), value_set=pa.array(splits, pa.string())
        ).to_numpy()
        return self[is_in]

    def with_splits(self, splits: Sequence[str]) -> Self:
        """Return the same images in other parts, one part for each image."""
        table, field = self.table(), SCHEMA.field("split")
        return type(self)(table.set_column(SCHEMA.names.index("split"), field, pa.array(splits, field.type)))

    @property
    def ids(self) -> list[str]:
        """The id of each image."""
        ids: list[str] = pc.coalesce(self._column("id"), self._column("path")).to_pylist()
        return ids

    @property
    def paths(self) -> list[str]:
        """The path of each image."""
        return self._values("path")

    @property
    def seconds(self) -> list[str | None]:
        """The path of each image's second source, None without one."""
        return self._values("second")

    @property
    def splits(self) -> list[str]:
        """The part of each image."""
        return self._values("split")

    @property
    def captions(self) -> list[list[str]]:
        """The captions of each image."""
        return self._values("captions")

    @property
    def sha256s(self) -> npt.NDArray[np.void]:
        """The hash of each image's content, V32 [N]."""
        return _hashes(self._column("sha256"))

    @property
    def second_sha256s(self) -> npt.NDArray[np.void]:
        """The hash of each second source, V32 [N]; zeros without one."""
        return _hashes(self._column("second_sha256"))

    @property
    def labels(self) -> LabelLists:
        """The labels of all images."""
        column = self._column("labels")
        return LabelLists(_int64(pc.list_value_length(column)), pc.list_flatten(column).to_numpy())

    @property
    def is_labelled(self) -> npt.NDArray[np.bool_]:
        """Whether each image has a label, bool [N]."""
        labelled: npt.NDArray[np.bool_] = self.labels.counts > 0
        return labelled

    @property
    def has_captions(self) -> npt.NDArray[np.bool_]:
        """Whether each image has captions, bool [N]."""
        captioned: npt.NDArray[np.bool_] = _int64(pc.list_value_length(self._column("captions"))) > 0
        return captioned

    @property
    def has_second(self) -> npt.NDArray[np.bool_]:
        """Whether each image has a second source, bool [N]."""
        present: npt.NDArray[np.bool_] = self._column("second").is_valid().to_numpy()
        return present

    def digest(self) -> bytes:
        """Return a SHA-256 of the content, which neither Arrow's version nor the chunks of the columns change.

        It is the hash of all columns in the order of `SCHEMA`, numbers as int64, little-endian. A column of texts or
        hashes is the length of each value in bytes (-1: none), then all values; a column of lists is the length of each
        list, then the column of all their values; a column of integers is these integers.
        """
        digest = hashlib.sha256()
        for name in SCHEMA.names:
            _feed(digest, self._column(name))
        return digest.digest()

    def _row_numbers(self) -> npt.NDArray[np.int64]:
        return np.arange(self._table.num_rows) if self._rows is None else self._rows

    def _column(self, name: str) -> pa.ChunkedArray:
        column = self._table[name]
        return column if self._rows is None else column.take(pa.array(self._rows))

    def _values(self, name: str) -> list[Any]:
        values: list[Any] = self._column(name).to_pylist()
        return values


def _image(row: dict[str, Any]) -> Image:
    second_sha256 = row["second_sha256"]
    return Image(
        id=row["path"] if row["id"] is None else row["id"],
        path=row["path"],
        labels=tuple(row["labels"]),
        split=row["split"],
        sha256=row["sha256"].hex(),
        captions=tuple(row["captions"]),
        second=row["second"],
        second_sha256=None if second_sha256 is None else second_sha256.hex(),
    )


def _int64(column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    return np.asarray(column.to_numpy(), "<i8")


def _hashes(column: pa.ChunkedArray) -> npt.NDArray[np.void]:
    hashes, start = np.empty(len(column), "V32"), 0
    for chunk in column.chunks:
        stop = start + len(chunk)
        hashes[start:stop] = np.frombuffer(_joined(chunk.fill_null(bytes(32))), "V32")
        start = stop
    return hashes


def _feed(digest: Any, column: pa.ChunkedArray) -> None:
    """Add a column to a hash, see `Images.digest`; in blocks, so that this needs little memory."""
    kind = column.type
    if pa.types.is_integer(kind):
        for block in _blocks(column):
            digest.update(_int64(block))
        return
    length = pc.list_value_length if pa.types.is_list(kind) else pc.binary_length
    for block in _blocks(column):
        digest.update(_int64(length(block).fill_null(-1)))
    if pa.types.is_list(kind):
        _feed(digest, pc.list_flatten(column))
        return
    for block in _blocks(column):
        for chunk in block.chunks:
            digest.update(_joined(chunk))


def _blocks(column: pa.ChunkedArray) -> Iterator[pa.ChunkedArray]:
    for start in range(0, len(column), _HASHED):
        block = column.slice(start, _HASHED)
        yield block.cast(block.type.value_type) if pa.types.is_dictionary(block.type) else block


def _joined(values: pa.Array) -> memoryview:
    """Return the bytes of all values of a column of texts or hashes, one after another."""
    present = values.drop_null().cast(pa.large_binary())
    if not len(present):
        return memoryview(b"")
    _, offsets, content = present.buffers()
    start, stop = (np.frombuffer(offsets, np.int64)[present.offset + place] for place in (0, len(present)))
    return memoryview(content or b"")[start:stop]
