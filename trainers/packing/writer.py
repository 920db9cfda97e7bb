"""Write a packed data set: the files of a folder as they are, with what a manifest says of them.

A local data set is written beside its place and renamed when it is whole. In an object store, Lance commits the rows
when all are written; the files of a process that was killed before belong to no version, and the next one removes them.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa

from orbithash.encoders.errors import ImageError, InputError
from orbithash.encoders.files import new_folder
from orbithash.encoders.imagery.rasters import read_bytes
from orbithash.encoders.imagery.rendering import Limits
from orbithash.encoders.lance_errors import is_absent, one_line_errors
from orbithash.encoders.sources.embeddings.tables import is_embedding_table
from orbithash.encoders.sources.image_roots import image_root
from orbithash.encoders.sources.packed import FORMAT_VERSION, PREFIX, PackedImages, lance_place
from orbithash.encoders.sources.remote import is_remote
from orbithash.trainers.datasets.images import SCHEMA, Images
from orbithash.trainers.datasets.make import find_images, hashed_images

__all__ = ["Packed", "pack"]

# Bytes of files that become one batch of rows; a file may be as long as that.
_BATCH_BYTES = 2**26

# `path`, `sha256` and `content` are of every file; the other columns are null for files of second sources only.
_FILE = (
    pa.schema([field for field in SCHEMA if field.name not in ("id", "split")])
    .append(pa.field("split", pa.string()))
    .append(pa.field("content", pa.large_binary()))
)

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Packed:
    """What was packed: `num_images` images of the data set `dataset` in `num_files` files of `num_bytes` in all."""

    dataset: str
    num_images: int
    num_files: int
    num_bytes: int


def pack(
    data: Path,
    out: str,
    dataset: str | None = None,
    captions: Path | None = None,
    on_progress: OnProgress | None = None,
) -> Packed:
    """Write the images of a folder to the packed data set `out`.

    Args:
        data: folder of images.
        out: path or URI of the data set; its name ends in .lance, and nothing may be there.
        dataset: name of the dataset; None: recognised.
        captions: JSON file of captions.
        on_progress: called with the number of files written so far, and of all files.

    Raises:
        InputError: the folder has problems, `out` is taken or cannot be written, a file changes meanwhile, or an image
            is a folder with a file for each band. Nothing is left of a local data set then.
    """
    target = image_root(out)
    if not isinstance(target, PackedImages):
        raise InputError(f"--out is {out}; the name of a packed data set ends in .lance, such as images.lance")
    _check_free(target)
    root = data.resolve()
    if is_embedding_table(root):
        raise InputError(f"{root} is a table of embeddings, which training reads as it is; pack folders of images")
    name, found = find_images(root, dataset, captions, needs_classes=False)
    if found.problems:
        raise InputError(f"{root}: {found.problems[0]}")
    paths = [path for row in found.rows for path in (row.path, row.second) if path is not None]
    if folders := [path for path in paths if path.is_dir()]:
        raise InputError(
            f"{folders[0]} is a folder with a file for each band, and files are packed; stack the bands of each image "
            "in one TIFF, or train from the folder"
        )
    images = hashed_images(found, root)
    files = _files(images)
    stated = {"format_version": FORMAT_VERSION, "dataset": name, "images": str(len(images))}
    stated["classes"] = json.dumps(found.classes)
    schema = _FILE.with_metadata({f"{PREFIX}{key}": value for key, value in stated.items()})
    written = _Written(root, files, schema, on_progress)
    if is_remote(target.location):
        made = written.write(*lance_place(target.location), target)
        with one_line_errors(target.location, "cannot be cleaned"):
            made.cleanup_old_versions(older_than=timedelta(0), delete_unverified=True)
    else:
        try:
            with new_folder(Path(target.location), replace=False) as part:
                written.write(str(part), None, target)
        except OSError as err:
            if isinstance(err, FileExistsError) and Path(target.location).exists():
                # Another process was quicker.
                raise _taken(target) from err
            raise InputError(f"{target} cannot be written ({err.strerror}); give another --out") from err
    return Packed(name, len(images), len(files), written.num_bytes)


def _check_free(target: PackedImages) -> None:
    """Raise `InputError` if something is at the place of a new data set."""
    if not is_remote(target.location):
        is_free = not Path(target.location).exists()
    else:
        import lance

        place, options = lance_place(target.location)
        try:
            lance.dataset(place, storage_options=options)
            is_free = False
        except (OSError, ValueError) as err:
            # Any other error means that something is there, or no permission.
            is_free = is_absent(err)
            if not is_free:
                with one_line_errors(target.location):
                    raise
    if not is_free:
        raise _taken(target)


def _taken(target: PackedImages) -> InputError:
    return InputError(f"{target} exists; give another --out, or remove it first")


def _files(images: Images) -> pa.Table:
    """Return a row with the columns of `_FILE` but `content` for each file: those of images, then of second sources."""
    table = images.table()
    columns = [table[field.name].cast(field.type) for field in _FILE if field.name != "content"]
    firsts = pa.table(columns, names=[field.name for field in _FILE if field.name != "content"])
    seconds = {
        image.second: bytes.fromhex(image.second_sha256)
        for image in images[images.has_second]
        if image.second is not None and image.second_sha256 is not None
    }
    for path in set(images.paths) & seconds.keys():
        del seconds[path]
    others = {"path": list(seconds), "sha256": list(seconds.values())}
    absent = {name: [None] * len(seconds) for name in firsts.column_names if name not in others}
    return pa.concat_tables([firsts, pa.table({**others, **absent}, schema=firsts.schema)]).combine_chunks()


class _Written:
    """The rows of a data set on their way to Lance, in batches of at most `_BATCH_BYTES`, and their size so far."""

    def __init__(self, root: Path, files: pa.Table, schema: pa.Schema, on_progress: OnProgress | None) -> None:
        self.num_bytes = 0
        self._root, self._files, self._schema, self._on_progress = root, files, schema, on_progress
        self._problem: InputError | None = None

    def write(self, place: str, options: dict[str, str] | None, target: PackedImages) -> Any:
        """Write all rows to an empty place and return the dataset; errors name `target`."""
        import lance

        reader = pa.RecordBatchReader.from_batches(self._schema, self._batches())
        try:
            with one_line_errors(target.location, "cannot be written"):
                return lance.write_dataset(reader, place, mode="create", storage_options=options)
        except InputError as err:
            # Lance puts the message of an error of the rows into one of its own.
            raise self._problem or err from err.__cause__

    def _batches(self) -> Iterator[pa.RecordBatch]:
        """Yield the rows with the contents of their files, which several threads read."""
        start, total = 0, len(self._files)
        with ThreadPoolExecutor() as pool:
            while start < total:
                stop = self._stop(start)
                rows = self._files.slice(start, stop - start).combine_chunks()
                try:
                    contents = list(pool.map(self._read, rows["path"].to_pylist(), rows["sha256"].to_pylist()))
                except InputError as err:
                    self._problem = err
                    raise
                self.num_bytes += sum(map(len, contents))
                columns = [*(column.chunk(0) for column in rows.columns), pa.array(contents, pa.large_binary())]
                del contents
                yield pa.record_batch(columns, schema=self._schema)
                del columns
                start = stop
                if self._on_progress is not None:
                    self._on_progress(stop, total)

    def _stop(self, start: int) -> int:
        """Return the end of the batch that begins at a file: before `_BATCH_BYTES` are exceeded, after one file."""
        size = 0
        for row in range(start, len(self._files)):
            # A file that is absent now is an error when it is read.
            with suppress(OSError):
                size += (self._root / self._files["path"][row].as_py()).stat().st_size
            if size > _BATCH_BYTES:
                return max(row, start + 1)
        return len(self._files)

    def _read(self, path: str, sha256: bytes) -> bytes:
        """Return the content of a file; `InputError` if it is not the content with this hash."""
        try:
            content = read_bytes(self._root / path, Limits())
        except ImageError as err:
            raise InputError(f"{self._root}: {path}: {err}") from err
        if hashlib.sha256(content).digest() != sha256:
            raise InputError(f"{self._root}: {path} has changed while it was packed; run the command again")
        return content
