"""Routes of the JSON door."""

import asyncio
import re
from functools import cache, partial
from importlib.resources import files
from typing import TypeVar

from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from orbithash.search.web.door.messages import message_of_json, message_of_query, to_json
from orbithash.v1 import search_pb2

__all__ = ["routes"]

# A conversion of a larger message would keep other requests waiting.
_SMALL_BYTES = 32 * 2**10
# Hits or rows of an answer to a query string that does not say how many.
_DEFAULT_NUMBER = 10

Result = TypeVar("Result")


def _route(method: MethodDescriptor, path: str, methods: list[str]) -> Route:
    async def answer(request: Request) -> Response:
        return await _answer(method, request)

    return Route(path, answer, methods=methods, name=method.name)


async def _answer(method: MethodDescriptor, request: Request) -> Response:
    message = GetMessageClass(method.input_type)()
    if request.method == "POST":
        body = await request.body()
        message = await _in_turn(partial(message_of_json, body or b"{}", message), len(body))
    else:
        message = message_of_query(request.query_params.multi_items(), message)
        for name in {"k", "limit"} & message.DESCRIPTOR.fields_by_name.keys() - request.query_params.keys():
            setattr(message, name, _DEFAULT_NUMBER)
    answer: Message = await request.state.client.call(method.name, message)
    text = await _in_turn(partial(to_json, answer), answer.ByteSize())
    return Response(text, media_type="application/json")


async def _in_turn(convert: "partial[Result]", num_bytes: int) -> Result:
    """Return the result of a conversion, which is done in a thread if it takes long."""
    return convert() if num_bytes <= _SMALL_BYTES else await asyncio.to_thread(convert)


@cache
def _description() -> bytes:
    return (files("orbithash.v1") / "openapi.json").read_bytes()


async def describe(_: Request) -> Response:
    """Answer GET /api/openapi.json."""
    return Response(_description(), media_type="application/json")


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


_SERVICES = search_pb2.DESCRIPTOR.services_by_name

routes = [
    Route("/api/openapi.json", describe, methods=["GET"]),
    _route(_SERVICES["ArchiveService"].methods_by_name["Describe"], "/api/archive", ["GET"]),
    *(_route(method, f"/api/{_snake(method.name)}", ["GET", "POST"]) for method in _SERVICES["SearchService"].methods),
]
