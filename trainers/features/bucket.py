"""Parts of features in an object store: KIND/PART below a prefix, which machines without a common folder share.

An object appears whole or not at all, and its content has the digest that its name states.
"""

import hashlib
import logging
from typing import Any

from orbithash.encoders.errors import InputError
from orbithash.encoders.sources.remote import error_line, open_uri

__all__ = ["Bucket"]

_log = logging.getLogger(__name__)


class Bucket:
    """A prefix of an object store; errors of all methods are `InputError`, one line each."""

    def __init__(self, uri: str) -> None:
        """`uri` is s3:// or gs://, without credentials: those come from the environment."""
        self.uri = uri
        self._system, self._root = _opened(uri)

    def sizes(self, kind: str) -> dict[str, int]:
        """Return the size in bytes of each part of a kind, by its name."""
        from pyarrow.fs import FileSelector, FileType

        try:
            # A bucket that is absent has no objects either, but is a mistake.
            bucket = self._root.partition("/")[0]
            if self._system.get_file_info(bucket).type == FileType.NotFound:
                raise InputError(f"ORBITHASH_FEATURES is {self.uri}, and there is no bucket {bucket}; create it first")
            entries = self._system.get_file_info(FileSelector(f"{self._root}/{kind}", allow_not_found=True))
        except OSError as err:
            raise self._failed("listed", err) from err
        return {entry.base_name: entry.size for entry in entries if entry.base_name.endswith(".arrow")}

    def read(self, kind: str, name: str) -> bytes | None:
        """Return a part; None if it is damaged, with a warning, or was removed meanwhile."""
        path = f"{self._root}/{kind}/{name}"
        try:
            with self._system.open_input_file(path) as file:
                content = bytes(file.read())
        except FileNotFoundError:
            return None
        except OSError as err:
            raise self._failed("read", err) from err
        if f"{hashlib.sha256(content).hexdigest()}.arrow" != name:
            _log.warning("%s in the bucket is damaged and not used; remove it", path)
            return None
        return content

    def write(self, kind: str, name: str, content: bytes) -> None:
        """Keep a part; stores show an object when all of it has arrived."""
        try:
            with self._system.open_output_stream(f"{self._root}/{kind}/{name}") as file:
                file.write(content)
        except OSError as err:
            raise self._failed("written", err) from err

    def _failed(self, action: str, err: OSError) -> InputError:
        return InputError(f"ORBITHASH_FEATURES is {self.uri}, which cannot be {action}: {error_line(err)}")


def _opened(uri: str) -> tuple[Any, str]:
    if uri.partition("://")[0].lower() not in ("s3", "gs", "gcs"):
        raise InputError(f"ORBITHASH_FEATURES is {uri}; a folder, or a URI of s3:// or gs://, is needed")
    return open_uri(uri)
