"""Images in object stores, through pyarrow's file systems: `s3://BUCKET/PREFIX`, `gs://BUCKET/PREFIX`.

Credentials, region and endpoint come from the environment (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, …) or, but for
credentials, from the URI's query (`?endpoint_override=HOST:PORT&scheme=http`), as pyarrow takes them.
"""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from orbithash.encoders.errors import ImageError, InputError
from orbithash.encoders.imagery.rendering import Limits

__all__ = ["is_remote", "read_object", "walk_objects"]

_SCHEMES = ("s3", "gs", "gcs")
_SECRETS = ("access_key", "secret_key", "session_token")


def is_remote(text: str) -> bool:
    """Whether it is the URI of an object or of a folder of objects."""
    return text.partition("://")[0].lower() in _SCHEMES and "://" in text


def walk_objects(uri: str) -> Iterator[tuple[str, str]]:
    """Path within the folder `uri` and URI of each object, one folder after another; of an object itself that alone.

    Names that begin with a dot are left out, as in folders of this machine.

    Raises:
        InputError: nothing there, no permission, no answer.
    """
    from pyarrow.fs import FileSelector, FileType

    scheme, query = uri.partition("://")[0], urlsplit(uri).query
    system, root = _located(uri)

    def address(path: str) -> str:
        return f"{scheme}://{quote(path)}" + (f"?{query}" if query else "")

    try:
        if system.get_file_info(root).type == FileType.File:
            yield PurePosixPath(root).name, address(root)
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
                    yield entry.path[len(root.rstrip("/")) + 1 :], address(entry.path)
            waiting += reversed(folders)
    except FileNotFoundError as error:
        raise InputError(f"{uri} does not exist, or nothing is there ({_line(error)})") from error
    except OSError as error:
        raise InputError(f"{uri} cannot be listed: {_line(error)}") from error


def read_object(uri: str, limits: Limits) -> bytes:
    """All of an object, whose size is held against `limits` before it is read.

    Raises:
        ImageError: no such object, or too long.
        InputError: no permission, no answer: of these the object is innocent, so it is not refused.
    """
    system, path = _located(uri)
    try:
        with system.open_input_file(path) as file:
            limits.check_bytes(file.size())
            return bytes(file.read())
    except FileNotFoundError as error:
        raise ImageError("there is no such object") from error
    except OSError as error:
        raise InputError(f"{uri} cannot be read: {_line(error)}; run it again, and it goes on") from error


def _located(uri: str) -> tuple[Any, str]:
    """The file system and the path in it."""
    parts = urlsplit(uri)
    if any(f"{name}=" in parts.query for name in _SECRETS) or "@" in parts.netloc:
        raise InputError(
            f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path} is given with a secret, which would stand "
            "in the archive; put it into the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
        )
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
        raise InputError(f"{uri} cannot be opened: {_line(error)}") from error
    return system, path


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
