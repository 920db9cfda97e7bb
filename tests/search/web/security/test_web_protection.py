"""Protection of the web service: headers, names, origins, sizes, times and rates, tried with real requests."""

import dataclasses
import socket
import time

import pytest
from search_parts import local_engine, serving, small_case
from web_parts import read_all, serving_web

from orbithash.search.web.settings import Rate, WebLimits, WebSettings

POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'; base-uri 'none'; form-action 'self'; "
    "object-src 'none'"
)
LIMITS = WebLimits(header_timeout_s=1.0, body_timeout_s=1.0, max_upload_bytes=2**20, max_call_bytes=2**20)


@pytest.fixture(scope="module")
def small_gateway():
    """A gateway of 40 rows that requires no tokens."""
    with serving(local_engine(small_case())) as running:
        yield running


@pytest.fixture(scope="module")
def service(small_gateway):
    """The web service with low limits."""
    with serving_web(WebSettings(small_gateway.address, "127.0.0.1:0", limits=LIMITS)) as running:
        yield running


def limited(gateway, **limits):
    settings = WebSettings(gateway.address, "127.0.0.1:0", limits=dataclasses.replace(LIMITS, **limits))
    return serving_web(settings)


def check_headers(reply):
    headers = {name.lower(): value for name, value in reply.headers.items()}
    assert headers["content-security-policy"] == POLICY
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "same-origin"
    assert headers["cross-origin-opener-policy"] == "same-origin"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert "camera=()" in headers["permissions-policy"]
    assert "server" not in headers


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", {200, 503}),
        ("GET", "/static/x/base.css", {200}),
        ("GET", "/nothing", {404}),
        ("GET", "/api/nothing", {404}),
        ("DELETE", "/login", {405}),
        ("GET", "/login", {303}),
        ("POST", "/logout", {303}),
        ("GET", "/" + "x" * 100_000, {431}),
    ],
)
def test_every_answer_has_the_headers(service, method, path, status):
    reply = service.ask(method, path, Sec_Fetch_Site="same-origin")
    assert reply.status in status
    check_headers(reply)


def test_what_is_not_http_gets_the_headers_too(service):
    with service.connection() as connection:
        connection.sendall(b"\x16\x03\x01\x02\x00 this is TLS\r\n\r\n")
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"content-security-policy: default-src 'self';" in answer.lower()


def test_the_origin_of_a_base_map_joins_the_images_only(small_gateway):
    settings = WebSettings(
        small_gateway.address, "127.0.0.1:0", base_map="https://tiles.example.org:8443/a/{z}/{x}/{y}.png?key=1"
    )
    with serving_web(settings) as running:
        policy = running.get("/login").headers["Content-Security-Policy"]
    assert policy == POLICY.replace("data: blob:", "data: blob: https://tiles.example.org:8443")


@pytest.mark.parametrize(
    "template",
    [
        "https://tiles.example.org/{z}/{x}.png",
        "javascript:alert({x}{y}{z})",
        "https://a.example;script-src */{z}/{x}/{y}",
        "https://user:secret@a.example/{z}/{x}/{y}",
        "https://a.example:port/{z}/{x}/{y}",
        "{z}/{x}/{y}",
    ],
)
def test_a_base_map_is_a_plain_url(template):
    with pytest.raises(ValueError, match="a base map is an http or https URL"):
        WebSettings("127.0.0.1:1", base_map=template).check()


@pytest.mark.parametrize(
    "name", ["evil.example", "evil.example:{port}", "localhost.evil.example", "", "127.0.0.1.evil"]
)
def test_a_foreign_name_is_refused(service, name):
    reply = service.get("/login", Host=name.format(port=service.port))
    assert reply.status in (421, 400)
    assert "login" not in reply.headers.get("Location", "")


@pytest.mark.parametrize("name", ["localhost:{port}", "127.0.0.1:{port}", "[::1]:{port}", "LOCALHOST", "192.0.2.7:99"])
def test_own_names_and_ip_addresses_are_accepted(service, name):
    assert service.get("/login", Host=name.format(port=service.port)).status == 303


