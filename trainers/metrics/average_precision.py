"""Average precision of Hamming rankings, exact for tied distances.

K-bit codes have only K + 1 distances, so most items of a ranking are tied, and a published metric can change by tens of
points with the order of ties. Every metric here therefore names its tie policy:

- `expected`: the expectation over all orders within each group of equal distance, in closed form;
- `optimistic`, `pessimistic`: the relevant items of each group first, or last;
- one given order (`ranked_average_precision`): the database's own, or a random one.

All but the last need only the numbers of items and of relevant items at each distance (`Histograms`).

Four definitions are in use under the name "mAP@k". With rel_r the relevance at rank r, P@r the precision at r, R the
number of relevant items in the database and H_k the number of them within rank k:

- `ap_min`: sum of P@r rel_r over r <= k, divided by min(k, R);
- `ap_hits`: the same sum divided by H_k; 0 if H_k = 0;
- `ap_k`: the same sum divided by k;
- `ap_first_k`: mean of j / t_j over the first min(k, R) relevant items, where t_j is the rank of the j-th (also > k).

A query without relevant items has average precision 0 by every definition.

`optimistic` is an upper and `pessimistic` a lower bound of `expected` for all definitions except `ap_hits`, which can
rise if relevant items leave the first k.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from orbithash.encoders.errors import InputError
from orbithash.encoders.ranges import check_integer

__all__ = [
    "Definition",
    "Histograms",
    "Policy",
    "average_precision",
    "check_cutoff",
    "hits_at",
    "ranked_average_precision",
    "ranked_average_precisions",
    "success_at",
]

Definition = Literal["ap_min", "ap_hits", "ap_k", "ap_first_k"]
Policy = Literal["expected", "optimistic", "pessimistic"]

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Histograms:
    """Numbers of database items at each Hamming distance from each query.

    `items` and `relevant` are int64 [Q, K+1]: column d counts all items, and the relevant ones, at distance d.
    """

    items: Counts
    relevant: Counts

    @property
    def num_items(self) -> Counts:
        """Number of database items of each query, int64 [Q]."""
        totals: Counts = self.items.sum(1)
        return totals

    @property
    def num_relevant(self) -> Counts:
        """Number of relevant database items of each query, int64 [Q]."""
        totals: Counts = self.relevant.sum(1)
        return totals

    @cached_property
    def groups(self) -> "_Groups":
        """The tie groups in the form that the metrics are computed from."""
        items, relevant = self.items.astype(np.float64), self.relevant.astype(np.float64)
        return _Groups(items, relevant, np.cumsum(items, 1) - items, np.cumsum(relevant, 1) - relevant)

    def without_distances(self) -> "Histograms":
        """Return the same items all at one distance: the expectation is then that of a random order."""
        return Histograms(self.num_items[:, None], self.num_relevant[:, None])


@dataclass(frozen=True)
class _Groups:
    """Tie groups as float64 [Q, K+1]: numbers of their items and relevant items, and of those ranked before them."""

    items: Floats
    relevant: Floats
    before: Floats
    relevant_before: Floats


def average_precision(
    histograms: Histograms, k: int | None, definition: Definition = "ap_min", policy: Policy = "expected"
) -> Floats:
    """Return the average precision of each query, float64 [Q].

    Args:
        histograms: numbers of items and relevant items by distance.
        k: the cut-off; None: the whole ranking.
        definition: one of `Definition`, see the module.
        policy: order of the items at the same distance.

    Raises:
        InputError: k below 1, or an unknown definition or policy.
    """
    _check(definition, Definition, "definition of average precision")
    _check(policy, Policy, "tie policy")
    cutoffs = histograms.num_items if k is None else np.full(len(histograms.items), check_cutoff(k))
    groups = histograms.groups
    limits = cutoffs.astype(np.float64)
    if policy == "expected":
        if definition == "ap_hits":
            return _expected_over_hits(groups, limits)
        if definition == "ap_first_k":
            return _expected_over_first(groups, limits)
        sums = _expected_sums(groups, np.clip(limits[:, None] - groups.before, 0, groups.items)).sum(1)
        return _divide(sums, _divisor(definition, limits, groups))
    starts = groups.before if policy == "optimistic" else groups.before + groups.items - groups.relevant
    if definition == "ap_first_k":
        firsts = np.minimum(limits, groups.relevant.sum(1))
        counted = np.clip(firsts[:, None] - groups.relevant_before, 0, groups.relevant)
        return _divide(_run_sums(groups.relevant_before, starts, counted).sum(1), firsts)
    counted = np.clip(limits[:, None] - starts, 0, groups.relevant)
    sums = _run_sums(groups.relevant_before, starts, counted).sum(1)
    return _divide(sums, counted.sum(1) if definition == "ap_hits" else _divisor(definition, limits, groups))


def hits_at(histograms: Histograms, k: int, policy: Policy = "expected") -> Floats:
    """Return the number of relevant items within rank k of each query, float64 [Q]; P@k is this divided by k."""
    _check(policy, Policy, "tie policy")
    groups = histograms.groups
    slots = np.clip(check_cutoff(k) - groups.before, 0, groups.items)
    if policy == "optimistic":
        group_hits = np.minimum(slots, groups.relevant)
    elif policy == "pessimistic":
        group_hits = np.maximum(slots - (groups.items - groups.relevant), 0)
    else:
        group_hits = slots * _divide(groups.relevant, groups.items)
    hits: Floats = group_hits.sum(1)
    return hits


def success_at(histograms: Histograms, k: int, policy: Policy = "expected") -> Floats:
    """Return whether a relevant item is within rank k of each query, float64 [Q]; under `expected`, its probability."""
    if policy != "expected":
        return (hits_at(histograms, k, policy) > 0).astype(np.float64)
    from scipy.special import gammaln

    groups = histograms.groups
    slots = np.clip(check_cutoff(k) - groups.before, 0, groups.items)
    others = groups.items - groups.relevant
    # If s of a group's n items are drawn, none of its r relevant ones is with probability C(n - r, s) / C(n, s).
    log_none = gammaln(others + 1) - gammaln(np.maximum(others - slots, 0) + 1)
    log_none -= gammaln(groups.items + 1) - gammaln(groups.items - slots + 1)
    probability: Floats = 1 - np.where(slots > others, 0.0, np.exp(log_none)).prod(1)
    return probability


def ranked_average_precision(ranks: Counts, k: int | None, definition: Definition, num_items: int) -> float:
    """Return the average precision of one ranking without ties.

    Args:
        ranks: 1-based ranks of all relevant items, ascending, int64 [R].
        k: the cut-off; None: the whole ranking.
        definition: one of `Definition`.
        num_items: length of the ranking.
    """
    _check(definition, Definition, "definition of average precision")
    return ranked_average_precisions(ranks, k, num_items)[definition]


def ranked_average_precisions(ranks: Counts, k: int | None, num_items: int) -> dict[Definition, float]:
    """Return the average precision by each definition; the arguments are those of `ranked_average_precision`."""
    limit = num_items if k is None else check_cutoff(k)
    num_hits = int(ranks.searchsorted(limit, side="right"))
    num_counted = min(limit, len(ranks))
    precisions = np.arange(1, num_counted + 1) / ranks[:num_counted]
    total = float(precisions[:num_hits].sum())
    return {
        "ap_min": total / max(num_counted, 1),
        "ap_hits": total / max(num_hits, 1),
        "ap_k": total / max(limit, 1),
        "ap_first_k": float(precisions.sum()) / max(num_counted, 1),
    }


def check_cutoff(k: int) -> int:
    """Return the cut-off `k`; `InputError` unless it is an integer of at least 1."""
    return check_integer(k, "the cut-off k", 1)


def _check(name: str, allowed: object, what: str) -> None:
    if name not in get_args(allowed):
        raise InputError(f"{what} {name!r} is unknown; there are {', '.join(get_args(allowed))}")


def _divide(numerator: Floats, denominator: Floats) -> Floats:
    """Return the quotient; 0 if the denominator is 0."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)


