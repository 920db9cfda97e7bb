"""TLS, mutual TLS, tokens and the audit log, with a real gateway and real clients."""

import asyncio
import logging
import re
import shutil
from contextlib import asynccontextmanager, suppress

import grpc
import numpy as np
import pytest
from certificates import Authority
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from search_parts import StubBackend, StubEncoder, local_engine, serving, small_case

from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.errors import InputError
from orbithash.search.client import AsyncClient, Client, Tls
from orbithash.search.engine.backend import LocalBackend
from orbithash.search.gateway.gateway import start_gateway
from orbithash.search.gateway.protection import Protection, ServerTls
from orbithash.search.gateway.tokens import Tokens
from orbithash.search.protocol.errors import GatewayUnreachable, InvalidQuery, PermissionDenied, Unauthenticated
from orbithash.search.protocol.rows import Row
from orbithash.search.service.service import Service, Target, open_service
from orbithash.v1 import search_pb2_grpc
from orbithash.v1.search_pb2 import SearchRequest

READER, WRITER = "reader-of-the-archive", "writer-of-the-archive"


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("ours"), "ours")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("theirs"), "theirs")


@pytest.fixture
def tokens(tmp_path):
    path = tmp_path / "tokens"
    path.touch(0o600)
    path.write_text(f"read {READER} alice\nwrite {WRITER} bob\n")
    return Tokens(path)


def both_clients(address, **options):
    """Return the ids that the blocking and the asyncio client find, or the errors that they raise."""
    found = []
    with Client(address, 5.0, **options) as client:
        try:
            found.append(client.search(key="place/3.tif", k=1).hits[0].id)
        except InputError as error:
            found.append(error)

    async def ask():
        async with AsyncClient(address, 5.0, **options) as client:
            try:
                return (await client.search(key="place/3.tif", k=1)).hits[0].id
            except InputError as error:
                return error

    return [*found, asyncio.run(ask())]


def test_tls(ours, theirs):
    protection = Protection(tls=ServerTls(*ours.issue("gateway")))
    with serving(local_engine(small_case()), protection=protection) as gateway:
        assert both_clients(gateway.address, tls=Tls(ca=ours.path)) == [3, 3]
        for tls in (Tls(ca=theirs.path), Tls(), None):
            for error in both_clients(gateway.address, tls=tls):
                assert isinstance(error, GatewayUnreachable), tls


def test_mutual_tls(ours, theirs):
    protection = Protection(tls=ServerTls(*ours.issue("gateway"), client_ca=ours.path))
    with serving(local_engine(small_case()), protection=protection) as gateway:
        assert both_clients(gateway.address, tls=Tls(ours.path, *ours.issue("client"))) == [3, 3]
        for tls in (Tls(ours.path), Tls(ours.path, *theirs.issue("stranger"))):
            for error in both_clients(gateway.address, tls=tls):
                assert isinstance(error, GatewayUnreachable), tls


@pytest.mark.parametrize("is_mutual", [False, True])
def test_certificates_are_renewed_without_a_restart(ours, theirs, tmp_path, caplog, is_mutual):
    old, new = ours.issue("gateway"), theirs.issue("gateway")
    files = tmp_path / "cert.pem", tmp_path / "key.pem"
    authorities = tmp_path / "ca.pem"
    for source, target in zip((*old, ours.path), (*files, authorities), strict=True):
        shutil.copy(source, target)
    protection = Protection(tls=ServerTls(*files, client_ca=authorities if is_mutual else None))

    def tls(authority):
        return Tls(authority.path, *(authority.issue("client") if is_mutual else ()))

    with serving(local_engine(small_case()), protection=protection) as gateway:
        assert both_clients(gateway.address, tls=tls(ours)) == [3, 3]
        shutil.copy(new[0], files[0])
        # The certificate is replaced and its key is not: the old pair stays in use.
        assert both_clients(gateway.address, tls=tls(ours)) == [3, 3]
        assert "the certificate was not renewed" in caplog.text
        shutil.copy(theirs.path, authorities)
        shutil.copy(new[1], files[1])
        assert both_clients(gateway.address, tls=tls(theirs)) == [3, 3]
        for error in both_clients(gateway.address, tls=tls(ours)):
            assert isinstance(error, GatewayUnreachable)
        files[0].unlink()
        assert both_clients(gateway.address, tls=tls(theirs)) == [3, 3]


