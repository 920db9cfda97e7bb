"""Average precision of Hamming rankings, exact for tied distances.

K-bit codes have only K + 1 distances, so most of a ranking is ties, and a published figure can move by tens of points
with the order in which ties happen to be listed. Every figure here therefore names its tie policy:

- `expected`: the expectation over all orders inside every group of equal distance, in closed form;
- `optimistic`, `pessimistic`: the relevant items of every group first, or last;
- one given order (`ranked_average_precision`): the database's own, or a random one.

All but the last need only how many items, and how many relevant ones, lie at each distance (`Histograms`).

Four definitions go by the name "mAP@k". With rel_r the relevance at rank r, P@r the precision at r, R the number of
relevant items in the database and H_k the number of them within rank k:

- `ap_min`: sum of P@r rel_r over r <= k, divided by min(k, R);
- `ap_hits`: the same sum divided by H_k, 0 where H_k = 0;
- `ap_k`: the same sum divided by k;
- `ap_first_k`: mean of j / t_j over the first min(k, R) relevant items, t_j being the rank, however deep, of the j-th.

A query with nothing relevant has average precision 0 by every definition.

`optimistic` is never below `expected`, nor `pessimistic` above it, for three of the four. `ap_hits` is the exception:
it rewards a list for holding fewer relevant items, so pushing them out of the first k can raise it.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from orbithash.encoders.errors import InputError

__all__ = [
    "Definition",
    "Histograms",
    "Policy",
    "average_precision",
    "check_cutoff",
    "hits_at",
    "ranked_average_precision",
    "success_at",
]

Definition = Literal["ap_min", "ap_hits", "ap_k", "ap_first_k"]
Policy = Literal["expected", "optimistic", "pessimistic"]

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Histograms:
    """What lies at each Hamming distance from each query.

    `items` and `relevant` are int64 [Q, K+1]: column d counts the database items at distance d.
    """

    items: Counts
    relevant: Counts

    @property
    def num_items(self) -> Counts:
        """Database items of each query, int64 [Q]."""
        totals: Counts = self.items.sum(1)
        return totals

    @property
    def num_relevant(self) -> Counts:
        """Relevant database items of each query, int64 [Q]."""
        totals: Counts = self.relevant.sum(1)
        return totals

    def without_distances(self) -> "Histograms":
        """The same items all at one distance: its expectation is what a random order would score."""
        return Histograms(self.num_items[:, None], self.num_relevant[:, None])


@dataclass(frozen=True)
class _Groups:
    """Tie groups as float64 [Q, K+1]: their items, relevant items, and how many of each are ranked before them."""

    items: Floats
    relevant: Floats
    before: Floats
    relevant_before: Floats

    @classmethod
    def of(cls, histograms: Histograms) -> "_Groups":
        items, relevant = histograms.items.astype(np.float64), histograms.relevant.astype(np.float64)
        return cls(items, relevant, np.cumsum(items, 1) - items, np.cumsum(relevant, 1) - relevant)


def average_precision(
    histograms: Histograms, k: int | None, definition: Definition = "ap_min", policy: Policy = "expected"
) -> Floats:
    """Average precision of each query, float64 [Q].

    Args:
        histograms: items and relevant items by distance.
        k: the cut-off; None for the whole ranking.
        definition: one of `Definition`, see the module.
        policy: how the items of one distance are ordered.

    Raises:
        InputError: k below 1, or an unknown definition or policy.
    """
    _check(definition, Definition, "definition of average precision")
    _check(policy, Policy, "tie policy")
    cutoffs = histograms.num_items if k is None else np.full(len(histograms.items), check_cutoff(k))
    groups = _Groups.of(histograms)
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
    """Relevant items within rank k of each query, float64 [Q]; P@k is this over k, recall@k this over R."""
    _check(policy, Policy, "tie policy")
    groups = _Groups.of(histograms)
    slots = np.clip(check_cutoff(k) - groups.before, 0, groups.items)
    if policy == "optimistic":
        found = np.minimum(slots, groups.relevant)
    elif policy == "pessimistic":
        found = np.maximum(slots - (groups.items - groups.relevant), 0)
    else:
        found = slots * _divide(groups.relevant, groups.items)
    hits: Floats = found.sum(1)
    return hits


def success_at(histograms: Histograms, k: int, policy: Policy = "expected") -> Floats:
    """Whether anything relevant is within rank k of each query, float64 [Q]; its probability where ties decide."""
    if policy != "expected":
        return (hits_at(histograms, k, policy) > 0).astype(np.float64)
    from scipy.special import gammaln

    groups = _Groups.of(histograms)
    slots = np.clip(check_cutoff(k) - groups.before, 0, groups.items)
    others = groups.items - groups.relevant
    # Of a group of n items, s are drawn: none is relevant with probability C(n - r, s) / C(n, s).
    log_none = gammaln(others + 1) - gammaln(np.maximum(others - slots, 0) + 1)
    log_none -= gammaln(groups.items + 1) - gammaln(groups.items - slots + 1)
    found: Floats = 1 - np.where(slots > others, 0.0, np.exp(log_none)).prod(1)
    return found


def ranked_average_precision(ranks: Counts, k: int | None, definition: Definition, num_items: int) -> float:
    """Average precision of one ranking without ties.

    Args:
        ranks: 1-based ranks of all the relevant items, ascending, int64 [R].
        k: the cut-off; None for the whole ranking.
        definition: one of `Definition`.
        num_items: length of the ranking.
    """
    _check(definition, Definition, "definition of average precision")
    limit = num_items if k is None else check_cutoff(k)
    found = int(np.searchsorted(ranks, limit, side="right"))
    counted = min(limit, len(ranks)) if definition == "ap_first_k" else found
    divisor = {"ap_hits": found, "ap_k": limit}.get(definition, min(limit, len(ranks)))
    return float((np.arange(1, counted + 1) / ranks[:counted]).sum() / divisor) if divisor else 0.0


def check_cutoff(k: int) -> int:
    """`k` itself, or `InputError` when it is not a whole number from 1."""
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise InputError(f"the cut-off k is {k!r}; it is a whole number from 1")
    return int(k)


def _check(name: str, allowed: object, what: str) -> None:
    if name not in get_args(allowed):
        raise InputError(f"{what} {name!r} is unknown; there are {', '.join(get_args(allowed))}")


def _divide(numerator: Floats, denominator: Floats) -> Floats:
    """The quotient, and 0 where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)


