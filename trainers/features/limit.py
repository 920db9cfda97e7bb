"""The largest size of the store of features: kinds that are not in use are pruned.

A kind goes as a whole, the least recently used first. The time of the last use is that of its folder. A process that
has a kind open holds a shared lock on its file `.lock`; pruning takes an exclusive one, and leaves kinds whose lock it
does not get. Parts do not depend on each other: if pruning is killed, the rows that are left are those that were
written.
"""

import fcntl
import logging
import math
import os
import re
import time
from contextlib import suppress
from pathlib import Path

from orbithash.encoders.errors import InputError
from orbithash.trainers.locks import LOCK, alone_in, open_lock

__all__ = ["make_room"]

VARIABLE = "ORBITHASH_FEATURES_GB"
_KIND = re.compile(r"[0-9a-f]{32}")
# What this store writes; other files are not removed.
_OWN = re.compile(r".*\.arrow|.*\.npy|\..*\.part|\.(lock|share|computing)")

_log = logging.getLogger(__name__)


def make_room(folder: Path, num_bytes: int) -> float:
    """Prune kinds other than that of `folder` until `num_bytes` more fit into the limit; without a limit, do nothing.

    Each call looks at all files, so it returns how many bytes beyond `num_bytes` may be written before the next: those
    that are free now, and at most 1 % of the limit. Processes that write at the same time may each exceed it by that.

    Raises:
        InputError: it does not fit, even without the kinds that are not in use.
    """
    if (limit := _limit()) is None:
        return math.inf
    root = folder.parent
    root.mkdir(parents=True, exist_ok=True)
    with alone_in(root / ".pruning"):
        sizes = {kind: _size(kind) for kind in _kinds(root)}
        needed = sizes.pop(folder, 0) + num_bytes
        if needed > limit:
            raise InputError(
                f"{root}: features need {needed / 1e9:.3g} GB and {VARIABLE} is {limit / 1e9:.3g}; raise it"
            )
        excess = needed + sum(sizes.values()) - limit
        for kind in sorted(sizes, key=_last_use):
            if excess <= 0:
                break
            excess -= _prune(kind, sizes[kind])
    if excess > 0:
        raise InputError(
            f"{root}: features need {needed / 1e9:.3g} GB beside others that are in use, and {VARIABLE} is "
            f"{limit / 1e9:.3g}; raise it, or wait until the other runs have ended"
        )
    return min(-excess, limit / 100)


def _limit() -> float | None:
    """Return the largest size in bytes; None: there is no limit."""
    if not (given := os.environ.get(VARIABLE)):
        return None
    try:
        limit = float(given)
    except ValueError:
        limit = math.nan
    if not 0 < limit < math.inf:
        raise InputError(f"{VARIABLE} is {given!r}; a number of GB above 0 is needed, such as 50")
    return limit * 1e9


def _kinds(root: Path) -> list[Path]:
    with os.scandir(root) as entries:
        return [
            root / entry.name
            for entry in entries
            if _KIND.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
        ]


def _files(kind: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(kind) as entries:
            return [entry for entry in entries if _OWN.fullmatch(entry.name)]
    except FileNotFoundError:
        return []


def _size(kind: Path) -> int:
    size = 0
    # A kind of another user, which may not be read, is not counted; nor is it removed.
    with suppress(OSError):
        for entry in _files(kind):
            with suppress(OSError):
                size += entry.stat(follow_symlinks=False).st_size
    return size


def _last_use(kind: Path) -> float:
    try:
        return kind.stat().st_mtime
    except OSError:
        return 0


def _prune(kind: Path, size: int) -> int:
    """Remove a kind of this size in bytes unless it is in use; return how many bytes that has freed."""
    last_use = _last_use(kind)
    try:
        descriptor = open_lock(kind / LOCK)
    except OSError:
        return 0
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for entry in _files(kind):
            if entry.name != LOCK:
                Path(entry.path).unlink()
        # Last: who waits for the lock sees that it is gone, and starts a new folder.
        (kind / LOCK).unlink()
        with suppress(OSError):
            kind.rmdir()
    except OSError:
        # In use, or a folder without locks, or not ours to remove.
        return size - _size(kind)
    finally:
        os.close(descriptor)
    day = time.strftime("%Y-%m-%d", time.gmtime(last_use))
    _log.warning("%s: removed %s (%.3g GB of features, last used on %s)", VARIABLE, kind, size / 1e9, day)
    return size
