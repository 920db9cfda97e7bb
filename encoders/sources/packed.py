"""Packed data sets: one Lance dataset with the bytes of all image files and what a manifest says of them.

Each row is a file: first one for each image, in the order of the manifest, then those of second sources. Lance reads
rows by their number, so any order of images costs the same, and is that of the folder that was packed.

Lance must not be used in a process that was forked from one that used it; a dataset is opened once in each process.
"""

import hashlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from errno import ENOENT
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit, urlunsplit

import numpy as np
import numpy.typing as npt

from orbithash.encoders.errors import InputError
from orbithash.encoders.lance_errors import is_absent, one_line_errors
from orbithash.encoders.sources.embeddings.key_hashes import hash_keys
from orbithash.encoders.sources.remote import is_remote

__all__ = ["FORMAT_VERSION", "PREFIX", "SUFFIX", "PackedImages", "is_packed", "lance_place"]

FORMAT_VERSION = "1"
PREFIX = "orbithash.packed."
"""Begins the keys of the metadata of a packed data set."""

SUFFIX = ".lance"
"""Ends the name of a packed data set, local or not, so that nothing is opened to recognise one."""

_OPENING = threading.Lock()

_REMEDY = "pack it again"


def is_packed(location: str) -> bool:
    """Return whether the name of a path or URI is that of a packed data set."""
    path = urlsplit(location).path if is_remote(location) else location
    return path.rstrip("/").endswith(SUFFIX)


@dataclass(frozen=True)
class PackedImages:
    """The images of a packed data set at an absolute path or a URI; nothing is opened before it is read."""

    location: str

    def __str__(self) -> str:
        return self.location

    def sources(self, names: Sequence[str]) -> list[bytes]:
        """Return the bytes of each image file; `InputError` if one is absent or damaged, or the data set unreadable."""
        if not names:
            return []
        rows = self._reader.rows(names)
        if absent := [name for name, row in zip(names, rows.tolist(), strict=True) if row < 0]:
            raise InputError(f"{self} has no image {absent[0]}; it is not the data of this run's manifest")
        with self._one_line_errors():
            read = self._reader.dataset.take(rows.tolist(), columns=["path", "sha256", "content"]).to_pydict()
        for name, path, sha256, content in zip(names, *read.values(), strict=True):
            if path != name or hashlib.sha256(content).digest() != sha256:
                raise InputError(f"{self} is damaged: {name} is not the file that was packed; pack it again")
        contents: list[bytes] = read["content"]
        return contents

    def hashes(self, names: Sequence[str]) -> list[bytes | OSError]:
        """Return the SHA-256 of each image, as it was packed; `FileNotFoundError` for an image that is not in it."""
        rows = self._reader.rows(names)
        there = np.flatnonzero(rows >= 0)
        hashes: list[bytes | OSError] = [FileNotFoundError(ENOENT, os.strerror(ENOENT))] * len(names)
        for place, sha256 in zip(there.tolist(), self.columns(["sha256"])["sha256"].take(rows[there]), strict=True):
            hashes[place] = sha256.as_py()
        return hashes

    @property
    def metadata(self) -> Mapping[str, str]:
        """What `orbithash pack` states about all images: dataset, classes, images (their number)."""
        return self._reader.metadata

    def columns(self, names: Sequence[str]) -> Any:
        """Return columns of all files as an Arrow table."""
        with self._one_line_errors():
            return self._reader.dataset.to_table(columns=list(names))

    @property
    def _reader(self) -> "_Reader":
        with _OPENING:
            return _opened(self.location, os.getpid(), _stamp(self.location))

    @contextmanager
    def _one_line_errors(self) -> Iterator[None]:
        """Do what `one_line_errors` does; after an error the data set is opened again, since it may be a new one."""
        try:
            with one_line_errors(self.location, remedy=_REMEDY):
                yield
        except InputError:
            _opened.cache_clear()
            raise


class _Reader:
    """An opened dataset, and the number of the row of each name: 16 bytes an image."""

    def __init__(self, location: str) -> None:
        import lance

        place, options = lance_place(location)
        if not is_remote(location) and not any(Path(location, "_versions").glob("*")):
            what = "holds no packed data set, or one that was not finished" if Path(location).exists() else "is absent"
            raise InputError(f"{location} {what}; `orbithash pack` makes one")
        try:
            with one_line_errors(location, remedy=_REMEDY):
                self.dataset = lance.dataset(place, storage_options=options)
        except InputError as error:
            # Or there is no such bucket.
            if is_absent(error.__cause__) or "404 Not Found" in str(error.__cause__):
                raise InputError(
                    f"{location} holds no packed data set, or one that was not finished; `orbithash pack` makes one"
                ) from error
            raise
        with one_line_errors(location, remedy=_REMEDY):
            stated = {key.decode(): value.decode() for key, value in (self.dataset.schema.metadata or {}).items()}
        self.metadata = {key.removeprefix(PREFIX): value for key, value in stated.items() if key.startswith(PREFIX)}
        version = self.metadata.get("format_version")
        if version is None:
            raise InputError(f"{location} is a Lance dataset that `orbithash pack` did not make; pack the images")
        if version != FORMAT_VERSION:
            raise InputError(
                f"{location} is of format version {version}, and {FORMAT_VERSION} is read; pack the images again"
            )
        with one_line_errors(location, remedy=_REMEDY):
            names = self.dataset.to_table(columns=["path"])["path"].combine_chunks()
        hashes = hash_keys(names)
        self._order = np.argsort(hashes)
        self._hashes = hashes[self._order]

    def rows(self, names: Sequence[str]) -> npt.NDArray[np.int64]:
        """Return the number int64 [N] of the row of each name, -1 for other names. `sources` compares the names."""
        import pyarrow as pa

        if not len(self._hashes):
            return np.full(len(names), -1)
        sought = hash_keys(pa.array(names, pa.large_string()))
        places = np.minimum(np.searchsorted(self._hashes, sought), len(self._hashes) - 1)
        found: npt.NDArray[np.int64] = np.where(self._hashes[places] == sought, self._order[places], -1)
        return found


@lru_cache(maxsize=4)
def _opened(location: str, process: int, stamp: tuple[tuple[str, int, int], ...]) -> _Reader:
    return _Reader(location)


def _stamp(location: str) -> tuple[tuple[str, int, int], ...]:
    """Return what differs when another data set was packed at a path; nothing for a URI, where looking takes long."""
    if is_remote(location):
        return ()
    try:
        with os.scandir(f"{location}/_versions") as entries:
            files = [(entry.name, entry.stat()) for entry in entries]
    except OSError:
        return ()
    return tuple(sorted((name, status.st_mtime_ns, status.st_ino) for name, status in files))


def lance_place(location: str) -> tuple[str, dict[str, str] | None]:
    """Return the location as Lance takes it, and its options: those that pyarrow reads from the query of a URI."""
    if not is_remote(location):
        return location, None
    parts = urlsplit(location)
    query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
    scheme, endpoint = query.get("scheme", "https"), query.get("endpoint_override")
    options = {"region": query["region"]} if "region" in query else {}
    if endpoint:
        options["endpoint"] = f"{scheme}://{endpoint}"
    if (endpoint and scheme == "http") or os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://"):
        options["allow_http"] = "true"
    # Both names of Google's store are read, of which Lance knows one.
    scheme_of_store = "gs" if parts.scheme == "gcs" else parts.scheme
    return urlunsplit(parts._replace(scheme=scheme_of_store, query="")).rstrip("/"), options
