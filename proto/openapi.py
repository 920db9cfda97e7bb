"""The OpenAPI description of the JSON door, from the descriptors of orbithash.v1 and the comments of the .proto files.

    python proto/openapi.py DESCRIPTORS OUT

Every unary call of SearchService is POST /api/NAME with the JSON form of its request, and GET /api/NAME with fields in
the query. Describe is GET /api/archive.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    MethodDescriptorProto,
)

__all__ = ["describe_door"]

FILE = "orbithash/v1/search.proto"

INTRODUCTION = """\
The calls of orbithash.v1 over HTTP, for programs without gRPC.

Requests and answers have the JSON form of protobuf with the names of the .proto file: bytes are base64, times are RFC
3339, and 64-bit integers are strings in answers and strings or numbers in requests. An unknown field is an error. A
query string may hold the fields that are not objects, and those of an object after a point:
`after.distance=3&after.id=7`. It may leave out `k` or `limit`, which is 10 then.

Calls that change the archive (Upsert, Update, Delete, Refresh) are streams or take minutes, and are offered over gRPC
only.

If the gateway requires tokens, send the header `Authorization: Bearer TOKEN`.
"""

_INTEGERS = {
    FieldDescriptorProto.TYPE_INT32: ("int32", -(2**31), 2**31 - 1),
    FieldDescriptorProto.TYPE_SINT32: ("int32", -(2**31), 2**31 - 1),
    FieldDescriptorProto.TYPE_SFIXED32: ("int32", -(2**31), 2**31 - 1),
    FieldDescriptorProto.TYPE_UINT32: ("uint32", 0, 2**32 - 1),
    FieldDescriptorProto.TYPE_FIXED32: ("uint32", 0, 2**32 - 1),
}
_LONG_INTEGERS = {
    FieldDescriptorProto.TYPE_INT64: "int64",
    FieldDescriptorProto.TYPE_SINT64: "int64",
    FieldDescriptorProto.TYPE_SFIXED64: "int64",
    FieldDescriptorProto.TYPE_UINT64: "uint64",
    FieldDescriptorProto.TYPE_FIXED64: "uint64",
}
# Messages whose JSON form is not an object of their fields.
_WELL_KNOWN: dict[str, dict[str, Any]] = {
    ".google.protobuf.Timestamp": {"type": "string", "format": "date-time"},
    ".google.protobuf.FieldMask": {"type": "string"},
    ".google.rpc.Status": {"$ref": "#/components/schemas/Status"},
}
_STATUS = {
    "type": "object",
    "description": "An error, as google.rpc.Status.",
    "properties": {
        "code": {"type": "integer", "description": "A google.rpc.Code."},
        "message": {"type": "string", "description": "What happened."},
        "details": {"type": "array", "items": {"type": "object"}, "description": "Messages of google.rpc."},
    },
}
_ERROR = {
    "type": "object",
    "description": "The answer to a call that failed.",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["code", "status", "message", "details", "request_id"],
            "properties": {
                "code": {"type": "integer", "description": "The status of HTTP."},
                "status": {"type": "string", "description": "The name of the status in google.rpc.Code."},
                "message": {"type": "string", "description": "One sentence: what happened and what to do."},
                "details": {"type": "array", "items": {"type": "object"}, "description": "Messages of google.rpc."},
                "request_id": {"type": "string", "description": "The id of the request in the service's log."},
            },
        }
    },
}


def describe_door(descriptors: FileDescriptorSet) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document for descriptors that have source information."""
    return _Door(next(file for file in descriptors.file if file.name == FILE)).document()


