"""How the command line reaches a gateway: options that every verb of a client has."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orbithash.encoders.errors import InputError

if TYPE_CHECKING:
    from orbithash.search.client.client import Client

__all__ = [
    "CaOption",
    "CertKeyOption",
    "CertOption",
    "Connection",
    "GatewayOption",
    "TokenFileOption",
]

TOKEN_VARIABLE = "ORBITHASH_TOKEN"

GatewayOption = Annotated[str, typer.Option("--address", envvar="ORBITHASH_ADDRESS", help="HOST:PORT of the gateway.")]
TokenFileOption = Annotated[
    Path | None, typer.Option("--token-file", help=f"File of the token to show; else {TOKEN_VARIABLE} is one.")
]
CaOption = Annotated[
    Path | None, typer.Option("--ca", help="Certificates to know the gateway by, PEM: encrypts the connection.")
]
CertOption = Annotated[Path | None, typer.Option("--cert", help="Certificate to show, PEM, where the gateway asks.")]
CertKeyOption = Annotated[Path | None, typer.Option("--cert-key", help="Its key, PEM.")]


@dataclass(frozen=True)
class Connection:
    """Where a gateway is and what to show it; what its options say, unchecked."""

    address: str
    timeout_s: float = 10.0
    token_file: Path | None = None
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def client(self) -> "Client":
        """A client that has contacted nobody yet; `InputError` for wrong options."""
        from orbithash.search.client import Client, Tls
        from orbithash.search.gateway.tokens import read_token

        if not self.timeout_s > 0:
            raise InputError(f"--timeout is {self.timeout_s:g}; seconds above 0 are needed")
        token = read_token(self.token_file) if self.token_file else os.environ.get(TOKEN_VARIABLE) or None
        is_encrypted = any((self.ca, self.certificate, self.key))
        tls = Tls(self.ca, self.certificate, self.key) if is_encrypted else None
        return Client(self.address, self.timeout_s, token=token, tls=tls)
