"""Checks of integers from Python and numpy; True and False are not integers here."""

from numbers import Integral
from typing import TypeGuard

from orbithash.encoders.errors import InputError

__all__ = ["check_integer", "is_integer"]


def is_integer(value: object, minimum: int | None = None, maximum: int | None = None) -> TypeGuard[int]:
    """Return whether the value is an integer within the bounds, both inclusive."""
    # The integers of numpy are registered as Integral; its booleans are not.
    if isinstance(value, bool) or not isinstance(value, Integral):
        return False
    number = int(value)
    return (minimum is None or number >= minimum) and (maximum is None or number <= maximum)


def check_integer(value: object, name: str, minimum: int, maximum: int | None = None) -> int:
    """Return the value as an int; `InputError` unless it is an integer within the bounds, both inclusive."""
    if not is_integer(value, minimum, maximum):
        bounds = f"from {minimum:,} to {maximum:,}" if maximum is not None else f"of at least {minimum:,}"
        raise InputError(f"{name} is {value!r}; an integer {bounds} is required")
    return int(value)
