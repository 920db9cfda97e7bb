"""`bench serve` and `bench soak` run and compare right answers. Speed is never asserted."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from cluster_parts import family, kill, wait_for

from orbithash.cluster.bench.codes import random_codes
from orbithash.cluster.bench.serving.processes import kind_of
from orbithash.cluster.bench.serving.serve import ServeBench, _num_wrong_distances, bench_serve
from orbithash.cluster.bench.serving.services import ServedArchive
from orbithash.cluster.bench.serving.soak import SoakBench, bench_soak
from orbithash.cluster.bench.serving.targets import started_milvus
from orbithash.encoders.errors import InputError

SMALL = {"rows": 500, "in_flight": 4, "requests": 64, "local": True}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rows": 5}, "--rows is 5"),
        ({"bits": 4}, "4"),
        ({"in_flight": 0}, "--in-flight is 0"),
        ({"requests": 10}, "--requests is 10; at least 32"),
        ({"peer": "qdrant"}, "--peer is 'qdrant'; allowed: none, milvus"),
        ({"peer": "milvus"}, "--peer and --peer-python belong together"),
        ({"peer": "milvus", "peer_python": Path(sys.executable)}, "No module named 'milvus'; in an environment of its"),
        ({"peer": "milvus", "peer_python": Path("/nowhere/python")}, "--peer-python /nowhere/python cannot be run"),
        ({"peer": "milvus", "peer_python": Path(sys.executable), "bits": 20}, "Milvus needs a multiple of 8"),
    ],
)
def test_invalid_settings_of_bench_serve(settings, message):
    with pytest.raises(InputError, match=message):
        bench_serve(ServeBench(**SMALL | settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"minutes": 0}, "--minutes is 0"),
        ({"kill_every_s": 0.5}, "--kill-every is 0.5"),
        ({"kill_every_s": 5, "local": True}, "--kill-every and --local"),
    ],
)
def test_invalid_settings_of_bench_soak(settings, message):
    with pytest.raises(InputError, match=message):
        bench_soak(SoakBench(**settings))


# Stands for the packages milvus and pymilvus: a "server" process, and a collection that searches in Python.
FAKE = {
    "milvus.py": """
        import subprocess
        __version__ = "0.fake"
        class default_server:
            listen_port, server = 1, None
            def set_base_dir(path): default_server.path = path
            def start(): default_server.server = subprocess.Popen(["sleep", "1234567"])
            def stop():
                if default_server.server: default_server.server.kill(); default_server.server.wait()
    """,
    "pymilvus.py": """
        import numpy as np
        class connections:
            def connect(host, port): print("a library that prints")
        class DataType: INT64 = BINARY_VECTOR = None
        def FieldSchema(*args, **kwargs): return None
        def CollectionSchema(fields): return None
        class Collection:
            def __init__(self, name, schema): self.rows, self.codes = [], []
            def insert(self, columns): self.rows += columns[0].tolist(); self.codes += columns[1]
            def flush(self): self.all = np.frombuffer(b"".join(self.codes), np.uint8).reshape(len(self.codes), -1)
            def create_index(self, field, settings): pass
            def load(self): pass
            def search(self, data, field, param, limit, timeout):
                query = np.frombuffer(data[0], np.uint8)
                distances = np.unpackbits(self.all ^ query, axis=1).sum(axis=1)
                # As Milvus, without an order of rows at the same distance.
                order = np.lexsort((-np.arange(len(distances)), distances))
                class Hits: ids = [self.rows[row] for row in order[:limit]]
                return [Hits]
    """,
}


@pytest.fixture
def peer_python(tmp_path):
    """Return a Python that finds the packages of `FAKE`."""
    for name, text in FAKE.items():
        (tmp_path / name).write_text(textwrap.dedent(text))
    python = tmp_path / "python"
    path = f"import sys; sys.path.insert(0, {str(tmp_path)!r})"
    python.write_text(
        f"""#!{sys.executable}
import os, runpy, sys
{path}
arguments = [each for each in sys.argv[1:] if each != "-I"]
if arguments[0] == "-c":
    exec(arguments[1])
