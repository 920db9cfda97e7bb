"""Serving as a process of its own: ready, right, told to stop, and whole again after a shard died."""

import contextlib
import json
import os
import re
import signal
import socket
from pathlib import Path

import grpc
import numpy as np
import pytest
from cluster_parts import REASONS, family, wait_for
from grpc_health.v1 import health_pb2, health_pb2_grpc

from orbithash.encoders.archive import Archive
from orbithash.encoders.codes import hamming
from orbithash.encoders.images import read_image
from orbithash.encoders.model import HashModel
from orbithash.search.client import Client
from orbithash.search.errors import SearchError

SERVING = health_pb2.HealthCheckResponse.SERVING


def ready_at(process):
    """The address, once the gateway says that it is ready."""
    found = wait_for(lambda: re.search(r"ready at (\S+);", process.err.read_text()), process)
    return found[1]


def is_healthy(address):
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        services = ("", "orbithash.v1.SearchService")
        return all(
            stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10).status == SERVING
            for service in services
        )


def is_free(address):
    host, port = address.split(":")
    try:
        socket.create_server((host, int(port))).close()
    except OSError:
        return False
    return True


class Oracle:
    """All distances in numpy, sorted by (distance, id)."""

    def __init__(self, archive):
        self.archive = Archive.open(archive)
        self.ids, self.codes = self.archive.codes()

    def code_of(self, key):
        return self.codes[self.ids == self.archive.find([key])[key]][0]

    def __call__(self, code, k):
        """Distances and ids of the hits, and the ties at the last of them."""
        distances = hamming(np.asarray(code, np.uint8)[None], self.codes)[0]
        order = np.lexsort((self.ids, distances))[:k]
        pairs = [(int(distances[row]), int(self.ids[row])) for row in order]
        return pairs, int((distances == pairs[-1][0]).sum())


def pairs_of(answer):
    return [(hit.distance, hit.id) for hit in answer.hits]


def check_answers(address, oracle, scenes, model):
    """By code, key and image: hits, order and ties are the oracle's, the columns the archive's."""
    rng = np.random.default_rng(0)
    loaded = HashModel.load(model)
    keys = sorted(oracle.archive.keys())[::9]
    with Client(address) as client:
        for k in (1, 7, 40, 100):
            code = rng.integers(0, 256, oracle.codes.shape[1], np.uint8)
            answer = client.search(code=bytes(code), k=k)
            assert (pairs_of(answer), answer.ties_at_cutoff) == oracle(code, k)
            assert answer.coverage.fraction == 1
        for key in keys:
            answer = client.search(key=key, k=5)
            assert (pairs_of(answer), answer.ties_at_cutoff) == oracle(oracle.code_of(key), 5)
            code = loaded.encode([read_image(scenes / key, loaded.preprocessing.rendering)])[0]
            answer = client.search(image=(scenes / key).read_bytes(), k=5)
            assert (pairs_of(answer), answer.ties_at_cutoff) == oracle(code, 5)
        rows = oracle.archive.take([hit.id for hit in answer.hits], ["key", "label", "lon", "lat", "datetime"])
        for rank, (hit, row) in enumerate(zip(answer.hits, rows.to_pylist(), strict=True), 1):
            assert (hit.rank, hit.key, hit.label, hit.lon, hit.lat) == (rank, *list(row.values())[:4])
            assert hit.datetime == row["datetime"]


