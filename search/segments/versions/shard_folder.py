"""The local files of a shard: its segments, and manifests that say which of their rows exist in a version.

    NAME.codes, NAME.columns   segments (`orbithash.search.segments.files`)
    manifest-SLOT              the last version that one replica has stored
    manifest-SLOT.lock         locked by the process of the replica

Replicas on one node share segments, which are named by their content; each has a slot of its own. Files are replaced
whole. A process may be killed at any point: what is missing or damaged is found by checksums and read from the archive
again.
"""

import fcntl
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from orbithash.encoders.files import new_file
from orbithash.search.segments.bits import Bits
from orbithash.search.segments.files import open_segment, remove_segments
from orbithash.search.segments.layout import DamagedSegment, map_file, read_arrays, write_arrays
from orbithash.search.segments.versions.shard_version import LiveSegment, ShardVersion

__all__ = ["Manifest", "ShardFolder"]

logger = logging.getLogger(__name__)

_MAX_SLOTS = 1024
# A manifest of a replica that does not run any more keeps its segments for this time.
_KEPT_FOR_S = 24 * 3600.0
_SIBLINGS_KEPT_FOR_S = 7 * _KEPT_FOR_S


@dataclass(frozen=True)
class Manifest:
    """A version of a shard in files.

    Attributes:
        version: number of the version.
        commit_id: id of the commit that made it.
        segments: name of each segment, and the rows that exist in the version; None: all.
    """

    version: int
    commit_id: str
    segments: Sequence[tuple[str, Bits | None]]


class ShardFolder:
    """The folder of one shard, used by one replica. Not thread-safe, except for `is_stored`."""

    def __init__(self, path: Path) -> None:
        """Create the folder, and take a slot in it.

        Raises `OSError` if that is not possible, and `InputError` if other users can write there.
        """
        self.path = path
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        for slot in range(_MAX_SLOTS):
            self._manifest = path / f"manifest-{slot}"
            if (lock := _lock(self._manifest)) is not None:
                self._lock_file = lock
                return
        raise OSError(f"{path} is used by {_MAX_SLOTS:,} processes")

    def manifests(self) -> list[Manifest]:
        """Return the manifests that can be read, the newest version first."""
        found = []
        for path in self.path.glob("manifest-*[0-9]"):
            try:
                found.append(_read(path))
            except DamagedSegment as error:
                logger.warning("rows are read from the archive: %s", error)
        return sorted(found, key=lambda manifest: -manifest.version)

    def versions(self, newest: int, bits: int, index: str) -> Iterator[ShardVersion]:
        """Yield the versions up to `newest` that are stored without damage, mapped from the files, the newest first."""
        for manifest in self.manifests():
            if manifest.version > newest:
                continue
            try:
                parts = [
                    LiveSegment.of(open_segment(self.path, name, bits, index), alive)
                    for name, alive in manifest.segments
                ]
            except DamagedSegment as error:
                logger.warning("rows of %s are read from the archive: %s", self.path, error)
                continue
            yield ShardVersion.of(manifest.version, manifest.commit_id, bits, parts)

    def write(self, manifest: Manifest) -> None:
        """Replace the manifest of this replica."""
        arrays = {str(number): alive for number, (_, alive) in enumerate(manifest.segments) if alive is not None}
        description = {
            "version": manifest.version,
            "commit_id": manifest.commit_id,
            "segments": [name for name, _ in manifest.segments],
        }
        with new_file(self._manifest, durable=False) as part, part.open("wb") as file:
            os.fchmod(file.fileno(), 0o600)
            write_arrays(file, arrays, description)

    def is_stored(self, name: str) -> bool:
        """Return whether the files of a segment are there."""
        return (self.path / f"{name}.codes").exists()

    def clean(self, used: Iterable[str]) -> None:
        """Remove the segments that are neither among `used` nor in a manifest, and old manifests without a process."""
        for path in self.path.glob("manifest-*[0-9]"):
            with suppress(OSError):
                if path != self._manifest and time.time() - path.stat().st_mtime > _KEPT_FOR_S:
                    _remove_abandoned(path)
        named = {name for manifest in self.manifests() for name, _ in manifest.segments}
        remove_segments(self.path, named.union(used))

    def remove_siblings(self) -> None:
        """Remove the folders of the same archive that no process has used for some time, as with other shards."""
        for folder in self.path.parent.iterdir():
            with suppress(OSError):
                manifests = [*folder.glob("manifest-*[0-9]")]
                last_used = max([folder.stat().st_mtime, *(path.stat().st_mtime for path in manifests)])
                if folder != self.path and time.time() - last_used > _SIBLINGS_KEPT_FOR_S:
                    for path in manifests:
                        _remove_abandoned(path)
                    if not [*folder.glob("manifest-*[0-9]")]:
                        shutil.rmtree(folder)

    def close(self) -> None:
        """Give the slot back."""
        os.close(self._lock_file)


def _lock(manifest: Path) -> int | None:
    """Return the descriptor of the lock of a slot; None if another process, or another host in this one, has it."""
    lock = os.open(manifest.with_name(f"{manifest.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock


def _remove_abandoned(manifest: Path) -> None:
    """Remove a manifest unless a process uses its slot."""
    if (lock := _lock(manifest)) is not None:
        manifest.unlink(missing_ok=True)
        os.close(lock)


def _read(path: Path) -> Manifest:
    _, description, arrays = read_arrays(path, map_file(path))
    segments = [(name, arrays.get(str(number))) for number, name in enumerate(description["segments"])]
    # Copies: the arrays of a map would keep the replaced file.
    kept = [(name, None if alive is None else np.array(alive)) for name, alive in segments]
    return Manifest(description["version"], description["commit_id"], kept)
