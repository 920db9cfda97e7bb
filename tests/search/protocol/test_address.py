import pytest

from orbithash.encoders.errors import InputError
from orbithash.search.protocol.address import is_loopback, parse_address


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("127.0.0.1:50051", ("127.0.0.1", 50051)),
        ("localhost:0", ("localhost", 0)),
        ("[::1]:65535", ("::1", 65535)),
        ("gateway.example.org:1", ("gateway.example.org", 1)),
    ],
)
def test_host_and_port(address, parts):
    assert parse_address(address) == parts


@pytest.mark.parametrize(
    "address", ["", "localhost", ":50051", "localhost:", "localhost:65536", "localhost:-1", "::1:5", "a:٣", "a:b"]
)
def test_invalid_addresses(address):
    with pytest.raises(InputError, match="HOST:PORT"):
        parse_address(address)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("localhost.example.org", False),
    ],
)
def test_loopback(host, expected):
    assert is_loopback(host) is expected
