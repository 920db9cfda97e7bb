"""Errors of Lance, which have several types and tell places in its source code, as one line."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from orbithash.encoders.errors import InputError

__all__ = ["error_line", "is_absent", "one_line_errors"]

# The words of the clients of object stores.
_FORBIDDEN = ("403 Forbidden", "401 Unauthorized")
_OF_STORE = ("Generic S3 error", "Generic GCS error")


@contextmanager
def one_line_errors(location: str, what: str = "cannot be read") -> Iterator[None]:
    """Turn errors of Lance into an `InputError` of one line: the location, `what`, and Lance's reason."""
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        # A panic in Lance's Rust arrives as a BaseException without an importable name.
        if not isinstance(error, OSError | ValueError | RuntimeError) and type(error).__name__ != "PanicException":
            raise
        guess = "" if what != "cannot be read" or _says(error, *_FORBIDDEN, *_OF_STORE) else ", it may be damaged"
        raise InputError(f"{location} {what}{guess}: {error_line(error)}") from error


def error_line(error: BaseException) -> str:
    """Return the first line of Lance's message, without the places in its source code."""
    if _says(error, *_FORBIDDEN):
        return "no permission; check the credentials"
    lines = re.sub(r",?\s*/\S+\.rs:\d+:\d+", "", str(error)).splitlines()
    return lines[0] if lines else type(error).__name__


def is_absent(error: BaseException | None) -> bool:
    """Return whether an error of opening a dataset is Lance's for an empty location."""
    return _says(error, "was not found")


def _says(error: BaseException | None, *words: str) -> bool:
    return any(each in str(error) for each in words)