def _divisor(definition: Definition, limits: Floats, groups: _Groups) -> Floats:
    return limits if definition == "ap_k" else np.minimum(limits, groups.relevant.sum(1))


_EXACT = 256
_HARMONIC = np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, _EXACT + 1))])


def _harmonic_span(before: Floats, count: Floats) -> Floats:
    """The sum of 1/(before + j) over j = 1..count, for any whole before, count >= 0.

    From `_EXACT` on it is the difference of two Euler-Maclaurin expansions of the harmonic number, subtracted term by
    term, so that a short span far down the ranking keeps all its digits.
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
    """The sum of P@r over `counts` relevant items that stand in a row from rank `starts` + 1 on."""
    return counts + (relevant_before - starts) * _harmonic_span(starts, counts)


def _expected_sums(groups: _Groups, slots: Floats) -> Floats:
    """The expected sum of P@r rel_r over the first `slots` places of each group.

    For place j of n items with g relevant ones, E[rel_j] = g/n and E[rel_i | rel_j] = (g-1)/(n-1) for each of the j - 1
    places before it in the group, so that E[P@(b+j) rel_j] = g/n (r + 1 + (j-1)(g-1)/(n-1)) / (b+j).
    """
    share = _divide(groups.relevant, groups.items)
    another = np.maximum(_divide(groups.relevant - 1, groups.items - 1), 0)
    constant = groups.relevant_before + 1 - another * (groups.before + 1)
    return share * (another * slots + constant * _harmonic_span(groups.before, slots))


def _expected_over_hits(groups: _Groups, limits: Floats) -> Floats:
    """Expected `ap_hits`: only the group that rank k cuts makes H_k uncertain, so condition on its hits."""
    ends = groups.before + groups.items
    whole = ends <= limits[:, None]
    sums = np.where(whole, _expected_sums(groups, groups.items), 0).sum(1)
    found = np.where(whole, groups.relevant, 0).sum(1)
    result = _divide(sums, found)
    for query, group in zip(*np.nonzero((groups.before < limits[:, None]) & ~whole), strict=True):
        before, slots = groups.before[query, group], limits[query] - groups.before[query, group]
        hits, chances = _hypergeometric(groups.items[query, group], groups.relevant[query, group], slots)
        # Given their number, the hits are spread evenly over the group's places within rank k: a whole group again.
        places = np.full_like(hits, slots)
        cut = _Groups(places, hits, np.full_like(hits, before), np.full_like(hits, found[query]))
        result[query] = chances @ _divide(sums[query] + _expected_sums(cut, places), found[query] + hits)
    return result


def _hypergeometric(items: float, relevant: float, slots: float) -> tuple[Floats, Floats]:
    """How many of `relevant` among `items` fall into `slots` drawn places: the possible numbers and their chances."""
    hits = np.arange(max(0.0, slots - (items - relevant)), min(slots, relevant) + 1)
    rising = (relevant - hits[:-1]) * (slots - hits[:-1])
    falling = hits[1:] * (items - relevant - slots + hits[1:])
    return hits, _from_ratios(rising, falling)


def _from_ratios(rising: Floats, falling: Floats) -> Floats:
    """The distribution p_0, p_1, … with p_{i+1} / p_i = rising_i / falling_i, in logarithms so that none overflows."""
    logs = np.concatenate([[0.0], np.cumsum(np.log(rising) - np.log(falling))])
    weights = np.exp(logs - logs.max())
    chances: Floats = weights / weights.sum()
    return chances


def _expected_over_first(groups: _Groups, limits: Floats) -> Floats:
    """Expected `ap_first_k`: whole groups as ever, and the first items of the group that holds the last one counted."""
    firsts = np.minimum(limits, groups.relevant.sum(1))
    wanted = np.clip(firsts[:, None] - groups.relevant_before, 0, groups.relevant)
    sums = np.where(wanted == groups.relevant, _expected_sums(groups, groups.items), 0).sum(1)
    for query, group in zip(*np.nonzero((wanted > 0) & (wanted < groups.relevant)), strict=True):
        reciprocals = _expected_reciprocal_ranks(
            int(groups.items[query, group]),
            int(groups.relevant[query, group]),
            int(groups.before[query, group]),
            int(wanted[query, group]),
        )
        sums[query] += (groups.relevant_before[query, group] + np.arange(1, len(reciprocals) + 1)) @ reciprocals
    return _divide(sums, firsts)


def _expected_reciprocal_ranks(items: int, relevant: int, before: int, count: int) -> Floats:
    """u_i = E[1 / (before + T_i)] for i = 1..count, T_i being the place of the i-th relevant item of a shuffled group.

    P(T_i = t) = C(t-1, i-1) C(n-t, g-i) / C(n, g) gives i (n-t-g+i+1) P(T_{i+1} = t) = (t-i) (g-i) P(T_i = t). Divided
    by b + t and summed over t, that is a recurrence of first order:

        u_{i+1} = (1 + (g-i)/i (1 - (b+i) u_i)) / (n + b - g + i + 1)

    A step multiplies an error by `growth` below, which falls with i: so one value in the middle is summed directly and
    the recurrence runs from there in both directions, down where forward would amplify, up where backward would.
    """
    steps = np.arange(1, count, dtype=np.float64)
    divisors = items + before - relevant + steps + 1
    growth = (relevant - steps) * (before + steps) / (steps * divisors)
    anchor = 1 + int(np.count_nonzero(growth > 1))
    values = np.empty(count)
    values[anchor - 1] = _expected_reciprocal_rank(items, relevant, before, anchor)
    for i in range(anchor, count):
        values[i] = (1 + (relevant - i) / i * (1 - (before + i) * values[i - 1])) / divisors[i - 1]
    for i in range(anchor - 1, 0, -1):
        values[i - 1] = (1 - i / (relevant - i) * (divisors[i - 1] * values[i] - 1)) / (before + i)
    return values


def _expected_reciprocal_rank(items: int, relevant: int, before: int, i: int) -> float:
    """E[1 / (before + T_i)] summed over the places that T_i takes with a chance that a float64 can tell from zero."""
    mean = i * (items + 1) / (relevant + 1)
    variance = mean * (relevant - i + 1) * (items - relevant) / ((relevant + 1) * (relevant + 2))
    # The distribution is log-concave, so 40 standard deviations out its tails are below e^-39.
    reach = 40 * (np.sqrt(variance) + 1)
    places = np.arange(
        max(i, int(mean - reach)), min(items - relevant + i, int(mean + reach) + 1) + 1, dtype=np.float64
    )
    now = places[:-1]
    chances = _from_ratios(now * (items - now - relevant + i), (now - i + 1) * (items - now))
    return float(chances @ (1 / (before + places)))
