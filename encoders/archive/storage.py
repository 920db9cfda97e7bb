"""The ground the archive stands on: its columns, where it lies, how Lance opens it and who may write."""

import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa

from orbithash.encoders.codes import check_bits, num_bytes
from orbithash.encoders.errors import ArchiveBusy, InputError

__all__ = [
    "FORMAT_VERSION",
    "check_free",
    "described",
    "holds_dataset",
    "load",
    "location_of",
    "quoted",
    "reading",
    "reason",
    "schema_of",
    "write_lock",
]

FORMAT_VERSION = 1

_LOCK = "_writer.lock"


def schema_of(bits: int, model_id: str) -> pa.Schema:
    """The columns and the metadata of an archive."""
    fields = [
        pa.field("key", pa.string(), nullable=False),
        pa.field("code", pa.list_(pa.uint8(), num_bytes(bits)), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("label", pa.string()),
        pa.field("caption", pa.string()),
        pa.field("datetime", pa.timestamp("us", "UTC")),
        pa.field("lon", pa.float64()),
        pa.field("lat", pa.float64()),
        pa.field("footprint", pa.binary()),
        pa.field("thumbnail", pa.binary()),
    ]
    metadata = {"format_version": str(FORMAT_VERSION), "bits": str(bits), "model_id": model_id}
    return pa.schema(fields, metadata={f"orbithash.{name}": value for name, value in metadata.items()})


def described(path: str, dataset: Any) -> tuple[int, str]:
    """Bits and model of a dataset that is an archive of this format."""
    metadata = {name.decode(): value.decode() for name, value in (dataset.schema.metadata or {}).items()}
    try:
        version, bits, model_id = (metadata[f"orbithash.{name}"] for name in ("format_version", "bits", "model_id"))
    except KeyError as error:
        raise InputError(f"{path} is a Lance dataset, but not an archive of codes (no {error.args[0]})") from error
    if version != str(FORMAT_VERSION):
        raise InputError(f"{path} is an archive of format version {version}; this orbithash reads {FORMAT_VERSION}")
    if not bits.isdecimal() or not dataset.schema.equals(schema_of(check_bits(int(bits)), model_id)):
        raise InputError(f"{path} is damaged: its columns are not those of an archive of {bits}-bit codes")
    return int(bits), model_id


def is_remote(location: str) -> bool:
    """Whether it is the URI of an object store."""
    return "://" in location


def location_of(path: str | Path) -> str:
    """An absolute path, or a URI as it is; `InputError` for what no file system takes."""
    text = str(path).removeprefix("file://")
    try:
        return text.rstrip("/") if is_remote(text) else str(Path(text).resolve())
    except (ValueError, OSError) as error:
        raise InputError(f"{text[:80]!r} is no path ({error})") from error


def holds_dataset(location: str) -> bool:
    """Whether a Lance dataset is there, sound or damaged."""
    if not is_remote(location):
        try:
            return any(Path(location, "_versions").glob("*.manifest"))
        except OSError as error:
            raise InputError(f"{location[:80]} cannot be read: {error.strerror}") from error
    import lance

    try:
        lance.dataset(location)
    except ValueError as error:
        # The one message Lance gives where nothing is; whatever else is wrong, something is there.
        return "was not found" not in str(error)
    return True


def check_free(location: str) -> None:
    """Raises `InputError` where a new archive would overwrite or mix with anything."""
    if holds_dataset(location):
        raise InputError(f"{location} already holds a dataset; choose another folder")
    if is_remote(location) or not Path(location).exists():
        return
    # What is left of a creation that was killed before its first commit.
    traces = {"_versions", "_transactions"}
    if not Path(location).is_dir() or not {entry.name for entry in Path(location).iterdir()} <= traces:
        raise InputError(f"{location} exists and is not an archive of codes; choose a new or an empty folder")


def load(location: str, version: int | None) -> Any:
    """The Lance dataset, or `InputError` where there is none or it is damaged."""
    import lance

    if not is_remote(location) and not holds_dataset(location):
        missing = "is not an archive of codes" if Path(location).exists() else "does not exist"
        raise InputError(f"{location} {missing}; `orbithash encode` makes one")
    with reading(location):
        return lance.dataset(location, version=version)


@contextmanager
def reading(location: str) -> Iterator[None]:
    """Turns Lance's errors, which it raises in several types, into one clear line."""
    try:
        yield
    except BaseException as error:
        # A panic in Lance's Rust arrives as a BaseException without an importable name.
        if not isinstance(error, OSError | ValueError | RuntimeError) and type(error).__name__ != "PanicException":
            raise
        guess = "" if _is_forbidden(error) else ", it may be damaged"
        raise InputError(f"{location} cannot be read{guess}: {reason(error)}") from error


def _is_forbidden(error: BaseException) -> bool:
    """Whether an object store refused this user, as its client says it."""
    return any(words in str(error) for words in ("403 Forbidden", "401 Unauthorized"))


def reason(error: BaseException) -> str:
    """Lance's message without the places in its source code."""
    if _is_forbidden(error):
        return "no permission; check the credentials"
    lines = re.sub(r",?\s*/\S+\.rs:\d+:\d+", "", str(error)).splitlines()
    return lines[0] if lines else type(error).__name__


def quoted(text: str) -> str:
    """A string literal of the filter language."""
    return "'" + text.replace("'", "''") + "'"


@contextmanager
def write_lock(location: str) -> Iterator[None]:
    """Holds the only right to write; the kernel gives it back when its holder dies. Without effect in an object store.

    Raises:
        ArchiveBusy: another process holds it.
        InputError: nothing can be written there.
    """
    if is_remote(location):
        yield
        return
    import fcntl

    try:
        lock = Path(location, _LOCK).open("a+")  # noqa: SIM115 (only its own failure is ours to tell)
    except OSError as error:
        raise InputError(f"{location} cannot be written: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            holder = lock.read(200).strip() or "another process"
            raise ArchiveBusy(f"{location} is being written by {holder}; wait until it ends") from error
        # For people. Of a holder that died it says what was.
        with suppress(OSError):
            lock.truncate(0)
            lock.write(f"another process ({os.getpid()} on {socket.gethostname()})")
            lock.flush()
        yield
