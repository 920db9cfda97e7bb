"""The manifest: every image of a dataset, in exactly one part."""

import dataclasses
import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from orbithash.encoders.errors import InputError, listed
from orbithash.encoders.files import new_file
from orbithash.encoders.sources.image_roots import ImageRoot
from orbithash.trainers.datasets.hashes import hash_files
from orbithash.trainers.datasets.images import OPTIONAL, SCHEMA, Images
from orbithash.trainers.datasets.layouts import first_problems

__all__ = ["FORMAT_VERSION", "MANIFEST", "Manifest"]

FORMAT_VERSION = 4
MANIFEST = "manifest.parquet"
"""Name of the file in the folder of a run."""

# Formats up to 3.
_EARLIER = "manifest.jsonl"

# Rows that are read at once.
_BATCH = 2**16

# Key of the head in the footer of the file.
_KEY = b"orbithash.manifest"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The images of a dataset, each in one part, and the settings of the split.

    `images` may be given as any sequence of `Image`.
    """

    dataset: str
    protocol: str
    seed: int
    validation: float
    classes: tuple[str, ...]
    images: Images

    def __post_init__(self) -> None:
        if not isinstance(self.images, Images):
            object.__setattr__(self, "images", Images.of(self.images))

    @cached_property
    def sha256(self) -> str:
        """Hash of the head and of `Images.digest`, in hexadecimal: equal hashes mean equal splits of equal files.

        It is the SHA-256 of the head as one line of JSON and of the digest.
        """
        return hashlib.sha256(json.dumps(self._head()).encode() + b"\n" + self.images.digest()).hexdigest()

    def part(self, *splits: str) -> Images:
        """Return the images of these parts, in the order of the manifest."""
        return self.images.part(*splits)

    def _head(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "dataset": self.dataset,
            "protocol": self.protocol,
            "seed": self.seed,
            "validation": self.validation,
            "classes": self.classes,
        }

    def write(self, path: Path) -> None:
        """Write the manifest as Parquet: a row for each image, and the head with `sha256` in the footer."""
        head = json.dumps({**self._head(), "sha256": self.sha256})
        with new_file(path) as part:
            pq.write_table(
                self.images.table().replace_schema_metadata({_KEY: head.encode()}),
                part,
                compression="zstd",
                # Paths and hashes differ in every row.
                use_dictionary=["labels.list.element", "split"],
                write_statistics=False,
                row_group_size=2 * _BATCH,
            )

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Read what `write` wrote; `InputError` when it is missing or damaged."""
        try:
            path.open("rb").close()
            with pq.ParquetFile(path, memory_map=True) as file:
                manifest, sha256 = cls._of(file)
            if manifest.sha256 != sha256:
                raise ValueError("its content does not match the hash in its footer")
        except OSError as err:
            if err.errno is None:
                # Arrow's word for bytes that are not Parquet.
                raise InputError(f"{path}: the manifest is damaged ({_first_line(err)})") from err
            if path.with_name(_EARLIER).exists():
                raise InputError(
                    f"{path}: absent; {_EARLIER} beside it is of an earlier version of orbithash, which this one does "
                    "not read: train the run again, or use the version that wrote it"
                ) from err
            raise InputError(
                f"{path}: the manifest cannot be read ({err.strerror}); is this the folder of a run?"
            ) from err
        except (AttributeError, KeyError, TypeError, ValueError, pa.ArrowException) as err:
            raise InputError(f"{path}: the manifest is damaged ({_first_line(err)})") from err
        return manifest

    @classmethod
    def _of(cls, file: pq.ParquetFile) -> tuple["Manifest", str]:
        """Return the manifest in a file, and the hash in its footer."""
        text = (file.schema_arrow.metadata or {}).get(_KEY)
        if text is None:
            raise ValueError("a Parquet file that orbithash did not write as a manifest")
        head = json.loads(text)
        if (version := head.pop("format_version")) != FORMAT_VERSION:
            raise ValueError(f"of format version {version}, not {FORMAT_VERSION}: of another version of orbithash")
        if not file.schema_arrow.equals(SCHEMA):
            raise ValueError("its columns are not those of a manifest")
        # In pieces, whose memory need not grow, and in one thread: other ranks read at the same time.
        table = pa.Table.from_batches(file.iter_batches(_BATCH, use_threads=False), file.schema_arrow)
        if lacking := [name for name in SCHEMA.names if name not in OPTIONAL and table[name].null_count]:
            raise ValueError(f"its column {lacking[0]} has rows without a value")
        sha256, classes = head.pop("sha256"), tuple(head.pop("classes"))
        return cls(**head, classes=classes, images=Images(table.replace_schema_metadata(None))), sha256

    def check_files(self, root: ImageRoot) -> None:
        """Compare all images with the manifest, those of the second source too.

        Unchanged files that were hashed before are not read again (`hashes.py`).

        Raises:
            InputError: lists the images that are missing or have other content now.
        """
        first, second = self.images, self.images[self.images.has_second]
        paths = [*first.paths, *(path for path in second.seconds if path is not None)]
        expected = [*first.sha256s.tolist(), *second.second_sha256s.tolist()]
        notes = [*[""] * len(first), *(f", the second source of {path}" for path in second.paths)]
        problems = []
        for path, found, sha256, note in zip(paths, hash_files(root, paths), expected, notes, strict=True):
            if isinstance(found, FileNotFoundError | NotADirectoryError):
                problems.append(f"{path}: absent{note}")
            elif isinstance(found, OSError):
                problems.append(f"{path}: it cannot be read ({found.strerror}){note}")
            elif found != sha256:
                problems.append(f"{path}: another file than at the time of the split{note}")
        if problems:
            raise listed(first_problems(problems), f"{root} is not the data of this run's manifest")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
