"""`serve` as a process: answers, the command line, changes, a shard that dies, and a clean stop."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
from pathlib import Path

import grpc
import numpy as np
import pytest
from cluster_parts import REASONS, family, wait_for
from grpc_health.v1 import health_pb2, health_pb2_grpc
from serving_parts import queries_in_background, ready_at

from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.codes import hamming
from orbithash.encoders.imagery.images import read_image
from orbithash.encoders.networks.model import HashModel
from orbithash.search.client.client import Client
from orbithash.search.protocol.errors import InvalidQuery, SearchError
from orbithash.search.protocol.rows import Row

SERVING = health_pb2.HealthCheckResponse.SERVING


def is_healthy(address):
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        services = ("", "orbithash.v1.SearchService")
        return all(
            stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=60).status == SERVING
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
    """The exact answers: all distances in numpy, sorted by (distance, id)."""

    def __init__(self, archive):
        self.archive = Archive.open(archive)
        self.ids, self.codes = self.archive.codes()

    def code_of(self, key):
        return self.codes[self.ids == self.archive.find([key])[key]][0]

    def __call__(self, code, k):
        """Return (distance, id) of each hit, and the number of rows at the distance of the last one."""
        distances = hamming(np.asarray(code, np.uint8)[None], self.codes)[0]
        order = np.lexsort((self.ids, distances))[:k]
        pairs = [(int(distances[row]), int(self.ids[row])) for row in order]
        return pairs, int((distances == pairs[-1][0]).sum())


def pairs_of(answer):
    return [(hit.distance, hit.id) for hit in answer.hits]


def feature_of(model, path):
    return model.features(model.prepare([read_image(path, model.preprocessing.rendering)]))[0]


def check_answers(address, oracle, scenes, model):
    """Check hits, order, ties and columns of queries by code, key and image."""
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
            answer = client.search(vector=feature_of(loaded, scenes / key), k=5)
            assert (pairs_of(answer), answer.ties_at_cutoff) == oracle(code, 5)
            answer = client.search(image=(scenes / key).read_bytes(), k=5)
            assert (pairs_of(answer), answer.ties_at_cutoff) == oracle(code, 5)
        rows = oracle.archive.take([hit.id for hit in answer.hits], ["key", "label", "lon", "lat", "datetime"])
        for rank, (hit, row) in enumerate(zip(answer.hits, rows.to_pylist(), strict=True), 1):
            assert (hit.rank, hit.key, hit.label, hit.lon, hit.lat) == (rank, *list(row.values())[:4])
            assert hit.datetime == row["datetime"]


def check_command_line(cli, address, oracle, scenes, bad_images, model, tmp_path):
    """Check `query` against a running gateway: JSON, the table, and errors that only the gateway can find."""
    key = min(oracle.archive.keys())
    ended = cli("query", "--key", key, "-k", "3", "--address", address, "--json")
    assert (ended.code, ended.err) == (0, "")
    answer = json.loads(ended.out)
    assert list(answer) == ["hits", "ties_at_cutoff", "coverage", "is_exact", "took_ms", "next"]
    for hit in answer["hits"]:
        assert list(hit) == ["rank", "distance", "id", "key", "label", "lon", "lat", "datetime"]
    pairs, ties = oracle(oracle.code_of(key), 3)
    assert [(hit["distance"], hit["id"]) for hit in answer["hits"]] == pairs
    assert (answer["ties_at_cutoff"], answer["coverage"]) == (ties, 1.0)
    by_code = cli("query", "--code", bytes(oracle.code_of(key)).hex(), "-k", "3", "--address", address, "--json")
    assert json.loads(by_code.out)["hits"] == answer["hits"]
    by_image = cli("query", "--image", scenes / key, "-k", "3", "--address", address, "--json")
    assert json.loads(by_image.out)["hits"] == answer["hits"]

    page = cli("query", "--key", key, "-k", "2", "--after", answer["next"], "--address", address, "--json")
    ordered, _ = oracle(oracle.code_of(key), 5)
    assert [(hit["distance"], hit["id"]) for hit in json.loads(page.out)["hits"]] == ordered[3:]
    options = (
        "--like",
        key,
        "--radius",
        "6",
        "--filter",
        f"NOT key = '{key}'",
        "--include",
        "uri",
        "--include",
        "code",
    )
    found = json.loads(cli("query", *options, "-k", "99", "--address", address, "--json").out)
    ordered, _ = oracle(oracle.code_of(key), len(oracle.ids))
    own = oracle.archive.find([key])[key]
    assert [(hit["distance"], hit["id"]) for hit in found["hits"]] == [
        (distance, row) for distance, row in ordered if distance <= 6 and row != own
    ]
    assert found["matching_rows"] == len(ordered) - 1
    assert all(list(hit)[-2:] == ["uri", "code"] and len(hit["code"]) == 8 for hit in found["hits"])

    table = cli("query", "--key", key, "-k", "3", "--address", address).out
    for hit in answer["hits"]:
        assert hit["key"] in table, "keys are not shortened, so that they can be used in a query"
    assert f"{ties} rows tie at distance {pairs[-1][0]}; 100% of the archive searched" in table

    options = ("--key", key, "--image", scenes / key, "--weight", "key=3", "-k", "3")
    both = cli("query", *options, "--address", address, "--json")
    assert json.loads(both.out)["hits"] == answer["hits"]
    vector, short = feature_of(HashModel.load(model), scenes / key), tmp_path / "short.npy"
    np.save(tmp_path / "vector.npy", vector)
    np.save(short, vector[:-1])
    by_vector = cli("query", "--vector", tmp_path / "vector.npy", "-k", "3", "--address", address, "--json")
    assert json.loads(by_vector.out)["hits"] == answer["hits"]
    for options, words in (
        (("--code", "ff"), "a code of 32 bits has 4 bytes"),
        (("--key", "nope"), "no row of the archive has the key 'nope'"),
        (("--text", "boats"), "images only"),
        (("--key", key, "--filter", "colour = 'red'"), "filter: "),
        (("--key", key, "--after", "x"), "--after 'x'"),
        (("--key", key, "--like", key, "--weight", "text=2"), "an option of this query (key, like)"),
        (("--key", key, "--text", "boats"), "images only"),
        (("--vector", short), "this model takes vectors of"),
        (("--key", key, "--include", "smell"), "'smell'"),
        (("--key", key, "--min-coverage", "2"), "min_coverage: "),
        *((("--image", bad_images / name), reason) for name, reason in REASONS.items() if name != "empty.tif"),
        (("--image", bad_images / "empty.tif"), "an image file has 1 to 10,485,760 bytes, got 0"),
    ):
        ended = cli("query", *options, "--address", address)
        assert ended.code == 2
        assert re.fullmatch(r"error: .*\n", ended.err)
        assert words in ended.err


def check_changes(cli, address, archive, scenes, bad_images, tmp_path):
    """Check `upsert` and `delete`: changes are visible at once, and refused images are named."""
    before = set(Archive.open(archive).keys())
    source = tmp_path / "source"
    shutil.copytree(bad_images, source)
    first = scenes / min(before)
    shutil.copy(first, source / "copy.tif")
    ended = cli("upsert", source, "--address", address, "--json")
    assert ended.code == 0
    summary = json.loads(ended.out)
    assert "copy.tif" not in summary["refused"]
    assert set(REASONS) <= set(summary["refused"])
    assert summary["written"] == len(set(Archive.open(archive).keys()) - before)
    found = json.loads(cli("query", "--key", "copy.tif", "-k", "2", "--address", address, "--json").out)
    twin = next(hit for hit in found["hits"] if hit["key"] == min(before))
    assert twin["distance"] == 0
    assert (twin["lon"], twin["lat"]) == (found["hits"][1]["lon"], found["hits"][1]["lat"])
    new = sorted(set(Archive.open(archive).keys()) - before)
    (tmp_path / "keys").write_text("".join(f"{key}\n" for key in [*new, "never"]))
    ended = cli("delete", "--keys", tmp_path / "keys", "--address", address)
    assert ended.out == f"removed {len(new)} rows\n"
    assert set(Archive.open(archive).keys()) == before
    # Different scenes can have equal codes, too.
    ended = cli("duplicates", archive, "--json", "--filter", "key LIKE '%'")
    codes = dict(zip(*Archive.open(archive).codes(), strict=True))
    keys = {row: key for key, row in Archive.open(archive).find(list(before)).items()}
    keys_by_code = {}
    for row, code in codes.items():
        keys_by_code.setdefault(code.tobytes(), []).append(keys[int(row)])
    expected = [group for group in keys_by_code.values() if len(group) > 1]
    assert sorted(map(sorted, json.loads(ended.out)["groups"])) == sorted(map(sorted, expected))
    other = shutil.copytree(archive, archive.with_name("other"))
    Archive.open(other).delete([min(before)])
    with Client(address, timeout_s=60) as client:
        client.refresh(str(other))
        assert client.describe().rows == len(before) - 1
        for place in ("/etc", str(archive / ".." / ".." / "x"), "s3://bucket/archive", "a\0b"):
            with pytest.raises(InvalidQuery, match="moves only to archives and models beside"):
                client.refresh(place)
        client.refresh(str(archive))
        assert client.describe().rows == len(before)
    ended = cli("delete", "--address", address)
    assert ended.err == "error: give keys, or --keys FILE with one key per line\n"


def check_other_shards(cli, address, oracle, scenes, model, counts):
    """Check that more and fewer shards give the same answers, and that an invalid number is refused."""
    for num_shards in counts:
        ended = cli("refresh", "--shards", num_shards, "--address", address, "--json")
        assert ended.code == 0, ended.err
        assert len(json.loads(ended.out)["shards"]) == num_shards
        check_answers(address, oracle, scenes, model)
    ended = cli("refresh", "--shards", 2000, "--address", address)
    assert ended.err == "error: shards: from 1 to 1,024, or 0 for the current number; got 2000\n"


def check_stop(process, address):
    assert not is_free(address)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    assert process.err.read_text().endswith("stopping: queries in flight are answered, new ones refused\n")
    assert process.out.read_text() == ""
    assert is_free(address)


def test_in_one_process(start, cli, archive, scenes, model, bad_images, tmp_path):
    archive = shutil.copytree(archive, tmp_path / "archive")
    options = ("--local", "--shards", "3", "--address", "127.0.0.1:0")
    process = start("serve", archive, "--model", model, *options)
    address = ready_at(process)
    assert is_healthy(address)
    assert not family(process.pid), "no Ray"
    oracle = Oracle(archive)
    check_answers(address, oracle, scenes, model)
    check_command_line(cli, address, oracle, scenes, bad_images, model, tmp_path)
    check_changes(cli, address, archive, scenes, bad_images, tmp_path)
    check_other_shards(cli, address, oracle, scenes, model, [4, 1])
    check_answers(address, oracle, scenes, model)
    ended = cli("serve", archive, "--model", model, "--local", "--address", address)
    assert ended.code == 2
    assert f"cannot listen at {address}" in ended.err
    check_stop(process, address)


def shard_processes(process):
    def title(pid):
        with contextlib.suppress(OSError):
            return Path(f"/proc/{pid}/cmdline").read_bytes().decode()
        return ""

    return {pid for pid in family(process.pid) if title(pid).startswith("ray::_ShardActor")}


@pytest.mark.slow
@pytest.mark.ray
def test_on_ray_with_a_shard_that_dies(start, cli, archive, scenes, model):
    options = ("--shards", "2", "--encoders", "1:2", "--address", "127.0.0.1:0")
    process = start("serve", archive, "--model", model, *options)
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
            with Client(address, timeout_s=30) as client:
                answer = client.search(code=bytes(code), k=10)
        except SearchError:
            # Allowed while a shard restarts; a wrong answer is not.
            return False
        if answer.coverage.fraction == 1:
            assert (pairs_of(answer), answer.ties_at_cutoff) == (right, ties)
            return len(shard_processes(process) - {victim}) == 2
        # A partial answer says so, and its hits are right.
        assert answer.coverage.answered_shards == 1
        assert [distance_of[id_] for _, id_ in pairs_of(answer)] == [distance for distance, _ in pairs_of(answer)]
        return False

    wait_for(is_whole, process)
    assert is_healthy(address)
    check_answers(address, oracle, scenes, model)
    check_other_shards(cli, address, oracle, scenes, model, [3])
    others = family(process.pid)
    check_stop(process, address)
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in others))


@pytest.mark.slow
@pytest.mark.ray
def test_no_query_fails_while_a_replica_dies_and_rows_are_written(start, archive, model, tmp_path):
    copied = shutil.copytree(archive, tmp_path / "archive")
    options = ("--shards", "2", "--replicas", "2", "--address", "127.0.0.1:0")
    process = start("serve", copied, "--model", model, *options)
    address = ready_at(process)
    oracle = Oracle(copied)
    code = np.zeros(4, np.uint8)
    # The written rows are farther away than all others, so that the expected answer stays the same.
    expected = oracle(code, 10)

    def is_right(answer):
        return (pairs_of(answer), answer.ties_at_cutoff) == expected and answer.coverage.fraction == 1

    with queries_in_background(address, bytes(code), is_right, num_threads=3) as queries:
        shards = shard_processes(process)
        assert len(shards) == 4
        os.kill(min(shards), signal.SIGKILL)
        with Client(address, timeout_s=60) as client:
            for number in range(5):
                client.upsert([Row(key=f"new/{number}", code=b"\xff" * 4)])
            assert client.search(key="new/3", k=5, filter="key LIKE 'new/%'").matching_rows == 5

            def is_whole():
                return all(shard.healthy_replicas == 2 for shard in client.describe().shards)

            wait_for(is_whole, process)
            before = queries.num_answers
            wait_for(lambda: queries.num_answers > before + 50, process)
    assert queries.failures == []
    with Client(address) as client:
        assert client.describe().rows == len(oracle.ids) + 5
    check_stop(process, address)
