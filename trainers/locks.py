"""Locks of folders of features and runs. They end with the process; without locks of files all get them at once."""

import errno
import fcntl
import logging
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

__all__ = ["LOCK", "Use", "alone_in", "claim", "open_lock", "use"]

# In the folder of a kind: shared by those that use it, and exclusive for the one that removes it.
LOCK = ".lock"

_log = logging.getLogger(__name__)


class Use:
    """A lock that is held for as long as this object lives."""

    def __init__(self, descriptor: int) -> None:
        """`descriptor` is that of the lock, which is closed."""
        weakref.finalize(self, os.close, descriptor)


def use(folder: Path, create: bool = False) -> Use | None:
    """Lock the folder of a kind against pruning and note the time; None if it is absent or cannot be locked.

    With `create`, an absent folder is made. Waits while the folder is being pruned.

    Raises:
        OSError: the folder cannot be made.
    """
    while True:
        if create:
            folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = open_lock(folder / LOCK)
        except FileNotFoundError:
            if create:
                # It was pruned in between.
                continue
            return None
        except OSError:
            return None
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        if _is_at(descriptor, folder / LOCK):
            with suppress(OSError):
                os.utime(folder)
            return Use(descriptor)
        os.close(descriptor)


@contextmanager
def alone_in(path: Path, what: str | None = None) -> Iterator[None]:
    """Run the block in one process at a time, which holds the lock of the file `path` in a folder that exists.

    A warning says that another process is waited for, which does `what`.
    """
    try:
        descriptor = open_lock(path)
    except OSError:
        # A folder that cannot be written is an error only of what writes there.
        yield
        return
    try:
        with suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if what is not None:
                    _log.warning("%s: waiting for another process, which %s", path.parent, what)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        _release(descriptor)


def claim(path: Path) -> Callable[[], None] | None:
    """Lock the file `path` and return what releases it; None, without waiting, if another process has it."""
    while True:
        try:
            descriptor = open_lock(path)
        except OSError:
            return lambda: None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError:
            return partial(_release, descriptor)
        if _is_at(descriptor, path):
            return partial(_release, descriptor)
        # The one that had it has removed the file.
        os.close(descriptor)


def open_lock(path: Path) -> int:
    """Return the descriptor of a file to lock, which is created."""
    try:
        # Exclusive locks of network file systems need a file that is open for writing.
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as err:
        if err.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            with suppress(FileNotFoundError):
                return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        raise


def _release(descriptor: int) -> None:
    # A process that was forked in the block has the descriptor, too.
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        # Removed, which network file systems tell by other errors as well.
        return False
