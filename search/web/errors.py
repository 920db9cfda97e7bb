"""Errors of the web service: from an exception to a status and one plain sentence."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlsplit

from google.protobuf import json_format
from google.rpc import error_details_pb2  # noqa: F401 (its messages are in the details of statuses)
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response

from orbithash.encoders.errors import InputError
from orbithash.search.protocol.errors import (
    DeadlineExceeded,
    GatewayUnreachable,
    InvalidQuery,
    KeyNotFound,
    Overloaded,
    PermissionDenied,
    SearchError,
    Unauthenticated,
    Unavailable,
)
from orbithash.search.protocol.statuses import error_to_pb
from orbithash.search.web.rendering import render

__all__ = ["Failure", "WebError", "answer_error", "failure_of"]

logger = logging.getLogger(__name__)

_SENTENCES = {
    400: "The request is not valid.",
    404: "There is nothing at this address.",
    405: "This address does not take requests of this kind.",
    500: "The service failed. If it happens again, send the request id to the operator.",
}
# Names of google.rpc.Code for statuses of HTTP.
_CODES = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    405: "UNIMPLEMENTED",
    408: "DEADLINE_EXCEEDED",
    413: "INVALID_ARGUMENT",
    415: "INVALID_ARGUMENT",
    421: "INVALID_ARGUMENT",
    429: "RESOURCE_EXHAUSTED",
    431: "INVALID_ARGUMENT",
    500: "INTERNAL",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
_STATUSES: dict[type[Exception], int] = {
    InvalidQuery: 400,
    Unauthenticated: 401,
    PermissionDenied: 403,
    KeyNotFound: 404,
    Overloaded: 429,
    Unavailable: 503,
    GatewayUnreachable: 503,
    DeadlineExceeded: 504,
}


class WebError(Exception):
    """A request is refused. The message is one sentence for the visitor."""

    def __init__(self, status: int, sentence: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(sentence)
        self.status = status
        self.headers = dict(headers or {})


@dataclass(frozen=True)
class Failure:
    """The answer to a request that failed, for the visitor.

    Attributes:
        status: of HTTP.
        sentence: what happened and what to do.
        headers: further headers of the answer.
        details: messages of google.rpc as JSON.
        request_id: the id in the gateway's log; None if the gateway did not fail.
    """

    status: int
    sentence: str
    headers: Mapping[str, str] = field(default_factory=dict)
    details: tuple[Any, ...] = ()
    request_id: str | None = None

    @property
    def code(self) -> str:
        """The name in google.rpc.Code."""
        return _CODES.get(self.status, "UNKNOWN")


def failure_of(error: Exception) -> Failure:
    """Return the answer to an error. An unknown error is an internal one; its message is not shown."""
    if isinstance(error, WebError):
        return Failure(error.status, str(error), error.headers)
    if isinstance(error, HTTPException):
        return Failure(error.status_code, _SENTENCES.get(error.status_code, _SENTENCES[400]), error.headers or {})
    status = next((_STATUSES[kind] for kind in type(error).__mro__ if kind in _STATUSES), None)
    if isinstance(error, SearchError) and status is not None:
        details = json_format.MessageToDict(error_to_pb(error), preserving_proto_field_name=True).get("details", [])
        sentence, headers = _sentence(error), {}
        if isinstance(error, Overloaded):
            headers["Retry-After"] = str(max(1, round(error.retry_after_s)))
        return Failure(status, sentence, headers, tuple(details), error.request_id)
    if isinstance(error, GatewayUnreachable):
        return Failure(503, "The search service does not answer at the moment. Try again in a few seconds.")
    if isinstance(error, SearchError):
        return Failure(500, _SENTENCES[500], request_id=error.request_id)
    if isinstance(error, InputError):
        return Failure(400, str(error))
    return Failure(500, _SENTENCES[500])


def _sentence(error: SearchError) -> str:
    # The messages of these name the gateway's address.
    if isinstance(error, DeadlineExceeded):
        return "The search took longer than its time limit. Try again, or make it smaller."
    if isinstance(error, Overloaded):
        return "The search service has too much to do. Try again in a few seconds."
    if isinstance(error, Unauthenticated):
        return "The search service requires a valid token."
    return str(error)


def answer_error(request: Request, error: Exception) -> Response:
    """Return the answer to a request that failed: JSON below /api, a fragment for htmx, else a page."""
    failure = failure_of(error)
    request_id = failure.request_id or request.scope["state"]["request_id"]
    if failure.status >= 500 and not isinstance(error, SearchError | InputError | WebError):
        logger.error("request %s failed", request_id, exc_info=error)
    response: Response
    if _takes_json(request):
        fields = {
            "code": failure.status,
            "status": failure.code,
            "message": failure.sentence,
            "details": list(failure.details),
            "request_id": request_id,
        }
        response = JSONResponse({"error": fields})
        if failure.status == 401:
            response.headers["WWW-Authenticate"] = "Bearer"
    elif isinstance(error, Unauthenticated):
        return _to_login(request)
    else:
        name = "_error.html" if "hx-request" in request.headers else "error.html"
        response = render(request, name, failure=failure, request_id=request_id)
    response.status_code = failure.status
    response.headers.update(failure.headers)
    return response


def _takes_json(request: Request) -> bool:
    accepted = request.headers.get("accept", "")
    return request.url.path.startswith("/api/") or ("application/json" in accepted and "text/html" not in accepted)


def _to_login(request: Request) -> Response:
    """Return the way to the login page, which leads back to the address that was asked for."""
    if "hx-request" in request.headers:
        current = urlsplit(request.headers.get("hx-current-url", ""))
        back = (current.path or "/") + (f"?{current.query}" if current.query else "")
        return Response(status_code=401, headers={"HX-Redirect": f"/login?next={quote(back, safe='')}"})
    if request.method != "GET":
        return RedirectResponse("/login", 303)
    back = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    if request.headers.get("sec-fetch-site") == "cross-site":
        # After a click on a link in a mail or another site, browsers leave out the cookie (SameSite=Strict). The page
        # asks once more by itself, now with the cookie.
        return HTMLResponse('<!doctype html><meta http-equiv="refresh" content="0"><title>orbithash</title>')
    return RedirectResponse(f"/login?next={quote(back, safe='')}", 303)
