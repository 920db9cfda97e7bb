"""Retrieval metrics and code statistics against plain loops over sorted lists."""

import dataclasses
from itertools import permutations

import numpy as np
import pytest
import torch

from orbithash.encoders.codes import hamming, pack
from orbithash.encoders.errors import InputError
from orbithash.trainers.metrics.average_precision import average_precision, ranked_average_precision
from orbithash.trainers.metrics.gains import normalised_gains
from orbithash.trainers.metrics.metrics import (
    DEFINITIONS,
    evaluate_codes,
    nearest_class_counts,
    nearest_class_shares,
    radius_curve,
)
from orbithash.trainers.metrics.rankings import count_gains, rank_histograms, rankings
from orbithash.trainers.metrics.retrieval import Retrieval

KEYS = ("expected", "index", "optimistic", "pessimistic")


def retrieval(num_queries=9, num_items=40, bits=12, classes=4, seed=0, exclude=False, unknown=0):
    rng = np.random.default_rng(seed)
    database = rng.random((num_items, bits)) < 0.4
    labels = rng.integers(0, classes, num_items)
    labels[rng.permutation(num_items)[:unknown]] = -1
    excluded = None
    if exclude:
        excluded = np.flatnonzero(labels >= 0)[:num_queries]
        queries, query_labels = database[excluded], labels[excluded]
    else:
        queries, query_labels = rng.random((num_queries, bits)) < 0.4, rng.integers(0, classes, num_queries)
    return Retrieval(pack(queries), pack(database), query_labels, labels, bits, excluded)


def pairs(r: Retrieval, query: int) -> list[tuple[int, int, bool]]:
    """Return (distance, position, relevant) of every item that a query ranks, computed byte by byte."""
    out = []
    for position, code in enumerate(r.database_codes):
        if r.exclude is not None and r.exclude[query] == position:
            continue
        distance = sum((int(a) ^ int(b)).bit_count() for a, b in zip(r.query_codes[query], code, strict=True))
        out.append((distance, position, bool(r.query_labels[query] == r.database_labels[position])))
    return out


def all_pairs(r: Retrieval) -> tuple[np.ndarray, np.ndarray]:
    """Return distances [Q, N], K + 1 for excluded items, and the number of shared classes [Q, N], all at once."""
    distances = hamming(r.query_codes, r.database_codes)
    if r.multi_label:
        shared = r.query_labels.astype(int) @ r.database_labels.T.astype(int)
    else:
        shared = (r.query_labels[:, None] == r.database_labels).astype(int)
    if r.exclude is not None:
        rows = np.flatnonzero(r.exclude >= 0)
        distances[rows, r.exclude[rows]] = r.bits + 1
    return distances, shared


def shares_of_nearest(r: Retrieval, num_classes: int) -> np.ndarray:
    return nearest_class_shares(nearest_class_counts(r, num_classes), r.query_labels)


def by_order(r: Retrieval, k: int | None, definition="ap_min", seed=None) -> np.ndarray:
    """Return the average precision of each query with ties in the database's order, or in a random one."""
    if seed is not None:
        assert r.exclude is None
        order = np.random.default_rng(seed).permutation(len(r.database_codes))
        r = dataclasses.replace(r, database_codes=r.database_codes[order], database_labels=r.database_labels[order])
    ranks = [np.flatnonzero(ranking.gains) + 1 for ranking in rankings(r)]
    return np.array([ranked_average_precision(a, k, definition, n) for a, n in zip(ranks, r.num_items, strict=True)])


def naive(relevance: list[bool], k: int, definition: str) -> float:
    found, total, within, precisions = 0, sum(relevance), [], []
    for rank, relevant in enumerate(relevance, 1):
        if relevant:
            found += 1
            precisions.append(found / rank)
            if rank <= k:
                within.append(found / rank)
    values = precisions[:k] if definition == "ap_first_k" else within
    divisor = {"ap_hits": len(within), "ap_k": k}.get(definition, min(k, total))
    return sum(values) / divisor if divisor else 0.0


