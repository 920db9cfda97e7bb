"""Logging in with a token of the gateway: cookies, revoked tokens, the way back, several visitors."""

import time
from urllib.parse import parse_qs, quote, urlsplit

import pytest
from certificates import Authority
from search_parts import local_engine, serving, small_case
from web_parts import serving_web

from orbithash.encoders.errors import InputError
from orbithash.search.client.connection import Tls
from orbithash.search.gateway.protection import Protection
from orbithash.search.web.assets import Assets
from orbithash.search.web.security.login import safe_path
from orbithash.search.web.settings import Rate, WebLimits, WebSettings

ALICE, BOB = "alice-0123456789abcdef", "bob-0123456789abcdef+/="
needs_page = pytest.mark.skipif(Assets().problem is not None, reason="needs the scripts of the page: run make vendor")
# An address of the page with a state of its own.
PLACE = "/api/archive?q=boats%20%26%20ships&good=1,2"


class TokenFile:
    """The token file of a gateway."""

    def __init__(self, path):
        self.path = path

    def write(self, *tokens):
        lines = [f"read {token} holder{number}\n" for number, token in enumerate(tokens)]
        new = self.path.with_suffix(".new")
        new.write_text("".join(lines))
        new.chmod(0o600)
        new.rename(self.path)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    file = TokenFile(tmp_path_factory.mktemp("tokens") / "tokens")
    file.write(ALICE, BOB)
    return file


@pytest.fixture(scope="module")
def guarded(tokens):
    """A gateway that requires tokens."""
    with serving(
        local_engine(small_case()), protection=Protection.from_files(None, None, None, tokens.path)
    ) as running:
        yield running


@pytest.fixture(scope="module")
def service(guarded):
    with serving_web(WebSettings(guarded.address, "127.0.0.1:0")) as running:
        yield running


def log_in(service, token, back="/"):
    return service.post("/login", f"token={quote(token, safe='')}&next={quote(back, safe='')}")


def cookie_of(reply):
    return reply.headers["Set-Cookie"].partition(";")[0]


@needs_page
def test_without_a_token_the_way_leads_to_the_login_and_back(service):
    asked = "/?q=boats%20%26%20ships&good=1,2"
    reply = service.get(asked, Accept="text/html")
    assert reply.status == 303
    parts = urlsplit(reply.headers["Location"])
    assert (parts.netloc, parts.path, parse_qs(parts.query)) == ("", "/login", {"next": [asked]})
    form = service.get(reply.headers["Location"])
    assert form.status == 200
    assert 'value="/?q=boats%20%26%20ships&amp;good=1,2"' in form.text
    reply = log_in(service, ALICE, asked)
    assert (reply.status, reply.headers["Location"]) == (303, asked)


