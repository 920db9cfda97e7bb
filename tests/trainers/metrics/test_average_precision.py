"""Average precision against its definitions, evaluated on every order of tied items."""

from itertools import permutations, product
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orbithash.encoders.errors import InputError
from orbithash.trainers.metrics.average_precision import (
    Histograms,
    average_precision,
    hits_at,
    ranked_average_precision,
    success_at,
)

DEFINITIONS = ("ap_min", "ap_hits", "ap_k", "ap_first_k")
# Relevance by rank in the worked example: six of 34 items are relevant.
EXAMPLE = [1, 0, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 1] + [0] * 20 + [1]
Groups = list[tuple[int, int]]


def naive(relevance: list[int], k: int | None, definition: str) -> float:
    k = len(relevance) if k is None else k
    total = sum(relevance)
    precisions, found = [], 0
    for rank, relevant in enumerate(relevance, 1):
        found += relevant
        if relevant:
            precisions.append((rank, found / rank))
    within = [p for rank, p in precisions if rank <= k]
    if definition == "ap_first_k":
        within = [p for _, p in precisions[:k]]
    divisor = {"ap_min": min(k, total), "ap_hits": len(within), "ap_k": k, "ap_first_k": min(k, total)}[definition]
    return sum(within) / divisor if divisor else 0.0


def orders(groups: Groups) -> list[list[int]]:
    """Return the relevance by rank for every equally likely order: all combinations of the orders of each group."""
    arrangements = [sorted(set(permutations([1] * g + [0] * (n - g)))) for n, g in groups]
    return [[r for group in choice for r in group] for choice in product(*arrangements)]


def histograms(*queries: Groups) -> Histograms:
    width = max(map(len, queries))
    padded = np.array([[*groups, *[(0, 0)] * (width - len(groups))] for groups in queries], np.int64)
    return Histograms(padded[..., 0], padded[..., 1])


def one(groups: Groups, k: int | None, definition: str, policy: str = "expected") -> float:
    return float(average_precision(histograms(groups), k, definition, policy)[0])


def tie_groups(max_items: int, max_groups: int) -> st.SearchStrategy[Groups]:
    group = st.integers(0, max_items).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n)))
    return st.lists(group, min_size=1, max_size=max_groups)


@settings(max_examples=300, deadline=None)
@given(groups=tie_groups(5, 3), k=st.integers(1, 16) | st.none(), definition=st.sampled_from(DEFINITIONS))
def test_expected_is_the_mean_over_all_orders(groups, k, definition):
    scores = [naive(order, k, definition) for order in orders(groups)]
    assert one(groups, k, definition) == pytest.approx(np.mean(scores), abs=1e-12)


@settings(max_examples=200, deadline=None)
@given(groups=tie_groups(12, 6), k=st.integers(1, 60) | st.none(), definition=st.sampled_from(DEFINITIONS))
def test_optimistic_ranks_relevant_items_first_and_pessimistic_last(groups, k, definition):
    first = [r for n, g in groups for r in [1] * g + [0] * (n - g)]
    last = [r for n, g in groups for r in [0] * (n - g) + [1] * g]
    assert one(groups, k, definition, "optimistic") == pytest.approx(naive(first, k, definition), abs=1e-12)
    assert one(groups, k, definition, "pessimistic") == pytest.approx(naive(last, k, definition), abs=1e-12)


@settings(max_examples=300, deadline=None)
@given(
    groups=tie_groups(2000, 5),
    k=st.integers(1, 3000) | st.none(),
    definition=st.sampled_from(["ap_min", "ap_k", "ap_first_k"]),
)
def test_expected_lies_between_pessimistic_and_optimistic(groups, k, definition):
    low, middle, high = (one(groups, k, definition, p) for p in ("pessimistic", "expected", "optimistic"))
    assert -1e-9 <= low <= middle + 1e-9 <= high + 2e-9 <= 1 + 3e-9


@settings(max_examples=300, deadline=None)
@given(groups=tie_groups(5, 3), k=st.integers(1, 16))
def test_success_is_the_share_of_orders_with_a_relevant_item_within_k(groups, k):
    scores = [float(any(order[:k])) for order in orders(groups)]
    assert success_at(histograms(groups), k)[0] == pytest.approx(np.mean(scores), abs=1e-12)
    assert success_at(histograms(groups), k, "optimistic")[0] == max(scores)
    assert success_at(histograms(groups), k, "pessimistic")[0] == min(scores)


