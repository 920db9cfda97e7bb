"""What keeps strangers from a gateway: encryption, tokens, and an audit line for each change."""

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

__all__ = ["Change", "Protection", "ServerTls", "audited"]

logger = logging.getLogger(__name__)
audit = logging.getLogger("orbithash.audit")

# Every other call needs the role "read".
_WRITES = ("Upsert", "Update", "Delete", "Refresh")


@dataclass(frozen=True)
class ServerTls:
    """What a gateway proves itself with; files in PEM, which may be replaced by newer ones while it runs.

    Attributes:
        certificate, key: its own; the certificate with those that lead to the root.
        client_ca: clients must have a certificate that one of these signed (mutual TLS); None: they need none.
    """

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def credentials(self) -> grpc.ServerCredentials:
        """`InputError` for files that cannot be read or do not belong together.

        A connection that begins later is by the files as they are then, or by the last good ones.
        """
        seen = self._contents()
        first = self._configuration(seen)

        def renewed() -> grpc.ServerCertificateConfiguration | None:
            nonlocal seen
            try:
                now = self._contents()
                if now == seen:
                    return None
                seen = now
                return self._configuration(now)
            except InputError as error:
                # Also while the one is new and the other not yet.
                logger.warning("the certificate was not renewed: %s", error)
                return None

        return grpc.dynamic_ssl_server_credentials(first, renewed, self.client_ca is not None)

    def _contents(self) -> tuple[bytes, bytes, bytes | None]:
        return _read(self.certificate), _read(self.key), None if self.client_ca is None else _read(self.client_ca)

    def _configuration(self, contents: tuple[bytes, bytes, bytes | None]) -> grpc.ServerCertificateConfiguration:
        # gRPC would only say that it cannot listen.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificate, key, authorities = contents
        try:
            # Without the password OpenSSL would ask the terminal.
            context.load_cert_chain(self.certificate, self.key, password="")
        except (ssl.SSLError, ValueError) as error:
            raise InputError(
                f"{self.certificate} and {self.key} are no certificate in PEM with its key, unencrypted; give the two"
            ) from error
        if authorities is not None:
            try:
                context.load_verify_locations(cadata=authorities.decode("ascii"))
            except (ssl.SSLError, ValueError) as error:
                raise InputError(f"{self.client_ca}: no certificates in PEM") from error
        return grpc.ssl_server_certificate_configuration([(key, certificate)], authorities)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


@dataclass(frozen=True)
class Protection:
    """Who can reach a gateway.

    Attributes:
        tls: None: no encryption.
        tokens: who may call; None: anyone.
        insecure_listen: listen beyond loopback also without both of them.
        reflection: tell anyone what calls there are.
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
        """Raises `InputError` for files that do not go together, and for tokens that are none."""
        tls = None
        if certificate is not None and key is not None:
            tls = ServerTls(certificate, key, client_ca)
        elif certificate is not None or key is not None:
            raise InputError("a certificate and its key come together: give --tls-cert and --tls-key, or neither")
        elif client_ca is not None:
            raise InputError("--client-ca is for encrypted connections: give --tls-cert and --tls-key, too")
        return cls(tls, None if tokens is None else Tokens(tokens), insecure_listen, reflection)

    def check_open(self, host: str) -> None:
        """Raises `InputError` where other machines could reach a gateway that does not know them."""
        lacking = [name for name, has in (("TLS", self.tls), ("tokens", self.tokens)) if has is None]
        if lacking and not self.insecure_listen:
            raise InputError(
                f"the gateway has no {' and no '.join(lacking)}, so it serves loopback addresses only (127.0.0.1, ::1, "
                f"localhost); got {host!r}: give --tls-cert, --tls-key and --tokens, too, or --insecure-listen"
            )

    def admit(self, context: Any, call: str, request_id: str) -> str:
        """Who changes something, for lines of the log, "" for other calls.

        Raises `Unauthenticated` or `PermissionDenied` for a caller that may not call this.
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
        """Whose token or, after "cert:", whose certificate the caller has; "anonymous" where neither is needed."""
        if self.tokens is None:
            names = context.auth_context().get("x509_common_name")
            # What an authority lets into a certificate is no reason to let it into a log as it is.
            return "cert:" + ascii(names[0].decode(errors="replace"))[1:-1] if names else "anonymous"
        token = _token(context)
        if token is None:
            raise Unauthenticated("this gateway asks for a token: send the metadata authorization: Bearer TOKEN")
        holder = self.tokens.holder(token)
        if holder is None:
            raise Unauthenticated("the token is not one that this gateway knows; ask its operator for one")
        needed: Role = "write" if call in _WRITES else "read"
        if not holder.may(needed):
            raise PermissionDenied(
                f"the token of {holder.name!r} has the role {holder.role}, and {call} needs {needed}; give one that "
                "has it"
            )
        return holder.name


def _token(context: Any) -> str | None:
    for name, value in context.invocation_metadata() or ():
        if name == "authorization" and isinstance(value, str):
            scheme, _, token = value.partition(" ")
            return token.strip() if scheme.lower() == "bearer" else None
    return None


@dataclass
class Change:
    """A change while it is made; `version` is the archive's with it, once known."""

    version: int | None = None


@contextmanager
def audited(caller: str, call: str, what: str, request_id: str) -> Iterator[Change]:
    """Writes one line of the change that the block makes, also when it fails; `what` is how much, such as "3 rows"."""
    change = Change()
    outcome = "failed"
    try:
        yield change
        outcome = "done"
    except SearchError as error:
        outcome = error.reason
        raise
    except asyncio.CancelledError:
        # It goes on where it had begun.
        outcome = "given up by the caller"
        raise
    finally:
        version = "unknown" if change.version is None else change.version
        fields = {"caller": caller, "rpc": call, "change": what, "outcome": outcome, "version": change.version}
        audit.info(
            "%s: %s of %s: %s, version %s, request %s",
            *(caller, call, what, outcome, version, request_id),
            extra=fields,
        )
