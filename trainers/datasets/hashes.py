"""Hashes of files, remembered between commands: an unchanged file is not read again.

A file is unchanged if its size, inode and times are. The time of the last change of the inode (ctime) is one of them,
which tools that keep the modification time of a file cannot set.
"""

import hashlib
import os
import stat
import time
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from errno import ENOENT
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from orbithash.encoders.errors import ImageError
from orbithash.encoders.files import cache_folder, new_file
from orbithash.encoders.imagery.rasters import is_folder, read_bytes
from orbithash.encoders.imagery.rendering import Limits
from orbithash.encoders.sources.image_roots import ImageRoot
from orbithash.encoders.sources.object_folders import RemoteFolder
from orbithash.encoders.sources.packed import PackedImages

__all__ = ["SETTLED_S", "hash_files", "verified"]

# A file may change again within one step of its file system's clock, without a new time. Hashes of files that are
# younger than this are not remembered.
SETTLED_S = 2.0

Statuses = npt.NDArray[np.int64]

_STATUS = ("size", "mtime_ns", "ctime_ns", "inode")
_SCHEMA = pa.schema([("path", pa.large_binary()), *((name, pa.int64()) for name in _STATUS), ("sha256", pa.binary(32))])

_BUFFER_BYTES = 2**18
# Files that a thread hashes before it takes others.
_BLOCK = 256


def hash_files(root: ImageRoot, paths: Sequence[str]) -> list[bytes | OSError]:
    """Return the SHA-256 of each path below a data folder, or the error of one that cannot be read.

    The hash of a folder is that of the names and hashes, in hexadecimal, of its files by name, without hidden ones.
    Files are read in one thread for each CPU of the process. A cache that cannot be read or written costs time only.
    Packed images know their hashes. An object of a store is unchanged if its size and its time are. An object that
    cannot be read is an `InputError`; the hashes of those before it are remembered.
    """
    if isinstance(root, PackedImages):
        return root.hashes(paths)
    if isinstance(root, RemoteFolder):
        return _hash_objects(root, paths)
    root = root.resolve()
    try:
        # Paths below an open folder are found in half the time of whole paths.
        above = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as err:
        return [err] * len(paths)
    try:
        return _hash_files(root, above, paths)
    finally:
        os.close(above)


def verified(source: Path | bytes, sha256: bytes) -> Path | bytes:
    """Return the content of a file, or the path of a folder of files, that has this hash; see `hash_files`.

    Raises:
        ImageError: it cannot be read, or has another hash.
    """
    content = read_bytes(source, Limits()) if isinstance(source, Path) and not is_folder(source) else source
    found = hashlib.sha256(content).digest() if isinstance(content, bytes) else _hash_folder(content)
    if found != sha256:
        raise ImageError(
            "the file is not the one that was hashed at the start: it has changed, or differs between machines; make "
            "sure that nothing changes it and run the command again"
        )
    return content