def test_success_among_many_ties():
    # 10 of n = 10**7 tied items are relevant: 1 - C(n - 10, 20) / C(n, 20), about 20 draws at 10**-6 each.
    assert success_at(histograms([(10**7, 10)]), 20)[0] == pytest.approx(2e-5, abs=1e-8)
    assert success_at(histograms([(10**7, 10**7)]), 20)[0] == 1
    with pytest.raises(InputError, match="the cut-off k is 0"):
        success_at(histograms([(1, 1)]), 0)


def test_ap_hits_can_rise_when_relevant_items_drop_below_k():
    groups = [(1, 1), (3, 0), (2, 1)]
    assert one(groups, 5, "ap_hits", "pessimistic") == 1.0
    assert one(groups, 5, "ap_hits", "optimistic") == pytest.approx((1 + 2 / 5) / 2)


@pytest.mark.parametrize(
    ("definition", "value"), [("ap_hits", 0.833), ("ap_min", 0.333), ("ap_k", 0.333), ("ap_first_k", 0.583)]
)
def test_worked_example(definition, value):
    ranks = np.flatnonzero(EXAMPLE) + 1
    assert ranked_average_precision(ranks, 5, definition, len(EXAMPLE)) == pytest.approx(value, abs=5e-4)
    groups = [(1, r) for r in EXAMPLE]
    assert [one(groups, 5, definition, p) for p in ("expected", "optimistic", "pessimistic")] == pytest.approx(
        [value] * 3, abs=5e-4
    )


@settings(max_examples=200, deadline=None)
@given(
    relevance=st.lists(st.integers(0, 1), max_size=30),
    k=st.integers(1, 40) | st.none(),
    definition=st.sampled_from(DEFINITIONS),
)
def test_ranked_equals_the_definition(relevance, k, definition):
    score = ranked_average_precision(np.flatnonzero(relevance) + 1, k, definition, len(relevance))
    assert score == pytest.approx(naive(relevance, k, definition), abs=1e-12)


def reciprocal_sums(before: int, items: int, relevant: int, count: int) -> float:
    """Return the expected `ap_first_k` of one group after `before` irrelevant items, with exact binomials."""
    total = 0.0
    for i in range(1, count + 1):
        places = range(i, items - relevant + i + 1)
        chances = [comb(t - 1, i - 1) * comb(items - t, relevant - i) for t in places]
        total += i * sum(c / comb(items, relevant) / (before + t) for c, t in zip(chances, places, strict=True))
    return total / count


@pytest.mark.parametrize("before", [0, 1, 30, 5000])
@pytest.mark.parametrize(("items", "relevant"), [(300, 299), (300, 150), (300, 21), (1500, 40), (40, 39)])
def test_ap_first_k_of_medium_groups_is_exact(before, items, relevant):
    for count in {1, 2, 20, relevant - 1}:
        value = one([(before, 0), (items, relevant)], count, "ap_first_k")
        assert value == pytest.approx(reciprocal_sums(before, items, relevant, count), rel=1e-10)


@pytest.mark.parametrize(
    ("before", "items", "relevant", "k"), [(0, 300, 40, 100), (70, 300, 299, 100), (99, 50, 3, 100)]
)
def test_ap_hits_of_medium_groups_is_exact(before, items, relevant, k):
    slots, total = k - before, 0.0
    for hits in range(1, min(slots, relevant) + 1):
        chance = comb(relevant, hits) * comb(items - relevant, slots - hits) / comb(items, slots)
        among = [(slots, hits)]
        # Given the number of hits, their ranks are uniform: the mean is `ap_k` of a group of `slots` items.
        total += chance * one([(before, 0), *among], k, "ap_k") * k / hits
    assert one([(before, 0), (items, relevant)], k, "ap_hits") == pytest.approx(total, rel=1e-10)


def simulate(groups: Groups, k: int, definition: str, repeats: int) -> float:
    rng = np.random.default_rng(7)
    scores, length = [], sum(n for n, _ in groups)
    for _ in range(repeats):
        parts, start = [], 0
        for n, g in groups:
            parts.append(start + 1 + np.sort(rng.permutation(n)[:g]))
            start += n
        scores.append(ranked_average_precision(np.concatenate(parts), k, definition, length))
    return float(np.mean(scores))


@pytest.mark.parametrize("definition", DEFINITIONS)
@pytest.mark.parametrize("groups", [[(500, 3), (4000, 300)], [(1000, 50), (3000, 20)], [(5000, 5)]])
def test_expected_agrees_with_shuffling_large_groups(groups, definition):
    assert one(groups, 200, definition) == pytest.approx(simulate(groups, 200, definition, 2000), rel=0.1)


