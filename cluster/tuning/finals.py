"""The finals of a search: the best settings and the given ones, each trained with several seeds, and compared.

The search compares single runs, of which the best is better than its settings deserve. The seeds of the finals are not
the seed of its trials, and they are the same for all settings, so that differences are paired.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from orbithash.cluster.tuning.trials import Trial

__all__ = ["CONFIDENCE", "Candidate", "Finals", "candidate", "compare", "decide", "final_seeds", "finalists"]

# Probability that the interval of a difference contains the true difference.
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Candidate:
    """Settings in the finals.

    Attributes:
        number: number of the trial of the search that had these settings; 0: the given settings.
        settings: values of the settings of the space.
        scores: best score of each run, in the order of seeds; None if it ended with an error.
        problem: the first error, or "".
        mean: mean score; None if a run ended with an error.
        deviation: standard deviation of the scores, with n - 1; None for a single seed, and without a mean.
    """

    number: int
    settings: dict[str, Any]
    scores: list[float | None]
    problem: str
    mean: float | None
    deviation: float | None


@dataclass(frozen=True)
class Finals:
    """The result of the finals.

    Attributes:
        seeds: seeds of the runs of each candidate.
        candidates: the finalists and the given settings, the best mean first.
        chosen: number of the candidate with the best mean; the given settings win ties.
        rival: number of the best finalist, which is compared with the given settings; None if none has a mean.
        difference: mean of the paired differences, finalist less given settings; None if one of the two has no mean.
        margin: half the width of the confidence interval of the difference; None without one.
        verdict: whether the difference is noise, in one sentence.
    """

    seeds: list[int]
    candidates: list[Candidate]
    chosen: int
    rival: int | None
    difference: float | None
    margin: float | None
    verdict: str


def final_seeds(seed: int, num_seeds: int) -> list[int]:
    """Return the seeds of the finals, which follow the seed of the trials."""
    return [(seed + 1 + place) % 2**31 for place in range(num_seeds)]


def finalists(trials: Sequence[Trial], num_finalists: int) -> list[Trial]:
    """Return the trial with the given settings, then the best others with other settings; `trials` has the best first.

    There are fewer than `num_finalists` others if fewer have a score and ended without an error.
    """
    chosen = [trial for trial in trials if trial.number == 0]
    for trial in trials:
        if len(chosen) > num_finalists:
            break
        # Only some settings may have been searched, and of these only choices: trials can have the same settings.
        is_whole = trial.score is not None and not trial.problem
        if is_whole and json.dumps(trial.settings) not in [json.dumps(each.settings) for each in chosen]:
            chosen.append(trial)
    return chosen


def candidate(finalist: Trial, runs: Sequence[Trial]) -> Candidate:
    """Return a finalist with the scores of its runs, one per seed."""
    scores = [None if run.problem else run.score for run in runs]
    known = [score for score in scores if score is not None]
    is_whole = len(known) == len(scores)
    return Candidate(
        finalist.number,
        finalist.settings,
        scores,
        next((run.problem for run in runs if run.problem), ""),
        float(np.mean(known)) if is_whole else None,
        float(np.std(known, ddof=1)) if is_whole and len(known) > 1 else None,
    )


def compare(scores: Sequence[float], others: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean of the paired differences `scores` - `others`, and half the width of its confidence interval.

    The interval is that of Student's t distribution; it is None for a single pair.
    """
    from scipy.stats import t

    differences = np.subtract(scores, others)
    if len(differences) == 1:
        return float(differences[0]), None
    error = differences.std(ddof=1) / np.sqrt(len(differences))
    return float(differences.mean()), float(t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1) * error)


def decide(seeds: Sequence[int], candidates: Sequence[Candidate]) -> Finals | None:
    """Return the result of the finals; None if no candidate has a mean."""
    ranked = sorted(candidates, key=_rank, reverse=True)
    given = next(each for each in ranked if each.number == 0)
    rival = next((each for each in ranked if each.number != 0 and each.mean is not None), None)
    if ranked[0].mean is None:
        return None
    difference = margin = None
    if rival is None:
        verdict = "no finalist was trained with all seeds; the given settings are kept"
    elif given.mean is None:
        verdict = f"the given settings were not trained with all seeds; trial {rival.number} has the best mean"
    else:
        difference, margin = compare(_known(rival), _known(given))
        verdict = _verdict(rival.number, difference, margin, len(seeds))
    return Finals(
        list(seeds), ranked, ranked[0].number, None if rival is None else rival.number, difference, margin, verdict
    )


def _known(candidate: Candidate) -> list[float]:
    return [score for score in candidate.scores if score is not None]


def _rank(candidate: Candidate) -> tuple[float, bool]:
    return -np.inf if candidate.mean is None else candidate.mean, candidate.number == 0


def _verdict(rival: int, difference: float, margin: float | None, num_seeds: int) -> str:
    if margin is None:
        return f"trial {rival} differs from the given settings by {difference:+.4f}; one seed does not show the noise"
    if abs(difference) <= margin:
        return (
            f"the difference between trial {rival} and the given settings, {difference:+.4f} ± {margin:.4f}, is within "
            f"the noise of {num_seeds} seeds"
        )
    amount = f"by {abs(difference):.4f} ± {margin:.4f} ({CONFIDENCE:.0%} confidence, {num_seeds} seeds)"
    if difference > 0:
        return f"trial {rival} is better than the given settings {amount}"
    return f"the given settings are better than trial {rival}, the best finalist, {amount}"
