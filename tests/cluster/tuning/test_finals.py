"""The finals of a search: who takes part, statistics against scipy, the choice and the sentence about noise."""

import numpy as np
import pytest
from scipy import stats

from orbithash.cluster.tuning.finals import candidate, compare, decide, final_seeds, finalists
from orbithash.cluster.tuning.trials import Trial


def trial(number, score, problem="", settings=None):
    return Trial(number, settings or {"lr": number}, score, 1, 2, problem)


def of(number, *scores):
    return candidate(
        trial(number, 0.5), [trial(0, score, "the loss is nan" if score is None else "") for score in scores]
    )


def test_the_finalists():
    trials = [
        trial(4, 0.9),
        trial(2, 0.8, settings={"lr": 4}),
        trial(0, 0.7),
        trial(1, 0.6),
        trial(3, 0.5),
        trial(5, None),
        trial(6, 0.95, problem="the loss is nan"),
    ]
    assert [each.number for each in finalists(trials, 2)] == [0, 4, 1], "the same settings take part once"
    assert [each.number for each in finalists(trials, 5)] == [0, 4, 1, 3]
    assert [each.number for each in finalists(trials, 1)] == [0, 4]
    assert final_seeds(7, 3) == [8, 9, 10], "not the seed of the trials"
    assert final_seeds(2**31 - 2, 2) == [2**31 - 1, 0]


@pytest.mark.parametrize("num_seeds", [2, 3, 8])
def test_the_statistics(num_seeds):
    rng = np.random.default_rng(num_seeds)
    for _ in range(20):
        first, second = rng.normal(0.5, 0.1, num_seeds), rng.normal(0.5, 0.1, num_seeds)
        difference, margin = compare(first, second)
        interval = stats.ttest_rel(first, second).confidence_interval(0.95)
        assert difference == pytest.approx(sum(first - second) / num_seeds)
        assert (difference - margin, difference + margin) == pytest.approx(tuple(interval))
        found = of(1, *first)
        assert found.mean == pytest.approx(np.mean(first))
        variance = sum((score - np.mean(first)) ** 2 for score in first) / (num_seeds - 1)
        assert found.deviation == pytest.approx(variance**0.5)


def test_the_choice_and_the_sentence():
    # The differences are 0.1, 0.1 and 0.13: 0.11 ± 4.303 * 0.01.
    better = decide([1, 2, 3], [of(0, 0.5, 0.6, 0.7), of(2, 0.5, 0.5, 0.5), of(4, 0.6, 0.7, 0.83)])
    assert [each.number for each in better.candidates] == [4, 0, 2]
    assert (better.chosen, better.rival) == (4, 4)
    assert better.verdict == "trial 4 is better than the given settings by 0.1100 ± 0.0430 (95% confidence, 3 seeds)"

    noise = decide([1, 2, 3], [of(0, 0.5, 0.6, 0.7), of(4, 0.6, 0.5, 0.9)])
    assert noise.chosen == 4
    assert noise.verdict == (
        "the difference between trial 4 and the given settings, +0.0667 ± 0.3795, is within the noise of 3 seeds"
    )

    worse = decide([1, 2], [of(0, 0.8, 0.8), of(4, 0.5, 0.5)])
    assert worse.chosen == 0
    assert worse.verdict == (
        "the given settings are better than trial 4, the best finalist, by 0.3000 ± 0.0000 (95% confidence, 2 seeds)"
    )

    same = decide([1, 2], [of(4, 0.5, 0.7), of(0, 0.7, 0.5)])
    assert same.chosen == 0, "the given settings win ties"
    single = decide([1], [of(0, 0.5), of(4, 0.6)])
    assert (single.chosen, single.margin, single.candidates[0].deviation) == (4, None, None)
    assert "+0.1000; one seed does not show the noise" in single.verdict


def test_runs_that_fail():
    failed = decide([1, 2], [of(0, 0.5, 0.6), of(4, 0.9, None)])
    assert (failed.chosen, failed.rival, failed.difference) == (0, None, None)
    assert failed.candidates[1].problem == "the loss is nan"
    assert failed.candidates[1].scores == [0.9, None]
    assert failed.verdict == "no finalist was trained with all seeds; the given settings are kept"
    without = decide([1, 2], [of(0, None, 0.6), of(4, 0.2, 0.3)])
    assert (without.chosen, without.difference) == (4, None)
    assert without.verdict == "the given settings were not trained with all seeds; trial 4 has the best mean"
    assert decide([1, 2], [of(0, None, 0.6), of(4, 0.2, None)]) is None