def _hash_folder(folder: Path) -> bytes:
    """Return the hash of a folder, whose files are all read; `ImageError` if one cannot be."""
    above = os.open(folder.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        files, _, folders, failed = _scan(folder.parent, above, [folder.name])
        of_file = dict(zip(files, _hash_block(files, above), strict=True))
    finally:
        os.close(above)
    sha256 = failed.get(folder.name) or _joined(folder.name, folders, of_file)
    if isinstance(sha256, OSError):
        raise ImageError(f"it cannot be read ({sha256.strerror})")
    return sha256


def _hash_files(root: Path, above: int, paths: Sequence[str]) -> list[bytes | OSError]:
    """Do what `hash_files` does; `above` is the descriptor of the root."""
    began = time.time()
    files, statuses, folders, failed = _scan(root, above, paths)
    hashes = _hash_unknown(os.fsencode(root), began, files, statuses, lambda unknown: _read_and_hash(unknown, above))
    of_file = dict(zip(files, hashes, strict=True))
    return [failed.get(path) or _joined(path, folders, of_file) for path in paths]


def _hash_objects(root: RemoteFolder, paths: Sequence[str]) -> list[bytes | OSError]:
    """Do what `hash_files` does for a folder of an object store, after one listing of it."""
    began, objects = time.time(), root.objects()
    there = [path for path in dict.fromkeys(paths) if path in objects]
    # An object has no inode, and one time.
    statuses = np.array([(*objects[path], objects[path][1], 0) for path in there], np.int64)
    hashes = _hash_unknown(
        str(root).encode(),
        began,
        there,
        statuses.reshape(-1, len(_STATUS)),
        lambda unknown: root.each(unknown, lambda content: hashlib.sha256(content).digest()),
    )
    of_object = dict(zip(there, hashes, strict=True))
    return [of_object.get(path) or FileNotFoundError(ENOENT, os.strerror(ENOENT)) for path in paths]


def _hash_unknown(
    root: bytes,
    began: float,
    files: Sequence[str],
    statuses: Statuses,
    read: Callable[[list[str]], Iterable[bytes | OSError]],
) -> list[bytes | OSError | None]:
    """Return the remembered hashes of unchanged files, and those that `read` returns of others, which are remembered.

    `began` is the time before the first of the `statuses` int64 [N, 4] was read, seconds of the epoch.
    """
    cache = cache_folder() / "hashes" / f"{hashlib.sha256(root).hexdigest()[:32]}.parquet"
    remembered = _read(cache)
    names = pa.array([os.fsencode(name) for name in files], pa.large_binary())
    hashes = _known(remembered, names, statuses)
    unknown = [row for row, sha256 in enumerate(hashes) if sha256 is None]
    try:
        for row, sha256 in zip(unknown, read([files[row] for row in unknown]), strict=True):
            hashes[row] = sha256
    finally:
        # After an error, or Ctrl-C, the next command continues here.
        is_settled = began - statuses[:, _STATUS.index("ctime_ns")] / 1e9 > SETTLED_S
        kept = [row for row, sha256 in enumerate(hashes) if is_settled[row] and isinstance(sha256, bytes)]
        if not set(kept).isdisjoint(unknown):
            with suppress(OSError):
                _write(cache, remembered, names, statuses, hashes, kept)
    return hashes


def _scan(
    root: Path, above: int, paths: Sequence[str]
) -> tuple[list[str], Statuses, dict[str, list[str]], dict[str, OSError]]:
    """Look at each path once.

    Returns:
        the files, also those in folders; their `_STATUS` [N, 4]; the files of each folder; the paths that do not exist.
    """
    files: dict[str, None] = {}
    statuses = array("q")
    folders: dict[str, list[str]] = {}
    failed: dict[str, OSError] = {}

    def add(path: str, status: os.stat_result) -> None:
        if path not in files:
            files[path] = None
            # Inodes use all 64 bits on some file systems.
            statuses.extend((status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino & (2**63 - 1)))

    for path in paths:
        try:
            status = os.stat(path, dir_fd=above)
            if not stat.S_ISDIR(status.st_mode):
                add(path, status)
                continue
            folders[path] = [f"{path}/{name}" for name in _inner(root / path)]
            for inner in folders[path]:
                add(inner, os.stat(inner, dir_fd=above))
        except OSError as err:
            failed[path] = err
    return [*files], np.frombuffer(statuses, np.int64).reshape(-1, len(_STATUS)), folders, failed


def _inner(folder: Path) -> list[str]:
    """Return the names of the files in a folder that are not hidden, in order."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_file())


def _known(remembered: pa.Table, names: pa.Array, statuses: Statuses) -> list[bytes | OSError | None]:
    """Return the remembered hash of each file that has not changed, None for others."""
    rows = pc.index_in(names, value_set=remembered["path"])
    is_same = rows.is_valid().to_numpy(zero_copy_only=False)
    places = pa.array(rows.fill_null(0).to_numpy()[is_same])
    columns = [remembered[name].take(places).to_numpy() for name in _STATUS]
    hashes = remembered["sha256"].take(places).to_pylist()
    known: list[bytes | OSError | None] = [None] * len(names)
    unchanged = (np.stack(columns, axis=1) == statuses[is_same]).all(axis=1)
    for row, sha256, same in zip(np.flatnonzero(is_same).tolist(), hashes, unchanged.tolist(), strict=True):
        known[row] = sha256 if same else None
    return known


def _read_and_hash(paths: Sequence[str], above: int) -> list[bytes | OSError]:
    """Return the hash of each file, or its error. `hashlib` and reads release Python's lock."""
    blocks = [paths[start : start + _BLOCK] for start in range(0, len(paths), _BLOCK)]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return [sha256 for block in pool.map(lambda block: _hash_block(block, above), blocks) for sha256 in block]


def _hash_block(paths: Sequence[str], above: int) -> list[bytes | OSError]:
    """Hash files one after another into one buffer; a new one for each takes longer than the hash of a small file."""
    buffer = bytearray(_BUFFER_BYTES)
    view = memoryview(buffer)
    hashes: list[bytes | OSError] = []
    for path in paths:
        try:
            file = os.open(path, os.O_RDONLY, dir_fd=above)
            try:
                digest = hashlib.sha256()
                while count := os.readv(file, [buffer]):
                    digest.update(view[:count])
            finally:
                os.close(file)
            hashes.append(digest.digest())
        except OSError as err:
            hashes.append(err)
    return hashes


def _joined(path: str, folders: dict[str, list[str]], of_file: Mapping[str, bytes | OSError | None]) -> bytes | OSError:
    """Return the hash of a file or a folder, or the first error of its files."""
    if path not in folders:
        sha256 = of_file[path]
        assert sha256 is not None, "known or just hashed"
        return sha256
    whole = hashlib.sha256()
    for inner in folders[path]:
        sha256 = of_file[inner]
        if not isinstance(sha256, bytes):
            assert sha256 is not None, "known or just hashed"
            return sha256
        whole.update(_line(inner[len(path) + 1 :], sha256.hex()))
    return whole.digest()


def _line(name: str, sha256: str) -> bytes:
    return os.fsencode(name) + f"\0{sha256}\0".encode()


def _read(cache: Path) -> pa.Table:
    """Return the remembered hashes; none if they cannot be read."""
    with (
        suppress(OSError, ValueError, pa.ArrowException),
        pq.ParquetFile(cache, memory_map=True, page_checksum_verification=True) as file,
    ):
        if file.schema_arrow.equals(_SCHEMA):
            return file.read()
    return _SCHEMA.empty_table()


def _write(
    cache: Path,
    remembered: pa.Table,
    names: pa.Array,
    statuses: Statuses,
    hashes: Sequence[bytes | OSError | None],
    kept: Sequence[int],
) -> None:
    """Remember the hashes of the files with these row numbers, and those of files that this command did not look at."""
    others = remembered.filter(pc.invert(pc.is_in(remembered["path"], value_set=names)))
    columns = [pa.array(statuses[kept, column]) for column in range(len(_STATUS))]
    new = pa.table(
        [names.take(pa.array(kept, pa.int64())), *columns, pa.array([hashes[row] for row in kept], pa.binary(32))],
        schema=_SCHEMA,
    )
    with new_file(cache, durable=False) as part:
        pq.write_table(
            pa.concat_tables([others, new]), part, compression="zstd", use_dictionary=False, write_page_checksum=True
        )
