"""`bench search` runs and compares right answers. Speed is never asserted."""

import json
import re

import numpy as np
import pytest

from orbithash.cluster.bench.codes import CodeSource, mixture_codes
from orbithash.cluster.bench.engines import ENGINES, EngineInput, EngineKind, nearest_rows
from orbithash.cluster.bench.search import SearchBench, Target, _codes, _judge, _ratios, bench_search
from orbithash.encoders.codes import check_codes, hamming, pack
from orbithash.encoders.errors import InputError

INSTALLED = [name for name, kind in ENGINES.items() if kind.is_installed]


def oracle(codes, query, k, radius=10**6):
    """Return the rows ordered by (distance, row), computed one by one."""
    distances = hamming(query[None], codes)[0].tolist()
    return [row for distance, row in sorted((d, row) for row, d in enumerate(distances) if d <= radius)][:k]


@pytest.mark.parametrize("bits", [8, 20, 64, 128])
@pytest.mark.parametrize("radius", [None, 3])
def test_the_exact_answer(bits, radius):
    rng = np.random.default_rng(bits)
    codes, queries = (pack(rng.random((count, bits)) < 0.5) for count in (300, 9))
    rows = nearest_rows(codes, queries, 12, radius)
    for query, found in zip(queries, rows, strict=True):
        expected = oracle(codes, query, 12, 10**6 if radius is None else radius)
        assert found.tolist() == expected + [-1] * (12 - len(expected))


@pytest.mark.parametrize("name", [name for name in INSTALLED if name not in ("ivf", "hnsw", "milvus-lite")])
def test_exact_engines_find_the_nearest(name, tmp_path):
    rng = np.random.default_rng(0)
    codes, queries = (pack(rng.random((count, 64)) < 0.5) for count in (500, 5))
    engine = ENGINES[name].make(EngineInput(codes, 64, None, tmp_path))
    truth = nearest_rows(codes, queries, 7)
    alone = np.concatenate([engine.rows(engine.search(query[None], 7)) for query in queries])
    for rows in (alone, engine.rows(engine.search(queries, 7))):
        assert rows.shape == truth.shape
        recall, share = _judge(codes, queries, truth, rows)
        assert recall == 1
        # Other engines may order ties differently.
        assert share == 1 or name not in ("exact", "flat")
    assert engine.bytes_are
    assert (engine.num_bytes is None) == (name in ("flat", "faiss-flat"))


def test_recall_compares_distances_and_not_ids():
    codes = np.array([[0], [1], [1], [1], [255]], np.uint8)
    queries, truth = np.zeros((1, 1), np.uint8), np.array([[0, 1]])
    for rows, expected in (
        ([0, 1], (1, 1)),
        ([0, 3], (1, 0)),
        ([0, 4], (0.5, 0)),
        ([0, 0], (0.5, 0)),
        ([0, -1], (0.5, 0)),
    ):
        assert _judge(codes, queries, truth, np.array([rows])) == expected


def test_random_codes_with_duplicates():
    drawn = _codes(SearchBench(rows=1000, bits=64, source=CodeSource(distinct=0.1)), np.random.default_rng(0))
    assert (drawn.codes.shape, drawn.bits) == ((1000, 8), 64)
    assert len(np.unique(drawn.codes, axis=0)) == 100


@pytest.mark.parametrize("bits", [20, 64])
def test_codes_of_a_mixture(bits):
    one_centre = check_codes(mixture_codes(3000, bits, 1, 0.1, np.random.default_rng(0)), bits)
    # Two codes of one centre differ in a bit with probability 2 * 0.1 * 0.9.
    assert hamming(one_centre[:50], one_centre).mean() == pytest.approx(0.18 * bits, rel=0.05)
    drawn = CodeSource("mixture", centres=5, flip=0.0).draw(100, bits, 40, np.random.default_rng(1))
    assert len(np.unique(drawn.codes, axis=0)) <= 5
    assert {query.tobytes() for query in drawn.queries} <= {code.tobytes() for code in drawn.codes}
    assert "5 centres" in drawn.kind


