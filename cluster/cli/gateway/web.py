"""The verb that runs the web service over a gateway: web."""

from pathlib import Path
from typing import Annotated

import typer

from orbithash.cluster.cli.options import DEFAULT_ADDRESS, SEARCH, BaseMapOption, WebHostOption
from orbithash.search.logs import Format

__all__ = ["verbs"]

verbs = typer.Typer()


@verbs.command(rich_help_panel=SEARCH, epilog="Example: orbithash web --gateway 127.0.0.1:50051")
def web(
    gateway: Annotated[
        str, typer.Option("--gateway", envvar="ORBITHASH_ADDRESS", help="HOST:PORT of the gateway.")
    ] = DEFAULT_ADDRESS,
    listen: Annotated[str, typer.Option("--listen", help="HOST:PORT to listen on.")] = "127.0.0.1:8080",
    ca: Annotated[
        Path | None,
        typer.Option("--ca", help="Certificates of authorities to trust, PEM; encrypts the connection to the gateway."),
    ] = None,
    cert: Annotated[
        Path | None, typer.Option("--cert", help="Certificate to show to the gateway, PEM, for mutual TLS.")
    ] = None,
    cert_key: Annotated[Path | None, typer.Option("--cert-key", help="Key of --cert, PEM.")] = None,
    tls_cert: Annotated[
        Path | None, typer.Option("--tls-cert", help="Certificate of the page, PEM; serves HTTPS.")
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option("--tls-key", help="Private key of --tls-cert, PEM without a password.")
    ] = None,
    web_host: WebHostOption = None,
    base_map: BaseMapOption = None,
    insecure_listen: Annotated[
        bool, typer.Option("--insecure-listen", help="Allow other machines to connect without HTTPS and tokens.")
    ] = False,
    log_format: Annotated[Format, typer.Option("--log-format", help="Format of the log on stderr.")] = Format.TEXT,
) -> None:
    """Show the archive of a gateway as a page in the browser, until SIGTERM or Ctrl-C."""
    from orbithash.cluster.serving.web import run
    from orbithash.search.client.connection import Tls
    from orbithash.search.web.settings import WebSettings

    is_encrypted = any((ca, cert, cert_key))
    settings = WebSettings(
        gateway,
        listen,
        gateway_tls=Tls(ca, cert, cert_key) if is_encrypted else None,
        certificate=tls_cert,
        key=tls_key,
        hosts=tuple(web_host or ()),
        insecure_listen=insecure_listen,
        base_map=base_map,
    )
    run(settings, log_format)