def test_invalid_certificates(ours, theirs, tmp_path):
    certificate, key = ours.issue("gateway")
    _, other_key = theirs.issue("other")
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("nonsense")
    for tls, words in (
        (ServerTls(certificate, other_key), "are not a certificate and its unencrypted key"),
        (ServerTls(key, certificate), "are not a certificate and its unencrypted key"),
        (ServerTls(nonsense, nonsense), "are not a certificate and its unencrypted key"),
        (ServerTls(certificate, tmp_path / "none"), "cannot be read"),
        (ServerTls(certificate, key, nonsense), "not a file of certificates in PEM"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            asyncio.run(start_gateway(local_engine(small_case()), "127.0.0.1:0", protection=Protection(tls=tls)))
        assert "\n" not in str(caught.value)


def test_incomplete_sets_of_options(ours):
    certificate, key = ours.issue("gateway")
    for files in ((certificate, None, None), (None, key, None), (None, None, ours.path)):
        with pytest.raises(InputError, match="give --tls-cert and --tls-key"):
            Protection.from_files(*files, None)


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "192.0.2.1"])
def test_other_addresses_need_tls_and_tokens_or_the_option(ours, tokens, host):
    tls = ServerTls(*ours.issue("gateway"))
    for protection, lacks in (
        (None, "no TLS and no tokens"),
        (Protection(tls=tls), "no tokens"),
        (Protection(tokens=tokens), "no TLS,"),
    ):
        with pytest.raises(InputError, match="loopback") as caught:
            asyncio.run(start_gateway(local_engine(small_case()), f"{host}:0", protection=protection))
        assert lacks in str(caught.value)
        assert "--insecure-listen" in str(caught.value)
        assert "\n" not in str(caught.value)
    Protection(tls=tls, tokens=tokens).check_open(host)
    Protection(insecure_listen=True).check_open(host)


def test_tokens_over_tls_and_without(ours, tokens):
    for tls, trust in ((None, None), (ServerTls(*ours.issue("gateway")), Tls(ours.path))):
        with serving(local_engine(small_case()), protection=Protection(tls=tls, tokens=tokens)) as gateway:
            for token in (READER, WRITER):
                assert both_clients(gateway.address, token=token, tls=trust) == [3, 3]
            for token in (None, "somebody-elses-token", READER[:-1]):
                for error in both_clients(gateway.address, token=token, tls=trust):
                    assert isinstance(error, Unauthenticated), token
                    assert READER[:-1] not in str(error)


CALLS = {
    "search": (lambda client: client.search(code=b"ab"), "read"),
    "search_batch": (lambda client: client.search_batch(codes=[b"ab"]), "read"),
    "get": (lambda client: client.get(["a"]), "read"),
    "count": (lambda client: client.count(), "read"),
    "scroll": (lambda client: list(client.scroll()), "read"),
    "describe": (lambda client: client.describe(), "read"),
    "upsert": (lambda client: client.upsert([Row(key="a", code=b"ab")]), "write"),
    "update": (lambda client: client.update({"a": {"label": "b"}}), "write"),
    "delete": (lambda client: client.delete(["a"]), "write"),
    "refresh": (lambda client: client.refresh(), "write"),
}


@pytest.fixture
def archive_served(tmp_path):
    """Run calls of blocking clients against a gateway over an archive, in a thread beside the gateway's loop."""

    def run(protection, ask):
        folder = tmp_path / "archive"

        async def main():
            Archive.open_or_create(folder, 16, "m" * 32)

            async def open_backend(target):
                return LocalBackend(Archive.open(target.archive), StubEncoder(), target.num_shards)

            service = await open_service(open_backend, Target(str(folder), "", 2))
            gateway = await start_gateway(service, "127.0.0.1:0", protection=protection)
            try:
                await asyncio.to_thread(ask, gateway.address)
            finally:
                await gateway.stop(0)
                await service.close()

        asyncio.run(main())

    return run


