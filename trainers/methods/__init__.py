"""The methods by name. A method is one module: its config, its losses as pure functions, its network."""

from orbithash.encoders.errors import InputError
from orbithash.trainers.methods.base import Method
from orbithash.trainers.methods.dhcl import Dhcl

__all__ = ["METHODS", "Method", "get_method"]

METHODS: dict[str, type[Method]] = {"dhcl": Dhcl}


def get_method(name: str) -> type[Method]:
    """The method of that name; `InputError` with the names that exist."""
    if name not in METHODS:
        raise InputError(f"unknown method {name!r}; there are {', '.join(METHODS)}")
    return METHODS[name]
