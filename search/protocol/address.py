"""Addresses of the form HOST:PORT."""

import ipaddress

from orbithash.encoders.errors import InputError

__all__ = ["is_loopback", "parse_address"]


def parse_address(address: str) -> tuple[str, int]:
    """Return host and port of "HOST:PORT", or of "[HOST]:PORT" for IPv6 without the brackets. Raises `InputError`."""
    host, colon, port = address.rpartition(":")
    is_bracketed = host.startswith("[") and host.endswith("]")
    is_number = port.isascii() and port.isdigit() and int(port) <= 65535
    if not colon or not host or not is_number or (":" in host and not is_bracketed):
        raise InputError(
            f"an address is HOST:PORT with a port from 0 to 65535, such as 127.0.0.1:50051; got {address!r}"
        )
    return (host[1:-1] if is_bracketed else host), int(port)


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