def test_a_configured_name_is_accepted(small_gateway):
    with serving_web(WebSettings(small_gateway.address, "127.0.0.1:0", hosts=("maps.example",))) as running:
        assert running.get("/login", Host="maps.example").status == 303
        assert running.get("/login", Host="other.example").status == 421


@pytest.mark.parametrize(
    "headers",
    [
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
        {"Sec_Fetch_Site": "cross-site", "Origin": "http://{netloc}"},
        {"Sec_Fetch_Site": "same-origin", "Origin": "https://evil.example"},
        {"Origin": "https://evil.example"},
        {"Origin": "http://{netloc}.evil.example"},
        {"Origin": "null"},
        {},
    ],
)
@pytest.mark.parametrize("path", ["/logout", "/login", "/nothing"])
def test_other_sites_change_nothing(service, path, headers):
    filled = {name: value.format(netloc=service.netloc) for name, value in headers.items()}
    reply = service.ask("POST", path, b"", **filled)
    assert reply.status == 403
    assert "does not come from a page of this service" in reply.text


@pytest.mark.parametrize("headers", [{"Sec_Fetch_Site": "same-origin"}, {"Origin": "http://{netloc}"}])
def test_own_pages_may(service, headers):
    filled = {name: value.format(netloc=service.netloc) for name, value in headers.items()}
    assert service.ask("POST", "/logout", b"", **filled).status == 303


def test_other_sites_may_link_but_not_embed(service):
    link = {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate", "Sec_Fetch_Dest": "document"}
    assert service.get("/login", **link).status == 303
    for change in ({"Sec_Fetch_Dest": "iframe"}, {"Sec_Fetch_Mode": "no-cors", "Sec_Fetch_Dest": "image"}):
        assert service.get("/login", **{**link, **change}).status == 403


def test_a_large_upload_is_refused_before_it_arrives(service):
    with service.connection() as connection:
        connection.sendall(
            f"POST /image HTTP/1.1\r\nHost: {service.netloc}\r\nSec-Fetch-Site: same-origin\r\n"
            "Content-Length: 52428800\r\n\r\n".encode()
        )
        answer = b""
        while b"larger than 1 MiB" not in answer:
            answer += connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_a_browser_that_sends_all_of_it_reads_the_answer(service):
    reply = service.post("/image", b"x" * 5 * 2**20)
    assert reply.status == 413
    assert "larger than 1 MiB" in reply.text


def test_an_upload_without_a_length_is_counted_as_it_arrives(service):
    """The JSON door reads its body; the pieces are sent until the answer arrives."""
    with service.connection() as connection:
        connection.sendall(
            f"POST /login HTTP/1.1\r\nHost: {service.netloc}\r\nSec-Fetch-Site: same-origin\r\n".encode()
        )
        connection.sendall(b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(20):
            connection.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
        answer = connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_all_bodies_together_have_a_limit(small_gateway):
    with limited(small_gateway, max_bytes=1000) as running:
        assert running.post("/login", b"x" * 900).status == 401
        reply = running.post("/login", b"x" * 1001)
        assert (reply.status, reply.headers["Retry-After"]) == (503, "5")
        assert running.post("/login", b"x" * 900).status == 401, "the room is free again"


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET / HTT",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n",
    ],
)
def test_headers_that_do_not_arrive_end_the_connection(service, sent):
    with service.connection() as connection:
        connection.sendall(sent)
        read_all(connection)


