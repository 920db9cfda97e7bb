"""The dataset under an archive: columns, locations, opening, and the lock that lets one process write."""

import os
import random
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from orbithash.encoders.codes import check_bits, num_bytes
from orbithash.encoders.errors import ArchiveBusy, InputError
from orbithash.encoders.lance_errors import is_absent, one_line_errors
from orbithash.encoders.vectors import VectorSpec

__all__ = [
    "FORMAT_VERSION",
    "Metadata",
    "check_free",
    "holds_dataset",
    "key_filter",
    "normalise_location",
    "open_dataset",
    "read_metadata",
    "schema_of",
    "upkeep_lock",
    "write_lock",
]

FORMAT_VERSION = 3

_WRITER_LOCK, _UPKEEP_LOCK = "_writer.lock", "_upkeep.lock"

# Maximum seconds between two attempts to take a lock. Random, so that waiting processes take turns.
_ATTEMPT_EVERY_S = 0.02


class Metadata(NamedTuple):
    """What an archive holds: bits of a code, the `model_id` of the model, its stored vectors or None."""

    bits: int
    model_id: str
    vector: VectorSpec | None


def schema_of(bits: int, model_id: str, vector: VectorSpec | None = None) -> pa.Schema:
    """Return the columns and the metadata of an archive."""
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
        # The content that the code was made from (`stamps.py`); unknown for rows that came through a gateway.
        pa.field("stamp", pa.string()),
    ]
    metadata = {"format_version": str(FORMAT_VERSION), "bits": str(bits), "model_id": model_id}
    if vector is not None:
        # Unknown for rows of which only the code is known.
        fields.append(pa.field("vector", pa.list_(pa.int8(), vector.dims)))
        metadata["vector_scale"] = repr(vector.scale)
    return pa.schema(fields, metadata={f"orbithash.{name}": value for name, value in metadata.items()})


def read_metadata(path: str, dataset: Any) -> Metadata:
    """Return what an archive holds; `InputError` for a dataset that is not one of this format."""
    metadata = {name.decode(): value.decode() for name, value in (dataset.schema.metadata or {}).items()}
    try:
        version, bits, model_id = (metadata[f"orbithash.{name}"] for name in ("format_version", "bits", "model_id"))
    except KeyError as error:
        raise InputError(f"{path} is a Lance dataset, but not an archive of codes (no {error.args[0]})") from error
    if version != str(FORMAT_VERSION):
        raise InputError(
            f"{path} is an archive of format version {version}; this orbithash reads {FORMAT_VERSION}: encode the "
            "images again into a new folder"
        )
    vector = None
    if "vector" in dataset.schema.names:
        try:
            scale = float(metadata["orbithash.vector_scale"])
            vector = VectorSpec(dataset.schema.field("vector").type.list_size, scale)
        except (KeyError, ValueError, AttributeError) as error:
            raise InputError(f"{path} is damaged: its vectors have no scale or another type") from error
    if not bits.isdecimal() or not dataset.schema.equals(schema_of(check_bits(int(bits)), model_id, vector)):
        raise InputError(f"{path} is damaged: its columns are not those of an archive of {bits}-bit codes")
    return Metadata(int(bits), model_id, vector)


def _is_uri(location: str) -> bool:
    """Return whether the location is the URI of an object store."""
    return "://" in location


def normalise_location(path: str | Path) -> str:
    """Return an absolute path, or a URI as it is; `InputError` for an invalid path."""
    text = str(path).removeprefix("file://")
    try:
        if _is_uri(text):
            return text.rstrip("/")
        path = Path(text).resolve()
        # Raises for a name that is too long, which `resolve` accepts since Python 3.13.
        path.exists()
        return str(path)
    except (ValueError, OSError) as error:
        raise InputError(f"{text[:80]!r} is not a valid path ({error})") from error


def holds_dataset(location: str) -> bool:
    """Return whether a Lance dataset is there, sound or damaged."""
    if not _is_uri(location):
        try:
            return any(Path(location, "_versions").glob("*.manifest"))
        except OSError as error:
            raise InputError(f"{location[:80]} cannot be read: {error.strerror}") from error
    import lance

    try:
        lance.dataset(location)
    except ValueError as error:
        # Any other error means that something is there.
        return not is_absent(error)
    return True


def check_free(location: str) -> None:
    """Raise `InputError` where a new archive would overwrite other data or mix with it."""
    if holds_dataset(location):
        raise InputError(f"{location} already holds a dataset; choose another folder")
    if _is_uri(location) or not Path(location).exists():
        return
    # Left by a creation that was killed before its first commit.
    traces = {"_versions", "_transactions"}
    if not Path(location).is_dir() or not {entry.name for entry in Path(location).iterdir()} <= traces:
        raise InputError(f"{location} exists and is not an archive of codes; choose a new or an empty folder")


def open_dataset(location: str, version: int | None) -> Any:
    """Return the Lance dataset in its newest or in one version; `InputError` when it is missing or damaged."""
    import lance

    if not _is_uri(location) and not holds_dataset(location):
        missing = "is not an archive of codes" if Path(location).exists() else "does not exist"
        raise InputError(f"{location} {missing}; `orbithash encode` makes one")
    with one_line_errors(location):
        return lance.dataset(location, version=version)


def key_filter(keys: Sequence[str]) -> str:
    """Return the filter that rows with one of these keys pass, in Lance's SQL."""
    return f"key IN ({', '.join(_literal(key) for key in keys)})"


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def write_lock(location: str, timeout_s: float = 0.0) -> AbstractContextManager[None]:
    """Hold the right to write; wait for it up to `timeout_s` seconds.

    The kernel releases it when the process dies. No effect in an object store.

    Raises:
        ArchiveBusy: another process holds it.
        InputError: nothing can be written there.
    """
    return _locked(location, _WRITER_LOCK, "written", timeout_s)


def upkeep_lock(location: str) -> AbstractContextManager[None]:
    """Hold the right to rewrite files and to remove old ones; otherwise as `write_lock`."""
    return _locked(location, _UPKEEP_LOCK, "maintained", 0.0)


@contextmanager
def _locked(location: str, name: str, what: str, timeout_s: float) -> Iterator[None]:
    if _is_uri(location):
        yield
        return
    import fcntl

    try:
        lock = Path(location, name).open("a+")  # noqa: SIM115 (only a failure to open it is an error of this kind)
    except OSError as error:
        raise InputError(f"{location} cannot be written: {error.strerror}") from error
    with lock:
        give_up_at = time.monotonic() + timeout_s
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= give_up_at:
                    lock.seek(0)
                    holder = lock.read(200).strip() or "another process"
                    raise ArchiveBusy(f"{location} is being {what} by {holder}; wait until it ends") from error
            # flock has no time limit.
            time.sleep(random.uniform(0.2, 1) * _ATTEMPT_EVERY_S)
        # The content is only shown to people. After the death of a holder it names that process.
        with suppress(OSError):
            lock.truncate(0)
            lock.write(f"another process ({os.getpid()} on {socket.gethostname()})")
            lock.flush()
        yield