def _divisor(definition: Definition, limits: Floats, groups: _Groups) -> Floats:
    return limits if definition == "ap_k" else np.minimum(limits, groups.relevant.sum(1))


_EXACT = 256
_HARMONIC = np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, _EXACT + 1))])


def _harmonic_span(before: Floats, count: Floats) -> Floats:
    """Return the sum of 1/(before + j) over j = 1..count, for whole before, count >= 0.

    From `_EXACT` on it is the difference of two Euler-Maclaurin expansions of the harmonic number, subtracted term by
    term, which keeps full precision for a short span at high ranks.
    """
    last = before + count
    split = np.maximum(before, _EXACT)
    end = np.maximum(last, split)
    first, middle = (np.minimum(rank, _EXACT).astype(np.int64) for rank in (before, last))
    span = end - split
    total: Floats = _HARMONIC[middle] - _HARMONIC[first] + np.log1p(span / split) - span / (2 * split * end)
    total += (1 / split**2 - 1 / end**2) / 12 - (1 / split**4 - 1 / end**4) / 120
    return total


def _run_sums(relevant_before: Floats, starts: Floats, counts: Floats) -> Floats:
    """Return the sum of P@r over `counts` relevant items at consecutive ranks from `starts` + 1 on."""
    sums = np.zeros_like(counts)
    some = np.nonzero(counts)
    before, first, count = relevant_before[some], starts[some], counts[some]
    sums[some] = count + (before - first) * _harmonic_span(first, count)
    return sums


