"""Images in object stores, through pyarrow's file systems: `s3://BUCKET/PREFIX`, `gs://BUCKET/PREFIX`.

Credentials, region and endpoint come from the environment (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, …). All but the
credentials may instead be in the URI's query, as pyarrow reads it (`?endpoint_override=HOST:PORT&scheme=http`).
"""

import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from orbithash.encoders.errors import ImageError, InputError
from orbithash.encoders.imagery.rendering import Limits

__all__ = ["check_uri", "error_line", "is_remote", "open_uri", "path_of", "read_object", "walk_objects"]

_SCHEMES = ("s3", "gs", "gcs")
_SECRETS = ("access_key", "secret_key", "session_token")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def is_remote(location: str) -> bool:
    """Whether `location` is a URI of any scheme but `file`; everything else is a path on this machine."""
    scheme = _SCHEME.match(location)
    return scheme is not None and scheme[1].lower() != "file"


def path_of(location: str) -> str:
    """Return the path of a location that is not remote: without the scheme `file`, if it has one."""
    scheme = _SCHEME.match(location)
    return location[scheme.end() :] if scheme else location


def check_uri(uri: str) -> None:
    """Raise `InputError` for a URI that is not of an object store, or that has a secret in it."""
    parts = urlsplit(uri)
    if parts.scheme.lower() not in _SCHEMES:
        raise InputError(f"{uri} is remote; of remote images only s3:// and gs:// are read: copy it to a folder first")
    if any(f"{name}=" in parts.query for name in _SECRETS) or "@" in parts.netloc:
        raise InputError(
            f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path} is given with a secret, which "
            "would be stored; set it in the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
        )


def walk_objects(uri: str) -> Iterator[tuple[str, str, str]]:
    """Yield the path within the folder `uri`, the URI and the version (size and time) of each object in it.

    One folder after another; for the URI of an object, that object alone.

    Names that begin with a dot are skipped, as in local folders.

    Raises:
        InputError: nothing there, no permission, no answer.
    """
    from pyarrow.fs import FileSelector, FileType

    scheme, query = uri.partition("://")[0], urlsplit(uri).query
    system, root = open_uri(uri)

    def address(path: str) -> str:
        return f"{scheme}://{quote(path)}" + (f"?{query}" if query else "")

    try:
        info = system.get_file_info(root)
        if info.type == FileType.File:
            yield PurePosixPath(root).name, address(root), f"{info.size}-{info.mtime_ns}"
            return
        waiting = [root]
        while waiting:
            folders = []
            for entry in system.get_file_info(FileSelector(waiting.pop())):
                if entry.base_name.startswith("."):
                    continue
                if entry.type == FileType.Directory:
                    folders.append(entry.path)
                elif entry.type == FileType.File:
                    version = f"{entry.size}-{entry.mtime_ns}"
                    yield entry.path[len(root.rstrip("/")) + 1 :], address(entry.path), version
            waiting += reversed(folders)
    except FileNotFoundError as error:
        raise InputError(f"{uri} does not exist, or nothing is there ({error_line(error)})") from error
    except OSError as error:
        raise InputError(f"{uri} cannot be listed: {error_line(error)}") from error


def read_object(uri: str, limits: Limits) -> bytes:
    """Return the content of an object; its size is checked against `limits` before it is read.

    Raises:
        ImageError: no such object, or too long.
        InputError: no permission, or no answer. The image is not refused, because it may be sound.
    """
    system, path = open_uri(uri)
    try:
        with system.open_input_file(path) as file:
            limits.check_bytes(file.size())
            return bytes(file.read())
    except FileNotFoundError as error:
        raise ImageError("there is no such object") from error
    except OSError as error:
        raise InputError(f"{uri} cannot be read: {error_line(error)}; run the command again to resume") from error


def open_uri(uri: str) -> tuple[Any, str]:
    """Return the file system of a URI and the path in it, without a slash at its end; `InputError` as `check_uri`."""
    check_uri(uri)
    parts = urlsplit(uri)
    system, _ = _system(parts.scheme, parts.netloc, parts.query)
    return system, unquote(f"{parts.netloc}{parts.path}").rstrip("/")


@lru_cache(maxsize=8)
def _system(scheme: str, bucket: str, query: str) -> tuple[Any, str]:
    import pyarrow as pa
    from pyarrow.fs import FileSystem

    uri = f"{scheme}://{bucket}" + (f"?{query}" if query else "")
    try:
        system, path = FileSystem.from_uri(uri)
    except (OSError, pa.ArrowException, ValueError) as error:
        raise InputError(f"{uri} cannot be opened: {error_line(error)}") from error
    return system, path


def error_line(error: BaseException) -> str:
    """Return the first line of an error."""
    return (str(error).splitlines() or [type(error).__name__])[0]
