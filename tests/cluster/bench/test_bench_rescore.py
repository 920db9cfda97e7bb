"""`bench rescore`: the truth is exact, recall reaches its limit, and files of vectors are read."""

import json

import numpy as np
import pytest

from orbithash.cluster.bench import rescore
from orbithash.cluster.bench.rescore import OVERSAMPLINGS, RescoreBench, bench_rescore, show_rescore
from orbithash.encoders.errors import InputError

SMALL = {"rows": 3000, "dims": 24, "intrinsic": 6, "bits": 16, "vector_dims": 8, "queries": 12}


def test_recall_grows_with_the_shortlist_to_the_limit_of_the_stored_vectors(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rescore, "CHUNK_ROWS", 700)
    result = bench_rescore(RescoreBench(**SMALL), tmp_path)
    assert result["limit"] > 0.8
    assert {name: each["bytes"] for name, each in result["methods"].items()} == {
        "ITQ 16 bits": 2 + 8,
        "signs of all 24": 3 + 8,
        "RaBitQ alone": 3 + 8,
        "RaBitQ": 3 + 8 + 8,
    }
    for name in ("ITQ 16 bits", "signs of all 24"):
        recalls = result["methods"][name]["recall"]
        assert recalls["1"] < recalls["64"] <= result["limit"] + 0.05
        sizes = result["methods"][name]["shortlist"]
        assert all(sizes[str(oversampling)] >= 10 * oversampling for oversampling in OVERSAMPLINGS)
    assert json.loads((tmp_path / "results.json").read_text()) == result
    assert (tmp_path / "rescore.png").stat().st_size > 5000
    show_rescore(result, False)
    printed = capsys.readouterr().out
    assert "ITQ 16 bits" in printed
    assert "none for 16 bits" in printed


def test_the_truth_is_the_float_cosine_of_a_file(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(900, 8)).astype(np.float16)
    np.save(tmp_path / "vectors.npy", vectors)
    given = {**SMALL, "bits": 8, "embeddings": tmp_path / "vectors.npy"}
    result = bench_rescore(RescoreBench(**given))
    assert (result["rows"], result["dims"], result["vectors"]) == (888, 8, "vectors.npy")
    # With all dimensions in the stored vectors, only rounding to int8 loses anything.
    assert result["limit"] > 0.95


def test_the_nearest_rows_are_collected_over_chunks():
    rng = np.random.default_rng(1)
    scores = rng.normal(size=(5, 230)).astype(np.float32)
    nearest = rescore._Nearest(5)
    for start in range(0, 230, 50):
        nearest.add(scores[:, start : start + 50], start)
    assert nearest.numbers.tolist() == np.argsort(-scores, axis=1)[:, :10].tolist()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rows": 5}, "--rows is 5; at least 100"),
        ({"intrinsic": 30}, "--intrinsic is 30, more than --dims 24"),
        ({"bits": 4}, "bits"),
        ({"queries": 0}, "--queries is 0"),
    ],
)
def test_invalid_settings_are_refused(given, message):
    with pytest.raises(InputError, match=message):
        bench_rescore(RescoreBench(**{**SMALL, **given}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read|No such file"),
        (np.zeros(5), r"float \[N, D\] is needed"),
        (np.zeros((50, 4)), "50 vectors"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, content, message):
    if content is not None:
        np.save(tmp_path / "vectors.npy", content)
    with pytest.raises(InputError, match=message):
        bench_rescore(RescoreBench(**{**SMALL, "embeddings": tmp_path / "vectors.npy"}))
