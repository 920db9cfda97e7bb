"""`bench validation` compares equal metrics. Speed is never asserted."""

import json

import numpy as np
import pytest

from orbithash.cluster.bench.training import validation
from orbithash.cluster.bench.training.validation import ValidationBench, bench_validation
from orbithash.encoders.errors import InputError
from orbithash.trainers.metrics.retrieval import Retrieval


def test_bench_validation(cli, tmp_path):
    sizes = ("--queries", "30", "--database", "2000", "--bits", "20", "--rounds", "1")
    ended = cli("bench", "validation", *sizes, "--out", tmp_path, "--json")
    assert ended.code == 0, ended.err
    result = json.loads(ended.out)
    assert [result[name] for name in ("queries", "database", "bits", "rounds")] == [30, 2000, 20, 1]
    assert 0.1 < result["ap_min@20"] < 1
    assert result["times_faster"] == result["numpy_s"] / result["compiled_s"]
    assert result["times_faster_target"] == "no target"
    assert json.loads((tmp_path / "results.json").read_text()) == result
    assert (tmp_path / "report.html").exists()


def test_codes_are_near_the_centres_of_their_classes():
    queries, database, of_queries, of_database = validation._codes(ValidationBench(50, 300, 20, 1))
    retrieval = Retrieval(queries, database, of_queries, of_database, 20)
    distances = np.unpackbits(queries[:, None] ^ database, axis=2).sum(2)
    same = of_queries[:, None] == of_database
    assert distances[same].mean() < distances[~same].mean() - 1
    assert validation._compiled(retrieval) == validation._numpy(retrieval)


@pytest.mark.parametrize(("settings", "message"), [({"queries": 0}, "--queries"), ({"bits": 4}, "from 8 to 512")])
def test_invalid_settings_of_bench_validation(settings, message):
    with pytest.raises(InputError, match=message):
        bench_validation(ValidationBench(**({"queries": 2, "database": 2, "rounds": 1} | settings)))