else:
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")
"""
    )
    python.chmod(0o755)
    return python


def test_a_peer_is_called_in_its_own_process_and_ends_with_the_block(peer_python, tmp_path):
    rng = np.random.default_rng(0)
    codes, queries = random_codes(3000, 16, rng), random_codes(24, 16, rng)
    (tmp_path / "data").mkdir()

    async def call(milvus):
        rates = [await milvus.rate(number, 4, 100, 3) for number in range(2)]
        return rates, await milvus.latencies(1, 4, 2), await _num_wrong_distances(milvus, queries, archive)

    archive = ServedArchive(tmp_path, tmp_path, np.arange(3000, dtype=np.uint64), codes)
    with started_milvus(peer_python, tmp_path / "data", codes, queries, 10) as milvus:
        assert milvus.version == "0.fake"
        # A process has its command line a moment after the call that started it.
        wait_for(lambda: any(b"sleep" in command_of(pid) for pid in family(os.getpid())))
        rates, seconds, num_wrong = asyncio.run(call(milvus))
        assert min(rates) > 0
        assert len(seconds) == 2
        assert num_wrong == 0
        moved = ServedArchive(tmp_path, tmp_path, archive.ids, codes ^ np.arange(3000, dtype=np.uint8)[:, None])
        assert asyncio.run(_num_wrong_distances(milvus, queries, moved)) == 20
    wait_for(lambda: not any(b"sleep" in command_of(pid) for pid in family(os.getpid())))


def test_a_peer_that_does_not_start(peer_python, tmp_path):
    (tmp_path / "pymilvus.py").write_text("import missing_part")
    (tmp_path / "data").mkdir()
    codes = np.zeros((10, 2), np.uint8)
    peer_python.write_text(peer_python.read_text().replace("exec(arguments[1])", "pass"))
    with (
        pytest.raises(RuntimeError, match=r"Milvus did not start: .*missing_part"),
        started_milvus(peer_python, tmp_path / "data", codes, codes, 3),
    ):
        pass
    wait_for(lambda: not any(b"sleep" in command_of(pid) for pid in family(os.getpid())))


def check_served(result):
    assert result["wrong_answers"] == "0 of 20"
    for name in ("gateway", "floor"):
        assert result[f"{name}_requests_per_s"] > 0
        assert 0 < result[f"{name}_p50_ms"] <= result[f"{name}_p95_ms"] <= result[f"{name}_p99_ms"]
    assert min(result["p50_to_floor"], result["rate_to_floor"]) > 0
    assert result["raw_faiss_queries_per_s"] > 0


@pytest.mark.slow
def test_bench_serve_in_one_process(peer_python):
    result = bench_serve(ServeBench(**SMALL, bits=32, peer="milvus", peer_python=peer_python))
    check_served(result)
    assert (result["milvus"], result["milvus_wrong_answers"]) == ("0.fake", "0 of 20, by distance")
    assert min(result["rate_to_milvus"], result["p50_to_milvus"]) > 0
    assert not children(os.getpid())


@pytest.mark.slow
def test_bench_serve_with_ray(monkeypatch):
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    check_served(bench_serve(ServeBench(**SMALL | {"local": False})))
    assert not children(os.getpid())


@pytest.mark.slow
def test_a_killed_bench_leaves_no_process(tmp_path):
    out = tmp_path / "stderr"
    with out.open("wb") as stderr:
        program = "from orbithash.cluster.cli.main import main; main()"
        args = ["bench", "serve", "--rows", "500", "--requests", "20000", "--local"]
        process = subprocess.Popen([sys.executable, "-c", program, *args], stderr=stderr, stdout=stderr)
    process.err = out
    try:
        wait_for(lambda: "round 1" in out.read_text(), process)
        services = children(process.pid)
        assert len(services) == 2
        process.send_signal(signal.SIGKILL)
        process.wait()
        wait_for(lambda: not any(command_of(pid) for pid in services), timeout_s=60)
    finally:
        kill(process, *family(process.pid))


def children(pid):
    """Return the running services of a bench."""
    return {each for each in family(pid) if b"serving.services import main" in command_of(each)}


def command_of(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.slow
def test_a_gateway_under_load_with_changes():
    result = bench_soak(SoakBench(2000, bits=32, in_flight=4, minutes=0.1, local=True))
    assert (result["errors"], result["shed"], result["partial_answers"]) == ("none", 0, 0)
    assert result["searches"] > 20
    assert result["rows_written_or_removed"] >= 40
    assert result["memory_mb_end"] > 50


@pytest.mark.slow
def test_a_killed_replica_causes_no_error(monkeypatch):
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    result = bench_soak(SoakBench(2000, in_flight=4, minutes=0.5, replicas=2, kill_every_s=10))
    assert result["kills"] >= 2
    assert (result["errors"], result["partial_answers"]) == ("none", 0)


@pytest.mark.parametrize(
    ("title", "kind"),
    [
        ("ray::_ShardActor.call", "shard"),
        ("ray::b986e53425d7cf22-shard-0-1.call", "shard"),
        ("ray::_Registry", "registry"),
        ("/usr/bin/python gcs_server", "ray"),
    ],
)
def test_processes_by_their_titles(title, kind):
    assert kind_of(title) == kind