VARIANTS = [
    {},
    {"exclude": True},
    {"unknown": 15},
    {"exclude": True, "unknown": 10},
    {"bits": 8},
    {"bits": 512},
    {"bits": 13, "classes": 40},
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_histograms_count_pairs(variant):
    r = retrieval(**variant)
    histograms = rank_histograms(r)
    assert histograms.items.shape == histograms.relevant.shape == (len(r.query_codes), r.bits + 1)
    for query in range(len(r.query_codes)):
        expected = np.zeros((2, r.bits + 1), int)
        for distance, _, relevant in pairs(r, query):
            expected[:, distance] += (1, relevant)
        assert [histograms.items[query].tolist(), histograms.relevant[query].tolist()] == expected.tolist()


# One item, several blocks of items, and several groups of queries.
SIZES = [(1, 1), (3, 1023), (17, 1024), (40, 2500)]


@pytest.mark.parametrize(("num_queries", "num_items"), SIZES)
@pytest.mark.parametrize("bits", [8, 64, 100, 512])
@pytest.mark.parametrize("multi", [False, True])
def test_counts_and_rankings_are_those_of_all_pairs(num_queries, num_items, bits, multi):
    make = multi_label if multi else retrieval
    r = make(num_queries, num_items, bits, classes=70 if multi else 4, seed=bits)
    exclude = np.random.default_rng(bits).integers(-1, num_items, num_queries)
    r = dataclasses.replace(r, exclude=exclude)
    distances, shared = all_pairs(r)
    cells = np.where(distances > bits, -1, distances * 3 + np.minimum(shared, 2))
    expected = [np.bincount(row[row >= 0], minlength=(bits + 1) * 3).reshape(-1, 3) for row in cells]
    assert (count_gains(r, slice(None), 3) == expected).all()
    order = np.argsort(distances, axis=1, kind="stable")
    for limit in (None, 1, 20):
        for query, ranking in enumerate(rankings(r, limit)):
            row = order[query, : r.num_items[query]][:limit]
            assert ranking.items.tolist() == row.tolist()
            assert ranking.gains.tolist() == shared[query, row].tolist()
            assert (ranking.counts == expected[query].sum(1)).all()


@pytest.mark.parametrize("num_threads", [1, 3])
def test_counts_do_not_depend_on_the_number_of_threads(num_threads):
    r = retrieval(num_queries=100, num_items=1500, exclude=True)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        found = rank_histograms(r)
    finally:
        torch.set_num_threads(before)
    distances, shared = all_pairs(r)
    assert found.items.tolist() == [np.bincount(row, minlength=r.bits + 2)[:-1].tolist() for row in distances]
    assert (found.num_relevant == ((shared > 0) & (distances <= r.bits)).sum(1)).all()


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("limit", [None, 20])
def test_rankings_do_not_depend_on_threads_and_known_counts(num_threads, limit):
    r = retrieval(num_queries=100, num_items=1500, exclude=True)
    expected = list(rankings(r, limit))
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        for counts in (None, rank_histograms(r).items):
            found = list(rankings(r, limit, counts))
            assert len(found) == len(expected)
            for ranking, other in zip(found, expected, strict=True):
                assert all((a == b).all() for a, b in zip(ranking, other, strict=True))
        # One who wants few is not kept waiting by the others.
        assert (next(rankings(r, limit)).items == expected[0].items).all()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("multi", [False, True])
@pytest.mark.parametrize("chunk_pairs", [1, 90, 10**6])
def test_counts_of_nearest_classes_of_chunks_of_queries(multi, chunk_pairs):
    r = (multi_label if multi else retrieval)(exclude=True)
    whole = nearest_class_counts(r, 5)
    assert nearest_class_counts(r, 5, chunk_pairs=chunk_pairs) == pytest.approx(whole, abs=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("definition", DEFINITIONS)
def test_index_order_is_a_stable_sort(variant, definition):
    r = retrieval(**variant)
    for k in (1, 7, 100):
        expected = [naive([rel for _, _, rel in sorted(pairs(r, q))], k, definition) for q in range(len(r.query_codes))]
        assert by_order(r, k, definition) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_random_orders_average_to_the_expectation(definition):
    r = retrieval(num_queries=40, num_items=60, bits=8)
    means = [by_order(r, 10, definition, seed=seed).mean() for seed in range(200)]
    assert len(set(means)) > 100
    expected = average_precision(rank_histograms(r), 10, definition).mean()
    assert np.mean(means) == pytest.approx(expected, abs=5 * np.std(means) / np.sqrt(200))


def test_a_seed_gives_the_same_order():
    r = retrieval()
    assert (by_order(r, 10, seed=3) == by_order(r, 10, seed=3)).all()


@pytest.mark.parametrize("exclude", [False, True])
def test_evaluate_codes(exclude):
    r = retrieval(num_queries=12, num_items=30, bits=8, exclude=exclude)
    histograms = rank_histograms(r)
    metrics, chance = evaluate_codes(r, histograms, (5, 20))
    definitions = [f"{d}@{k}" for k in (5, 20) for d in DEFINITIONS]
    at_k = [f"{m}@{k}" for k in (1, 5, 10, 20, 50, 100) for m in ("precision", "recall")]
    assert sorted(metrics) == sorted([*definitions, "ap_min@all", *at_k, "success@20", "precision_radius@2"])
    assert metrics.keys() == chance.keys()
    assert all(tuple(values) == KEYS for values in metrics.values())
    rankings = [sorted(pairs(r, q)) for q in range(12)]
    for k in (5, 10, 50):
        hits = [sum(rel for _, _, rel in ranking[:k]) for ranking in rankings]
        totals = [max(1, sum(rel for _, _, rel in ranking)) for ranking in rankings]
        assert metrics[f"precision@{k}"]["index"] == pytest.approx(np.mean(hits) / k)
        assert metrics[f"recall@{k}"]["index"] == pytest.approx(np.mean(np.divide(hits, totals)))
    assert metrics["success@20"]["index"] == np.mean([any(rel for *_, rel in ranking[:20]) for ranking in rankings])
    assert metrics["ap_hits@5"]["index"] == pytest.approx(by_order(r, 5, "ap_hits").mean())
    assert metrics["ap_min@all"]["index"] == pytest.approx(by_order(r, None).mean())
    assert metrics["ap_min@20"]["expected"] == average_precision(histograms, 20).mean()
    for name, values in metrics.items():
        if not name.startswith("ap_hits"):
            assert values["pessimistic"] - 1e-12 <= values["expected"] <= values["optimistic"] + 1e-12
            assert values["pessimistic"] - 1e-12 <= values["index"] <= values["optimistic"] + 1e-12
    ball = [[rel for d, _, rel in ranking if d <= 2] for ranking in rankings]
    assert metrics["precision_radius@2"]["expected"] == pytest.approx(np.mean([np.mean(b) if b else 0 for b in ball]))


def test_chance_is_the_score_of_codes_without_information():
    r = retrieval(num_queries=12, num_items=30)
    constant = dataclasses.replace(r, query_codes=r.query_codes * 0, database_codes=r.database_codes * 0)
    _, chance = evaluate_codes(r, rank_histograms(r))
    scored, _ = evaluate_codes(constant, rank_histograms(constant))
    assert {name: values["expected"] for name, values in scored.items()} == pytest.approx(chance)


def test_perfect_codes_score_one():
    labels = np.repeat([0, 1, 2], 10)
    codes = pack(np.eye(12, dtype=bool)[labels])
    metrics, _ = evaluate_codes(
        Retrieval(codes, codes, labels, labels, 12, np.arange(30)),
        rank_histograms(Retrieval(codes, codes, labels, labels, 12, np.arange(30))),
    )
    for name in ("ap_min@20", "ap_hits@20", "ap_first_k@20", "ap_min@all", "precision@5", "recall@10"):
        assert set(metrics[name].values()) == {1.0}
    # A class has nine other items, so at most nine of ten results are relevant.
    assert metrics["precision@10"]["expected"] == pytest.approx(0.9)


def test_excluding_the_query_itself_lowers_the_score():
    r = retrieval(exclude=True, bits=64)
    with_itself = dataclasses.replace(r, exclude=None)
    assert by_order(r, 1).mean() < by_order(with_itself, 1).mean() == 1.0


@pytest.mark.parametrize("exclude", [False, True])
def test_radius_curve(exclude):
    r = retrieval(exclude=exclude, unknown=8)
    curve = radius_curve(rank_histograms(r))
    for radius in range(r.bits + 1):
        balls = [[rel for d, _, rel in pairs(r, q) if d <= radius] for q in range(len(r.query_codes))]
        totals = [sum(rel for _, _, rel in pairs(r, q)) for q in range(len(r.query_codes))]
        assert curve.precision[radius] == pytest.approx(np.mean([np.mean(b) if b else 0 for b in balls]))
        recalls = [sum(b) / t if t else 0 for b, t in zip(balls, totals, strict=True)]
        assert curve.recall[radius] == pytest.approx(np.mean(recalls))
        assert curve.empty[radius] == pytest.approx(np.mean([not b for b in balls]))


@pytest.mark.parametrize("variant", [{}, {"exclude": True}, {"unknown": 20, "bits": 8}])
def test_tied_nearest_items_share_rank_one(variant):
    r = retrieval(**variant)
    expected = np.zeros((5, 5))
    for query, label in enumerate(r.query_labels):
        nearest = min(d for d, _, _ in pairs(r, query))
        tied = [r.database_labels[p] for d, p, _ in pairs(r, query) if d == nearest]
        for other in tied:
            if other >= 0:
                expected[label, other] += 1 / len(tied) / np.count_nonzero(r.query_labels == label)
    assert shares_of_nearest(r, 5) == pytest.approx(expected)


def test_a_database_of_only_the_query_itself():
    code, label = pack(np.zeros((1, 8), bool)), np.array([0])
    alone = Retrieval(code, code, label, label, 8, np.array([0]))
    histograms = rank_histograms(alone)
    metrics, chance = evaluate_codes(alone, histograms)
    assert {v for values in metrics.values() for v in values.values()} == {0.0}
    assert set(chance.values()) == {0.0}
    assert shares_of_nearest(alone, 1).tolist() == [[0.0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_labels": np.array([0, -1] + [0] * 7)}, "1 of 9 queries have no label"),
        ({"query_labels": np.zeros(9)}, r"query labels are 9 integers or bool \[9, classes\], got float64"),
        ({"database_labels": np.zeros(3, int)}, r"database labels are 40 integers or bool .* got int64 \(3,\)"),
        ({"query_codes": np.zeros((0, 2), np.uint8), "query_labels": np.zeros(0, int)}, "needs codes"),
        ({"query_codes": np.zeros((9, 3), np.uint8)}, "a code of 12 bits has 2 bytes"),
        ({"query_codes": np.full((9, 2), 255, np.uint8)}, "pad bits"),
        ({"bits": 4}, "from 8 to 512"),
        ({"exclude": np.full(9, 40)}, "-1 to 39 are allowed"),
        ({"query_labels": np.ones((9, 4), bool)}, "differ in the number of classes"),
        ({"query_labels": np.zeros((9, 4), bool), "database_labels": np.ones((40, 4), bool)}, "9 of 9 queries have no"),
        ({"exclude": np.full(8, 0)}, "positions to exclude are 9 integers"),
    ],
)
def test_invalid_inputs_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(retrieval(), **change)


# Multi-label items.


def multi_label(num_queries=9, num_items=30, bits=8, classes=5, seed=0, exclude=False):
    r = retrieval(num_queries, num_items, bits, classes, seed, exclude)
    rng = np.random.default_rng(seed + 1)
    database = rng.random((num_items, classes)) < 0.3
    database[:2] = False
    queries = rng.random((num_queries, classes)) < 0.4
    if exclude:
        database[r.exclude, 0] = True
        queries = database[r.exclude]
    queries[:, 0] |= ~queries.any(1)
    return dataclasses.replace(r, query_labels=queries, database_labels=database)


def gains(r: Retrieval, query: int) -> list[tuple[int, int, int]]:
    """Return (distance, position, gain) of every item that a query ranks."""
    shared = [len(set(np.flatnonzero(r.query_labels[query])) & set(np.flatnonzero(row))) for row in r.database_labels]
    one_label = dataclasses.replace(
        r, query_labels=np.zeros(len(r.query_codes), int), database_labels=np.zeros(len(r.database_codes), int)
    )
    return [(d, p, shared[p]) for d, p, _ in pairs(one_label, query)]


def naive_ndcg(ranked: list[int], available: list[int], k: int) -> float:
    def dcg(values):
        return sum(gain / np.log2(rank + 1) for rank, gain in enumerate(values[:k], 1))

    ideal = dcg(sorted(available, reverse=True))
    return dcg(ranked) / ideal if ideal else 0.0


@pytest.mark.parametrize("exclude", [False, True])
def test_items_that_share_a_class_are_relevant(exclude):
    r = multi_label(exclude=exclude)
    histograms = rank_histograms(r)
    for query in range(9):
        expected = np.zeros((2, r.bits + 1), int)
        for distance, _, gain in gains(r, query):
            expected[:, distance] += (1, gain > 0)
        assert [histograms.items[query].tolist(), histograms.relevant[query].tolist()] == expected.tolist()


@pytest.mark.parametrize("k", [1, 5, 20, 100])
@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("chunk_pairs", [1, 10**6])
def test_ndcg_by_every_policy(k, exclude, chunk_pairs):
    r = multi_label(exclude=exclude)
    found = normalised_gains(r, [k], chunk_pairs=chunk_pairs)[f"ndcg@{k}"]
    for query in range(9):
        items = gains(r, query)
        all_gains = [gain for _, _, gain in items]
        orders = {"index": 1, "optimistic": -1, "pessimistic": 1}
        for policy, sign in orders.items():
            key = (lambda i: i[:2]) if policy == "index" else (lambda i, sign=sign: (i[0], sign * i[2]))
            ranked = [gain for _, _, gain in sorted(items, key=key)]
            assert found[policy][query] == pytest.approx(naive_ndcg(ranked, all_gains, k)), policy


def test_expected_ndcg_is_the_mean_over_all_orders():
    r = dataclasses.replace(multi_label(num_items=7), database_codes=np.repeat(np.uint8([[0], [255]]), [3, 4], axis=0))
    r = dataclasses.replace(r, query_codes=np.zeros((9, 1), np.uint8))
    found = normalised_gains(r, [4, 7])
    for k in (4, 7):
        for query in range(9):
            values = [gain for _, _, gain in gains(r, query)]
            scores = [
                naive_ndcg([*near, *far], values, k)
                for near in permutations(values[:3])
                for far in permutations(values[3:])
            ]
            assert found[f"ndcg@{k}"]["expected"][query] == pytest.approx(np.mean(scores))
    by_chance = [naive_ndcg(list(order), values, 4) for order in permutations(values)]
    assert found["ndcg@4"]["chance"][-1] == pytest.approx(np.mean(by_chance))


def test_queries_without_a_shared_class_score_zero():
    r = multi_label()
    without_classes = dataclasses.replace(r, database_labels=np.zeros_like(r.database_labels))
    assert {float(v) for values in normalised_gains(without_classes, [5])["ndcg@5"].values() for v in values} == {0.0}