def check_command_line(cli, address, oracle, scenes, bad_images):
    """`query` against a running gateway: JSON, the table, and what only the gateway can refuse."""
    key = min(oracle.archive.keys())
    ended = cli("query", "--key", key, "-k", "3", "--address", address, "--json")
    assert (ended.code, ended.err) == (0, "")
    answer = json.loads(ended.out)
    assert list(answer) == ["hits", "ties_at_cutoff", "coverage", "took_ms"]
    for hit in answer["hits"]:
        assert list(hit) == ["rank", "distance", "id", "key", "label", "lon", "lat", "datetime"]
    pairs, ties = oracle(oracle.code_of(key), 3)
    assert [(hit["distance"], hit["id"]) for hit in answer["hits"]] == pairs
    assert (answer["ties_at_cutoff"], answer["coverage"]) == (ties, 1.0)
    by_code = cli("query", "--code", bytes(oracle.code_of(key)).hex(), "-k", "3", "--address", address, "--json")
    assert json.loads(by_code.out)["hits"] == answer["hits"]
    by_image = cli("query", "--image", scenes / key, "-k", "3", "--address", address, "--json")
    assert json.loads(by_image.out)["hits"] == answer["hits"]

    table = cli("query", "--key", key, "-k", "3", "--address", address).out
    for hit in answer["hits"]:
        assert hit["key"] in table, "keys are whole: the next query is by one of them"
    assert f"{ties} rows tie at distance {pairs[-1][0]}; 100% of the archive searched" in table

    for options, words in (
        (("--code", "ff"), "a code of 32 bits has 4 bytes"),
        (("--code", ""), "a code of 32 bits has 4 bytes"),
        (("--key", "nope"), "no row of the archive has the key 'nope'"),
        *((("--image", bad_images / name), reason) for name, reason in REASONS.items() if name != "empty.tif"),
        (("--image", bad_images / "empty.tif"), "an image file has 1 to 10,485,760 bytes, got 0"),
    ):
        ended = cli("query", *options, "--address", address)
        assert ended.code == 2
        assert re.fullmatch(r"error: .*\n", ended.err)
        assert words in ended.err


def check_stop(process, address):
    assert not is_free(address)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    assert process.err.read_text().endswith("stopping: queries in flight are answered, new ones refused\n")
    assert process.out.read_text() == ""
    assert is_free(address)


def test_in_one_process(start, cli, archive, scenes, model, bad_images):
    options = ("--local", "--shards", "3", "--address", "127.0.0.1:0")
    process = start("serve", archive, "--model", model, *options)
    address = ready_at(process)
    assert is_healthy(address)
    assert not family(process.pid), "no Ray"
    oracle = Oracle(archive)
    check_answers(address, oracle, scenes, model)
    check_command_line(cli, address, oracle, scenes, bad_images)
    ended = cli("serve", archive, "--model", model, "--local", "--address", address)
    assert ended.code == 2
    assert "is the port in use?" in ended.err
    check_stop(process, address)


def shard_processes(process):
    def title(pid):
        with contextlib.suppress(OSError):
            return Path(f"/proc/{pid}/cmdline").read_bytes().decode()
        return ""

    return {pid for pid in family(process.pid) if title(pid).startswith("ray::_ShardActor")}


@pytest.mark.ray
def test_on_ray_with_a_shard_that_dies(start, archive, scenes, model):
    process = start("serve", archive, "--model", model, "--shards", "2", "--address", "127.0.0.1:0")
    address = ready_at(process)
    assert is_healthy(address)
    oracle = Oracle(archive)
    check_answers(address, oracle, scenes, model)
    shards = shard_processes(process)
    assert len(shards) == 2
    victim = min(shards)

    code = np.zeros(4, np.uint8)
    right, ties = oracle(code, 10)
    distance_of = {id_: distance for distance, id_ in oracle(code, len(oracle.ids))[0]}
    os.kill(victim, signal.SIGKILL)

    def is_whole():
        try:
            with Client(address, timeout_s=5) as client:
                answer = client.search(code=bytes(code), k=10)
        except SearchError:
            # Allowed while a shard starts again; a wrong answer is not.
            return False
        if answer.coverage.fraction == 1:
            assert (pairs_of(answer), answer.ties_at_cutoff) == (right, ties)
            return len(shard_processes(process) - {victim}) == 2
        # It says that it is partial, and what it holds is true.
        assert answer.coverage.answered_shards == 1
        assert [distance_of[id_] for _, id_ in pairs_of(answer)] == [distance for distance, _ in pairs_of(answer)]
        return False

    wait_for(is_whole, process)
    assert is_healthy(address)
    check_answers(address, oracle, scenes, model)
    others = family(process.pid)
    check_stop(process, address)
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in others))
