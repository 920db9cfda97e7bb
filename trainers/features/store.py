"""Kept features of one kind: a folder of files that are written once and never changed.

FOLDER/KIND/DIGEST.arrow     up to `PART_ROWS` rows in Arrow's IPC format: `hash` of an image or sentence, `features`

A part is written under a temporary name and renamed, so any number of processes may write at once without a lock, and
a run that ends early loses the rows of one part. The name is the digest of the content: a damaged part is ignored and
its rows are computed again, and processes that keep the same part write the same file. A part is read whole for its
digest once on each machine; later only its hashes are read, until a row is needed. Rows that two processes computed at
the same time are there twice, and the older one counts.
"""

import errno
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from orbithash.encoders.errors import InputError
from orbithash.encoders.files import cache_folder, write_file
from orbithash.encoders.sources.remote import is_remote, path_of
from orbithash.trainers.data.feature_table import FeatureTable
from orbithash.trainers.datasets.hashes import hash_files
from orbithash.trainers.features.bucket import Bucket
from orbithash.trainers.features.limit import make_room
from orbithash.trainers.locks import Use, alone_in, claim, use

__all__ = ["HASH", "PART_ROWS", "FeatureStore", "Hashes", "store_folder", "store_uri", "with_writable_store"]

# Rows of a part. At 2048 dimensions 8 MiB.
PART_ROWS = 1024

# Of the layout of parts. It is part of the name of a folder, so that no other version reads it.
_VERSION = 2

# Parts that are fetched or uploaded at once.
_TRANSFERS = 8

# Errors of a folder that another user owns, or that is mounted for reading.
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)

_log = logging.getLogger(__name__)

Made = TypeVar("Made")

Features = npt.NDArray[np.float32]

# SHA-256, 32 bytes each. Of this type, hashes are sorted and compared as a whole.
Hashes = npt.NDArray[np.bytes_]
HASH = np.dtype("S32")


def store_folder() -> Path:
    """Return the absolute path of the folder of all kinds: `ORBITHASH_FEATURES`, or one in the cache folder.

    The latter if the variable is not set, or is the URI of an object store.
    """
    given = os.environ.get("ORBITHASH_FEATURES")
    return Path(path_of(given)).absolute() if given and not is_remote(given) else cache_folder() / "features"


def store_uri() -> str | None:
    """Return the URI behind the folder, which machines share: `ORBITHASH_FEATURES`; None if that is no URI."""
    given = os.environ.get("ORBITHASH_FEATURES")
    return given if given and is_remote(given) else None


def with_writable_store(work: Callable[[], Made]) -> Made:
    """Return the result of `work`; if the folder of features may not be written, try again with a temporary one.

    A warning says so. Only for work of one process.
    """
    try:
        return work()
    except InputError as err:
        if not isinstance(err.__cause__, OSError) or err.__cause__.errno not in _NOT_ALLOWED:
            raise
        _log.warning("%s; computing without keeping them", err)
    before = os.environ.get("ORBITHASH_FEATURES")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ORBITHASH_FEATURES"] = folder
        try:
            return work()
        finally:
            if before is None:
                del os.environ["ORBITHASH_FEATURES"]
            else:
                os.environ["ORBITHASH_FEATURES"] = before


class _Part(NamedTuple):
    """Hashes [n] and features float32 [n, D] of a mapped file of `size` bytes."""

    hashes: Hashes
    features: Features
    size: int


