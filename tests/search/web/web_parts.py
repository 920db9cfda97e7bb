"""Helpers of the tests of the web service: the service in a thread, and raw HTTP, which browsers would not send."""

import asyncio
import http.client
import json
import socket
import ssl
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

from orbithash.search.web.server import listening, run_web, url_of


@dataclass
class Reply:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def text(self):
        return self.body.decode()

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def error(self):
        return self.json["error"]


class Service:
    """A running web service."""

    def __init__(self, url, authority=None):
        self.url = url
        parts = urlsplit(url)
        self.host, self.port, self.netloc = parts.hostname, parts.port, parts.netloc
        self._tls = ssl.create_default_context(cafile=authority) if parts.scheme == "https" else None

    def ask(self, method, path, body=None, **headers):
        """Return the reply to one request; `_` in names of headers stands for `-`."""
        if self._tls is None:
            connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        else:
            connection = http.client.HTTPSConnection(self.host, self.port, timeout=60, context=self._tls)
        try:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, named)
            response = connection.getresponse()
            return Reply(response.status, response.headers, response.read())
        finally:
            connection.close()

    def get(self, path, **headers):
        return self.ask("GET", path, **headers)

    def post(self, path, body=b"", **headers):
        """POST as a page of the service does."""
        return self.ask("POST", path, body, **{"Sec_Fetch_Site": "same-origin", **headers})

    def call(self, path, fields, **headers):
        """POST JSON as a program does."""
        body = fields if isinstance(fields, str | bytes) else json.dumps(fields)
        return self.ask("POST", path, body, **{"Content_Type": "application/json", **headers})

    @contextmanager
    def connection(self):
        """Yield a socket, for requests that no library sends."""
        with socket.create_connection((self.host, self.port), timeout=60) as connection:
            yield connection


@contextmanager
def serving_web(settings, authority=None):
    """Run the web service of these settings on its port, or on a free one for port 0, in a thread."""
    loop = asyncio.new_event_loop()
    stop, ready = asyncio.Event(), threading.Event()
    listener = listening(settings.listen)
    failed = []

    def run():
        try:
            loop.run_until_complete(run_web(settings, listener, ready.set, stop))
        except BaseException as error:
            failed.append(error)
        finally:
            ready.set()
            loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert ready.wait(120)
        if failed:
            raise failed[0]
        yield Service(url_of(settings, listener), authority)
    finally:
        if not failed:
            loop.call_soon_threadsafe(stop.set)
        thread.join()
        listener.close()


def read_all(connection):
    """Return what the server sends until it closes the connection."""
    parts = []
    while True:
        try:
            part = connection.recv(65536)
        except ConnectionResetError:
            break
        if not part:
            break
        parts.append(part)
    return b"".join(parts)