@pytest.mark.parametrize("definition", DEFINITIONS)
@pytest.mark.parametrize("k", [1, 20, 1900, 500_000, None])
@pytest.mark.parametrize(
    "groups",
    [
        [(10**6, 10**6)],
        [(10**6, 500_000)],
        [(10**6, 21)],
        [(10**6, 1)],
        [(10**6, 0), (10**6, 400_000)],
        [(999_990, 0), (10**6, 30)],
    ],
)
def test_a_million_ties_give_a_finite_score_from_0_to_1(groups, k, definition):
    value = one(groups, k, definition)
    assert np.isfinite(value)
    assert 0 <= value <= 1 + 1e-12
    if groups == [(10**6, 10**6)] and definition != "ap_k":
        assert value == pytest.approx(1.0, rel=1e-12)


def test_the_rank_of_the_first_hit_is_geometric_if_half_are_relevant():
    # The sum of 2^-t / t over t = 1, 2, … is ln 2; a million items approximate the infinite sum.
    assert one([(10**6, 500_000)], 1, "ap_first_k") == pytest.approx(np.log(2), rel=1e-6)


@pytest.mark.parametrize(
    ("before", "items", "digits"),
    [(0, 1, 14), (0, 5000, 14), (255, 3, 14), (256, 1, 13), (257, 5000, 13), (3_000_000, 50, 8)],
)
def test_precision_at_deep_ranks(before, items, digits):
    # All items are relevant: the j-th has rank before + j, whatever the order.
    exact = sum(j / (before + j) for j in range(1, items + 1)) / items
    assert one([(before, 0), (items, items)], None, "ap_min") == pytest.approx(exact, rel=10**-digits)
    assert one([(before, 0), (items, items)], None, "ap_hits", "optimistic") == pytest.approx(exact, rel=10**-digits)


def test_a_query_without_relevant_items_scores_zero():
    both = histograms([(2, 0), (3, 0)], [(2, 2), (3, 0)])
    for definition in DEFINITIONS:
        for policy in ("expected", "optimistic", "pessimistic"):
            assert average_precision(both, 2, definition, policy).tolist() == [0.0, 1.0]


def test_an_empty_database_scores_zero():
    empty = histograms([(0, 0), (0, 0)])
    assert [average_precision(empty, k, d)[0] for d in DEFINITIONS for k in (3, None)] == [0.0] * 8


@settings(max_examples=150, deadline=None)
@given(groups=tie_groups(5, 3), k=st.integers(1, 16))
def test_hits_at_k_by_every_policy(groups, k):
    found = [sum(order[:k]) for order in orders(groups)]
    by_policy = [hits_at(histograms(groups), k, p)[0] for p in ("expected", "optimistic", "pessimistic")]
    assert by_policy == pytest.approx([np.mean(found), max(found), min(found)], abs=1e-12)


@pytest.mark.parametrize("policy", ["expected", "optimistic", "pessimistic"])
@pytest.mark.parametrize("definition", DEFINITIONS)
def test_queries_have_no_effect_on_each_other(definition, policy):
    # Groups that rank k cuts at all depths, and queries of which it cuts none.
    rng = np.random.default_rng(0)
    items = rng.integers(0, 40, (60, 6)) * rng.integers(0, 2, (60, 6))
    relevant = rng.integers(0, items + 1)
    for k in (1, 7, 30, None):
        alone = [
            average_precision(Histograms(*rows), k, definition, policy)[0]
            for rows in zip(items[:, None], relevant[:, None], strict=True)
        ]
        assert average_precision(Histograms(items, relevant), k, definition, policy).tolist() == alone


def test_without_distances_all_items_are_tied():
    chance = histograms([(3, 3), (5, 0), (2, 1)]).without_distances()
    assert chance.items.tolist() == [[10]]
    assert chance.relevant.tolist() == [[4]]


@pytest.mark.parametrize("k", [0, -1, 2.0, True, "20"])
def test_invalid_cutoffs_are_refused(k):
    with pytest.raises(InputError, match="an integer of at least 1"):
        average_precision(histograms([(1, 1)]), k, "ap_min")


def test_errors_for_unknown_names_list_the_known_ones():
    with pytest.raises(InputError, match="ap_min, ap_hits, ap_k, ap_first_k"):
        average_precision(histograms([(1, 1)]), 5, "ap")
    with pytest.raises(InputError, match="expected, optimistic, pessimistic"):
        average_precision(histograms([(1, 1)]), 5, "ap_min", "index")