def test_the_second_request_of_a_connection_has_the_same_limit(service):
    with service.connection() as connection:
        connection.sendall(b"GET /static/x/base.css HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
        connection.sendall(b"GET / HTTP/1.1\r\nHost")
        read_all(connection)


def test_headers_that_arrive_byte_by_byte_end_the_connection(service):
    """A byte now and then does not extend the time."""
    with service.connection() as connection:
        begun = time.monotonic()
        with pytest.raises(OSError, match=r"."):  # noqa: PT012
            while time.monotonic() - begun < 60:
                connection.sendall(b"G")
                time.sleep(0.05)


def test_a_body_that_does_not_arrive_is_given_up(service):
    with service.connection() as connection:
        connection.sendall(
            f"POST /login HTTP/1.1\r\nHost: {service.netloc}\r\nSec-Fetch-Site: same-origin\r\n"
            "Content-Length: 1000\r\n\r\nabc".encode()
        )
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"did not arrive within 1 s" in answer


def test_connections_have_a_limit(small_gateway):
    with limited(small_gateway, max_connections=3, header_timeout_s=60.0) as running:
        kept = [socket.create_connection((running.host, running.port)) for _ in range(3)]
        try:
            # They are counted when the server has accepted them.
            for connection in kept:
                connection.sendall(b"GET /static/x/base.css HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert connection.recv(15) == b"HTTP/1.1 200 OK"
            with running.connection() as connection:
                assert read_all(connection) == b""
        finally:
            for connection in kept:
                connection.close()


def test_each_kind_of_request_has_a_rate(small_gateway):
    rates = {kind: Rate(0.001, 3) for kind in ("searches", "uploads", "exports", "logins")}
    with limited(small_gateway, rates=rates) as running:
        for path in ("/export.csv", "/more", "/heat/1"):
            replies = [running.get(path, Accept="application/json") for _ in range(4)]
            assert [reply.status for reply in replies[:3]].count(429) == 0
            last = replies[-1]
            assert last.status == 429
            assert int(last.headers["Retry-After"]) == 1000
            assert last.error["message"].startswith("Too many ")
            assert last.error["status"] == "RESOURCE_EXHAUSTED"
        assert running.get("/static/x/base.css").status == 200, "files are not limited"


def test_buckets_fill_again_and_are_bounded(monkeypatch):
    from orbithash.search.web.security import rates

    monkeypatch.setattr(rates, "_MAX_CLIENTS", 100)
    buckets = rates.Buckets({"searches": Rate(2.0, 3)})
    assert [buckets.take("searches", "a", 0.0) for _ in range(3)] == [0.0] * 3
    assert buckets.take("searches", "a", 0.0) == pytest.approx(0.5)
    assert buckets.take("searches", "b", 0.0) == 0.0
    assert buckets.take("searches", "a", 0.5) == 0.0
    assert [buckets.take("searches", "a", 1000.0) for _ in range(3)] == [0.0] * 3
    assert buckets.take("searches", "a", 1000.0) > 0
    for client in range(1000):
        buckets.take("searches", str(client), 1000.0)
    assert len(buckets._levels) <= 100


def test_one_ipv6_client_has_many_addresses():
    from orbithash.search.web.security.rates import _network

    assert _network("2001:db8::1") == _network("2001:db8::ffff:1") != _network("2001:db8:0:1::1")
    assert _network("192.0.2.1") != _network("192.0.2.2")


def test_errors_show_nothing_of_the_inside(small_gateway):
    with serving_web(WebSettings("127.0.0.1:1", "127.0.0.1:0")) as running:
        reply = running.get("/login")
        assert reply.status == 503
        assert "does not answer at the moment" in reply.text
        assert "127.0.0.1:1" not in reply.text
        assert "Traceback" not in reply.text
        reply = running.get("/more", Accept="application/json")
        assert reply.error["request_id"] == reply.headers["X-Request-Id"]


def test_static_files_are_kept_by_version(service):
    page = service.get("/nothing").text
    address = page.partition('href="')[2].partition('"')[0]
    assert address.startswith("/static/")
    assert service.get(address).headers["Cache-Control"] == "public, max-age=31536000, immutable"
    old = "/static/0123456789abcdef/" + address.split("/", 3)[3]
    assert service.get(old).headers["Cache-Control"] == "no-cache"
    packed = service.get("/static/x/base.css", Accept_Encoding="gzip")
    assert packed.headers["Content-Encoding"] == "gzip"
    for path in ("/static/x/../templates/base.html", "/static/x/%2e%2e/app.py", "/static/x//etc/passwd", "/static/"):
        assert service.get(path).status == 404
