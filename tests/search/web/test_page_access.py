"""The page in front of a gateway that requires tokens."""

import re

import pytest
from page_screen import expect
from page_services import GatewayThread, WebProcess

from orbithash.search.gateway.protection import Protection
from orbithash.search.gateway.tokens import Tokens

TOKEN, OTHER = "a-token-of-an-analyst", "a-token-of-somebody-else"
SENTENCE = "a river and some trees"


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """The file of the tokens that the gateway admits."""
    path = tmp_path_factory.mktemp("tokens") / "tokens"
    path.write_text(f"read {TOKEN} ann\nread {OTHER} bob\n")
    path.chmod(0o600)
    return path


@pytest.fixture(scope="module")
def closed_web(world, tokens):
    """A web service in front of a gateway that requires tokens."""
    gateway = GatewayThread(world, protection=Protection(tokens=Tokens(tokens)))
    gateway.start()
    running = WebProcess(gateway.address)
    yield running
    running.stop()
    gateway.stop()


def log_in(screen, token):
    screen.page.get_by_label("Token").fill(token)
    screen.page.get_by_role("button", name="Log in").click()


def test_a_token_is_asked_for_once(visit, closed_web):
    screen = visit(closed_web.url, allowed=["status of 401"])
    screen.go(f"q={SENTENCE}")
    log_in(screen, "no-such-token-anywhere")
    expect(screen.page.get_by_role("alert")).to_contain_text(re.compile("token", re.I))
    log_in(screen, TOKEN)
    # What the address asked for is shown.
    expect(screen.page.locator("#q")).to_have_value(SENTENCE)
    expect(screen.tiles).to_have_count(60)
    (cookie,) = screen.page.context.cookies()
    assert cookie["httpOnly"]
    assert cookie["sameSite"] == "Strict"
    # No script can read it, and no other user has it.
    assert screen.page.evaluate("document.cookie") == ""
    other = visit(closed_web.url, allowed=["status of 401"])
    expect(other.page.get_by_label("Token")).to_be_visible()
    screen.page.get_by_role("button", name="Log out").click()
    expect(screen.page.get_by_label("Token")).to_be_visible()


def test_an_expired_token_leads_to_the_login_and_back(visit, closed_web, tokens):
    screen = visit(closed_web.url, allowed=["status of 401"])
    log_in(screen, OTHER)
    screen.ask(SENTENCE)
    expect(screen.page.locator("#answer")).to_have_attribute("data-has-query", "yes")
    screen.mark_tile(screen.tile_number(0), "good")
    expect(screen.page.get_by_role("group", name="Good marks").locator("li")).to_have_count(1)
    good = screen.parameters["good"]
    admitted = tokens.read_text()
    tokens.write_text(f"read {TOKEN} ann\n")
    screen.page.locator("#sort").select_option("newest")
    expect(screen.page.get_by_label("Token")).to_be_visible()
    log_in(screen, OTHER)
    expect(screen.page.get_by_role("alert")).to_be_visible()
    tokens.write_text(admitted)
    log_in(screen, OTHER)
    # Nothing is lost: the marks, the sentence, and the order that was asked for last.
    expect(screen.page.get_by_role("group", name="Good marks").locator("li")).to_have_count(1)
    assert screen.parameters["good"] == good
    assert screen.parameters["sort"] == ["newest"]
    expect(screen.page.locator("#q")).to_have_value(SENTENCE)