class _Door:
    def __init__(self, file: FileDescriptorProto) -> None:
        self._file = file
        self._comments = {
            tuple(place.path): _paragraphs(place.leading_comments) for place in file.source_code_info.location
        }
        self._messages = {f".{file.package}.{each.name}": (n, each) for n, each in enumerate(file.message_type)}
        self._enums = {f".{file.package}.{each.name}": (n, each) for n, each in enumerate(file.enum_type)}
        # Schemas that the calls need.
        self._schemas: dict[str, dict[str, Any]] = {"Status": _STATUS, "Error": _ERROR}

    def document(self) -> dict[str, Any]:
        paths = {f"/api/{name}": operations for name, operations in self._calls()}
        return {
            "openapi": "3.1.0",
            "info": {"title": "orbithash", "version": "1.0.0", "description": INTRODUCTION},
            "paths": paths,
            "components": {
                "schemas": dict(sorted(self._schemas.items())),
                "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            },
            # A gateway without tokens takes calls without one.
            "security": [{}, {"token": []}],
        }

    def _calls(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for number, service in enumerate(self._file.service):
            for place, method in enumerate(service.method):
                text = self._comments.get((6, number, 2, place), "")
                if service.name == "SearchService":
                    yield _snake(method.name), self._operations(method, text)
                elif method.name == "Describe":
                    yield "archive", {"get": self._operation(method, method.name, text)}

    def _operations(self, method: MethodDescriptorProto, text: str) -> dict[str, Any]:
        get = self._operation(method, f"{method.name}ByQuery", text)
        get["parameters"] = list(self._parameters(method.input_type))
        post = self._operation(method, method.name, text)
        post["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": self._message(method.input_type)}},
        }
        return {"get": get, "post": post}

    def _operation(self, method: MethodDescriptorProto, name: str, text: str) -> dict[str, Any]:
        answer = {"application/json": {"schema": self._message(method.output_type)}}
        error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
        return {
            "operationId": name,
            "description": text,
            "responses": {
                "200": {"description": "The answer.", "content": answer},
                "default": {"description": "The call failed.", "content": error},
            },
        }

    def _parameters(self, name: str, prefix: str = "") -> Iterator[dict[str, Any]]:
        """Yield the fields of a message that a query can hold, and those of messages in it."""
        number, message = self._messages[name]
        for place, field in enumerate(message.field):
            if field.type == FieldDescriptorProto.TYPE_MESSAGE:
                is_list = field.label == FieldDescriptorProto.LABEL_REPEATED
                if not is_list and field.type_name not in _WELL_KNOWN:
                    yield from self._parameters(field.type_name, f"{prefix}{field.name}.")
                continue
            yield {
                "name": prefix + field.name,
                "in": "query",
                "required": False,
                "description": self._comments.get((4, number, 2, place), ""),
                "schema": self._field(field),
            }

    def _message(self, name: str) -> dict[str, Any]:
        """Return a reference to the schema of a message, and add the schema."""
        if name in _WELL_KNOWN:
            return dict(_WELL_KNOWN[name])
        number, message = self._messages[name]
        if message.name not in self._schemas:
            self._schemas[message.name] = {}
            self._schemas[message.name] = self._schema(number, message)
        return {"$ref": f"#/components/schemas/{message.name}"}

    def _schema(self, number: int, message: DescriptorProto) -> dict[str, Any]:
        properties = {}
        for place, field in enumerate(message.field):
            schema = self._field(field)
            if text := self._comments.get((4, number, 2, place)):
                schema = {**schema, "description": text}
            properties[field.name] = schema
        parts = [self._comments.get((4, number), "")]
        for place in range(len(message.oneof_decl)):
            names = [field.name for field in message.field if _is_in_oneof(field, place)]
            if names:
                parts.append(f"At most one of these is set: {', '.join(names)}.")
        return {
            "type": "object",
            "description": " ".join(filter(None, parts)),
            "properties": properties,
            "additionalProperties": False,
        }

    def _field(self, field: FieldDescriptorProto) -> dict[str, Any]:
        schema = self._value(field)
        if field.label == FieldDescriptorProto.LABEL_REPEATED:
            return {"type": "array", "items": schema}
        return schema

    def _value(self, field: FieldDescriptorProto) -> dict[str, Any]:
        if field.type == FieldDescriptorProto.TYPE_MESSAGE:
            return self._message(field.type_name)
        if field.type == FieldDescriptorProto.TYPE_ENUM:
            return self._enum(field.type_name)
        if field.type in _INTEGERS:
            name, least, largest = _INTEGERS[field.type]
            return {"type": "integer", "format": name, "minimum": least, "maximum": largest}
        if field.type in _LONG_INTEGERS:
            return {"type": ["string", "integer"], "format": _LONG_INTEGERS[field.type]}
        return {
            FieldDescriptorProto.TYPE_BOOL: {"type": "boolean"},
            FieldDescriptorProto.TYPE_STRING: {"type": "string"},
            FieldDescriptorProto.TYPE_BYTES: {"type": "string", "contentEncoding": "base64"},
            FieldDescriptorProto.TYPE_DOUBLE: {"type": "number", "format": "double"},
            FieldDescriptorProto.TYPE_FLOAT: {"type": "number", "format": "float"},
        }[field.type]

    def _enum(self, name: str) -> dict[str, Any]:
        number, enum = self._enums[name]
        self._schemas[enum.name] = {
            "type": "string",
            "enum": [value.name for value in enum.value],
            "description": self._enum_text(number, enum),
        }
        return {"$ref": f"#/components/schemas/{enum.name}"}

    def _enum_text(self, number: int, enum: EnumDescriptorProto) -> str:
        lines = [self._comments.get((5, number), "")]
        for place, value in enumerate(enum.value):
            lines.append(f"- {value.name}: {self._comments.get((5, number, 2, place), '')}")
        return "\n".join(lines)


def _is_in_oneof(field: FieldDescriptorProto, place: int) -> bool:
    return field.HasField("oneof_index") and field.oneof_index == place and not field.proto3_optional


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def _paragraphs(comment: str) -> str:
    """Return a comment without the breaks of its lines."""
    return "\n\n".join(" ".join(part.split()) for part in comment.split("\n\n")).strip()


if __name__ == "__main__":
    described = describe_door(FileDescriptorSet.FromString(Path(sys.argv[1]).read_bytes()))
    Path(sys.argv[2]).write_text(json.dumps(described, indent=1) + "\n")
