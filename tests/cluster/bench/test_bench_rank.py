"""`bench rank` compares right answers. Speed is never asserted."""

import json
import re

import numpy as np
import pytest

from orbithash.cluster.bench.rank import RankBench, _check_products, _first_rows, _products, bench_rank
from orbithash.encoders.errors import InputError


def test_bench_rank(cli, tmp_path):
    ended = cli(
        "bench", "rank", "--rows", "70001", "--dims", "9", "-k", "500", "--rounds", "1", "--out", tmp_path, "--json"
    )
    assert ended.code == 0, ended.err
    result = json.loads(ended.out)
    assert (result["rows"], result["dims"], result["answers"]) == (70_001, 9, "equal")
    assert re.fullmatch(r"[\d.]+ of its bandwidth \(no target\)", result["of_best_product_1"])
    for of_threads in result["threads"].values():
        assert {"read memory", "numpy int8", "orbithash"} <= of_threads.keys()
        assert of_threads["orbithash"]["ratio"] == 1
        assert all(metrics["gb_per_s"] > 0 for metrics in of_threads.values())
    assert json.loads((tmp_path / "results.json").read_text()) == result


def test_the_first_rows_and_a_wrong_product():
    rng = np.random.default_rng(0)
    vectors, weights = rng.integers(-128, 128, (50, 3), np.int8), np.array([1, -1, 2], np.int8)
    keys = [-int(row @ weights.astype(int)) for row in vectors]
    expected = sorted(zip(keys, range(50), strict=True))
    for k in (1, 20, 99):
        assert list(zip(*_first_rows(vectors, weights, k), strict=True)) == expected[:k]
    products, _ = _products(vectors, weights)
    _check_products(products, vectors, weights)
    with pytest.raises(AssertionError, match="wrong computes something else"):
        _check_products({"wrong": lambda begin, end: vectors[begin:end, 0]}, vectors, weights)


@pytest.mark.parametrize(
    ("settings", "message"), [({"rows": 0}, "--rows is 0"), ({"k": 10_001}, "-k is 10001; from 1 to 10,000")]
)
def test_invalid_settings_of_bench_rank(settings, message):
    with pytest.raises(InputError, match=message):
        bench_rank(RankBench(**settings))
