"""Metrics of rescored rankings, compared with averages over orders that are written out."""

import itertools
import math

import numpy as np
import pytest

from orbithash.encoders.codes import hamming, outputs_of, pack
from orbithash.trainers.metrics.average_precision import (
    Histograms,
    average_precision,
    hits_at,
    ranked_average_precision,
    success_at,
)
from orbithash.trainers.metrics.metrics import DEFINITIONS, POLICIES, PRECISION_CUTOFFS, SUCCESS_K, evaluate_codes
from orbithash.trainers.metrics.rankings import rank_histograms
from orbithash.trainers.metrics.rescored import Scores, rescored_metrics
from orbithash.trainers.metrics.retrieval import Retrieval

BITS = 8


def make_retrieval(seed, num_items=7, exclude=False):
    rng = np.random.default_rng(seed)
    codes = pack(rng.random((num_items, BITS)) < 0.3)
    queries = pack(rng.random((3, BITS)) < 0.3)
    positions = np.array([2, -1, 0]) if exclude else None
    return Retrieval(queries, codes, rng.integers(0, 3, 3), rng.integers(-1, 3, num_items), BITS, positions)


def groups_of(retrieval, query, costs, size):
    """Return the tie groups of one query, each a list of items, by the definition."""
    items = [
        i for i in range(len(retrieval.database_codes)) if retrieval.exclude is None or retrieval.exclude[query] != i
    ]
    distance = hamming(retrieval.query_codes[query : query + 1], retrieval.database_codes)[0].tolist()
    cutoff = sorted(distance[i] for i in items)[min(size, len(items)) - 1]
    keys = {i: (0, costs[i]) if distance[i] <= cutoff else (1, distance[i]) for i in items}
    return [sorted(i for i in items if keys[i] == key) for key in sorted(set(keys.values()))]


def orders(groups):
    for parts in itertools.product(*(list(itertools.permutations(group)) for group in groups)):
        yield [item for part in parts for item in part]


def average(order, retrieval, query, k, definition):
    relevant = retrieval.database_labels[order] == retrieval.query_labels[query]
    return ranked_average_precision(np.flatnonzero(relevant) + 1, k, definition, len(order))


@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_metrics_are_averages_over_the_orders_of_ties(seed, exclude):
    retrieval = make_retrieval(seed, exclude=exclude)
    rng = np.random.default_rng(seed)
    vectors = rng.integers(-1, 2, (7, 2)).astype(np.int8)
    scores = Scores(rng.integers(-1, 2, (3, 2)).astype(np.int8), vectors)
    found = rescored_metrics(retrieval, scores, cutoffs=(2, 5), oversampling=1.5)
    for k, definition in itertools.product((2, 5), DEFINITIONS):
        expected, index = [], []
        for query in range(3):
            dots = vectors.astype(int) @ scores.queries[query].astype(int)
            squares = (vectors.astype(int) ** 2).sum(1) * (scores.queries[query].astype(int) ** 2).sum()
            costs = [-dot / math.sqrt(square) if square else 0.0 for dot, square in zip(dots, squares, strict=True)]
            groups = groups_of(retrieval, query, costs, math.ceil(k * 1.5))
            every = [average(order, retrieval, query, k, definition) for order in orders(groups)]
            expected.append(np.mean(every))
            index.append(average([item for group in groups for item in group], retrieval, query, k, definition))
        assert found[f"{definition}@{k}"]["expected"] == pytest.approx(np.mean(expected), abs=1e-12)
        assert found[f"{definition}@{k}"]["index"] == pytest.approx(np.mean(index), abs=1e-12)


def test_scores_that_rank_as_the_distances_change_nothing():
    retrieval = make_retrieval(7, num_items=300)
    plain, _ = evaluate_codes(retrieval, rank_histograms(retrieval), (5, 20))
    found = rescored_metrics(
        retrieval, Scores(outputs_of(retrieval.query_codes, BITS), retrieval.database_codes), cutoffs=(5, 20)
    )
    assert found.keys() == {name for name in plain if not name.endswith(("@all", "radius@2"))}
    for name, by_policy in found.items():
        assert by_policy == pytest.approx(plain[name], abs=1e-12), name


def test_perfect_scores_bring_the_relevant_items_of_the_shortlist_to_the_front():
    retrieval = make_retrieval(3, num_items=200)
    labels = np.eye(3, dtype=np.int8) * 100
    database = np.concatenate([labels, np.zeros((1, 3), np.int8)])[retrieval.database_labels]
    found = rescored_metrics(retrieval, Scores(labels[retrieval.query_labels], database), (20,), oversampling=200 / 20)
    assert found["precision@20"]["pessimistic"] == 1
    assert found["ap_min@20"]["pessimistic"] == 1


@pytest.mark.parametrize("oversampling", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("seed", range(3))
def test_every_cutoff_has_its_own_shortlist(seed, oversampling):
    # Items tie within and beyond each shortlist, cut-offs exceed the database, and query 1 has no relevant item.
    retrieval = make_retrieval(seed, num_items=70, exclude=True)
    retrieval.database_labels[retrieval.database_labels == retrieval.query_labels[1]] = -1
    vectors = np.random.default_rng(seed).integers(-2, 3, (70, 2)).astype(np.int8)
    scores = Scores(vectors[:3], vectors)
    found = rescored_metrics(retrieval, scores, cutoffs=(5, 30), oversampling=oversampling)
    for k in {*PRECISION_CUTOFFS, SUCCESS_K, 30}:
        groups, orders = np.zeros((2, 3, 70), np.int64), []
        for query in range(3):
            costs = scores.costs(query, np.arange(70)).tolist()
            of_query = groups_of(retrieval, query, costs, math.ceil(k * oversampling))
            hits = [retrieval.database_labels[group] == retrieval.query_labels[query] for group in of_query]
            groups[:, query, : len(hits)] = [len(of_group) for of_group in hits], [of_group.sum() for of_group in hits]
            orders.append(np.concatenate(hits))
        histograms = Histograms(*groups)
        num_hits = np.array([order[:k].sum() for order in orders])
        num_relevant = np.maximum(histograms.num_relevant, 1)
        for policy in POLICIES:
            if k in PRECISION_CUTOFFS:
                hits = hits_at(histograms, k, policy)
                assert found[f"precision@{k}"][policy] == pytest.approx((hits / k).mean(), abs=1e-12)
                assert found[f"recall@{k}"][policy] == pytest.approx((hits / num_relevant).mean(), abs=1e-12)
                assert found[f"precision@{k}"]["index"] == pytest.approx(num_hits.mean() / k, abs=1e-12)
                assert found[f"recall@{k}"]["index"] == pytest.approx((num_hits / num_relevant).mean(), abs=1e-12)
            if k == SUCCESS_K:
                expected = success_at(histograms, k, policy).mean()
                assert found[f"success@{k}"][policy] == pytest.approx(expected, abs=1e-12)
            for definition in DEFINITIONS if k in (5, 30) else ():
                expected = average_precision(histograms, k, definition, policy).mean()
                assert found[f"{definition}@{k}"][policy] == pytest.approx(expected, abs=1e-12)


def test_a_database_of_the_query_alone_scores_0():
    codes, label = np.zeros((1, 1), np.uint8), np.zeros(1, np.int64)
    retrieval = Retrieval(codes, codes, label, label, BITS, np.zeros(1, np.int64))
    found = rescored_metrics(retrieval, Scores(np.ones((1, 2), np.int8), np.ones((1, 2), np.int8)))
    assert {value for by_policy in found.values() for value in by_policy.values()} == {0.0}
