"""The web service of the tests of the page over HTTP."""

import pytest
from web_parts import serving_web

from orbithash.search.client import Client
from orbithash.search.web.settings import WebSettings


@pytest.fixture(scope="module")
def service(gateway):
    with serving_web(WebSettings(gateway=gateway.address, listen="127.0.0.1:0")) as running:
        if running.get("/").status == 503:
            pytest.skip("needs the scripts of the page in search/web/static/vendor: run `make vendor`")
        yield running


@pytest.fixture(scope="module")
def rows(gateway):
    """All rows by key."""
    with Client(gateway.address) as client:
        return {row.key: row for row in client.scroll(include=("code",))}
