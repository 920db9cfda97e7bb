"""Options with which all verbs of a client reach a gateway."""

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
    Path | None,
    typer.Option("--token-file", help=f"File with the client's token; default: {TOKEN_VARIABLE}."),
]
CaOption = Annotated[
    Path | None, typer.Option("--ca", help="Certificates of trusted authorities, PEM; encrypts the connection.")
]
CertOption = Annotated[Path | None, typer.Option("--cert", help="The client's certificate, PEM, for mutual TLS.")]
CertKeyOption = Annotated[Path | None, typer.Option("--cert-key", help="Key of the client's certificate, PEM.")]


@dataclass(frozen=True)
class Connection:
    """The address of a gateway and the client's token and certificates, unchecked."""

    address: str
    timeout_s: float = 10.0
    token_file: Path | None = None
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def client(self) -> "Client":
        """Return a client that has not contacted the gateway yet. Raises `InputError` for invalid options."""
        from orbithash.search.client import Client, Tls
        from orbithash.search.gateway.tokens import read_token

        if not self.timeout_s > 0:
            raise InputError(f"--timeout is {self.timeout_s:g}; give a number of seconds above 0")
        token = read_token(self.token_file) if self.token_file else os.environ.get(TOKEN_VARIABLE) or None
        is_encrypted = any((self.ca, self.certificate, self.key))
        tls = Tls(self.ca, self.certificate, self.key) if is_encrypted else None
        return Client(self.address, self.timeout_s, token=token, tls=tls)