def _expected_sums(groups: _Groups, slots: Floats) -> Floats:
    """Return the expected sum of P@r rel_r over the first `slots` positions of each group.

    For position j in a group of n items with g relevant ones, E[rel_j] = g/n, and E[rel_i | rel_j] = (g-1)/(n-1) for
    each of the j - 1 positions before it. Hence E[P@(b+j) rel_j] = g/n (r + 1 + (j-1)(g-1)/(n-1)) / (b+j).
    """
    sums = np.zeros_like(slots)
    # Most groups are beyond rank k, or have no relevant item.
    some = np.nonzero((slots > 0) & (groups.relevant > 0))
    items, relevant, before, count = groups.items[some], groups.relevant[some], groups.before[some], slots[some]
    another = _divide(relevant - 1, items - 1)
    constant = groups.relevant_before[some] + 1 - another * (before + 1)
    sums[some] = relevant / items * (another * count + constant * _harmonic_span(before, count))
    return sums


def _expected_over_hits(groups: _Groups, limits: Floats) -> Floats:
    """Return the expected `ap_hits`, conditioned on the hits of the group cut by rank k: only these are uncertain."""
    whole = groups.before + groups.items <= limits[:, None]
    sums = _expected_sums(groups, np.where(whole, groups.items, 0)).sum(1)
    hits_before = np.where(whole, groups.relevant, 0).sum(1)
    result = _divide(sums, hits_before)
    rows, columns = np.nonzero((groups.before < limits[:, None]) & ~whole)
    if not len(rows):
        return result
    items, relevant, before = (of[rows, columns] for of in (groups.items, groups.relevant, groups.before))
    slots = limits[rows] - before
    drawn = [
        _hypergeometric(*of_query) for of_query in zip(*map(np.ndarray.tolist, (items, relevant, slots)), strict=True)
    ]
    hits = np.concatenate([possible for possible, _ in drawn])
    # Given their number, the hits are distributed uniformly over the group's positions within rank k, as in a whole
    # group.
    lengths = [len(possible) for possible, _ in drawn]
    query = np.repeat(np.arange(len(rows)), lengths)
    positions, hits_of_before = slots[query], hits_before[rows][query]
    cut = _Groups(positions, hits, before[query], hits_of_before)
    values = _divide(sums[rows][query] + _expected_sums(cut, positions), hits_of_before + hits)
    parts = np.split(values, np.cumsum(lengths)[:-1])
    result[rows] = [chances @ of_hits for (_, chances), of_hits in zip(drawn, parts, strict=True)]
    return result


def _hypergeometric(items: float, relevant: float, slots: float) -> tuple[Floats, Floats]:
    """Return the possible numbers of relevant items among `slots` items drawn, and their probabilities."""
    hits = np.arange(max(0.0, slots - (items - relevant)), min(slots, relevant) + 1)
    rising = (relevant - hits[:-1]) * (slots - hits[:-1])
    falling = hits[1:] * (items - relevant - slots + hits[1:])
    return hits, _from_ratios(rising, falling)


