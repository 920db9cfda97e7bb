"""The outermost middleware: request ids, the headers of every answer, and answers to errors."""

import uuid

from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orbithash.search.web.errors import answer_error
from orbithash.search.web.settings import WebSettings

__all__ = ["REQUEST_ID", "Boundary"]

REQUEST_ID = "X-Request-Id"


def security_headers(settings: WebSettings) -> dict[str, str]:
    """Return the headers that every answer has."""
    images = " ".join(filter(None, ("'self' data: blob:", settings.base_map_origin)))
    policy = (
        f"default-src 'self'; img-src {images}; frame-ancestors 'none'; base-uri 'none'; form-action 'self'; "
        "object-src 'none'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        # Addresses hold what people search for.
        "Referrer-Policy": "same-origin",
        "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
    }
    if settings.is_https:
        headers["Strict-Transport-Security"] = "max-age=31536000"
    return headers


class Boundary:
    """Gives every request an id and every answer the security headers, and turns errors into answers."""

    def __init__(self, app: ASGIApp, settings: WebSettings) -> None:
        self._app = app
        self._headers = security_headers(settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = uuid.uuid4().hex
        scope["state"] = {**scope.get("state", {}), "request_id": request_id}
        has_begun = False

        async def send_with_headers(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                headers = MutableHeaders(scope=message)
                for name, value in self._headers.items():
                    headers[name] = value
                headers[REQUEST_ID] = request_id
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except ClientDisconnect:
            return
        except Exception as error:
            if has_begun:
                # The connection is closed without the end of the body, so that the client sees that a part is missing.
                raise
            await answer_error(Request(scope), error)(scope, receive, send_with_headers)