def test_each_call_has_its_role(archive_served, tokens):
    def ask(address):
        for call, role in CALLS.values():
            with Client(address) as client, pytest.raises(Unauthenticated, match="requires a token"):
                call(client)
            with (
                Client(address, token="not-one-that-is-known") as client,
                pytest.raises(Unauthenticated, match="does not know"),
            ):
                call(client)
            for token, may_write in ((READER, False), (WRITER, True)):
                with Client(address, token=token) as client:
                    if role == "write" and not may_write:
                        with pytest.raises(PermissionDenied, match="'alice' has the role read"):
                            call(client)
                    else:
                        call(client)

    archive_served(Protection(tokens=tokens), ask)


def test_other_ways_to_send_a_token_are_refused(tokens):
    metadata = {
        "authorization": (
            READER,
            f"Basic {READER}",
            f"Bearer{READER}",
            "Bearer",
            "Bearer ",
            f"Bearer {READER} {READER}",
        ),
        "token": (READER,),
        "authorization-bin": (f"Bearer {READER}".encode(),),
    }
    with (
        serving(local_engine(small_case()), protection=Protection(tokens=tokens)) as gateway,
        grpc.insecure_channel(gateway.address) as channel,
    ):
        ask = search_pb2_grpc.SearchServiceStub(channel).Search
        for name, values in metadata.items():
            for value in values:
                with pytest.raises(grpc.RpcError) as caught:
                    ask(SearchRequest(code=b"ab", k=1), metadata=[(name, value)])
                assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED, (name, value)
        assert ask(SearchRequest(code=b"ab", k=1), metadata=[("authorization", f"bearer {READER}")]).hits


def test_health_is_open_and_reflection_is_off(tokens):
    with (
        serving(local_engine(small_case()), protection=Protection(tokens=tokens)) as gateway,
        grpc.insecure_channel(gateway.address) as channel,
    ):
        check = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert check.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            services(channel)
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def services(channel):
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    (answer,) = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([request]))
    return {service.name for service in answer.list_services_response.service}


def test_reflection_on_request():
    with (
        serving(local_engine(small_case()), protection=Protection(reflection=True)) as gateway,
        grpc.insecure_channel(gateway.address) as channel,
    ):
        assert {"orbithash.v1.SearchService", "orbithash.v1.ArchiveService"} <= services(channel)


def audit_lines(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "orbithash.audit"]


def test_a_withdrawn_token_is_refused_at_once(tokens):
    with (
        serving(local_engine(small_case()), protection=Protection(tokens=tokens)) as gateway,
        Client(gateway.address, token=READER) as client,
    ):
        client.search(code=b"ab")
        tokens._path.write_text(f"write {WRITER} bob\n")
        with pytest.raises(Unauthenticated):
            client.search(code=b"ab")


