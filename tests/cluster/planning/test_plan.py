"""The plan against the memory of real shards, tables and archives, against results by hand, and as a command."""

import json
from dataclasses import replace

import numpy as np
import pytest

from orbithash.cluster.bench.inputs import write_archive
from orbithash.cluster.planning.costs import MEASURED, Probe, fitted
from orbithash.cluster.planning.latency import MAX_DIRECT, Fan, Latency, distinct_of_shard, latency
from orbithash.cluster.planning.page import write_plan_page
from orbithash.cluster.planning.plan import make_plan
from orbithash.cluster.planning.requirements import Requirements
from orbithash.cluster.planning.sizing import size
from orbithash.cluster.serving.memory import segment_bytes
from orbithash.cluster.serving.shards import SHARD_THREADS
from orbithash.encoders.errors import InputError
from orbithash.search.segments.dealing import Deal
from orbithash.search.segments.host import MAX_VERSIONS
from orbithash.search.segments.segment import Segment


def some_codes(rng, num_rows, num_distinct, bits):
    """Return codes with exactly `num_distinct` distinct ones, which differ in their first four bytes."""
    codes = np.zeros((num_distinct, -(-bits // 8)), np.uint8)
    codes[:, :4] = rng.permutation(10 * num_distinct)[:num_distinct].astype(">u4")[:, None].view(np.uint8)
    return codes[rng.permutation(np.resize(np.arange(num_distinct), num_rows))]


@pytest.mark.parametrize("bits", [32, 60, 64, 128, 512])
@pytest.mark.parametrize(("num_distinct", "is_part"), [(50, False), (1000, True), (4000, True), (4000, False)])
def test_memory_of_a_segment(bits, num_distinct, is_part):
    codes = some_codes(np.random.default_rng(0), 4000, num_distinct, bits)
    ids = np.arange(4000, dtype=np.uint64)
    # Blocks of another shard lie between those of this one.
    segment = Segment.build(ids + 500 * (ids // 500) if is_part else ids, codes, bits)
    assert segment.num_bytes == sum(segment_bytes(4000, num_distinct, bits, is_part).values())


@pytest.mark.parametrize(("bits", "num_rows", "num_distinct"), [(64, 140_000, 140_000), (200, 50_000, 40_000)])
def test_memory_of_a_segment_with_tables(bits, num_rows, num_distinct):
    codes = some_codes(np.random.default_rng(0), num_rows, num_distinct, bits)
    parts = segment_bytes(num_rows, num_distinct, bits, False)
    assert Segment.build(np.arange(num_rows, dtype=np.uint64), codes, bits).num_bytes == sum(parts.values())
    assert parts["tables"] > 4 * num_distinct


def test_memory_of_a_replica_by_hand():
    requirements = Requirements(2e7, qps=1, replicas=1)
    costs = replace(MEASURED, mapped_bytes=40, replica_bytes=1e8, cached_bytes=20, load_s=1e-6)
    one = Latency(1.0, {"all": 0.001})
    # 10^7 codes of 64 bits: three tables of 21 or 22 bits, two of which list code numbers.
    tables = 4 * (2**22 + 2 * 2**21 + 3) + 2 * 4 * 1e7
    plan = size(requirements, costs, 2, 1, Fan(2, 0), one)
    assert {name: 1e9 * value for name, value in plan.memory_gb.items()} == pytest.approx(
        {
            "codes": 8 * 2e7,
            "rows of codes": 4 * 2e7,
            "tables": 2 * tables,
            "ids": 4 * 2e7,
            "versions": MAX_VERSIONS * 2e7 / 8,
            "filters": 2 * 64 * 1e7 / 8,
            "columns in the page cache": 20 * 2e7,
            "processes of shards": 2e8,
            "processes of gateways": MEASURED.gateway_bytes,
        }
    )
    assert plan.start_s["from the archive"] == pytest.approx(10)
    assert 1e9 * plan.archive_gb["files of replicas"] == pytest.approx((8 + 4 + 4 + 40) * 2e7 + 2 * tables)
    assert size(replace(requirements, has_changes=False), costs, 2, 1, Fan(2, 0), one).memory_gb["versions"] == 0


@pytest.mark.parametrize("shards", [1, 3, 40])
def test_distinct_codes_of_a_shard(shards):
    codes = some_codes(np.random.default_rng(0), 30_000, 3000, 64)
    ids = np.arange(30_000, dtype=np.uint64)
    deal = Deal.of(30_000, shards)
    found = [len(np.unique(codes[deal.part(ids, number)], axis=0)) for number in range(shards)]
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
    word_s=4e-9,
    batch_share=1.0,
    probes=(Probe(64, 1e6, 1e-3), Probe(64, 1e8, 4e-3), Probe(256, 1e6, 9e-3)),
    scan_tail=2,
    probe_tail=3,
    call_s=3e-3,
    shard_call_s=2e-3,
    hop_s=4e-3,
    query_s=5e-3,
    merge_s=1e-3,
    merge_hit_s=1e-4,
)
RANDOM = Requirements(1e6, bits=24, codes="random", k=10, replicas=1)


def test_the_latency_by_hand():
    # 10^6 codes of one word in one shard: 1 + 4 ms, twice that at the 99th percentile.
    plan = make_plan(replace(RANDOM, qps=1), ROUND)
    assert (plan.shards, plan.gateways, plan.replicas, plan.batch, plan.branches) == (1, 1, 1, 1, 1)
    # The shard's four threads are busy for 5 of 1,000 ms.
    busy = 0.005 / SHARD_THREADS
    expected = {
        "shard calls": 7,
        "gateway and merge": 5 + 1 + 1,
        "searches": 10,
        "waiting in shards": 5 * busy / (1 - busy),
    }
    period = sum(expected.values())
    # Another query is in progress for 24 of 1,000 ms.
    expected |= {"waiting in the gateway": period * period / 1000}
    assert plan.p99_ms == pytest.approx(expected | {"all": sum(expected.values())})
    assert plan.cores == pytest.approx({"searches": 5e-3, "calls in shards": 2e-3, "gateways": 1})


def test_queries_share_the_calls_of_many_shards():
    # 50 shards: 150 ms of calls per batch, 105 ms of merging per query. Four queries per second, one batch at a time.
    batch, seconds = latency(RANDOM, ROUND, 50, Fan.of(50, 3), 1, 4.0)
    scan_s = 1e-3 + 2e4 * 4e-9
    assert batch == pytest.approx(4 * (0.154 + batch * (0.105 + scan_s)))
    assert seconds["shard calls"] == pytest.approx(0.154)
    assert seconds["waiting in the gateway"] == pytest.approx(sum(list(seconds.values())[1:]))
    assert latency(RANDOM, ROUND, 50, Fan.of(50, 3), 1, 10.0) is None
    # With four batches at a time, the gateway's event loop is the limit; two gateways share the load.
    four = replace(RANDOM, replicas=4)
    batch, _ = latency(four, ROUND, 50, Fan.of(50, 3), 1, 4.0)
    assert batch == pytest.approx(4 * (0.15 + batch * 0.105))
    assert latency(four, ROUND, 50, Fan.of(50, 3), 2, 4.0).batch < batch


def test_beyond_64_shards_one_of_each_node_calls_the_others():
    assert Fan.of(MAX_DIRECT, 5) == (MAX_DIRECT, 0)
    assert Fan.of(100, 10) == (10, 9)
    assert Fan.of(65, 1) == (1, 64)
    _, seconds = latency(RANDOM, ROUND, 100, Fan(10, 9), 1, 1e-6)
    assert seconds["shard calls"] == pytest.approx((10 + 9) * 3e-3 + 2 * 4e-3)
    assert seconds["gateway and merge"] == pytest.approx(5e-3 + 10 * 2e-3)
    # Nine answers are merged in a shard, at the pace of the slowest.
    assert seconds["searches"] == pytest.approx(2 * (1e-3 + 1e4 * 4e-9 + 9 * 2e-3))


def test_searches_by_probing():
    # A hundred times the codes take four times the time; beyond what was measured the time stays.
    assert [ROUND.search_s("learned", codes, 64) for codes in (1e6, 1e7, 1e8, 1e9)] == pytest.approx(
        [2e-3, 3e-3, 5e-3, 5e-3]
    )
    # Twice the bits are half-way to four times the bits.
    assert ROUND.search_s("learned", 1e6, 128) == pytest.approx(4e-3)
    # Never more than 1.2 times the scan.
    assert ROUND.search_s("learned", 1000, 64) == pytest.approx(1.2 * ROUND.search_s("random", 1000, 64))


def test_queries_of_a_batch_share_a_scan():
    costs = replace(ROUND, scan_s=0, batch_share=0.25)
    seconds = [costs.search_s("random", 1e6, 64, batch) for batch in (1, 2, 64, 200)]
    assert seconds[0] == pytest.approx(4e-3)
    assert seconds[0] > seconds[1] > seconds[2] == seconds[3] == pytest.approx(1e-3)


@pytest.mark.parametrize("rows", [1, 1e4, 1e7, 1e9, 1e11])
@pytest.mark.parametrize("qps", [1, 300])
def test_a_plan_meets_its_requirements(rows, qps):
    requirements = Requirements(rows, qps=qps, p99_ms=300)
    plan = make_plan(requirements)
    assert plan.nodes == max(plan.nodes_by.values()) == plan.nodes_by[plan.decided_by]
    assert plan.replicas == plan.shards * requirements.replicas
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
        (Requirements(3e8, qps=1, memory_gb=16), "memory"),
        (Requirements(1e7, codes="random", qps=3000, memory_gb=1000, cores=4), "cores"),
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
    plan = make_plan(Requirements(1e9, codes="random", p99_ms=5))
    assert "not within 5 ms" in plan.problem
    plan = size(Requirements(1e10), MEASURED, 4, 1, Fan(4, 0), Latency(1.0, {}))
    assert "s to read its rows; the timeout is 600 s" in plan.problem
    assert "a new filter takes" in plan.problem
    plan = make_plan(Requirements(1e9, memory_gb=1), replace(MEASURED, replica_bytes=1e9))
    assert "a replica of a shard needs" in plan.problem
    with pytest.raises(InputError, match="do not keep up with this load"):
        make_plan(Requirements(1e6, qps=1e7))


def result_of(path, rows, bits, p50_ms, p99_ms=1.0, distinct=1.0, **other):
    exact = {"p50_ms": p50_ms, "p99_ms": p99_ms}
    result = {"rows": rows, "bits": bits, "distinct_share": distinct, "radius": None, "codes": "random codes"}
    result["engines"] = {"exact": exact}
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
    assert (costs.scan_tail, costs.probe_tail) == (pytest.approx(3), MEASURED.probe_tail)
    assert costs.probes == MEASURED.probes
    assert costs.call_s == MEASURED.call_s
    assert str(files[0]) in make_plan(Requirements(1e6), costs).costs
    # With one size, only the cost per code is fitted.
    one = fitted(files[2:3])
    assert one.scan_s == MEASURED.scan_s
    assert one.scan_s + 1e7 * one.compare_s(64) == pytest.approx(2e-4 + 2e7 * MEASURED.compare_s(64))


def test_a_fit_of_searches_by_probing(tmp_path):
    files = [
        result_of(tmp_path / f"{rows}.json", rows, 64, p50_ms, codes="mixture of 100 centres")
        for rows, p50_ms in ((1e6, 0.5), (1e7, 0.7))
    ]
    costs = fitted(files)
    assert (costs.scan_tail, costs.probe_tail) == (MEASURED.scan_tail, pytest.approx(1 / 0.7))
    assert costs.search_s("learned", 1e7, 64) == pytest.approx(0.7e-3)
    assert costs.search_s("random", 1e7, 64) == MEASURED.search_s("random", 1e7, 64)


@pytest.mark.slow
def test_a_fit_of_a_real_result(tmp_path, cli):
    out = tmp_path / "out"
    args = ("--rows", "20000", "--queries", "8", "--engine", "exact", "--out", out, "--json")
    assert cli("bench", "search", *args).code == 0
    ended = cli("plan", "--rows", "1e8", "--bench", out / "results.json", "--json")
    assert (ended.code, ended.err) == (0, "")
    assert str(out / "results.json") in json.loads(ended.out)["costs"]


def test_the_table_and_the_fields(cli):
    ended = cli("plan", "--rows", "1e9", "--bits", "64", "--qps", "500", "--distinct", "0.2")
    assert (ended.code, ended.err) == (0, "")
    for words in ("memory decides", "what would change it", "rows of codes", "shard calls", "thumbnails"):
        assert words in ended.out
    assert max(map(len, ended.out.splitlines())) <= 120
    ended = cli("plan", "--rows", "1000000000", "--qps", "500", "--distinct", "0.2", "--read-only", "--json")
    fields = json.loads(ended.out)
    assert fields["requirements"]["rows"] == 1e9
    assert fields["nodes"] >= fields["requirements"]["replicas"]
    assert fields["memory_gb"]["versions"] == 0
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
        (("--rows", "1e6", "--codes", "trained"), ["--codes is 'trained'", "learned, random"]),
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
    ["", "[]", "{}", '{"engines": {"exact": {"p50_ms": 1, "p99_ms": 1}}}', '{"engines": 3}'],
)
def test_an_invalid_results_file(refused, tmp_path, text):
    path = tmp_path / "results.json"
    path.write_text(text)
    refused("plan", "--rows", "1e6", "--bench", path, words=[path, "orbithash bench search"])


@pytest.mark.parametrize(
    "fields", [{"radius": 3}, {"rows": 0}, {"bits": "64"}, {"p50_ms": 0}, {"rows": float("nan")}, {"codes": 3}]
)
def test_an_unsuitable_result(tmp_path, fields):
    path = tmp_path / "results.json"
    given = {"rows": 1e6, "bits": 64, "p50_ms": 1.0} | fields
    with pytest.raises(InputError, match="without --radius"):
        fitted([result_of(path, **given)])


def test_the_page_of_a_plan(cli, tmp_path):
    path = tmp_path / "plan.html"
    ended = cli("plan", "--rows", "1e9", "--qps", "500", "--report", path, "--json")
    assert ended.code == 0
    page = path.read_text()
    assert all(each["text"] in page for each in json.loads(ended.out)["alternatives"])
    assert "required: 100 ms" in page
    assert "orbithash plan --rows 1e9 --qps 500" in page
    assert "the packed codes alone: 8.0 GB" in page


def test_the_page_of_a_plan_that_is_not_possible(tmp_path):
    requirements = Requirements(1e6, p99_ms=1)
    plan = make_plan(requirements)
    assert plan.problem
    write_plan_page(tmp_path / "plan.html", plan)
    page = (tmp_path / "plan.html").read_text()
    assert "No plan meets these requirements" in page
    assert "not within 1 ms" in page
