import asyncio
import contextlib
import importlib.util
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from search_parts import (
    MemoryArchive,
    StubEncoder,
    StubShard,
    hits_of,
    local_engine,
    memory_shards,
    oracle,
    random_case,
    serving,
    small_case,
    snapshot_of,
)

from orbithash.encoders.errors import ImageError, InputError
from orbithash.search.client.client import Client
from orbithash.search.engine.engine import Engine
from orbithash.search.engine.snapshot import Snapshot
from orbithash.search.gateway.limits import GatewayLimits
from orbithash.search.protocol.errors import (
    DeadlineExceeded,
    GatewayError,
    GatewayUnreachable,
    InvalidQuery,
    KeyNotFound,
    Overloaded,
    Unavailable,
)
from orbithash.search.protocol.queries import MAX_IMAGE_BYTES
from orbithash.search.segments.dealing import Deal

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def stub_engine(before, encode_images=None):
    case = small_case()
    (shard,) = memory_shards(case, 1)
    return Engine(snapshot_of(case, [StubShard(shard, before)], StubEncoder(encode_images)))


@pytest.mark.parametrize("seed", range(6000, 6012))
def test_equals_the_oracle_and_the_engine_in_process(seed):
    case = random_case(seed, max_rows=800)
    archive = MemoryArchive(case.ids, case.codes, case.bits)
    with serving(local_engine(case)) as gateway, Client(gateway.address) as client:
        for k in case.ks:
            for query in case.queries:
                answer = client.search(code=query.tobytes(), k=k)
                assert hits_of(answer) == oracle(case.ids, case.codes, query, k)
                for hit in answer.hits[:20]:
                    row = archive.row(hit.id)
                    names = ("key", "label", "lon", "lat", "datetime")
                    assert [getattr(hit, name) for name in names] == [row[name] for name in names]
                assert (answer.model_id, answer.archive_version) == ("model-of-the-test", 7)


def test_invalid_queries_are_not_sent(free_port):
    with Client(f"127.0.0.1:{free_port}") as client:
        with pytest.raises(InvalidQuery, match="image: an image file has 1 to 10,485,760 bytes, got 20,000,000"):
            client.search(image=bytes(20_000_000))
        with pytest.raises(InvalidQuery, match=r"k: .*0"):
            client.search(code=b"ab", k=0)
        with pytest.raises(InvalidQuery, match="exactly one"):
            client.search()


def test_errors_of_the_gateway_arrive_as_they_were_raised():
    async def encode(images):
        if images[0] == b"crash":
            raise RuntimeError("a secret of the server")
        raise ImageError("not an image")

    with serving(local_engine(small_case(), encode)) as gateway, Client(gateway.address) as client:
        with pytest.raises(InvalidQuery) as caught:
            client.search(code=b"abc")
        assert [field for field, _ in caught.value.violations] == ["code"]
        assert "16 bits" in str(caught.value)
        with pytest.raises(InvalidQuery, match="image: not an image"):
            client.search(image=b"text")
        with pytest.raises(KeyNotFound, match="nowhere"):
            client.search(key="nowhere")
        with pytest.raises(GatewayError, match="internal error, request id") as caught:
            client.search(image=b"crash")
        assert "secret" not in str(caught.value)


def test_the_largest_image_passes():
    async def encode(images):
        assert len(images[0]) == MAX_IMAGE_BYTES
        return small_case().codes[:1]

    with serving(local_engine(small_case(), encode)) as gateway, Client(gateway.address) as client:
        assert client.search(image=bytes(MAX_IMAGE_BYTES)).hits[0].distance == 0


def test_a_large_answer_passes():
    case = small_case(num_rows=10_000)
    archive = MemoryArchive(case.ids, case.codes, case.bits)
    for row in archive._rows.values():
        row["key"] += "x" * 600
    shards = memory_shards(case, 2, archive)
    with (
        serving(Engine(Snapshot.of(archive, shards, Deal(2), StubEncoder()))) as gateway,
        Client(gateway.address) as client,
    ):
        assert len(client.search(code=case.codes[0].tobytes(), k=10_000).hits) == 10_000


async def nothing():
    pass


def test_calls_to_an_unavailable_gateway_are_repeated():
    outcomes = [RuntimeError("first"), RuntimeError("second"), None]

    async def before():
        if error := outcomes.pop(0):
            raise error

    async def encode(images):
        assert len(images[0]) == 5_000_000
        return small_case().codes[:1]

    with serving(stub_engine(before, encode)) as gateway, Client(gateway.address) as client:
        assert len(client.search(image=bytes(5_000_000), k=3).hits) == 3
    assert outcomes == []