def test_each_change_has_its_line(archive_served, tokens, caplog):
    caplog.set_level(logging.INFO, "orbithash.audit")

    def ask(address):
        with Client(address, token=WRITER) as client:
            client.search(code=b"ab")
            client.upsert([Row(key=name, code=b"ab") for name in "abc"])
            client.delete(["a", "b", "nowhere"])
            with pytest.raises(InvalidQuery):
                client.refresh("no/such\nforged: line")
            client.refresh()
            with pytest.raises(InvalidQuery):
                client.upsert([Row(key="d", code=b"too long")])
        with Client(address, token=READER) as client, pytest.raises(PermissionDenied):
            client.upsert([Row(key="d", code=b"ab")])
        with Client(address) as client, pytest.raises(Unauthenticated):
            client.delete(["c"])

    archive_served(Protection(tokens=tokens), ask)
    lines = audit_lines(caplog)
    request = "request [0-9a-f]{32}"
    bob = r"bob at ipv4:127\.0\.0\.1:\d+"
    patterns = [
        rf"{bob}: Upsert of 3 rows: done, version 2, {request}",
        rf"{bob}: Delete of 3 keys: done, version 3, {request}",
        rf"{bob}: Refresh of archive 'no/such\\nforged: line': INVALID_QUERY, version unknown, {request}",
        rf"{bob}: Refresh of the archive: done, version 3, {request}",
        rf"{bob}: Upsert of 1 rows: INVALID_QUERY, version unknown, {request}",
        rf"ipv4:\S+: Upsert refused: the token of 'alice' has the role read.*, {request}",
        rf"ipv4:\S+: Delete refused: this gateway requires a token.*, {request}",
    ]
    assert len(lines) == len(patterns), lines
    for line, pattern in zip(lines, patterns, strict=True):
        assert re.fullmatch(pattern, line), line
    assert READER not in caplog.text
    assert WRITER not in caplog.text


def test_without_tokens_the_certificate_names_the_caller(ours, archive_served, caplog):
    caplog.set_level(logging.INFO, "orbithash.audit")
    gateway = ours.issue("gateway")
    strange = ours.issue("carol\nroot")

    def ask(tls):
        def upsert(address):
            with Client(address, tls=tls) as client:
                client.upsert([Row(key="a", code=np.zeros(2, np.uint8).tobytes())])

        return upsert

    archive_served(None, ask(None))
    archive_served(Protection(ServerTls(*gateway, ours.path)), ask(Tls(ours.path, *ours.issue("carol"))))
    archive_served(Protection(ServerTls(*gateway, ours.path)), ask(Tls(ours.path, *strange)))
    whose = [line.partition(" at ")[0] for line in audit_lines(caplog)]
    assert whose == ["anonymous", "cert:carol", "cert:carol\\nroot"]


@asynccontextmanager
async def counting_proxy(address):
    """Run a TCP proxy in front of a gateway; yield its address and the list of sizes that clients have sent."""
    host, port = address.split(":")
    sizes, tasks = [], set()

    async def copy(reader, writer, sizes):
        try:
            with suppress(ConnectionError):
                while data := await reader.read(2**16):
                    sizes.append(len(data))
                    writer.write(data)
                    await writer.drain()
        finally:
            # Also when it is cancelled: since Python 3.12 a server waits for its connections.
            writer.close()

    async def connected(reader, writer):
        there, back = await asyncio.open_connection(host, int(port))
        for copying in (copy(reader, back, sizes), copy(there, writer, [])):
            task = asyncio.create_task(copying)
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    async with await asyncio.start_server(connected, "127.0.0.1", 0) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", sizes
        for task in tasks:
            task.cancel()


def test_a_message_of_an_unknown_caller_is_not_received(tokens):
    """Only what fits into the window of HTTP/2 arrives, however large the message is."""

    async def scenario():
        gateway = await start_gateway(
            Service(Target("", "", 2), StubBackend(), local_engine(small_case()), None),
            "127.0.0.1:0",
            protection=Protection(tokens=tokens),
        )
        image = bytes(12 * 2**20)
        try:
            async with counting_proxy(gateway.address) as (address, sizes):
                for token, code in (("not-one-that-is-known", "UNAUTHENTICATED"), (READER, "INVALID_ARGUMENT")):
                    async with grpc.aio.insecure_channel(address) as channel:
                        stub = search_pb2_grpc.SearchServiceStub(channel)
                        with pytest.raises(grpc.aio.AioRpcError) as caught:
                            await stub.Search(
                                SearchRequest(image=image, k=1), metadata=[("authorization", f"Bearer {token}")]
                            )
                    assert caught.value.code() == grpc.StatusCode[code]
                    assert (sum(sizes) > len(image)) == (token == READER)
                    assert sum(sizes) < len(image) / 2 or token == READER
        finally:
            await gateway.stop(0)

    asyncio.run(scenario())
