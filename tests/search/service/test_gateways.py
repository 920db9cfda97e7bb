"""Several gateways of one archive, as processes: they take turns to write, follow one another, and share a port."""

import contextlib
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from orbithash.encoders.archive.archive import Archive
from orbithash.search.client.client import Client
from orbithash.search.protocol.errors import GatewayUnreachable, SearchError, Unavailable
from orbithash.search.protocol.rows import Row

BITS = 16

GATEWAY = """
import asyncio, sys
from search_parts import StubEncoder
from orbithash.encoders.archive.archive import Archive
from orbithash.search.engine.backend import LocalBackend
from orbithash.search.gateway.gateway import PortSharing, start_gateway
from orbithash.search.service import maintenance, writer
from orbithash.search.service.service import Membership, Target, open_service

maintenance._PAUSE_S = 0.5
writer._LOCK_S = 1.0

async def main(archive, address, sharing):
    async def open_backend(target):
        return LocalBackend(Archive.open(target.archive), StubEncoder(), target.num_shards)
    membership = Membership(maintains=sharing != "join")
    service = await open_service(open_backend, Target(archive, "", 2), None, membership)
    gateway = await start_gateway(service, address, sharing=PortSharing(sharing))
    follower = asyncio.create_task(service.follow())
    print(gateway.address, flush=True)
    await asyncio.Event().wait()

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.fixture
def start():
    """Start gateways of an archive in processes; they are killed when the test ends."""
    processes = []

    def call(archive, address="127.0.0.1:0", sharing="none"):
        command = [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{GATEWAY}"]
        process = subprocess.Popen([*command, str(archive), address, sharing], stdout=subprocess.PIPE, text=True)
        processes.append(process)
        process.address = process.stdout.readline().strip()
        assert process.address
        return process

    yield call
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def archive(tmp_path):
    folder = tmp_path / "archive"
    Archive.create(folder, BITS, "m" * 32)
    return folder


def code(number):
    return int(number).to_bytes(2)


def keys_of(client):
    return {row.key for row in client.scroll()}


def wait_until(condition, timeout_s=60.0):
    """Wait until the condition holds."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < timeout_s
        time.sleep(0.02)


def test_two_gateways_that_write_at_once(archive, start):
    """Every acknowledged change is there once, rows keep their ids, and both gateways show all of them."""
    gateways = [start(archive), start(archive)]
    ids = {}

    def write(name, address, changes, errors):
        try:
            with Client(address, timeout_s=60) as client:
                for number in range(6):
                    key = f"{name}/{number}"
                    client.upsert([Row(key=key, code=code(number)), Row(key="both", code=code(number), label=name)])
                    # At once at the gateway that took it.
                    ids[key] = client.get([key])[key].id
                    if number % 3 == 0:
                        client.delete([key])
                        assert client.get([key]) == {}
                    else:
                        changes.add(key)
        except Exception as error:
            errors.append(error)

    changes, errors = {"both"}, []
    writers = [
        threading.Thread(target=write, args=(name, gateway.address, changes, errors))
        for gateway, names in zip(gateways, ("ab", "cd"), strict=True)
        for name in names
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert errors == []
    opened = Archive.open(archive)
    assert opened.keys() == changes
    assert opened.num_rows == len(changes)
    found = opened.find(list(changes))
    assert all(ids[key] == found[key] for key in changes - {"both"})
    for gateway in gateways:
        with Client(gateway.address) as client:
            wait_until(lambda client=client: keys_of(client) == changes)


def test_a_change_is_seen_at_other_gateways(archive, start):
    first, second = start(archive), start(archive)
    with Client(first.address) as one, Client(second.address) as other:
        one.upsert([Row(key="a", code=code(1))])
        wait_until(lambda: keys_of(other) == {"a"})
        # A thousand rows of another program.
        keys = [f"n{number}" for number in range(1000)]
        table = Archive.table(np.zeros((1000, 2), np.uint8), BITS, keys, keys)
        Archive.open(archive).commit(Archive.write_fragments(archive, table))
        for client in (one, other):
            wait_until(lambda client=client: client.describe().rows == 1001)


def test_a_gateway_beside_a_program_that_writes_for_long(archive, start):
    gateway = start(archive)
    opened = Archive.open(archive)
    with Client(gateway.address, timeout_s=60) as client:
        with opened.writing():
            began = time.monotonic()
            with pytest.raises(Unavailable, match="another program may be writing"):
                client.upsert([Row(key="refused", code=code(1))])
            assert time.monotonic() - began > 0.9, "it waits for its turn"
            for number in range(3):
                table = Archive.table(np.zeros((1, 2), np.uint8), BITS, [f"n{number}"], [""])
                opened.commit(Archive.write_fragments(archive, table))
                wait_until(lambda number=number: f"n{number}" in keys_of(client))
            writer = threading.Thread(target=client.upsert, args=([Row(key="later", code=code(1))],))
            writer.start()
        writer.join()
        assert keys_of(client) == {"n0", "n1", "n2", "later"}


@pytest.mark.slow
def test_a_gateway_that_is_killed_under_load(archive, start):
    """Clients go on at the other gateway of the port, and no acknowledged change is lost."""
    Archive.open(archive).write(Archive.table(np.zeros((1, 2), np.uint8), BITS, ["k0"], [""]))
    first = start(archive, sharing="first")
    address = first.address
    with pytest.raises(AssertionError):
        start(archive, address, "first")
    second = start(archive, address, "join")
    acknowledged, stop, failures = {"k0"}, threading.Event(), []

    def search():
        while not stop.is_set():
            # A new connection each time: the kernel gives it to one of the gateways.
            with Client(address, timeout_s=30) as client:
                for _ in range(5):
                    try:
                        assert client.search(key="k0", k=1).hits[0].distance == 0
                    except Exception as error:
                        failures.append(error)

    def write(name):
        number = 0
        while not stop.is_set():
            number += 1
            with Client(address, timeout_s=30) as client, contextlib.suppress(SearchError, GatewayUnreachable):
                client.upsert([Row(key=f"{name}/{number}", code=code(number))])
                acknowledged.add(f"{name}/{number}")

    threads = [threading.Thread(target=search) for _ in range(2)]
    threads += [threading.Thread(target=write, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for _ in range(4):
        time.sleep(1)
        second.kill()
        second.wait()
        seen = len(acknowledged)
        wait_until(lambda seen=seen: len(acknowledged) > seen + 3)
        second = start(archive, address, "join")
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert acknowledged <= Archive.open(archive).keys()
    assert len(acknowledged) > 10