def test_connections_that_are_cut_at_once_are_made_anew(make_client):
    """As by a gateway that is killed while it accepts, beside another one of the same port."""
    num_cut = 0

    def forward(source, target):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def accept(listener, port):
        nonlocal num_cut
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            if num_cut < 2:
                num_cut += 1
                connection.close()
                continue
            other = socket.create_connection(("127.0.0.1", port))
            for ends in ((connection, other), (other, connection)):
                threading.Thread(target=forward, args=ends, daemon=True).start()

    with serving(local_engine(small_case())) as gateway, socket.create_server(("127.0.0.1", 0)) as listener:
        port = int(gateway.address.rpartition(":")[2])
        accepting = threading.Thread(target=accept, args=(listener, port), daemon=True)
        accepting.start()
        with make_client(f"127.0.0.1:{listener.getsockname()[1]}") as client:
            assert client.search(code=b"ab").hits
        listener.shutdown(socket.SHUT_RDWR)
        accepting.join()
    assert num_cut == 2


def test_attempts_are_limited():
    calls = []

    async def before():
        calls.append(1)
        raise RuntimeError("always")

    with (
        serving(stub_engine(before)) as gateway,
        Client(gateway.address) as client,
        pytest.raises(Unavailable, match="none of 1 shards"),
    ):
        client.search(code=b"ab")
    assert len(calls) == 4


@pytest.mark.timeout(120)
def test_the_deadline_is_the_clients():
    async def encode(images):
        await asyncio.Event().wait()

    # The gateway would wait for longer than this test may take.
    with (
        serving(local_engine(small_case(), encode), GatewayLimits(max_timeout_s=600)) as gateway,
        Client(gateway.address, timeout_s=0.2) as client,
        pytest.raises(DeadlineExceeded, match="within 0"),
    ):
        client.search(image=b"x")


def test_a_refusal_by_grpc_itself():
    with (
        serving(local_engine(small_case()), GatewayLimits(max_receive_bytes=1000)) as gateway,
        Client(gateway.address) as client,
        pytest.raises(Overloaded, match="larger than max"),
    ):
        client.search(image=bytes(5000))


def test_an_address_without_a_gateway(free_port):
    there = re.escape(f"127.0.0.1:{free_port}")
    with Client(f"127.0.0.1:{free_port}") as client, pytest.raises(GatewayUnreachable, match=there) as caught:
        client.search(code=b"ab")
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, InputError)


def test_a_gateway_that_stopped():
    with serving(local_engine(small_case())) as gateway:
        client = Client(gateway.address)
        client.search(code=b"ab")
    with client, pytest.raises(GatewayUnreachable):
        client.search(code=b"ab")


def test_a_proxy_in_the_environment_is_not_used(monkeypatch, free_port):
    for name in ("http_proxy", "grpc_proxy", "https_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port}")
    monkeypatch.delenv("no_proxy", raising=False)
    with serving(local_engine(small_case())) as gateway, Client(gateway.address) as client:
        assert client.search(key="place/3.tif").hits[0].id == 3


def test_a_wrong_address():
    with pytest.raises(InputError, match="HOST:PORT"):
        Client("localhost")


def test_the_client_needs_grpc_and_protobuf_only(tmp_path):
    """It works where only gRPC and protobuf are installed, with their companions of one repository each."""
    packages = tmp_path / "packages"
    (packages / "orbithash").mkdir(parents=True)
    for name in ("encoders", "search"):
        (packages / "orbithash" / name).symlink_to(ROOT / name)
    (packages / "orbithash" / "v1").symlink_to(ROOT / "proto/orbithash/v1")
    for name in ("grpc", "grpc_health", "grpc_status", "google", "typing_extensions"):
        module = importlib.util.find_spec(name)
        places = module.submodule_search_locations
        source = Path(next(iter(places)) if places else module.origin)
        (packages / source.name).symlink_to(source)
    code = (
        f"import sys; sys.path.append({str(packages)!r})\n"
        "from orbithash.search.client import AsyncClient, Client, Query, Row, Tls\n"
        "client = Client('127.0.0.1:1', options=[('grpc.enable_retries', 0)])\n"
        "Row(key='a', code=bytearray(8)).check()\n"
        "try:\n    client.search(key='a', k=3)\n"
        "except Exception as error:\n    print(type(error).__name__)\n"
    )
    # Neither the environment's packages nor its variables.
    result = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout.strip()) == (0, "GatewayUnreachable"), result.stderr
