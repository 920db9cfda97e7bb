"""The file of the arrays of a segment: a header, and arrays at offsets that are multiples of 64 bytes.

    0   8 bytes   magic number
    8   uint32    format version
    12  uint32    number of bytes of the description
    16  uint64    xxh3_64 of the bytes from 0 to 16 and of the description
    24            description: JSON with sorted keys
    ...           arrays, each followed by zero bytes up to the next multiple of 64

Integers are little-endian. The description has the type, shape, offset and checksum of each array, and the size of the
file. A checksum covers the zero bytes after its array. Every byte of the file is covered by one of the checksums.
"""

import json
import mmap
import os
import stat
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

__all__ = ["FORMAT_VERSION", "DamagedSegment", "checksum_of", "map_file", "read_arrays", "write_arrays"]

# Raise it with each change of the files, of the arrays of an index, and of `chunks.ROWS_PER_CHUNK`.
FORMAT_VERSION = 1

_MAGIC = b"orbitseg"
_START = struct.Struct("<8sII")
_CHECKSUM = struct.Struct("<Q")
_ALIGNMENT = 64
_MAX_DESCRIPTION = 2**20
# Bytes that are in memory at a time while a checksum is computed; a multiple of the size of a page.
_BLOCK = 2**26

Arrays = Mapping[str, npt.NDArray[Any]]


class DamagedSegment(Exception):
    """The files of a segment are missing, damaged or of another format. The message has one line."""


def write_arrays(file: BinaryIO, arrays: Arrays, description: Mapping[str, Any]) -> str:
    """Write a whole file with little-endian arrays and further description; return the hash of its header."""
    import xxhash

    sections, offset = {}, 0
    for name, array in arrays.items():
        padding = bytes(-array.nbytes % _ALIGNMENT)
        checksum = xxhash.xxh3_64(_bytes(array))
        checksum.update(padding)
        sections[name] = {
            "type": array.dtype.str,
            "shape": list(array.shape),
            "offset": offset,
            "checksum": checksum.hexdigest(),
        }
        offset += array.nbytes + len(padding)
    text = json.dumps({**description, "arrays": sections, "num_bytes": offset}, sort_keys=True).encode()
    # Spaces after the JSON align the first array.
    text += b" " * (-(_START.size + _CHECKSUM.size + len(text)) % _ALIGNMENT)
    start = _START.pack(_MAGIC, FORMAT_VERSION, len(text))
    file.write(start + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(start + text)) + text)
    for array in arrays.values():
        file.write(_bytes(array))
        file.write(bytes(-array.nbytes % _ALIGNMENT))
    return str(xxhash.xxh3_128_hexdigest(start + text))


def read_arrays(
    path: Path, mapped: mmap.mmap, is_verified: bool = False
) -> tuple[str, dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """Return the hash of the header, the description and the mapped arrays of a file that `write_arrays` wrote.

    Checksums of arrays are compared unless `is_verified`. Raises `DamagedSegment`.
    """
    import xxhash

    begin = _START.size + _CHECKSUM.size
    if len(mapped) < begin:
        raise DamagedSegment(f"{path} has {len(mapped)} bytes, which is less than its header")
    start = mapped[: _START.size]
    magic, version, length = _START.unpack(start)
    if magic != _MAGIC:
        raise DamagedSegment(f"{path} is not a file of a segment")
    if version != FORMAT_VERSION:
        raise DamagedSegment(f"{path} has format version {version}; this orbithash reads {FORMAT_VERSION}")
    if length > _MAX_DESCRIPTION or begin + length > len(mapped):
        raise DamagedSegment(f"{path} is damaged: its header is longer than the file")
    text = mapped[begin : begin + length]
    if _CHECKSUM.unpack(mapped[_START.size : begin])[0] != xxhash.xxh3_64_intdigest(start + text):
        raise DamagedSegment(f"{path} is damaged: wrong checksum of the header")
    description = json.loads(text)
    first = begin + length
    if len(mapped) != first + description["num_bytes"]:
        raise DamagedSegment(f"{path} has {len(mapped):,} bytes instead of {first + description['num_bytes']:,}")
    bytes_ = np.frombuffer(mapped, np.uint8)
    arrays = {}
    for name, section in description["arrays"].items():
        dtype, shape, offset = np.dtype(section["type"]), section["shape"], first + section["offset"]
        num_bytes = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        covered = bytes_[offset : offset + num_bytes + -num_bytes % _ALIGNMENT]
        if not is_verified and xxhash.xxh3_64_hexdigest(covered.data) != section["checksum"]:
            raise DamagedSegment(f"{path} is damaged: wrong checksum of {name}")
        arrays[name] = bytes_[offset : offset + num_bytes].view(dtype).reshape(shape)
    return xxhash.xxh3_128_hexdigest(start + text), description, arrays


def map_file(path: Path) -> mmap.mmap:
    """Return a read-only map of a file; `DamagedSegment` if that is not possible or not safe.

    A process that reads a mapped page beyond the end of its file is killed. Files are therefore never changed after
    they have their name, and a file that another user could shorten is refused.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise DamagedSegment(f"{path} cannot be opened: {error.strerror}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or not status.st_size:
            raise DamagedSegment(f"{path} is not a file or is empty")
        if status.st_uid not in (os.geteuid(), 0) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise DamagedSegment(f"{path} can be written by other users")
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise DamagedSegment(f"{path} cannot be mapped: {error.strerror}") from error
    finally:
        os.close(descriptor)


def _bytes(array: npt.NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def checksum_of(mapped: mmap.mmap) -> str:
    """Return the xxh3_64 of a mapped file as hexadecimal text; its pages do not stay in the memory of the process."""
    import xxhash

    checksum = xxhash.xxh3_64()
    with memoryview(mapped) as view:
        for start in range(0, len(view), _BLOCK):
            block = view[start : start + _BLOCK]
            checksum.update(block)
            mapped.madvise(mmap.MADV_DONTNEED, start, len(block))
            block.release()
    return str(checksum.hexdigest())
