"""The versions of a shard that can be searched."""

import threading
import time
from collections import OrderedDict

from orbithash.search.protocol.errors import Unavailable
from orbithash.search.segments.versions.shard_version import ShardVersion

__all__ = ["MAX_VERSIONS", "History", "VersionGone"]

# Number of versions that are kept.
MAX_VERSIONS = 32
# A version that is not the newest is dropped when nothing has asked for it for this time: it may be all that keeps a
# large segment that was merged.
_UNUSED_S = 600.0


class VersionGone(Unavailable):
    """The shard does not hold this version of the archive any more, or not yet; `ShardHost.follow` may load it."""


class History:
    """The versions of one shard. Thread-safe.

    Attributes:
        lock: held while a version is made from another one and published. Searches do not need it.
        merging: names of the segments that are being merged; the caller holds the lock.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.merging: frozenset[str] = frozenset()
        self._versions: OrderedDict[int, ShardVersion] = OrderedDict()
        self._used: dict[int, float] = {}
        self._newest: ShardVersion | None = None

    @property
    def newest(self) -> ShardVersion | None:
        """The version that changes are applied to next; None before the first one."""
        return self._newest

    @property
    def versions(self) -> tuple[ShardVersion, ...]:
        """All versions, ascending."""
        with self.lock:
            return tuple(sorted(self._versions.values(), key=lambda each: each.version))

    def find(self, version: int) -> ShardVersion | None:
        """Return a version, or None."""
        return self._versions.get(version)

    def get(self, version: int) -> ShardVersion:
        """Return a version for a search. Raises `VersionGone`."""
        shard = self._versions.get(version)
        if shard is None:
            raise VersionGone(f"version {version} of the archive is not held by a shard; ask for a newer one")
        self._used[version] = time.monotonic()
        return shard

    def publish(self, shard: ShardVersion, is_newest: bool) -> None:
        """Keep a new version. The caller holds the lock."""
        self._versions.pop(shard.version, None)
        self._versions[shard.version] = shard
        self._used[shard.version] = time.monotonic()
        if is_newest or self._newest is None:
            self._newest = shard
        while len(self._versions) > MAX_VERSIONS:
            self._drop(next(version for version, kept in self._versions.items() if kept is not self._newest))

    def replace(self, shard: ShardVersion) -> None:
        """Put a version in the place of the newest one, which has the same rows. The caller holds the lock."""
        assert self._newest is not None, "a version was merged"
        assert self._newest.version == shard.version, "the same version"
        self._versions[shard.version] = self._newest = shard

    def drop_unused(self) -> None:
        """Drop the versions that nothing has asked for recently."""
        with self.lock:
            for version, used in list(self._used.items()):
                shard = self._versions.get(version)
                if shard is not self._newest and time.monotonic() - used > _UNUSED_S:
                    self._drop(version)

    def clear(self) -> None:
        """Drop all versions."""
        with self.lock:
            self._versions.clear()
            self._used.clear()
            self._newest = None

    def _drop(self, version: int) -> None:
        self._versions.pop(version, None)
        self._used.pop(version, None)
