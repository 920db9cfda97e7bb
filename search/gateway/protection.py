"""Access control of a gateway: encryption, tokens, and an audit log of changes."""

import asyncio
import logging
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from orbithash.encoders.errors import InputError
from orbithash.search.gateway.tokens import Role, Tokens
from orbithash.search.protocol.errors import PermissionDenied, SearchError, Unauthenticated

__all__ = ["AuditEntry", "Protection", "ServerTls", "audited"]

logger = logging.getLogger(__name__)
audit = logging.getLogger("orbithash.audit")

# Methods that need the role "write"; all others need "read".
_WRITES = ("Upsert", "Update", "Delete", "Refresh")


@dataclass(frozen=True)
class ServerTls:
    """Certificates of a gateway: files in PEM, which may be replaced while it runs.

    Attributes:
        certificate, key: the gateway's own; the certificate followed by its intermediate certificates.
        client_ca: authorities whose certificates clients must show (mutual TLS); None: clients need no certificate.
    """

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def credentials(self) -> grpc.ServerCredentials:
        """Return the credentials of a server. Raises `InputError` for unreadable or mismatched files.

        Later connections use the files as they are then, or the last valid ones.
        """
        current = self._contents()
        first = self._configuration(current)

        def renewed() -> grpc.ServerCertificateConfiguration | None:
            nonlocal current
            try:
                newest = self._contents()
                if newest == current:
                    return None
                current = newest
                return self._configuration(newest)
            except InputError as error:
                # This happens, too, while only one of certificate and key has been replaced.
                logger.warning("the certificate was not renewed: %s", error)
                return None

        return grpc.dynamic_ssl_server_credentials(first, renewed, self.client_ca is not None)

    def _contents(self) -> tuple[bytes, bytes, bytes | None]:
        return _read(self.certificate), _read(self.key), None if self.client_ca is None else _read(self.client_ca)

    def _configuration(self, contents: tuple[bytes, bytes, bytes | None]) -> grpc.ServerCertificateConfiguration:
        # Checked here because gRPC only reports that it cannot listen.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificate, key, authorities = contents
        try:
            # An empty password: otherwise OpenSSL would ask for one at the terminal.
            context.load_cert_chain(self.certificate, self.key, password="")
        except (ssl.SSLError, ValueError) as error:
            raise InputError(
                f"{self.certificate} and {self.key} are not a certificate and its unencrypted key, both in PEM; give a "
                "matching pair"
            ) from error
        if authorities is not None:
            try:
                context.load_verify_locations(cadata=authorities.decode("ascii"))
            except (ssl.SSLError, ValueError) as error:
                raise InputError(f"{self.client_ca}: not a file of certificates in PEM") from error
        return grpc.ssl_server_certificate_configuration([(key, certificate)], authorities)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


@dataclass(frozen=True)
class Protection:
    """Who can use a gateway.

    Attributes:
        tls: certificates; None: no encryption.
        tokens: callers that are admitted; None: everyone.
        insecure_listen: listen on addresses that other machines can reach, even without TLS or tokens.
        reflection: offer gRPC reflection, which lists the methods to everyone.
    """

    tls: ServerTls | None = None
    tokens: Tokens | None = None
    insecure_listen: bool = False
    reflection: bool = False

    @classmethod
    def from_files(
        cls,
        certificate: Path | None,
        key: Path | None,
        client_ca: Path | None,
        tokens: Path | None,
        insecure_listen: bool = False,
        reflection: bool = False,
    ) -> "Protection":
        """Return the protection that these files give. Raises `InputError` for incomplete sets and invalid tokens."""
        tls = None
        if certificate is not None and key is not None:
            tls = ServerTls(certificate, key, client_ca)
        elif certificate is not None or key is not None:
            raise InputError("a certificate needs its key: give --tls-cert and --tls-key, or neither")
        elif client_ca is not None:
            raise InputError("--client-ca needs encrypted connections: give --tls-cert and --tls-key, too")
        return cls(tls, None if tokens is None else Tokens(tokens), insecure_listen, reflection)

    def check_open(self, host: str) -> None:
        """Raise `InputError` if other machines could reach the gateway without both TLS and tokens."""
        missing = [name for name, part in (("TLS", self.tls), ("tokens", self.tokens)) if part is None]
        if missing and not self.insecure_listen:
            raise InputError(
                f"the gateway has no {' and no '.join(missing)}, so it listens on loopback addresses only (127.0.0.1, "
                f"::1, localhost); got {host!r}: give --tls-cert, --tls-key and --tokens, too, or --insecure-listen"
            )

    def admit(self, context: Any, call: str, request_id: str) -> str:
        """Return the caller of a change for the audit log; "" for other calls.

        Raises `Unauthenticated` or `PermissionDenied` for a caller that may not call this method.
        """
        if call not in _WRITES:
            if self.tokens is not None:
                self._name(context, call)
            return ""
        try:
            return f"{self._name(context, call)} at {context.peer()}"
        except SearchError as error:
            audit.info("%s: %s refused: %s, request %s", context.peer(), call, error, request_id)
            raise

    def _name(self, context: Any, call: str) -> str:
        """Return the name of the token's holder, "cert:" with the name in the certificate, or "anonymous"."""
        if self.tokens is None:
            names = context.auth_context().get("x509_common_name")
            # The name in a certificate may hold line breaks and control characters.
            return "cert:" + ascii(names[0].decode(errors="replace"))[1:-1] if names else "anonymous"
        token = _token(context)
        if token is None:
            raise Unauthenticated("this gateway requires a token: send the metadata authorization: Bearer TOKEN")
        holder = self.tokens.holder(token)
        if holder is None:
            raise Unauthenticated("this gateway does not know the token; ask its operator for one")
        needed: Role = "write" if call in _WRITES else "read"
        if not holder.may(needed):
            raise PermissionDenied(
                f"the token of {holder.name!r} has the role {holder.role}, and {call} needs {needed}; give a token "
                "with that role"
            )
        return holder.name


def _token(context: Any) -> str | None:
    for name, value in context.invocation_metadata() or ():
        if name == "authorization" and isinstance(value, str):
            scheme, _, token = value.partition(" ")
            return token.strip() if scheme.lower() == "bearer" else None
    return None


@dataclass
class AuditEntry:
    """A change in progress; `version` is the archive version that has it, once it is known."""

    version: int | None = None


@contextmanager
def audited(caller: str, call: str, what: str, request_id: str) -> Iterator[AuditEntry]:
    """Log one line about the change that the block makes, also if it fails; `what` is its size, such as "3 rows"."""
    entry = AuditEntry()
    outcome = "failed"
    try:
        yield entry
        outcome = "done"
    except SearchError as error:
        outcome = error.reason
        raise
    except asyncio.CancelledError:
        # A change that has begun is completed.
        outcome = "cancelled by the caller"
        raise
    finally:
        version = "unknown" if entry.version is None else entry.version
        fields = {"caller": caller, "rpc": call, "change": what, "outcome": outcome, "version": entry.version}
        audit.info(
            "%s: %s of %s: %s, version %s, request %s",
            *(caller, call, what, outcome, version, request_id),
            extra=fields,
        )
