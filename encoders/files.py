"""Write files and folders so that they appear whole or not at all.

New content is written under a temporary name in the same folder, `.NAME.TOKEN.part`, and then renamed. The token is
random, so two writers of one path do not conflict: the later rename wins. The temporary name is removed on error.
"""

import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["cache_folder", "new_file", "new_folder", "recover_folder", "write_file"]


def cache_folder() -> Path:
    """Return the folder of caches: the absolute path of ORBITHASH_CACHE, or `orbithash` in the user's cache folder."""
    if given := os.environ.get("ORBITHASH_CACHE"):
        return Path(given).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "orbithash"


def write_file(path: Path, content: bytes | str, *, durable: bool = True) -> None:
    """Write a file, UTF-8 for text, and its parent folders; see `new_file`."""
    with new_file(path, durable=durable) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def new_file(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield the temporary path of a file that replaces `path` when the block ends without an error.

    Parent folders are created. With `durable`, the content is flushed to the disk before the rename, so that a power
    failure leaves the old or the new content; without it, only a killed process is covered.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _temporary(path, "part")
    try:
        yield part
        if durable:
            _flush(part)
        part.replace(path)
        if durable:
            _flush(path.parent)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path, *, durable: bool = True, replace: bool = True) -> Iterator[Path]:
    """Yield the empty temporary folder that becomes `path` when the block ends without an error.

    A folder that exists at `path` is replaced: it is first renamed to `.NAME.TOKEN.old`, because a rename cannot
    overwrite a folder with files in it, and removed last. Killed at any point, the process leaves a whole folder at
    `path` or one that `recover_folder` puts back. `durable`: as for `new_file`. Without `replace`, the end
    of the block raises `FileExistsError` if by then anything but an empty folder is at `path`, which is left as it is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    part, lock = _locked_folder(path)
    try:
        yield part
        if durable:
            for folder, _, names in os.walk(part):
                for name in names:
                    _flush(Path(folder, name))
                _flush(Path(folder))
        if replace:
            recover_folder(path)
            _move(part, path)
        else:
            _move_to_free(part, path)
        if durable:
            _flush(path.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        os.close(lock)
    for old in _siblings(path, "old"):
        shutil.rmtree(old, ignore_errors=True)


def recover_folder(path: Path) -> None:
    """Put back the folder that an interrupted replacement moved away from `path`, if nothing is at `path`."""
    with suppress(OSError):
        if not path.exists() and (replaced := _siblings(path, "old")):
            max(replaced, key=lambda old: old.stat().st_ctime_ns).rename(path)


def _locked_folder(path: Path) -> tuple[Path, int]:
    """Return a new temporary folder and the descriptor of its lock, which marks its writer as alive."""
    new, part = _temporary(path, "new"), _temporary(path, "part")
    new.mkdir()
    lock = os.open(new, os.O_RDONLY)
    with suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX)
    # Only now: a part without a lock is taken for abandoned.
    new.rename(part)
    return part, lock


def _remove_abandoned(path: Path) -> None:
    """Remove the temporary folders of writers of `path` that were killed."""
    for part in _siblings(path, "part"):
        with suppress(OSError):
            lock = os.open(part, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(part, ignore_errors=True)
            finally:
                os.close(lock)


def _move(part: Path, path: Path) -> None:
    """Rename a folder to `path`, moving away what is there, also when another writer does the same."""
    while True:
        try:
            part.rename(path)
        except OSError as err:
            if err.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            return
        # Another writer may have moved it away by now.
        with suppress(FileNotFoundError):
            path.rename(_temporary(path, "old"))


def _move_to_free(part: Path, path: Path) -> None:
    """Rename a folder to `path`; `FileExistsError` if something is there."""
    try:
        part.rename(path)
    except OSError as err:
        if err.errno in (errno.ENOTEMPTY, errno.ENOTDIR):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from err
        raise


def _siblings(path: Path, kind: str) -> list[Path]:
    """Return the temporary paths of one kind beside `path`."""
    names = [entry.name for entry in path.parent.iterdir()]
    return [path.with_name(name) for name in names if name.startswith(f".{path.name}.") and name.endswith(f".{kind}")]


def _temporary(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{kind}")


def _flush(path: Path) -> None:
    """Flush a file or the names in a folder to the disk, where the file system allows it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