@pytest.mark.slow
def test_bench_search(tmp_path):
    names = ("exact", "faiss-flat", "ivf", "numpy")
    result = bench_search(
        SearchBench(2000, source=CodeSource(distinct=0.5), k=5, queries=70, engines=names), tmp_path / "out"
    )
    assert list(result["engines"]) == list(names)
    assert result["distinct_share"] == 0.5
    for name in ("p50", "p99", "batched"):
        assert re.fullmatch(r"[\d.e+]+ times as fast as faiss-flat \(no target\)", result[f"exact_{name}"])
    assert re.fullmatch(r"[\d.]+ s without a cache, [\d.]+ s with it", result["compiling"])
    for name, metrics in result["engines"].items():
        assert metrics["p50_ms"] <= metrics["p95_ms"] <= metrics["p99_ms"]
        assert min(metrics["lone_queries_per_s"], metrics["batched_queries_per_s"], metrics["build_s"]) > 0
        assert metrics["recall"] == 1 or name == "ivf"
    assert result["engines"]["exact"]["is_exact"]
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(json.dumps(result))
    for name in ("recall.png", "latency.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_bench_search_of_an_archive_within_a_radius(archive, cli):
    ended = cli("bench", "search", "--archive", archive, "--radius", "2", "--queries", "8", "--json")
    assert ended.code == 0
    result = json.loads(ended.out)
    assert list(result["engines"]) == ["exact", "flat"]
    assert all(metrics["is_exact"] and metrics["recall"] == 1 for metrics in result["engines"].values())
    assert (result["codes"], result["radius"]) == (str(archive), 2)
    assert "times as fast as flat" in result["exact_p50"]


def test_an_engine_that_is_not_installed():
    assert not EngineKind(ENGINES["usearch"].make, ("no_such_module",), "no-such").is_installed
    settings = SearchBench(rows=100, queries=2, engines=("flat", "usearch"))
    if "usearch" not in INSTALLED:
        assert bench_search(settings)["absent"] == {"usearch": "absent: pip install usearch"}


@pytest.mark.parametrize(
    ("settings", "target"),
    [
        ({"rows": 10**7, "source": CodeSource("mixture")}, (100, 10, None)),
        ({"rows": 10**7}, (1 / 1.1, None, 3)),
        ({"rows": 10**6}, (None, None, None)),
        ({"rows": 10**7, "k": 11}, (None, None, None)),
        ({"rows": 10**6, "bits": 128, "source": CodeSource("mixture")}, (5, None, None)),
        ({"rows": 10**6, "bits": 128, "source": CodeSource("mixture", flip=0.01)}, (None, None, None)),
    ],
)
def test_targets_belong_to_stated_codes(settings, target):
    assert SearchBench(**settings).target == target


def test_ratios_name_their_targets():
    lone = {"flat": [[6.0, 6.0], [8.0, 8.0]], "exact": [[1.0, 1.0], [1.0, 2.0]]}
    lines = _ratios(Target(p50=5, p99=6), "flat", lone, lone)
    assert lines == {
        "exact_p50": "5.67 times as fast as flat (target 5: met)",
        "exact_p99": "4.06 times as fast as flat (target 6: missed)",
        "exact_batched": "5.67 times as fast as flat (no target)",
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rows": 5}, "--rows is 5"),
        ({"bits": 4}, "4"),
        ({"source": CodeSource(distinct=0.0)}, "--distinct is 0"),
        ({"source": CodeSource("archive", distinct=0.5, archive="a")}, "give one of them"),
        ({"source": CodeSource("learned")}, "--codes is 'learned'; allowed: random, mixture, archive"),
        ({"source": CodeSource("archive")}, "--codes archive and --archive belong together"),
        ({"source": CodeSource("mixture", centres=0)}, "--centres is 0"),
        ({"source": CodeSource("mixture", flip=float("nan"))}, "--flip is nan"),
        ({"k": 0}, "-k is 0"),
        ({"queries": 0}, "--queries is 0"),
        ({"radius": -1}, "--radius is -1"),
        ({"engines": ("flt",)}, "--engine flt does not exist; allowed: exact, faiss-flat"),
        ({"engines": ("numpy",), "radius": 2}, "--engine numpy does not exist; allowed for --radius: exact, flat"),
    ],
)
def test_invalid_settings_of_bench_search(settings, message):
    with pytest.raises(InputError, match=message):
        bench_search(SearchBench(**settings))


def test_more_hits_than_rows(archive):
    with pytest.raises(InputError, match="-k is 4000, there are"):
        bench_search(SearchBench(source=CodeSource("archive", archive=archive), k=4000))
