"""Errors of Lance, which have several types and tell places in its source code, as one line."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from orbithash.encoders.errors import InputError

__all__ = ["error_line", "is_absent", "one_line_errors"]

# The words of the clients of object stores.
_FORBIDDEN = ("403 Forbidden", "401 Unauthorized")
_OF_STORE = ("Generic S3 error", "Generic GCS error")

# Names of types of errors in front of a message, and places in the source code within it.
_TYPES = re.compile(r"(?:External error: |LanceError\(\w+\): )+")
_PLACES = re.compile(r",?\s*/\S+\.rs:\d+:\d+")


@contextmanager
def one_line_errors(location: str, what: str = "cannot be read", remedy: str = "") -> Iterator[None]:
    """Turn errors of Lance into an `InputError` of one line: the location, `what`, and Lance's reason.

    If the location may be damaged, the line ends with `remedy`.
    """
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        # A panic in Lance's Rust arrives as a BaseException without an importable name.
        if not isinstance(error, OSError | ValueError | RuntimeError) and type(error).__name__ != "PanicException":
            raise
        line = error_line(error)
        if what == "cannot be read" and not _says(error, *_FORBIDDEN, *_OF_STORE):
            what, line = f"{what}, it may be damaged", f"{line}; {remedy}" if remedy else line
        raise InputError(f"{location} {what}: {line}") from error


def error_line(error: BaseException) -> str:
    """Return the first line of Lance's message, without types of errors and places in its source code."""
    if _says(error, *_FORBIDDEN):
        return "no permission; check the credentials"
    lines = _TYPES.sub("", _PLACES.sub("", str(error))).splitlines()
    return lines[0] if lines else type(error).__name__


def is_absent(error: BaseException | None) -> bool:
    """Return whether an error of opening a dataset is Lance's for an empty location."""
    return _says(error, "was not found")


def _says(error: BaseException | None, *words: str) -> bool:
    return any(each in str(error) for each in words)
