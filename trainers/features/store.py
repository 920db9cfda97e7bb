"""Kept features of one kind: a folder of files that are written once and never changed.

FOLDER/KIND/DIGEST.npy     up to `PART_ROWS` rows, each the hash of an image or sentence and its features

A part is written under a temporary name and renamed, so any number of processes may write at once without a lock, and
a run that ends early loses the rows of one part. The name is the digest of the content: a damaged part is ignored and
its rows are computed again, and processes that keep the same part write the same file. Rows that two processes
computed at the same time are there twice, and the older one counts.
"""

import errno
import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from orbithash.encoders.errors import InputError
from orbithash.encoders.files import cache_folder, write_file
from orbithash.trainers.data.feature_table import FeatureTable

__all__ = ["HASH", "PART_ROWS", "FeatureStore", "Hashes", "store_folder"]

# Rows of a part. At 2048 dimensions 8 MiB.
PART_ROWS = 1024

# The head of a part, which names its two columns, is shorter.
_HEAD_BYTES = 4096

Features = npt.NDArray[np.float32]

# SHA-256, 32 bytes each. Of this type, hashes are sorted and compared as a whole.
Hashes = npt.NDArray[np.bytes_]
HASH = np.dtype("S32")


def store_folder() -> Path:
    """Return the folder of all kinds: `ORBITHASH_FEATURES`, or one in the cache folder."""
    given = os.environ.get("ORBITHASH_FEATURES")
    return Path(given) if given else cache_folder() / "features"


class FeatureStore:
    """The kept rows of one kind, by hash: those that were there at the last `refresh`."""

    def __init__(self, kind: dict[str, Any]) -> None:
        """`kind` says what the features are of: the network and its weights, the preprocessing, the view."""
        self.folder = store_folder() / hashlib.sha256(json.dumps(kind).encode()).hexdigest()[:32]
        self._parts: dict[Path, npt.NDArray[Any]] = {}
        self.refresh()

    @property
    def num_features(self) -> int:
        """Number of dimensions; 0 for a store without rows."""
        return next((int(part["features"].shape[1]) for part in self._parts.values()), 0)

    def refresh(self) -> None:
        """Map the parts that were added since, by any process."""
        for path in sorted(_files(self.folder) - self._parts.keys(), key=_age):
            if (part := _mapped(path)) is not None and self.num_features in (0, part["features"].shape[1]):
                self._parts[path] = part
        hashes = np.concatenate([np.empty(0, HASH), *(part["hash"] for part in self._parts.values())])
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
        return FeatureTable([part["features"] for part in self._parts.values()], rows)

    def add(self, hashes: Hashes, features: Features) -> None:
        """Keep the features float32 [N, D] of N hashes, in parts; `refresh` makes them visible.

        Raises:
            InputError: the folder cannot be written; parts before the first that failed are kept.
        """
        for start in range(0, len(hashes), PART_ROWS):
            rows = slice(start, start + PART_ROWS)
            part = np.empty(len(hashes[rows]), [("hash", HASH), ("features", "<f4", (features.shape[1],))])
            part["hash"], part["features"] = hashes[rows], features[rows]
            content = io.BytesIO()
            np.save(content, part, allow_pickle=False)
            digest = hashlib.blake2b(content.getbuffer(), digest_size=16).hexdigest()
            try:
                write_file(self.folder / f"{digest}.npy", content.getvalue())
            except OSError as err:
                raise InputError(
                    f"{self.folder}: features cannot be written there ({err.strerror}); set ORBITHASH_FEATURES to a "
                    "folder on a disk with free space"
                ) from err


def _files(folder: Path) -> set[Path]:
    """Return the parts of a folder, which may be absent."""
    return {path for path in folder.glob("*.npy") if not path.name.startswith(".")}


def _age(path: Path) -> tuple[int, str]:
    """Return a key that sorts parts from the oldest to the newest."""
    try:
        return path.stat().st_mtime_ns, path.name
    except FileNotFoundError:
        # Removed meanwhile: it cannot be opened either.
        return 0, path.name


def _mapped(path: Path) -> npt.NDArray[Any] | None:
    """Return a part, mapped, or None if its content is not what was written."""
    try:
        with path.open("rb") as file:
            if hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest() != path.stem:
                return None
        # Mapped by Arrow: NumPy's map would keep a descriptor of each part, of which a process has some 1,000.
        with pa.memory_map(str(path)) as source:
            content = source.read_buffer()
        head = io.BytesIO(memoryview(content)[:_HEAD_BYTES])
        np.lib.format.read_magic(head)
        shape, _, dtype = np.lib.format.read_array_header_1_0(head)
        part: npt.NDArray[Any] = np.frombuffer(content, dtype, offset=head.tell()).reshape(shape)
    except OSError as err:
        if err.errno in (errno.EMFILE, errno.ENFILE):
            raise InputError(f"{path}: {err.strerror}; raise the limit of open files (ulimit -n)") from err
        return None
    except ValueError:
        return None
    is_part = part.dtype.names == ("hash", "features") and part.dtype["hash"] == HASH and part.ndim == 1
    return part if is_part else None
