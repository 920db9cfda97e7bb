"""Failures of a model: worst queries, confused classes, wasted bits; the content of failures.json."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from orbithash.encoders.codes import hamming, pack
from orbithash.trainers.evaluation import report
from orbithash.trainers.evaluation.comparison import BaselineResult
from orbithash.trainers.evaluation.evaluation import Evaluation, evaluate, with_baselines
from orbithash.trainers.evaluation.failures import failures_of
from orbithash.trainers.evaluation.parts import EncodedPart
from orbithash.trainers.evaluation.report import write_evaluation
from orbithash.trainers.metrics.average_precision import average_precision

CLASSES = ("beach", "forest", "harbor", "river")
BITS = 16
# Bits that say nothing: one is dead, one is the complement of bit 0.
DEAD, COMPLEMENT = 5, 9


@pytest.fixture(autouse=True)
def no_map(monkeypatch):
    """Disable t-SNE, which takes half a second."""
    monkeypatch.setattr(report, "MIN_MAPPED", 10**9)


def part(count: int, seed: int, prefix: str) -> EncodedPart:
    """Return items of four classes; forest and harbor are nearly the same code."""
    rng = np.random.default_rng(seed)
    prototypes = np.random.default_rng(99).random((len(CLASSES), BITS)) < 0.5
    prototypes[2] = prototypes[1]
    labels = np.arange(count) % len(CLASSES)
    bits = prototypes[labels] ^ (rng.random((count, BITS)) < 0.1)
    bits[:, DEAD], bits[:, COMPLEMENT] = True, ~bits[:, 0]
    ids = [f"{prefix}/{i}" for i in range(count)]
    return EncodedPart(ids, pack(bits), labels, [f"/home/user/{id}.jpg" for id in ids])


def run(query: EncodedPart | None = None, database: EncodedPart | None = None, **changes) -> Evaluation:
    settings = {"dataset": "made up", "protocol": "random", "method": "dhcl", "bits": BITS, "exclude_self": False}
    settings |= {"classes": CLASSES, "model_id": "abc"}
    return evaluate(query or part(40, 1, "q"), database or part(80, 2, "d"), **settings | changes)


def test_the_worst_queries_have_the_lowest_average_precision():
    query, database = part(40, 1, "q"), part(80, 2, "d")
    evaluation = run(query, database)
    content = failures_of({"": evaluation})
    assert (content["model_id"], content["metric"], list(content["directions"])) == ("abc", "ap_min@20", [""])
    worst = content["directions"][""]["worst"]
    scores = average_precision(evaluation.histograms, 20)
    assert [each["ap"] for each in worst] == sorted(scores)[:8]
    distances = hamming(query.codes, database.codes)
    for each in worst:
        row = query.ids.index(each["key"])
        assert (each["ap"], each["label"], each["sentence"]) == (scores[row], CLASSES[query.labels[row]], None)
        nearest = np.argsort(distances[row], kind="stable")[:8]
        assert [hit["key"] for hit in each["hits"]] == [database.ids[i] for i in nearest]
        assert [hit["distance"] for hit in each["hits"]] == distances[row, nearest].tolist()
        assert all(hit["relevant"] == (hit["label"] == each["label"]) for hit in each["hits"])


def test_confused_pairs_count_the_nearest_items_of_other_classes():
    query, database = part(40, 1, "q"), part(80, 2, "d")
    evaluation = run(query, database)
    confused = failures_of({"": evaluation})["directions"][""]["confused"]
    expected = np.zeros((4, 4))
    for label, row in zip(query.labels, hamming(query.codes, database.codes), strict=True):
        nearest = database.labels[row == row.min()]
        expected[label] += np.bincount(nearest, minlength=4) / len(nearest)
    np.fill_diagonal(expected, 0)
    assert [each["queries"] for each in confused] == pytest.approx(sorted(expected[expected > 0], reverse=True)[:10])
    for each in confused:
        a, b = CLASSES.index(each["label"]), CLASSES.index(each["nearest"])
        assert each["queries"] == pytest.approx(expected[a, b])
        assert each["of"] == 10
    assert (confused[0]["label"], confused[0]["nearest"]) in {("forest", "harbor"), ("harbor", "forest")}
    shown = [query for query in evaluation.gallery if query.reason == "confused"]
    pairs = [(CLASSES[pair.label], CLASSES[pair.nearest]) for pair in evaluation.confused]
    assert [query.label for query in shown] == [label for label, _ in pairs[: len(shown)]]
    for query, (_, nearest) in zip(shown, pairs, strict=False):
        at_once = [hit.label for hit in query.hits if hit.distance == query.hits[0].distance]
        assert query.hits[0].label == nearest or nearest in at_once


def test_failures_stand_beside_the_best_baseline_of_no_more_bytes():
    rng = np.random.default_rng(0)
    scores, nearest = rng.random(40), rng.random((4, 4))
    metrics = {"ap_min@20": 0.5}
    results = {
        "cosine": BaselineResult(400, {"ap_min@20": 1.0}, np.ones(40), np.zeros((4, 4))),
        "lsh": BaselineResult(2, {"ap_min@20": 0.4}, np.zeros(40), np.zeros((4, 4))),
        "itq": BaselineResult(2, metrics, scores, nearest),
        "pq": "of a reason",
    }
    query = part(40, 1, "q")
    evaluation = with_baselines(run(query), results)
    failures = failures_of({"": evaluation})["directions"][""]
    for each in failures["worst"]:
        assert each["baseline"] == {"name": "itq", "ap": scores[query.ids.index(each["key"])]}
    for each in failures["confused"]:
        expected = nearest[CLASSES.index(each["label"]), CLASSES.index(each["nearest"])]
        assert each["baseline"] == {"name": "itq", "queries": expected}
    larger = failures_of({"": with_baselines(run(), {"cosine": results["cosine"]})})["directions"][""]
    assert {each["baseline"] for each in larger["worst"] + larger["confused"]} == {None}


def test_an_example_of_a_confusion_that_only_ties_produce():
    codes = pack(np.zeros((3, BITS), bool))
    database = EncodedPart(["a", "b", "c"], codes, np.array([0, 1, 2]), ["a", "b", "c"])
    query = database.select(np.array([0]))
    evaluation = run(query, database)
    assert [(pair.nearest, pair.queries) for pair in evaluation.confused] == [(1, 1 / 3), (2, 1 / 3)]
    assert [query.id for query in evaluation.gallery if query.reason == "confused"] == ["a", "a"]


def test_wasted_bits_are_named():
    bits = failures_of({"": run()})["directions"][""]["bits"]
    assert (bits["count"], bits["dead"], bits["limit"]) == (BITS, [DEAD], 0.9)
    pairs = {tuple(each["bits"]): each["correlation"] for each in bits["correlated"]}
    assert pairs[0, COMPLEMENT] == pytest.approx(-1)
    assert bits["num_correlated"] == len(pairs)


def test_a_perfect_model_confuses_nothing():
    prototypes = np.eye(len(CLASSES), BITS, dtype=bool)
    labels = np.arange(40) % len(CLASSES)
    perfect = dataclasses.replace(part(40, 1, "q"), codes=pack(prototypes[labels]))
    assert failures_of({"": run(perfect, perfect)})["directions"][""]["confused"] == []


def test_one_class_as_one_of_several_gives_the_same_failures():
    parts = part(40, 1, "q"), part(80, 2, "d")
    one_hot = [dataclasses.replace(each, labels=np.eye(4, dtype=bool)[each.labels]) for each in parts]
    assert failures_of({"": run(*one_hot)}) == failures_of({"": run(*parts)})


def test_confused_pairs_of_items_of_several_classes():
    """Nearest items that share a class are no confusion; others count in parts for all pairs of classes."""
    codes = pack(np.eye(5, BITS, dtype=bool))
    queries = EncodedPart(
        ["a", "b", "c"],
        codes[:3],
        np.array([[1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 1]], bool),
        ["a", "b", "c"],
    )
    database = EncodedPart(
        ["x", "y", "z"],
        codes[:3],
        np.array([[0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], bool),
        ["x", "y", "z"],
    )
    evaluation = run(queries, database)
    found = {(pair.label, pair.nearest): (pair.queries, pair.of) for pair in evaluation.confused}
    assert found == {(0, 2): (0.25, 3), (0, 3): (0.25, 3), (1, 2): (0.25, 1), (1, 3): (0.25, 1)}
    assert {query.id for query in evaluation.gallery if query.reason == "confused"} == {"a"}
    # The rarer class is first: a larger share of its queries.
    assert [pair.label for pair in evaluation.confused] == [1, 1, 0, 0]


def test_the_file_has_ids_and_no_paths(tmp_path: Path):
    evaluations = {"image->text": run(), "text->image": run(part(40, 5, "q"))}
    write_evaluation(tmp_path, evaluations)
    text = (tmp_path / "failures.json").read_text()
    assert json.loads(text) == failures_of(evaluations)
    assert "/home/user" not in text
    assert list(json.loads(text)["directions"]) == ["image->text", "text->image"]
    assert json.loads((tmp_path / "metrics.json").read_text())["model_id"] == "abc"
