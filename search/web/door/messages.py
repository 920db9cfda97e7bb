"""Requests and answers of the JSON door: the JSON form of protobuf."""

import re
from collections.abc import Iterable
from typing import Any

from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from orbithash.search.protocol.errors import InvalidQuery

__all__ = ["message_of_json", "message_of_query", "to_json"]

# Deeper than any request of orbithash.v1.
_MAX_DEPTH = 16


def message_of_json(text: bytes, message: Message) -> Message:
    """Return `message` with the fields of a JSON object. Raises `InvalidQuery`, which names the field if it can."""
    if not text.lstrip().startswith(b"{"):
        raise InvalidQuery(("body", "is not a JSON object"))
    try:
        json_format.Parse(text, message, max_recursion_depth=_MAX_DEPTH)
    except (json_format.ParseError, ValueError, RecursionError) as error:
        raise _invalid(message, error) from error
    return message


def message_of_query(pairs: Iterable[tuple[str, str]], message: Message) -> Message:
    """Return `message` with the fields of a query string, such as text=boats&k=5; a repeated field may be repeated.

    Fields that are messages have their own names after a point: after.distance=3&after.id=7.
    """
    fields: dict[str, Any] = {}
    for name, value in pairs:
        place, descriptor = fields, message.DESCRIPTOR
        *outer, inner = name.split(".")
        for part in outer:
            field = descriptor.fields_by_name.get(part)
            if field is None or field.message_type is None or field.is_repeated:
                raise InvalidQuery((name, f"is not a field; {_known(message)}"))
            place, descriptor = place.setdefault(part, {}), field.message_type
        field = descriptor.fields_by_name.get(inner)
        if field is None or field.message_type is not None:
            raise InvalidQuery((name, f"is not a field that a query string can hold; {_known(message)}"))
        if field.is_repeated:
            place.setdefault(inner, []).append(value)
        elif inner in place:
            raise InvalidQuery((name, "is given more than once"))
        else:
            place[inner] = {"true": True, "false": False}.get(value, value) if _is_bool(field) else value
    try:
        json_format.ParseDict(fields, message, max_recursion_depth=_MAX_DEPTH)
    except (json_format.ParseError, ValueError) as error:
        raise _invalid(message, error) from error
    return message


def to_json(message: Message) -> str:
    """Return a message as JSON, with the fields that have their default value, such as a distance of 0."""
    return json_format.MessageToJson(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True, indent=None
    )


def _is_bool(field: Any) -> bool:
    return bool(field.type == FieldDescriptor.TYPE_BOOL)


def _known(message: Message) -> str:
    return f"the fields are {', '.join(field.name for field in message.DESCRIPTOR.fields)}"


def _invalid(message: Message, error: Exception) -> InvalidQuery:
    text = str(error).partition("\n")[0]
    if unknown := re.search(r'has no field named "([^"]*)"(?: at "(\w+))?', text):
        known = re.search(r"Available Fields.*?: \"\[?(.*?)\]?\"", str(error), re.DOTALL)
        fields = f"; the fields here are {known[1].replace(chr(39), '')}" if known else f"; {_known(message)}"
        return InvalidQuery((unknown[1][:80], f"is not a field{fields}"))
    if failed := re.match(r"Failed to parse ([\w.\[\]]+) field: (.*)", text):
        return InvalidQuery((failed[1], failed[2]))
    if isinstance(error, RecursionError) or "recursion" in text.lower():
        return InvalidQuery(("body", f"objects are nested more than {_MAX_DEPTH} deep"))
    return InvalidQuery(("body", text or "is not a JSON object"))