def _from_ratios(rising: Floats, falling: Floats) -> Floats:
    """Return the distribution p_0, p_1, … with p_{i+1} / p_i = rising_i / falling_i, computed without overflow."""
    logs = np.concatenate([[0.0], np.cumsum(np.log(rising) - np.log(falling))])
    weights = np.exp(logs - logs.max())
    chances: Floats = weights / weights.sum()
    return chances


def _expected_over_first(groups: _Groups, limits: Floats) -> Floats:
    """Return the expected `ap_first_k`: whole groups, and the first relevant items of the last group counted."""
    firsts = np.minimum(limits, groups.relevant.sum(1))
    counted = np.clip(firsts[:, None] - groups.relevant_before, 0, groups.relevant)
    sums = _expected_sums(groups, np.where(counted == groups.relevant, groups.items, 0)).sum(1)
    rows, columns = np.nonzero((counted > 0) & (counted < groups.relevant))
    if not len(rows):
        return _divide(sums, firsts)
    of_cut = (of[rows, columns] for of in (groups.items, groups.relevant, groups.before, counted))
    reciprocals = _expected_reciprocal_ranks(*of_cut)
    numbers = groups.relevant_before[rows, columns][:, None] + np.arange(1, reciprocals.shape[1] + 1)
    lengths = counted[rows, columns].astype(np.int64).tolist()
    sums[rows] += [a[:n] @ b[:n] for a, b, n in zip(numbers, reciprocals, lengths, strict=True)]
    return _divide(sums, firsts)


def _expected_reciprocal_ranks(items: Floats, relevant: Floats, before: Floats, count: Floats) -> Floats:
    """Return u_i = E[1 / (before + T_i)], i = 1..count; T_i: position of the i-th relevant item of a shuffled group.

    The arguments are whole numbers [G], the result is [G, largest count]; what is beyond the count of a group has no
    meaning.

    P(T_i = t) = C(t-1, i-1) C(n-t, g-i) / C(n, g) gives i (n-t-g+i+1) P(T_{i+1} = t) = (t-i) (g-i) P(T_i = t). Divided
    by b + t and summed over t, that is a recurrence of first order:

        u_{i+1} = (1 + (g-i)/i (1 - (b+i) u_i)) / (n + b - g + i + 1)

    A step multiplies an error by `growth` below, which falls with i. Therefore one value in the middle is summed
    directly, and the recurrence runs from there in both directions, each without amplifying errors.
    """
    longest = int(count.max())
    steps = np.arange(1.0, longest)[:, None]
    divisors = items + before - relevant + steps + 1
    growth = (relevant - steps) * (before + steps) / (steps * divisors)
    anchor = 1 + np.count_nonzero((growth > 1) & (steps < count), axis=0)
    values = np.zeros((longest, len(items)))
    middle = zip(*(of.astype(np.int64).tolist() for of in (items, relevant, before, anchor)), strict=True)
    values[anchor - 1, np.arange(len(items))] = [_expected_reciprocal_rank(*of_group) for of_group in middle]
    for i in range(1, longest):
        some = np.flatnonzero((anchor <= i) & (i < count))
        rest = (relevant[some] - i) / i * (1 - (before[some] + i) * values[i - 1, some])
        values[i, some] = (1 + rest) / divisors[i - 1, some]
    for i in range(int(anchor.max()) - 1, 0, -1):
        some = np.flatnonzero(anchor > i)
        rest = i / (relevant[some] - i) * (divisors[i - 1, some] * values[i, some] - 1)
        values[i - 1, some] = (1 - rest) / (before[some] + i)
    return np.ascontiguousarray(values.T)


def _expected_reciprocal_rank(items: int, relevant: int, before: int, i: int) -> float:
    """Return E[1 / (before + T_i)], summed over the positions of T_i whose probability is not 0 in float64."""
    mean = i * (items + 1) / (relevant + 1)
    variance = mean * (relevant - i + 1) * (items - relevant) / ((relevant + 1) * (relevant + 2))
    # The distribution is log-concave: its tails beyond 40 standard deviations are below e^-39.
    reach = 40 * (np.sqrt(variance) + 1)
    positions = np.arange(
        max(i, int(mean - reach)), min(items - relevant + i, int(mean + reach) + 1) + 1, dtype=np.float64
    )
    now = positions[:-1]
    chances = _from_ratios(now * (items - now - relevant + i), (now - i + 1) * (items - now))
    return float(chances @ (1 / (before + positions)))
