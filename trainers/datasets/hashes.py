"""Hashes of files, remembered between commands: a file with the same size and times is not read again."""

import hashlib
import json
import time
from contextlib import suppress
from pathlib import Path

from orbithash.encoders.archive.stamps import file_version
from orbithash.encoders.files import cache_folder, write_file

__all__ = ["FileHashes", "hash_file"]

# A file may change again within one step of its file system's clock, without a new time. Hashes of files that are
# younger than this are not remembered.
_SETTLED_S = 2.0


class FileHashes:
    """The SHA-256 of files below a data folder. `save` writes those of unchanged files for the next command."""

    def __init__(self, root: Path) -> None:
        """Read the remembered hashes of a folder; without a readable cache there are none."""
        self._root = root.resolve()
        name = hashlib.sha256(str(self._root).encode(errors="surrogateescape")).hexdigest()[:32]
        self._path = cache_folder() / "hashes" / f"{name}.json"
        # Path below the root: version and hash.
        self._known: dict[str, tuple[str, str]] = {}
        self._is_changed = False
        with suppress(OSError, ValueError, AttributeError, TypeError):
            self._known = {path: (str(version), str(sha)) for path, (version, sha) in self._read().items()}

    def sha256(self, path: str) -> str:
        """Return the hash of `hash_file` of a path below the root; `OSError` when it cannot be read."""
        file = self._root / path
        version = file_version(str(file))
        known = self._known.get(path)
        if known is not None and known[0] == version:
            return known[1]
        sha256 = hash_file(file)
        if version is not None and time.time() - _changed_at(file) > _SETTLED_S:
            self._known[path] = version, sha256
            self._is_changed = True
        return sha256

    def save(self) -> None:
        """Write the hashes. A cache that cannot be written costs time only."""
        if self._is_changed:
            with suppress(OSError):
                write_file(self._path, json.dumps(self._known), durable=False)
            self._is_changed = False

    def _read(self) -> dict[str, tuple[str, str]]:
        content: dict[str, tuple[str, str]] = json.loads(self._path.read_bytes())
        return content


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal; of a folder, that of the names and hashes of its files by name."""
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    whole = hashlib.sha256()
    for inner in _inner_files(path):
        whole.update(f"{inner.name}\0{hash_file(inner)}\0".encode())
    return whole.hexdigest()


def _inner_files(folder: Path) -> list[Path]:
    """Return the files in a folder that are not hidden, sorted by name."""
    inner = sorted(folder.iterdir(), key=lambda path: path.name)
    return [path for path in inner if path.is_file() and not path.name.startswith(".")]


def _changed_at(path: Path) -> float:
    """Return when a file, or the last of the files in a folder, was changed: seconds of the epoch."""
    return max(file.stat().st_ctime for file in (_inner_files(path) if path.is_dir() else [path]))