def test_the_cookie_is_out_of_reach_of_scripts_and_other_sites(service):
    cookie = log_in(service, BOB).headers["Set-Cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert "path=/" in cookie
    assert "domain" not in cookie
    assert "secure" not in cookie, "the connection is not encrypted"


@pytest.mark.parametrize("token", [ALICE, BOB])
def test_the_cookie_is_the_token(service, token):
    cookie = cookie_of(log_in(service, token))
    assert service.get(PLACE.partition("?")[0], Cookie=cookie).status == 200
    assert service.get("/nothing", Cookie=cookie).status == 404


@pytest.mark.parametrize(
    ("token", "text"),
    [
        ("stranger-0123456789abcdef", "does not know this token"),
        ("", "Enter a token"),
        ("two words", "without spaces"),
        ("töken", "letters, digits and signs"),
        ("x" * 3000, "at most 2,048 characters"),
        ("line\nbreak", "letters, digits and signs"),
    ],
)
def test_a_wrong_token_keeps_the_way_back(service, token, text):
    reply = log_in(service, token, "/?q=boats")
    assert reply.status == 401
    assert text in reply.text
    assert 'value="/?q=boats"' in reply.text
    assert "Set-Cookie" not in reply.headers
    assert len(token) < 5 or token not in reply.text


@needs_page
@pytest.mark.parametrize("value", ["", "!!!", "bm90IGEgdG9rZW4", "gICA", "x" * 4000, 'a"b;c'])
def test_a_damaged_cookie_is_none(service, value):
    assert service.get("/", Cookie=f"orbithash={value}").status == 303


@needs_page
def test_a_fragment_sends_the_whole_page_to_the_login(service):
    reply = service.get(
        "/?q=boats",
        HX_Request="true",
        HX_Current_URL=f"{service.url}/?q=boats&good=1",
        Sec_Fetch_Site="same-origin",
    )
    assert reply.status == 401
    assert reply.headers["HX-Redirect"] == f"/login?next={quote('/?q=boats&good=1', safe='')}"


def test_markup_in_an_address_stays_text(service):
    reply = service.get("/login?next=/%22%3E%3Cscript%3Ealert(1)%3C/script%3E")
    assert 'value="/&#34;&gt;&lt;script&gt;alert(1)&lt;/script&gt;"' in reply.text
    assert "<script>alert" not in reply.text


@needs_page
def test_a_link_of_another_site_asks_again_with_the_cookie(service):
    """Browsers leave a strict cookie out of the first request after a click on another site."""
    link = {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate", "Sec_Fetch_Dest": "document"}
    reply = service.get("/?q=boats", **link)
    assert reply.status == 200
    assert '<meta http-equiv="refresh" content="0">' in reply.text
    assert service.get("/?q=boats", **{**link, "Sec_Fetch_Site": "same-origin"}).status == 303


@needs_page
def test_a_revoked_token_leads_to_the_login(service, tokens):
    cookie = cookie_of(log_in(service, BOB))
    other = cookie_of(log_in(service, ALICE))
    assert service.get("/api/archive", Cookie=cookie).status == 200
    tokens.write(ALICE)
    try:
        for _ in range(2):
            reply = service.get("/api/archive", Cookie=cookie)
            assert reply.status == 401
        assert service.get("/api/archive", Cookie=other).status == 200
        reply = service.get("/?q=boats", Cookie=cookie)
        assert reply.status == 303
        assert log_in(service, BOB).status == 401
    finally:
        tokens.write(ALICE, BOB)
    assert service.get("/api/archive", Cookie=cookie).status == 200


def test_logging_out_removes_the_cookie(service):
    reply = service.post("/logout", "next=/?q=boats", Cookie=cookie_of(log_in(service, ALICE)))
    assert (reply.status, reply.headers["Location"]) == (303, "/login?next=%2F%3Fq%3Dboats")
    assert "max-age=0" in reply.headers["Set-Cookie"].lower()
    assert service.get("/logout").status in (405, 303)


def test_without_tokens_there_is_no_login():
    with (
        serving(local_engine(small_case())) as gateway,
        serving_web(WebSettings(gateway.address, "127.0.0.1:0")) as service,
    ):
        reply = service.get("/login?next=/%3Fq%3Dboats")
        assert (reply.status, reply.headers["Location"]) == (303, "/?q=boats")


def test_guesses_do_not_use_up_what_a_known_token_may(guarded):
    """All come from one address; the gateway has accepted one token."""
    rates = {kind: Rate(0.001, 4) for kind in ("searches", "uploads", "exports", "logins")}
    settings = WebSettings(guarded.address, "127.0.0.1:0", limits=WebLimits(rates=rates))
    with serving_web(settings) as service:

        def ask(token):
            return service.get("/api/archive", Authorization=f"Bearer {token}").status

        assert ask(ALICE) == 200
        assert [ask(f"guess-0123456789-{number}") for number in range(5)] == [401, 401, 401, 429, 429]
        assert log_in(service, BOB).status == 429
        assert [ask(ALICE) for _ in range(5)] == [200, 200, 200, 200, 429]


@pytest.mark.parametrize(
    "address",
    [
        "https://evil.example/",
        "//evil.example/",
        "/\\evil.example",
        "\\\\evil.example",
        "/\t/evil.example",
        "/\n/evil.example",
        "\x00/",
        "javascript:alert(1)",
        "evil.example",
        "",
        "/login?next=/",
        "/logout",
        " //evil.example",
        "/\u200b/evil.example",
        "//[/",
    ],
)
def test_the_way_back_stays_here(address):
    assert safe_path(address) == "/"


@pytest.mark.parametrize("address", ["/", "/?q=boats&near=3.1,51.2", "/more?q=a//b", "/row/17?label=a%20b", "/loginx"])
def test_the_way_back_keeps_the_address(address):
    assert safe_path(address) == address


def test_clients_are_bounded_and_closed(guarded):
    """Unknown tokens take no room; known ones are closed when they are idle, or when another one needs the room."""
    import asyncio

    from orbithash.search.protocol.errors import GatewayUnreachable, Overloaded, Unauthenticated
    from orbithash.search.web.security.clients import Clients

    async def scenario():
        clients = Clients(WebSettings(guarded.address, limits=WebLimits(max_clients=1, idle_client_s=0.0)))
        for number in range(5):
            with pytest.raises(Unauthenticated):
                async with clients.lease(f"unknown-0123456789-{number}"):
                    raise AssertionError("not reached")
        assert not clients._entries
        async with clients.lease(ALICE) as first:
            with pytest.raises(Overloaded):
                async with clients.lease(BOB):
                    raise AssertionError("not reached")
            async with clients.lease(ALICE) as again:
                assert again is first
            await clients.close_idle()
            assert (await first.describe()).bits == 16, "still in use"
        async with clients.lease(BOB) as client:
            assert (await client.describe()).bits == 16
        assert list(clients._entries) == [BOB]
        for error in (Unauthenticated("revoked"), GatewayUnreachable("another certificate")):
            with pytest.raises(type(error)):
                async with clients.lease(BOB):
                    raise error
            assert not clients._entries, "the next request begins anew"
        async with clients.lease(ALICE):
            pass

        async def ask():
            async with clients.lease(BOB) as client:
                await client.describe()
                return client

        assert len(set(await asyncio.gather(*(ask() for _ in range(5))))) == 1, "opened once, in the place of another"
        await clients.close_idle()
        assert not clients._entries

    asyncio.run(scenario())


def test_https_to_the_page_and_tls_to_the_gateway(tmp_path, tokens):
    authority = Authority(tmp_path, "authority")
    certificate, key = authority.issue("gateway")
    protection = Protection.from_files(certificate, key, None, tokens.path)
    with serving(local_engine(small_case()), protection=protection) as gateway:
        settings = WebSettings(
            gateway.address, "127.0.0.1:0", gateway_tls=Tls(authority.path), certificate=certificate, key=key
        )
        with serving_web(settings, authority.path) as service:
            reply = log_in(service, ALICE)
            cookie = reply.headers["Set-Cookie"]
            assert cookie.startswith("__Host-orbithash=")
            assert "secure" in cookie.lower()
            assert service.get("/api/archive", Cookie=cookie_of(reply)).status == 200
            assert reply.headers["Strict-Transport-Security"] == "max-age=31536000"


@pytest.mark.parametrize(("is_https", "has_tokens", "text"), [(False, True, "certificate"), (True, False, "tokens")])
def test_other_machines_need_https_and_tokens(tmp_path, tokens, is_https, has_tokens, text):
    certificate, key = Authority(tmp_path, "authority").issue("page") if is_https else (None, None)
    protection = Protection.from_files(None, None, None, tokens.path if has_tokens else None)
    with serving(local_engine(small_case()), protection=protection) as gateway:
        settings = WebSettings(gateway.address, "0.0.0.0:0", certificate=certificate, key=key)
        with pytest.raises(InputError, match=f"no {text}.*loopback"), serving_web(settings):
            raise AssertionError("not reached")


def test_other_machines_may_be_let_in(guarded):
    with serving_web(WebSettings(guarded.address, "0.0.0.0:0", insecure_listen=True)) as service:
        assert service.get("/login").status == 200


@pytest.mark.parametrize("swapped", [True, False])
def test_a_wrong_certificate_is_an_input_error(tmp_path, guarded, swapped):
    certificate, key = Authority(tmp_path, "authority").issue("page")
    files = (key, certificate) if swapped else (certificate, tmp_path / "gone")
    with (
        pytest.raises(InputError, match="not a certificate and its unencrypted key"),
        serving_web(WebSettings(guarded.address, "127.0.0.1:0", certificate=files[0], key=files[1])),
    ):
        raise AssertionError("not reached")


def test_a_renewed_certificate_is_used(tmp_path, guarded, monkeypatch):
    import ssl

    from orbithash.search.web import server

    monkeypatch.setattr(server, "_RENEW_EVERY_S", 0.05)
    authority = Authority(tmp_path, "authority")
    certificate, key = authority.issue("page")
    settings = WebSettings(guarded.address, "127.0.0.1:0", certificate=certificate, key=key)
    with serving_web(settings, authority.path) as service:
        first = ssl.get_server_certificate((service.host, service.port))
        authority.issue("page")
        deadline = time.monotonic() + 60
        while ssl.get_server_certificate((service.host, service.port)) == first:
            assert time.monotonic() < deadline, "the certificate stayed"
        assert service.get("/login").status == 200
