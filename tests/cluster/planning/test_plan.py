"""The plan's arithmetic against real shards, tables and archives, against a calculation by hand, and as a verb."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from orbithash.cluster.bench.inputs import write_archive
from orbithash.cluster.planning import plan as planning
from orbithash.cluster.planning.costs import MEASURED, fitted
from orbithash.cluster.planning.plan import Wanted, distinct_of_shard, hit_row_bytes, make_plan, shard_bytes
from orbithash.encoders.errors import InputError
from orbithash.search.engine import batching, row_cache, selections
from orbithash.search.index.host import MAX_VERSIONS, Diff, Selection, ShardHost
from orbithash.search.index.shard import Shard, part_of


def some_codes(rng, num_rows, num_distinct, bits):
    """Codes of which exactly so many are distinct; they differ in their first four bytes."""
    codes = np.zeros((num_distinct, -(-bits // 8)), np.uint8)
    codes[:, :4] = rng.permutation(10 * num_distinct)[:num_distinct].astype(">u4")[:, None].view(np.uint8)
    return codes[rng.permutation(np.resize(np.arange(num_distinct), num_rows))]


def true_bytes(*shards):
    """All arrays that shards hold, each once however many hold it, and what FAISS holds."""
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
    # Those that are made from others hold nothing of them, nor more than their own.
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
        # A row takes another's code: as many rows and codes as before.
        host.apply(Diff(version, version + 1, ids[:0], ids[:1], codes[version + 1 : version + 2]))
        for filter_number in range(5):
            host.search(version + 1, codes[:1], 3, selection=Selection(str(filter_number), ids[filter_number::2]))
    one = sum(shard_bytes(3000, 3000, 64).values())
    versions, filtered = list(host._shards.values()), list(host._filtered.values())
    assert true_bytes(*versions) == pytest.approx(MAX_VERSIONS * one, rel=0.01)
    assert len(filtered) > 1
    assert 0.5 * one < true_bytes(*filtered) <= 1.01 * one
    # In the plan: these, and the one in the making.
    memory = make_plan(Wanted(3000, replicas=1, qps=1)).memory_gb
    searched = sum(memory[name] for name in shard_bytes(1, 1, 64))
    assert 1e9 * searched == pytest.approx(one)
    assert memory["versions beside it"] == pytest.approx(MAX_VERSIONS * searched)
    assert memory["filters"] == pytest.approx(searched)
    assert "versions beside it" not in {
        name for name, value in make_plan(Wanted(3000, has_changes=False)).memory_gb.items() if value
    }


@pytest.mark.parametrize("shards", [1, 3, 40])
def test_distinct_codes_of_a_shard(shards):
    codes = some_codes(np.random.default_rng(0), 30_000, 3000, 64)
    ids = np.arange(30_000, dtype=np.uint64)
    found = [len(np.unique(codes[part_of(ids, number, shards)], axis=0)) for number in range(shards)]
    assert np.mean(found) == pytest.approx(distinct_of_shard(30_000, 3000, shards), rel=0.02)


class Archive:
    def __init__(self, keys):
        self.num_rows, self._keys = len(keys), keys

    def scan(self, columns):
        count = self.num_rows
        table = {
            "key": self._keys,
            "label": [("beach", "harbor", None)[row % 3] for row in range(count)],
            "lon": np.linspace(-180, 180, count),
            "lat": np.linspace(-90, 90, count),
            "datetime": pa.array(range(count), pa.timestamp("us", "UTC")),
        }
        return np.arange(count, dtype=np.uint64), pa.table(table)


@pytest.mark.parametrize("key_chars", [8, 60])
def test_memory_of_rows_of_hits(key_chars):
    keys = [f"{row:0{key_chars}d}" for row in range(20_000)]
    rows = row_cache.RowCache(Archive(keys))
    rows.warm()
    held = [*vars(rows._table).values(), rows._is_touched]
    true = sum(each.nbytes for each in held if hasattr(each, "nbytes"))
    assert true == pytest.approx(hit_row_bytes(20_000, key_chars), rel=0.02)


def test_bytes_on_disk(tmp_path):
    rng = np.random.default_rng(0)
    write_archive(tmp_path / "archive", rng.integers(0, 256, (30_000, 8), np.uint8), "model")
    true = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    archive = make_plan(Wanted(30_000)).archive_gb
    assert true == pytest.approx(1e9 * (archive["codes"] + archive["other columns"]), rel=0.15)


def test_the_bounds_are_those_of_the_search():
    assert planning.ROWS_IN_MEMORY == row_cache._MAX_TABLE
    assert planning.READY_ROWS == row_cache._MAX_READY
    assert planning.SELECTED_IDS == selections._MAX_KEPT_IDS
    assert planning.MAX_BATCH == batching._MAX_BATCH


# Every part of an answer costs another round number.
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


def test_an_answer_by_hand():
    # 10^6 codes of 3 bytes in one shard: 1 + 4 ms, twice that for the 99th of 100.
    plan = make_plan(Wanted(1e6, bits=24, qps=1, k=10, replicas=1), ROUND)
    assert (plan.shards, plan.gateways, plan.copies, plan.batch) == (1, 1, 1, 1)
    wanted = {"calls of shards": 7, "gateway and merge": 5 + 1 + 1, "scans": 10, "rows of hits": 0}
    for name, value in wanted.items():
        assert plan.p99_ms[name] == pytest.approx(value)
    # For 24 of 1,000 ms another query is under way.
    assert plan.p99_ms["waiting"] == pytest.approx(24 * 0.024)
    assert plan.p99_ms["all"] == pytest.approx(24 * 1.024)
    assert plan.cores == pytest.approx({"scans": 5e-3, "gateways": 1, "rows of hits": 0})


def test_queries_share_the_calls_of_many_shards():
    # 100 shards: calls of 300 ms a batch, 205 ms of merging a query. Two a second come while one batch is under way.
    batch, seconds = planning._p99(Wanted(1e6, bits=24, replicas=1, k=10), ROUND, 100, 2.0)
    scan_s = 1e-3 + 1e4 * 4e-9
    period = (0.304 + batch * (0.205 + scan_s)) / 2
    assert batch == pytest.approx(2 * (0.304 + batch * (0.205 + scan_s)))
    assert period > 0.1
    assert seconds["waiting"] == pytest.approx(0.304 + batch * (0.205 + 2 * scan_s))
    assert planning._p99(Wanted(1e6, bits=24, replicas=1), ROUND, 100, 5.0) is None
    # With many batches under way the gateway's loop is what is short.
    batch, _ = planning._p99(Wanted(1e6, bits=24, replicas=4, k=10), ROUND, 100, 2.0)
    assert batch == pytest.approx(2 * (0.3 + batch * 0.205))


@pytest.mark.parametrize("rows", [1, 1e4, 1e7, 1e9, 1e11])
@pytest.mark.parametrize("qps", [1, 300])
def test_what_is_planned_is_within_what_was_asked(rows, qps):
    wanted = Wanted(rows, qps=qps, p99_ms=300)
    plan = make_plan(wanted)
    assert plan.nodes == max(plan.nodes_by.values()) == plan.nodes_by[plan.decided_by]
    assert plan.copies == plan.shards * plan.gateways * wanted.replicas
    assert plan.rows_per_shard * plan.shards == pytest.approx(rows)
    if not plan.problem:
        assert plan.p99_ms["all"] <= 300
        assert sum(plan.memory_gb.values()) <= 0.7 * 64 * plan.nodes
        assert sum(plan.cores.values()) <= 0.7 * 16 * plan.nodes
    harder = [replace(wanted, rows=10 * rows), replace(wanted, qps=10 * qps), replace(wanted, headroom=0.6)]
    if not plan.problem:
        assert all(other.problem or other.nodes >= plan.nodes for other in map(make_plan, harder))


@pytest.mark.parametrize(
    ("wanted", "decided_by"),
    [
        (Wanted(1e4, qps=1, replicas=3), "replicas"),
        (Wanted(1e8, qps=1, memory_gb=16), "memory"),
        (Wanted(1e7, qps=3000, memory_gb=1000, cores=4), "cores"),
    ],
)
def test_what_decides(wanted, decided_by):
    plan = make_plan(wanted)
    assert (plan.decided_by, plan.problem) == (decided_by, "")
    more_memory = make_plan(replace(wanted, memory_gb=2 * wanted.memory_gb)).nodes
    more_cores = make_plan(replace(wanted, cores=2 * wanted.cores)).nodes
    assert (more_memory < plan.nodes, more_cores < plan.nodes) == (decided_by == "memory", decided_by == "cores")
    told = {change.text: change.nodes for change in plan.what_if}
    assert told["nodes of twice the memory"] == more_memory
    assert told["nodes of twice the cores"] == more_cores


def test_what_cannot_be_had():
    plan = make_plan(Wanted(1e9, p99_ms=5))
    assert "not within 5 ms" in plan.problem
    plan = make_plan(Wanted(1e11, p99_ms=1e5, qps=0.01))
    assert "to read its rows and is given up" in plan.problem
    plan = make_plan(Wanted(1e9, memory_gb=1))
    assert "a copy of a shard needs" in plan.problem
    with pytest.raises(InputError, match="gateways do not keep up"):
        make_plan(Wanted(1e6, qps=1e7))


def result_of(path, rows, bits, p50_ms, p99_ms=1.0, distinct=1.0, **other):
    flat = {"p50_ms": p50_ms, "p99_ms": p99_ms}
    result = {"rows": rows, "bits": bits, "distinct_share": distinct, "radius": None, "engines": {"flat": flat}}
    path.write_text(json.dumps(result | other))
    return path


def test_a_fit_finds_what_made_the_figures(tmp_path):
    """Twice the time for a code, and 0.2 ms for a scan, over sizes, widths and shares of distinct codes."""
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
    assert str(files[0]) in make_plan(Wanted(1e6), costs).costs
    # One size says what a code costs, no more.
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
    for words in ("memory decides", "what would change it", "codes in FAISS", "calls of shards", "thumbnails"):
        assert words in ended.out
    assert max(map(len, ended.out.splitlines())) <= 120
    ended = cli("plan", "--rows", "1000000000", "--qps", "500", "--distinct", "0.2", "--read-only", "--json")
    fields = json.loads(ended.out)
    assert fields["wanted"]["rows"] == 1e9
    assert fields["nodes"] >= fields["wanted"]["replicas"]
    assert fields["memory_gb"]["versions beside it"] == 0
    assert fields["what_if"][0].keys() == {
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
def test_what_cannot_be_planned(refused, args, words):
    refused("plan", *args, words=words)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"engines": {"flat": {"p50_ms": 1, "p99_ms": 1}}}', '{"engines": 3}'],
)
def test_a_file_that_is_no_result(refused, tmp_path, text):
    path = tmp_path / "results.json"
    path.write_text(text)
    refused("plan", "--rows", "1e6", "--bench", path, words=[path, "orbithash bench search"])


@pytest.mark.parametrize("wrong", [{"radius": 3}, {"rows": 0}, {"bits": "64"}, {"p50_ms": 0}, {"rows": float("nan")}])
def test_a_result_of_another_kind(tmp_path, wrong):
    path = tmp_path / "results.json"
    given = {"rows": 1e6, "bits": 64, "p50_ms": 1.0} | wrong
    with pytest.raises(InputError, match="without --radius"):
        fitted([result_of(path, **given)])
