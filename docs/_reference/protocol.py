"""Pages of the gRPC interface: services and messages of search.proto with their comments."""

import sys
import tempfile
from pathlib import Path
from typing import Any

from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto, FileDescriptorSet
from google.rpc import status_pb2
from grpc_tools import protoc
from markdown_parts import code, escaped, table

__all__ = ["pages"]

PROTO = Path(__file__).resolve().parents[2] / "proto"
FILE = "orbithash/v1/search.proto"

# Numbers of fields in descriptor.proto, of which paths to comments consist.
_PACKAGE, _MESSAGE, _ENUM, _SERVICE = 2, 4, 5, 6
_FIELD, _NESTED, _NESTED_ENUM, _VALUE, _METHOD = 2, 3, 4, 2, 2

Comments = dict[tuple[int, ...], str]


def pages() -> dict[str, str]:
    """Return the page of the services and that of the messages, by file name without ending."""
    file = _described()
    comments = {tuple(place.path): place.leading_comments for place in file.source_code_info.location}
    services = [
        "# gRPC interface",
        "Generated from `proto/orbithash/v1/search.proto`. [Messages](messages.md) lists the fields.",
        _paragraphs(comments.get((_PACKAGE,), "")),
    ]
    for i, service in enumerate(file.service):
        services += [f"## {service.name}", _paragraphs(comments.get((_SERVICE, i), ""))]
        rows = [
            (
                code(method.name),
                escaped(comments.get((_SERVICE, i, _METHOD, k), "")),
                _type(method.input_type, method.client_streaming),
                _type(method.output_type, method.server_streaming),
            )
            for k, method in enumerate(service.method)
        ]
        services.append(table(("call", "does", "takes", "returns"), rows))
    services.append("```{toctree}\n:hidden:\n\nmessages\n```")
    messages = ["# Messages", "Messages of the [gRPC interface](index.md), in the order of the file."]
    for i, message in enumerate(file.message_type):
        messages += _message(message, (_MESSAGE, i), comments, "")
    for i, enum in enumerate(file.enum_type):
        messages += _enum(enum, (_ENUM, i), comments, "")
    return {
        name: "\n\n".join(part.rstrip("\n") for part in parts if part) + "\n"
        for name, parts in (("index", services), ("messages", messages))
    }


def _described() -> FileDescriptorProto:
    google_rpc = Path(status_pb2.__file__).parents[2]
    own = Path(protoc.__file__).parent / "_proto"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "set")
        words = ["protoc", f"-I{PROTO}", f"-I{google_rpc}", f"-I{own}", "--include_source_info"]
        if protoc.main([*words, f"--descriptor_set_out={out}", str(PROTO / FILE)]):
            sys.exit(f"{FILE} cannot be compiled")
        return FileDescriptorSet.FromString(out.read_bytes()).file[0]


def _message(message: Any, path: tuple[int, ...], comments: Comments, outer: str) -> list[str]:
    name = f"{outer}{message.name}"
    if message.options.map_entry:
        return []
    parts = [f"## {name}", _paragraphs(comments.get(path, ""))]
    maps = {each.name: each for each in message.nested_type if each.options.map_entry}
    rows = []
    for k, field in enumerate(message.field):
        one_of = ""
        if field.HasField("oneof_index") and not field.proto3_optional:
            one_of = f" One of {code(message.oneof_decl[field.oneof_index].name)}."
        about = escaped(comments.get((*path, _FIELD, k), ""))
        rows.append((code(field.name), str(field.number), _field_type(field, maps), about + one_of))
    if rows:
        parts.append(table(("field", "number", "type", "meaning"), rows))
    for k, nested in enumerate(message.nested_type):
        parts += _message(nested, (*path, _NESTED, k), comments, f"{name}.")
    for k, enum in enumerate(message.enum_type):
        parts += _enum(enum, (*path, _NESTED_ENUM, k), comments, f"{name}.")
    return parts


def _enum(enum: Any, path: tuple[int, ...], comments: Comments, outer: str) -> list[str]:
    rows = [
        (code(value.name), str(value.number), escaped(comments.get((*path, _VALUE, k), "")))
        for k, value in enumerate(enum.value)
    ]
    head = [f"## {outer}{enum.name}", _paragraphs(comments.get(path, ""))]
    return [*head, table(("value", "number", "meaning"), rows)]


def _field_type(field: Any, maps: dict[str, Any]) -> str:
    short = field.type_name.rpartition(".")[2]
    if short in maps:
        key, value = maps[short].field
        return f"map of {_field_type(key, {})} to {_field_type(value, {})}"
    if field.type_name:
        text = _type(field.type_name)
    else:
        text = code(FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower())
    label = "optional " if field.proto3_optional else ""
    return f"{label}{'repeated ' if field.label == field.LABEL_REPEATED else ''}{text}"


def _type(name: str, is_stream: bool = False) -> str:
    """Return a type's name, with a link if it is of this file."""
    own = name.removeprefix(".orbithash.v1.")
    text = code(name.lstrip(".")) if own == name else f"[{code(own)}](messages.md#{own.lower().replace('.', '')})"
    return f"stream of {text}" if is_stream else text


def _paragraphs(comment: str) -> str:
    """Return a comment as Markdown: its paragraphs, and its tables as they are."""
    lines = [line.removeprefix(" ").rstrip() for line in comment.split("\n")]
    parts = "\n".join(lines).strip().split("\n\n")
    return "\n\n".join(_joined(part) if part.startswith("|") else escaped(part) for part in parts)


def _joined(rows: str) -> str:
    """Return a table whose rows that begin with two empty cells have been joined to the row before them."""
    joined: list[list[str]] = []
    for row in rows.split("\n"):
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        if joined and not any(cells[:2]):
            joined[-1] = [" ".join(filter(None, pair)) for pair in zip(joined[-1], cells, strict=True)]
        else:
            joined.append(cells)
    return table(joined[0], joined[2:])
