"""Fit a detector to marked rows: regularised logistic regression with weak negatives, and a cut-off.

Marks are few and not drawn at random: an analyst marks rows that look alike. Rows drawn at random from the archive
serve as weak negatives, which tell the regression what the rest looks like; those that score like the good rows are
left out before the last fit, because they may be unmarked good ones.

The cut-off lies between the mean scores of held-out bad and held-out good rows. Without bad rows, it maximises
recall^2 / (fraction of rows found) over held-out good rows (Lee and Liu, ICML 2003), which orders cut-offs as the F1
score does and does not need the number of good rows in the archive. Constants and cut-off were chosen on 19 classes of
UC Merced, see docs/operate/detectors.md.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from orbithash.encoders.vectors import VectorSpec
from orbithash.search.detectors.detector import Detector
from orbithash.search.protocol.errors import InvalidQuery

__all__ = ["MAX_BACKGROUND", "MIN_ESTIMATED", "fit_detector"]

Vectors = npt.NDArray[np.int8]
_Numbers = npt.NDArray[np.float64]

# Rows drawn at random that are worth their time; further ones are ignored.
MAX_BACKGROUND = 1000
# Good and bad marks each without which precision and recall are not estimated.
MIN_ESTIMATED = 5

# Inverse strength of the regularisation, for vectors of length 1.
_C = 10.0
# Weight of all weak negatives together, for each good row.
_BACKGROUND_WEIGHT = 3.0
# Weak negatives above this quantile of the scores of good rows are left out.
_QUANTILE = 0.1
# Position of the cut-off from the mean score of bad rows, 0, to that of good rows, 1.
_CUTOFF = 0.4
_FOLDS = 5
_MAX_WEIGHT, _MAX_WEIGHTS = 2**15 - 1, 2**24 - 1


def fit_detector(
    good: Vectors,
    bad: Vectors,
    model_id: str,
    vector: VectorSpec,
    background: Vectors | None = None,
) -> Detector:
    """Return the detector of marked rows. The same rows give the same detector, in every order.

    Args:
        good: stored vectors int8 [n, d] of rows marked as good, at least one.
        bad: stored vectors int8 [m, d] of rows marked as bad; at least one, if there is no background.
        model_id: the model of the archive.
        vector: the stored vectors of the archive.
        background: stored vectors int8 [b, d] of rows drawn at random, without the marked ones; None: none.

    Raises:
        InvalidQuery: no good rows, or neither bad rows nor a background.
    """
    from threadpoolctl import threadpool_limits

    empty = np.empty((0, vector.dims), np.int8)
    background = empty if background is None else background[:MAX_BACKGROUND]
    if not len(good):
        raise InvalidQuery(("marks", "mark at least one row as good: a detector learns what good rows have in common"))
    if not len(bad) and not len(background):
        raise InvalidQuery(("marks", "mark at least one row as bad: a detector learns from both kinds"))
    for part in (good, bad, background):
        if part.ndim != 2 or part.shape[1] != vector.dims:
            raise InvalidQuery(("marks", f"stored vectors have {vector.dims} dimensions, got an array {part.shape}"))
    parts = [_sorted(part).astype(np.float64) for part in (good, bad, background)]
    length = math.sqrt(np.mean(np.square(np.concatenate(parts)).sum(axis=1))) or 1.0
    # The sums of several threads differ in the last bits from run to run.
    with threadpool_limits(1):
        rows = _Rows(*(part / length for part in parts))
        model = _fit_with_cutoff(rows)
        precision, recall, folds = _validate(rows)
    weights, scale = _quantised(model.direction / length)
    return Detector(
        weights=tuple(weights.tolist()),
        scale=scale,
        offset=model.intercept,
        model_id=model_id,
        vector=vector,
        num_good=len(good),
        num_bad=len(bad),
        num_background=len(background),
        precision=precision,
        recall=recall,
        folds=folds,
    )


@dataclass(frozen=True)
class _Rows:
    """Rows to fit to, float [n, d] each."""

    good: _Numbers
    bad: _Numbers
    background: _Numbers

    def without(self, fold: int, folds: int) -> "_Rows":
        """Return the marked rows of all folds but one, and the background."""
        return _Rows(_others(self.good, fold, folds), _others(self.bad, fold, folds), self.background)


@dataclass(frozen=True)
class _Model:
    """The log-odds of a row is `row @ direction + intercept`."""

    direction: _Numbers
    intercept: float

    def scores(self, rows: _Numbers) -> _Numbers:
        """Return the score of each row, float [n]."""
        scores: _Numbers = rows @ self.direction + self.intercept
        return scores


def _fit_with_cutoff(rows: _Rows) -> _Model:
    """Return a model whose score is 0 at the cut-off."""
    model = _fit(rows)
    if not len(rows.background):
        return model
    good, bad = _held_out(rows)
    if len(bad):
        cutoff = float(bad.mean() + _CUTOFF * (good.mean() - bad.mean()))
    elif len(good) > 1:
        cutoff = _cutoff(good, model.scores(rows.background))
    else:
        # Half-way between the one good row and the one percent of the others that is nearest to it.
        cutoff = float(good[0] + np.quantile(model.scores(rows.background), 0.99)) / 2
    return _Model(model.direction, model.intercept - cutoff)


def _held_out(rows: _Rows) -> tuple[_Numbers, _Numbers]:
    """Return the scores of good and of bad rows, each by a model without it, if there are two good rows or more."""
    folds = min(_FOLDS, len(rows.good))
    models = [_fit(rows.without(fold, folds) if folds > 1 else rows) for fold in range(folds)]
    parts = [[model.scores(part[fold::folds]) for fold, model in enumerate(models)] for part in (rows.good, rows.bad)]
    return np.concatenate(parts[0]), np.concatenate(parts[1])


def _fit(rows: _Rows) -> _Model:
    """Return a model, fitted a second time without weak negatives that look like good rows."""
    model = _regression(rows)
    if not len(rows.background):
        return model
    is_other = model.scores(rows.background) < np.quantile(model.scores(rows.good), _QUANTILE)
    if is_other.all() or not (is_other.any() or len(rows.bad)):
        return model
    return _regression(_Rows(rows.good, rows.bad, rows.background[is_other]))


def _regression(rows: _Rows) -> _Model:
    from sklearn.linear_model import LogisticRegression

    counts = [len(rows.good), len(rows.bad), len(rows.background)]
    # Without weak negatives, both kinds of marks have the same weight.
    bad_weight = 1.0 if counts[2] else counts[0] / counts[1]
    weights = np.repeat([1.0, bad_weight, _BACKGROUND_WEIGHT * counts[0] / max(counts[2], 1)], counts)
    regression: Any = LogisticRegression(C=_C, max_iter=1000, tol=1e-5)
    regression.fit(np.concatenate([rows.good, rows.bad, rows.background]), np.arange(sum(counts)) < counts[0], weights)
    return _Model(regression.coef_[0], float(regression.intercept_[0]))


def _cutoff(good: _Numbers, others: _Numbers) -> float:
    """Return the score that maximises recall^2 / (fraction of `others` found).

    Recall is that of a normal distribution with the mean and deviation of the held-out scores of good rows: few scores
    alone would make steps.
    """
    from scipy.special import ndtr

    mean, deviation = float(good.mean()), float(good.std(ddof=1)) + 1e-9
    scores = np.sort(others)
    cutoffs = np.linspace(mean - 3 * deviation, mean + 2 * deviation, 400)
    recall = ndtr((mean - cutoffs) / deviation)
    # One more row: where no row is found, a lower cut-off with a higher recall is the better one.
    found = (len(scores) - np.searchsorted(scores, cutoffs) + 1) / (len(scores) + 1)
    return float(cutoffs[np.argmax(np.square(recall) / found)])


def _validate(rows: _Rows) -> tuple[float | None, float | None, int]:
    """Return precision, recall and the number of folds; each marked row is scored by a model without it."""
    if min(len(rows.good), len(rows.bad)) < MIN_ESTIMATED:
        return None, None, 0
    hits = misses = 0
    for fold in range(_FOLDS):
        model = _fit_with_cutoff(rows.without(fold, _FOLDS))
        hits += int((model.scores(rows.good[fold::_FOLDS]) >= 0).sum())
        misses += int((model.scores(rows.bad[fold::_FOLDS]) >= 0).sum())
    precision = hits / (hits + misses) if hits + misses else None
    return precision, hits / len(rows.good), _FOLDS


def _quantised(direction: _Numbers) -> tuple[npt.NDArray[np.int64], float]:
    """Return integer weights and the scale with which they approximate `direction`."""
    largest, total = float(np.abs(direction).max()), float(np.abs(direction).sum())
    if not largest:
        return np.zeros(len(direction), np.int64), 1.0
    # Rounding adds at most a half to each magnitude.
    factor = min(_MAX_WEIGHT / largest, (_MAX_WEIGHTS - len(direction)) / total)
    return np.rint(direction * factor).astype(np.int64), 1 / factor


def _others(rows: _Numbers, fold: int, folds: int) -> _Numbers:
    others: _Numbers = rows[np.arange(len(rows)) % folds != fold]
    return others


def _sorted(rows: Vectors) -> Vectors:
    return rows[np.lexsort(rows.T[::-1])] if len(rows) else rows
