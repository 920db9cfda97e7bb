"""`serve --gateways` and `serve --join` as processes: one set of shards, a port that is shared, a gateway that dies."""

import os
import re
import shutil
import signal
import threading
import urllib.request
from pathlib import Path

import pytest
from cluster_parts import family, joining, wait_for
from serving_parts import queries_in_background, ready_at

from orbithash.encoders.archive.archive import Archive
from orbithash.search.client.client import Client
from orbithash.search.protocol.errors import GatewayUnreachable, SearchError, Unavailable
from orbithash.search.protocol.rows import Row
from orbithash.trainers.scenes import write_scenes

CODE = bytes(4)


def titles(process):
    """Return the command lines of the descendants of a process, by process id."""
    found = {}
    for pid in family(process.pid):
        try:
            found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
    return found


def shards_of(process):
    return {pid for pid, title in titles(process).items() if title.startswith("ray::_ShardActor")}


def further_gateways(process):
    """Return the processes of the further gateways: direct children that Python's multiprocessing started."""
    return {pid for pid, title in titles(process).items() if "multiprocessing.spawn" in title and "--multi" in title}


def described(address):
    with Client(address, timeout_s=30) as client:
        return client.describe()


def is_seen(address, key):
    with Client(address, timeout_s=30) as client:
        return key in client.get([key])


@pytest.mark.slow
@pytest.mark.ray
def test_gateways_of_one_port(start, archive, model, tmp_path):
    archive = shutil.copytree(archive, tmp_path / "archive")
    options = ("--shards", "2", "--gateways", "2", "--address", "127.0.0.1:0", "--metrics", "127.0.0.1:0")
    process = start("serve", archive, "--model", model, *options, "--segments", tmp_path / "segments")
    address = ready_at(process)
    wait_for(lambda: described(address).gateways == 2, process)
    (further,) = further_gateways(process)
    assert len(shards_of(process)) == 2, "one set of shards"
    pages = re.findall(r"metrics at (\S+)", process.err.read_text())
    assert len(set(pages)) == 2

    def calls():
        """Return the calls that each gateway has answered."""
        counts = []
        for page in pages:
            with urllib.request.urlopen(page, timeout=60) as response:
                text = response.read().decode()
            counts.append(float(re.search(r'requests_total\{outcome="OK",rpc="Search"\} (\S+)', text)[1]))
        return counts

    expected = None
    with Client(address) as client:
        expected = [(hit.distance, hit.id) for hit in client.search(code=CODE, k=10).hits]

    def ask_until_both_answer():
        with Client(address, options=[("grpc.use_local_subchannel_pool", 1)]) as client:
            client.search(code=CODE, k=1)
        return min(calls()) > 0

    wait_for(ask_until_both_answer, process)

    acknowledged, stop = [], threading.Event()

    def write():
        number = 0
        while not stop.is_set():
            number += 1
            try:
                with Client(address, timeout_s=30, options=[("grpc.use_local_subchannel_pool", 1)]) as client:
                    client.upsert([Row(key=f"new/{number}", code=b"\xff" * 4)])
            except (SearchError, GatewayUnreachable):
                continue
            acknowledged.append(f"new/{number}")

    def is_right(answer):
        return [(hit.distance, hit.id) for hit in answer.hits] == expected and answer.coverage.fraction == 1

    writer = threading.Thread(target=write)
    with queries_in_background(address, CODE, is_right) as queries:
        writer.start()
        try:
            os.kill(further, signal.SIGKILL)
            wait_for(lambda: further_gateways(process) - {further}, process)
            wait_for(lambda: described(address).gateways == 2, process)
            with Client(address, timeout_s=120) as client:
                client.refresh(shards=3)
            wait_for(lambda: all(len(described(address).shards) == 3 for _ in range(8)), process)
        finally:
            stop.set()
            writer.join()
    assert queries.failures == []
    assert queries.num_answers
    assert "is started again" in process.err.read_text()
    assert len(acknowledged) > 3
    assert set(acknowledged) <= Archive.open(archive).keys()
    wait_for(lambda: all(is_seen(address, acknowledged[-1]) for _ in range(8)), process)
    others = family(process.pid)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    assert "is killed" not in process.err.read_text()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in others))


@pytest.mark.slow
@pytest.mark.ray
def test_a_gateway_that_joins(start, nodes, archive, scenes, model, tmp_path):
    archive = shutil.copytree(archive, tmp_path / "archive")
    before = joining(nodes)
    lonely = start("serve", archive, "--join", "--address", "127.0.0.1:0", before=before)
    assert lonely.wait(timeout=120) == 2
    (line,) = [line for line in lonely.err.read_text().splitlines() if line.startswith("error: ")]
    assert re.match(r"error: no gateway on this Ray cluster serves \S+/archive: start `orbithash serve", line)

    first = start("serve", archive, "--model", model, "--address", "127.0.0.1:0", before=before)
    address = ready_at(first)
    second = start("serve", archive, "--join", "--address", "127.0.0.1:0", before=before)
    other = ready_at(second)
    assert address != other
    assert described(other).gateways == 2
    with Client(address) as one, Client(other) as two:
        image = (scenes / min(Archive.open(archive).keys())).read_bytes()
        for query in ({"code": CODE}, {"image": image}):
            answers = [client.search(k=20, **query).hits for client in (one, two)]
            assert answers[0] == answers[1]
        two.upsert([Row(key="new", code=CODE, label="x")])
        assert two.get(["new"])["new"].label == "x"
        wait_for(lambda: one.get(["new"]), first)
        one.delete(["new"])
        wait_for(lambda: not two.get(["new"]), second)
        # A move that is asked of the gateway that joined is made by the first one.
        two.refresh(shards=3, timeout_s=120)
        assert len(two.describe().shards) == len(one.describe().shards) == 3
    first.send_signal(signal.SIGTERM)
    assert first.wait(timeout=60) == 0
    assert second.wait(timeout=60) == 2
    assert re.search(r"error: the gateway .* has ended; start it again", second.err.read_text())


@pytest.mark.slow
@pytest.mark.ray
def test_a_gateway_beside_encode(start, archive, model, tmp_path):
    """It follows what `encode` commits, and refuses changes, with a status, while that holds the archive's lock."""
    archive = shutil.copytree(archive, tmp_path / "archive")
    source = tmp_path / "more"
    write_scenes(source, 12, 1, 64)
    gateway = start("serve", archive, "--model", model, "--local", "--address", "127.0.0.1:0")
    address = ready_at(gateway)
    before = described(address).rows
    written, refused = [], []
    encoding = start("encode", source, "--model", model, "--archive", archive, "--prefix", "more/")
    with Client(address, timeout_s=60) as client:
        while encoding.poll() is None:
            key = f"own/{len(written)}"
            try:
                client.upsert([Row(key=key, code=CODE)])
                written.append(key)
            except Unavailable as error:
                refused.append(str(error))
        assert encoding.returncode == 0, encoding.err.read_text()
        wait_for(lambda: client.describe().rows == before + 12 + len(written), gateway)
        assert all(client.get([key]) for key in written)
        keys = {row.key for row in client.scroll("key LIKE 'more/%'")}
        assert len(keys) == 12
    assert refused, "encode holds the lock for longer than a change waits"
    assert all("another program may be writing" in message for message in refused)
