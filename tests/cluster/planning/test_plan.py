"""The plan against the memory of real shards, tables and archives, against results by hand, and as a command."""

import json
from dataclasses import replace

import numpy as np
import pytest

from orbithash.cluster.bench.inputs import write_archive
from orbithash.cluster.planning.costs import MEASURED, fitted
from orbithash.cluster.planning.latency import distinct_of_shard, latency
from orbithash.cluster.planning.plan import make_plan
from orbithash.cluster.planning.requirements import Requirements
from orbithash.cluster.planning.sizing import shard_bytes
from orbithash.encoders.errors import InputError
from orbithash.search.index.host import MAX_VERSIONS, Diff, Selection, ShardHost
from orbithash.search.index.shard import Shard, part_of


def some_codes(rng, num_rows, num_distinct, bits):
    """Return codes with exactly `num_distinct` distinct ones, which differ in their first four bytes."""
    codes = np.zeros((num_distinct, -(-bits // 8)), np.uint8)
    codes[:, :4] = rng.permutation(10 * num_distinct)[:num_distinct].astype(">u4")[:, None].view(np.uint8)
    return codes[rng.permutation(np.resize(np.arange(num_distinct), num_rows))]


def true_bytes(*shards):
    """Return the bytes of all arrays of the shards, each counted once, and of the FAISS indexes."""
    import faiss

    owners, in_faiss, todo = {}, 0, list(shards)
    while todo:
        each = todo.pop()
        if isinstance(each, np.ndarray):
            while isinstance(each.base, np.ndarray):
                each = each.base
            owners[id(each)] = each
        elif isinstance(each, tuple | list):
            todo += each
        elif isinstance(each, faiss.IndexBinary):
            in_faiss += faiss.vector_to_array(each.xb).nbytes
        elif type(each).__module__.startswith("orbithash."):
            todo += vars(each).values()
    return sum(owner.nbytes for owner in owners.values()) + in_faiss


@pytest.mark.parametrize("bits", [32, 60, 64, 128, 512])
@pytest.mark.parametrize("num_distinct", [50, 1000, 4000])
def test_memory_of_a_shard(bits, num_distinct):
    rng = np.random.default_rng(0)
    codes = some_codes(rng, 4000, num_distinct, bits)
    shard = Shard(np.arange(4000, dtype=np.uint64), codes, bits)
    assert true_bytes(shard) == sum(shard_bytes(4000, num_distinct, bits).values())
    # Shards derived from others share no memory with them.
    part = shard.where(np.arange(0, 4000, 2, dtype=np.uint64))
    assert true_bytes(part) == sum(shard_bytes(2000, len(np.unique(codes[::2], axis=0)), bits).values())
    changed = shard.changed(np.arange(100, dtype=np.uint64), np.arange(9000, 9010, dtype=np.uint64), codes[:10])
    kept = np.concatenate([codes[100:], codes[:10]])
    assert true_bytes(changed) == sum(shard_bytes(3910, len(np.unique(kept, axis=0)), bits).values())
    assert true_bytes(shard, part, changed) == sum(map(true_bytes, (shard, part, changed)))


def test_memory_of_the_versions_and_filters_of_a_shard():
    rng = np.random.default_rng(0)
    codes, ids = some_codes(rng, 3000, 3000, 64), np.arange(3000, dtype=np.uint64)
    host = ShardHost(lambda version: [(ids, codes)], 64, 0, 1)
    assert host.num_rows(0) == 3000
    for version in range(MAX_VERSIONS + 3):
        # A row takes the code of another one: the numbers of rows and codes stay.
        host.apply(Diff(version, version + 1, ids[:0], ids[:1], codes[version + 1 : version + 2]))
        for filter_number in range(5):
            host.search(version + 1, codes[:1], 3, selection=Selection(str(filter_number), ids[filter_number::2]))
    one = sum(shard_bytes(3000, 3000, 64).values())
    versions, filtered = list(host._shards.values()), list(host._filtered.values())
    assert true_bytes(*versions) == pytest.approx(MAX_VERSIONS * one, rel=0.01)
    assert len(filtered) > 1
    assert 0.5 * one < true_bytes(*filtered) <= 1.01 * one
    # The plan counts these versions and the one that is being built.
    memory = make_plan(Requirements(3000, replicas=1, qps=1)).memory_gb
    searched = sum(memory[name] for name in shard_bytes(1, 1, 64))
    assert 1e9 * searched == pytest.approx(one)
    assert memory["other versions"] == pytest.approx(MAX_VERSIONS * searched)
    assert memory["filters"] == pytest.approx(searched)
    assert "other versions" not in {
        name for name, value in make_plan(Requirements(3000, has_changes=False)).memory_gb.items() if value
    }


@pytest.mark.parametrize("shards", [1, 3, 40])
def test_distinct_codes_of_a_shard(shards):
    codes = some_codes(np.random.default_rng(0), 30_000, 3000, 64)
    ids = np.arange(30_000, dtype=np.uint64)
    found = [len(np.unique(codes[part_of(ids, number, shards)], axis=0)) for number in range(shards)]
    assert np.mean(found) == pytest.approx(distinct_of_shard(30_000, 3000, shards), rel=0.02)


def test_bytes_on_disk(tmp_path):
    rng = np.random.default_rng(0)
    write_archive(tmp_path / "archive", rng.integers(0, 256, (30_000, 8), np.uint8), 64, "model")
    true = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    archive = make_plan(Requirements(30_000)).archive_gb
    assert true == pytest.approx(1e9 * (archive["codes"] + archive["other columns"]), rel=0.15)


# Each part of an answer has another round cost.
ROUND = replace(
    MEASURED,
    scan_s=1e-3,
    code_s=1e-9,
    byte_s=1e-9,
    scan_tail=2,
    call_s=3e-3,
    hop_s=4e-3,
    query_s=5e-3,
    merge_s=1e-3,
    merge_hit_s=1e-4,
)


def test_the_latency_by_hand():
    # 10^6 codes of 3 bytes in one shard: 1 + 4 ms, twice that at the 99th percentile.
    plan = make_plan(Requirements(1e6, bits=24, qps=1, k=10, replicas=1), ROUND)
    assert (plan.shards, plan.gateways, plan.replicas, plan.batch) == (1, 1, 1, 1)
    expected = {"shard calls": 7, "gateway and merge": 5 + 1 + 1, "scans": 10, "rows of hits": 0}
    for name, value in expected.items():
        assert plan.p99_ms[name] == pytest.approx(value)
    # Another query is in progress for 24 of 1,000 ms.
    assert plan.p99_ms["waiting"] == pytest.approx(24 * 0.024)
    assert plan.p99_ms["all"] == pytest.approx(24 * 1.024)
    assert plan.cores == pytest.approx({"scans": 5e-3, "gateways": 1, "rows of hits": 0})


def test_queries_share_the_calls_of_many_shards():
    # 100 shards: 300 ms of calls per batch, 205 ms of merging per query. Two queries per second, one batch at a time.
    batch, seconds = latency(Requirements(1e6, bits=24, replicas=1, k=10), ROUND, 100, 2.0)
    scan_s = 1e-3 + 1e4 * 4e-9
    period = (0.304 + batch * (0.205 + scan_s)) / 2
    assert batch == pytest.approx(2 * (0.304 + batch * (0.205 + scan_s)))
    assert period > 0.1
    assert seconds["waiting"] == pytest.approx(0.304 + batch * (0.205 + 2 * scan_s))
    assert latency(Requirements(1e6, bits=24, replicas=1), ROUND, 100, 5.0) is None
    # With four batches at a time, the gateway's event loop is the limit.
    batch, _ = latency(Requirements(1e6, bits=24, replicas=4, k=10), ROUND, 100, 2.0)
    assert batch == pytest.approx(2 * (0.3 + batch * 0.205))


@pytest.mark.parametrize("rows", [1, 1e4, 1e7, 1e9, 1e11])
@pytest.mark.parametrize("qps", [1, 300])
def test_a_plan_meets_its_requirements(rows, qps):
    requirements = Requirements(rows, qps=qps, p99_ms=300)
    plan = make_plan(requirements)
    assert plan.nodes == max(plan.nodes_by.values()) == plan.nodes_by[plan.decided_by]
    assert plan.replicas == plan.shards * plan.gateways * requirements.replicas
    assert plan.rows_per_shard * plan.shards == pytest.approx(rows)
    if not plan.problem:
        assert plan.p99_ms["all"] <= 300
        assert sum(plan.memory_gb.values()) <= 0.7 * 64 * plan.nodes
        assert sum(plan.cores.values()) <= 0.7 * 16 * plan.nodes
    harder = [
        replace(requirements, rows=10 * rows),
        replace(requirements, qps=10 * qps),
        replace(requirements, headroom=0.6),
    ]
    if not plan.problem:
        assert all(other.problem or other.nodes >= plan.nodes for other in map(make_plan, harder))


@pytest.mark.parametrize(
    ("requirements", "decided_by"),
    [
        (Requirements(1e4, qps=1, replicas=3), "replicas"),
        (Requirements(1e8, qps=1, memory_gb=16), "memory"),
        (Requirements(1e7, qps=3000, memory_gb=1000, cores=4), "cores"),
    ],
)
def test_the_resource_that_decides(requirements, decided_by):
    plan = make_plan(requirements)
    assert (plan.decided_by, plan.problem) == (decided_by, "")
    more_memory = make_plan(replace(requirements, memory_gb=2 * requirements.memory_gb)).nodes
    more_cores = make_plan(replace(requirements, cores=2 * requirements.cores)).nodes
    assert (more_memory < plan.nodes, more_cores < plan.nodes) == (decided_by == "memory", decided_by == "cores")
    nodes = {alternative.text: alternative.nodes for alternative in plan.alternatives}
    assert nodes["nodes of twice the memory"] == more_memory
    assert nodes["nodes of twice the cores"] == more_cores


def test_requirements_that_cannot_be_met():
    plan = make_plan(Requirements(1e9, p99_ms=5))
    assert "not within 5 ms" in plan.problem
    plan = make_plan(Requirements(1e11, p99_ms=1e5, qps=0.01))
    assert "s to read its rows; the timeout is 600 s" in plan.problem
    plan = make_plan(Requirements(1e9, memory_gb=1))
    assert "a replica of a shard needs" in plan.problem
    with pytest.raises(InputError, match="gateways do not keep up"):
        make_plan(Requirements(1e6, qps=1e7))


def result_of(path, rows, bits, p50_ms, p99_ms=1.0, distinct=1.0, **other):
    flat = {"p50_ms": p50_ms, "p99_ms": p99_ms}
    result = {"rows": rows, "bits": bits, "distinct_share": distinct, "radius": None, "engines": {"flat": flat}}
    path.write_text(json.dumps(result | other))
    return path


def test_a_fit_recovers_the_costs(tmp_path):
    """Twice the time per code and 0.2 ms per scan, over sizes, code lengths and shares of distinct codes."""
    files = []
    for rows, bits, distinct in ((1e5, 64, 1.0), (1e6, 64, 0.5), (1e7, 64, 1.0), (1e6, 256, 0.1)):
        p50_ms = 0.2 + 2e3 * rows * distinct * MEASURED.compare_s(bits)
        files.append(result_of(tmp_path / f"{rows}-{bits}.json", rows, bits, p50_ms, 3 * p50_ms, distinct))
    costs = fitted(files)
    assert costs.scan_s == pytest.approx(2e-4)
    assert [costs.compare_s(bits) for bits in (64, 512)] == pytest.approx(
        [2 * MEASURED.compare_s(bits) for bits in (64, 512)]
    )
    assert costs.scan_tail == pytest.approx(3)
    assert costs.call_s == MEASURED.call_s
    assert str(files[0]) in make_plan(Requirements(1e6), costs).costs
    # With one size, only the cost per code is fitted.
    one = fitted(files[2:3])
    assert one.scan_s == MEASURED.scan_s
    assert one.scan_s + 1e7 * one.compare_s(64) == pytest.approx(2e-4 + 2e7 * MEASURED.compare_s(64))


def test_a_fit_of_a_real_result(tmp_path, cli):
    out = tmp_path / "out"
    args = ("--rows", "20000", "--queries", "8", "--engine", "flat", "--out", out, "--json")
    assert cli("bench", "search", *args).code == 0
    ended = cli("plan", "--rows", "1e8", "--bench", out / "results.json", "--json")
    assert (ended.code, ended.err) == (0, "")
    assert str(out / "results.json") in json.loads(ended.out)["costs"]


def test_the_table_and_the_fields(cli):
    ended = cli("plan", "--rows", "1e9", "--bits", "64", "--qps", "500", "--distinct", "0.2")
    assert (ended.code, ended.err) == (0, "")
    for words in ("memory decides", "what would change it", "codes in FAISS", "shard calls", "thumbnails"):
        assert words in ended.out
    assert max(map(len, ended.out.splitlines())) <= 120
    ended = cli("plan", "--rows", "1000000000", "--qps", "500", "--distinct", "0.2", "--read-only", "--json")
    fields = json.loads(ended.out)
    assert fields["requirements"]["rows"] == 1e9
    assert fields["nodes"] >= fields["requirements"]["replicas"]
    assert fields["memory_gb"]["other versions"] == 0
    assert fields["alternatives"][0].keys() == {
        *("text", "nodes", "shards", "gateways", "p99_ms", "decided_by", "problem"),
    }


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--rows", "0"), ["--rows is 0", "from 1 to"]),
        (("--rows", "1.5"), ["--rows is 1.5", "whole number"]),
        (("--rows", "nan"), ["--rows is nan"]),
        (("--rows", "inf"), ["--rows is inf"]),
        (("--rows", "1e6", "--bits", "4"), ["4", "8", "512"]),
        (("--rows", "1e6", "--qps", "0"), ["--qps is 0"]),
        (("--rows", "1e6", "-k", "0"), ["-k is 0"]),
        (("--rows", "1e6", "--distinct", "0"), ["--distinct is 0", "up to 1"]),
        (("--rows", "1e6", "--distinct", "nan"), ["--distinct is nan"]),
        (("--rows", "1e6", "--replicas", "0"), ["--replicas is 0"]),
        (("--rows", "1e6", "--cores", "0"), ["--cores is 0"]),
        (("--rows", "1e6", "--memory", "-3"), ["--memory is -3"]),
        (("--rows", "1e6", "--headroom", "1"), ["--headroom is 1", "0.9"]),
        (("--rows", "1e6", "--p99", "0"), ["--p99 is 0"]),
        (("--rows", "1e6", "--bench", "/nowhere/results.json"), ["/nowhere/results.json", "No such file"]),
    ],
)
def test_invalid_options(refused, args, words):
    refused("plan", *args, words=words)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"engines": {"flat": {"p50_ms": 1, "p99_ms": 1}}}', '{"engines": 3}'],
)
def test_an_invalid_results_file(refused, tmp_path, text):
    path = tmp_path / "results.json"
    path.write_text(text)
    refused("plan", "--rows", "1e6", "--bench", path, words=[path, "orbithash bench search"])


@pytest.mark.parametrize("fields", [{"radius": 3}, {"rows": 0}, {"bits": "64"}, {"p50_ms": 0}, {"rows": float("nan")}])
def test_an_unsuitable_result(tmp_path, fields):
    path = tmp_path / "results.json"
    given = {"rows": 1e6, "bits": 64, "p50_ms": 1.0} | fields
    with pytest.raises(InputError, match="without --radius"):
        fitted([result_of(path, **given)])