class FeatureStore:
    """The kept rows of one kind, by hash: those that were there at the last `refresh`.

    The kind is not pruned as long as the store or a table of it lives.
    """

    def __init__(self, kind: dict[str, Any]) -> None:
        """`kind` says what the features are of: the network and its weights, the preprocessing, the view."""
        digest = hashlib.sha256(json.dumps({"version": _VERSION, **kind}).encode())
        self.folder = store_folder() / digest.hexdigest()[:32]
        self._parts: dict[str, _Part] = {}
        self._order, self._sorted = np.empty(0, np.int64), np.empty(0, HASH)
        self._use: Use | None = None
        # Bytes that may be written before the next look at the limit.
        self._room = 0.0
        self._bucket = None if (uri := store_uri()) is None else Bucket(uri)
        self._uploads = self._bucket is not None
        # Whether others wait for what is uploaded, so that a failure is an error.
        self._must_upload = False
        self.refresh()

    @property
    def num_features(self) -> int:
        """Number of dimensions; 0 for a store without rows."""
        return next((part.features.shape[1] for part in self._parts.values()), 0)

    def refresh(self) -> None:
        """Map the parts that were added since, by any process."""
        self._use = self._use or use(self.folder)
        if not (new := _files(self.folder) - self._parts.keys()):
            return
        for name in sorted(_undamaged(self.folder, new), key=lambda name: _age(self.folder / name)):
            if (part := _mapped(self.folder / name)) and self.num_features in (0, part.features.shape[1]):
                self._parts[name] = part
        hashes = np.concatenate([np.empty(0, HASH), *(part.hashes for part in self._parts.values())])
        # Stable: of the rows of one hash, the older comes first.
        self._order = np.argsort(hashes, kind="stable")
        self._sorted = hashes[self._order]

    def find(self, hashes: Hashes) -> npt.NDArray[np.int64]:
        """Return the numbers of the rows of these hashes [N], int64 [N]; -1 for those that are not kept."""
        if not len(self._sorted):
            return np.full(len(hashes), -1, np.int64)
        places = np.minimum(np.searchsorted(self._sorted, hashes), len(self._sorted) - 1)
        return np.where(self._sorted[places] == hashes, self._order[places], -1).astype(np.int64)

    def table(self, rows: npt.NDArray[np.int64]) -> FeatureTable:
        """Return the features of rows by their numbers, which `find` returned since the last `refresh`."""
        return FeatureTable([part.features for part in self._parts.values()], rows, self._use)

    def claim(self) -> Callable[[], None] | None:
        """Reserve the computing of rows of this kind and return what ends that; None if another process has it."""
        self._open()
        return claim(self.folder / ".computing")

    def make_room(self, num_bytes: int) -> None:
        """Prune other kinds until `num_bytes` more fit into the limit; `InputError` if they cannot."""
        self._open()
        make_room(self.folder, num_bytes)

    def share(self, *, only_upload: bool = False) -> None:
        """Fetch the parts of the bucket that lack here, and upload those that lack there; without a bucket, do nothing.

        A bucket that may only be read is a warning; with `only_upload`, for rows that others wait for, an error of this
        and of `add`.

        Raises:
            InputError: the bucket does not answer or may not be read, or the parts cannot be written here. What was
                fetched until then is kept.
        """
        if (bucket := self._bucket) is None:
            return
        kind = self.folder.name
        self._open()
        # Processes of one machine fetch a part once.
        self._must_upload = only_upload
        with alone_in(self.folder / ".share", "fetches or uploads features of the same kind"):
            self.refresh()
            sizes = bucket.sizes(kind)
            lacking = [] if only_upload else sorted(sizes.keys() - self._parts.keys())
            if lacking:
                make_room(self.folder, sum(sizes[name] for name in lacking))
            unshared = sorted(name for name, part in self._parts.items() if sizes.get(name) != part.size)

            def fetch(name: str) -> None:
                if (content := bucket.read(kind, name)) is not None:
                    self._write(name, content)

            def upload(name: str) -> None:
                # A part may be removed by hand.
                with suppress(FileNotFoundError):
                    bucket.write(kind, name, (self.folder / name).read_bytes())

            self._uploads = True
            with ThreadPoolExecutor(_TRANSFERS) as pool:
                list(pool.map(fetch, lacking))
                self._go_on(lambda: list(pool.map(upload, unshared)))
        self.refresh()

    def add(self, hashes: Hashes, features: Features) -> None:
        """Keep the features float32 [N, D] of N hashes, in parts; `refresh` makes them visible.

        Each part is uploaded as soon as it is written. If that fails, a warning says so, and the next `share` uploads
        it and those after it.

        Raises:
            InputError: the folder cannot be written, or the limit does not allow it; parts before the first that
                failed are kept.
        """
        self._open()
        for start in range(0, len(hashes), PART_ROWS):
            rows = slice(start, start + PART_ROWS)
            content = _content(hashes[rows], features[rows])
            if len(content) > self._room:
                self._room = len(content) + make_room(self.folder, len(content))
            self._room -= len(content)
            name = f"{hashlib.sha256(content).hexdigest()}.arrow"
            self._write(name, content)
            if self._bucket is not None and self._uploads:
                self._go_on(partial(self._bucket.write, self.folder.name, name, content))

    def try_share(self) -> None:
        """Do what `share` does; a bucket that fails is a warning."""
        self._go_on(self.share)

    def _go_on(self, exchange: Callable[[], object]) -> None:
        """Call `exchange`; if it fails, warn, and upload nothing more before the next `share`, unless others wait."""
        try:
            exchange()
        except InputError as err:
            if self._must_upload:
                raise
            self._uploads = False
            _log.warning("%s; features stay in %s until the next command uploads them", err, self.folder)

    def _write(self, name: str, content: bytes) -> None:
        try:
            write_file(self.folder / name, content)
        except OSError as err:
            raise self._unwritable(err) from err

    def _open(self) -> None:
        """Make the folder, and hold it against pruning."""
        try:
            self._use = self._use or use(self.folder, create=True)
        except OSError as err:
            raise self._unwritable(err) from err

    def _unwritable(self, err: OSError) -> InputError:
        return InputError(
            f"{self.folder}: features cannot be written there ({err.strerror}); set ORBITHASH_FEATURES to a folder on "
            "a disk with free space"
        )


