"""Stamps: what identifies the content of an item, so that a changed image is encoded again and no other one is.

A stamp has two parts, `VERSION/DIGEST`. The version is made of sizes and times and costs one look at the file system.
Equal versions mean equal content. Where the versions differ (a file that was copied, touched or overwritten), the
digest of the content decides. Objects of an object store have no digest: reading one to compare it costs as much as
encoding it.
"""

import hashlib
from functools import lru_cache
from pathlib import Path

from orbithash.encoders.imagery.mosaic_files import mosaic_files
from orbithash.encoders.imagery.mosaics import is_mosaic
from orbithash.encoders.imagery.rasters import open_raster
from orbithash.encoders.sources.remote import is_remote

__all__ = ["file_version", "make_stamp", "same_content"]


def file_version(path: str) -> str | None:
    """Return the version of a file, a mosaic, or a folder with one file per band; None when it does not exist.

    The time of the last change of the inode (ctime) belongs to it: tools that keep the modification time of a file
    (`cp -p`, `rsync -t`, `touch -r`) cannot set it.
    """
    try:
        stats = [file.stat() for file in _files(Path(path))]
    except OSError:
        return None
    values = [(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for stat in stats]
    if len(values) == 1:
        return "-".join(map(str, values[0]))
    return hashlib.blake2b(repr(values).encode(), digest_size=16).hexdigest()


def make_stamp(path: str, version: str | None) -> str | None:
    """Return the stamp of an item whose version was taken before it was read; None when it does not exist."""
    if version is None:
        return None
    digest = None if is_remote(path) else _digest(path, version)
    return f"{version}/{digest or ''}"


def same_content(stamp: str, path: str, version: str | None) -> bool:
    """Return whether `stamp` describes the content of the item at `path`, which has this version now."""
    stamped, _, digest = stamp.partition("/")
    # The row of a file that is not there (now) stays.
    if version is None or stamped == version:
        return True
    return bool(digest) and digest == _digest(path, version)


# The tiles of a scene come one after another.
@lru_cache(maxsize=64)
def _digest(path: str, version: str) -> str | None:
    """Return the digest of the names and contents of all files of an item; None when one cannot be read."""
    whole = hashlib.blake2b(digest_size=16)
    try:
        for inner in _files(Path(path)):
            # The name of a file in a folder says which band it is.
            whole.update(inner.name.encode(errors="surrogateescape") if inner != Path(path) else b"")
            with inner.open("rb") as file:
                whole.update(hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest())
    except OSError:
        return None
    return whole.hexdigest()


def _files(path: Path) -> list[Path]:
    """Return the file itself, the files in a folder in the order of their names, or a mosaic and the files it shows."""
    if is_mosaic(path):
        return mosaic_files(path, open_raster)
    if not path.is_dir():
        return [path]
    return sorted(inner for inner in path.iterdir() if inner.is_file() and not inner.name.startswith("."))