def _content(hashes: Hashes, features: Features) -> bytes:
    """Return the content of a part with these rows."""
    columns = {
        "hash": pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(HASH.itemsize), len(hashes), [None, pa.py_buffer(np.ascontiguousarray(hashes, HASH))]
        ),
        "features": pa.FixedSizeListArray.from_arrays(
            pa.array(features.astype(np.float32, copy=False).ravel()), features.shape[1]
        ),
    }
    batch = pa.RecordBatch.from_pydict(columns)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _files(folder: Path) -> set[str]:
    """Return the names of the parts of a folder, which may be absent."""
    return {path.name for path in folder.glob("*.arrow") if not path.name.startswith(".")}


def _undamaged(folder: Path, names: Iterable[str]) -> list[str]:
    """Return the parts whose content is what was written; those that have not changed are not read again."""
    ordered = sorted(names)
    found = []
    for name, sha256 in zip(ordered, hash_files(folder, ordered), strict=True):
        if isinstance(sha256, OSError):
            _check_limit(folder / name, sha256)
        elif sha256.hex() == name.removesuffix(".arrow"):
            found.append(name)
    return found


def _age(path: Path) -> tuple[int, str]:
    """Return a key that sorts parts from the oldest to the newest."""
    try:
        return path.stat().st_mtime_ns, path.name
    except FileNotFoundError:
        # Removed meanwhile: it cannot be opened either.
        return 0, path.name


def _mapped(path: Path) -> _Part | None:
    """Return a part, mapped, or None if it cannot be read."""
    try:
        # Mapped by Arrow: NumPy's map would keep a descriptor of each part, of which a process has some 1,000.
        with pa.memory_map(str(path)) as source:
            size = source.size()
            batch = pa.ipc.open_file(source.read_buffer()).get_batch(0)
        batch.validate()
    except OSError as err:
        _check_limit(path, err)
        return None
    except pa.ArrowException:
        return None
    hashes, features = batch.column("hash"), batch.column("features")
    width = features.type.list_size
    rows: Features = features.flatten().to_numpy().reshape(len(batch), width)
    return _Part(np.frombuffer(hashes.buffers()[1], HASH, len(batch)), rows, size)


def _check_limit(path: Path, err: OSError) -> None:
    """Raise `InputError` if a file could not be opened because too many are open or mapped, which is no damage."""
    if err.errno in (errno.EMFILE, errno.ENFILE):
        raise InputError(f"{path}: {err.strerror}; raise the limit of open files (ulimit -n)") from err
    # Arrow gives the words of the system and no number.
    if err.errno == errno.ENOMEM or os.strerror(errno.ENOMEM) in str(err):
        raise InputError(
            f"{path}: it cannot be mapped into memory ({os.strerror(errno.ENOMEM)}); raise the limit of mapped files "
            "(sysctl vm.max_map_count), or of memory (ulimit -v)"
        ) from err
