import numpy as np
import pytest

from orbithash.encoders.vectors import VectorSpec
from orbithash.search.detectors.fitting import MIN_ESTIMATED, fit_detector
from orbithash.search.protocol.errors import InvalidQuery

DIMS = 16
SPEC = VectorSpec(DIMS, 0.01)


def kinds(seed, counts, spread=14):
    """Rows of several kinds: int8 [count, d] each, around a centre of its own."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(7).integers(-60, 60, (len(counts), DIMS))
    return [
        np.clip(centre + rng.normal(0, spread, (count, DIMS)), -127, 127).astype(np.int8)
        for centre, count in zip(centres, counts, strict=True)
    ]


def scores(detector, rows):
    return detector.offset + detector.scale * (rows.astype(np.int64) @ np.array(detector.weights))


def fit(good, bad, background=None):
    return fit_detector(good, bad, "model", SPEC, background)


@pytest.mark.parametrize("num_bad", [0, 10])
def test_a_detector_finds_the_kind_that_was_marked(num_bad):
    good, other, _ = kinds(0, (10, num_bad, 1))
    archive = kinds(1, (60, 500, 500))
    background = np.concatenate(kinds(2, (20, 200, 200)))
    detector = fit(good, other, background)
    found = [np.mean(scores(detector, rows) >= 0) for rows in archive]
    assert found[0] >= 0.9
    assert max(found[1:]) <= 0.02
    assert (detector.num_good, detector.num_bad, detector.num_background) == (10, num_bad, 420)


def test_marks_alone_suffice_without_background():
    good, bad = kinds(0, (10, 10))
    detector = fit(good, bad)
    rest_good, rest_bad = kinds(1, (50, 50))
    assert np.mean(scores(detector, rest_good) >= 0) > 0.9
    assert np.mean(scores(detector, rest_bad) >= 0) < 0.1


def test_one_good_row_finds_rows_like_it():
    good, _, _ = kinds(0, (1, 1, 1))
    detector = fit(good, good[:0], np.concatenate(kinds(2, (3, 200, 200))))
    like, other, third = kinds(1, (50, 50, 50))
    assert np.mean(scores(detector, like) >= 0) > 0.5
    assert np.mean(scores(detector, np.concatenate([other, third])) >= 0) < 0.05


def test_the_order_of_the_rows_has_no_effect():
    good, bad, rest = kinds(0, (12, 8, 300))
    order = np.random.default_rng(0).permutation
    once = fit(good, bad, rest)
    again = fit(good[order(12)], bad[order(8)], rest[order(300)])
    assert once == again


def test_weights_stay_below_the_limits_of_a_ranking():
    dims = 2048
    rng = np.random.default_rng(0)
    rows = rng.choice(np.array([-127, 127], np.int8), (20, dims))
    detector = fit_detector(rows[:10], rows[10:], "model", VectorSpec(dims, 0.01))
    assert detector.linear().problems() == []
    assert sum(map(abs, detector.weights)) < 2**24


def test_equal_rows_of_both_kinds_give_a_detector_without_weights():
    rows = kinds(0, (6, 1))[0]
    detector = fit(rows, rows)
    assert np.isfinite(scores(detector, rows)).all()
    assert detector.linear().problems() == []


def test_vectors_of_zeros_are_fitted():
    zeros = np.zeros((6, DIMS), np.int8)
    assert set(fit(zeros, zeros, zeros).weights) == {0}


def test_estimates_need_enough_marks():
    good, bad, rest = kinds(0, (MIN_ESTIMATED, MIN_ESTIMATED, 100))
    few = fit(good[1:], bad, rest)
    assert (few.precision, few.recall, few.folds) == (None, None, 0)
    enough = fit(good, bad, rest)
    assert enough.precision == enough.recall == 1.0
    assert enough.folds == MIN_ESTIMATED


def test_estimates_are_low_for_marks_that_have_nothing_in_common():
    rng = np.random.default_rng(0)
    good, bad = rng.integers(-100, 100, (2, 20, DIMS)).astype(np.int8)
    detector = fit(good, bad)
    # The scores of the marked rows themselves are far better than that.
    assert np.mean(scores(detector, good) >= 0) > 0.7
    assert detector.precision < 0.7


def test_marks_of_one_kind_are_refused():
    good, rest = kinds(0, (5, 50))
    with pytest.raises(InvalidQuery, match="mark at least one row as good"):
        fit(good[:0], good, rest)
    with pytest.raises(InvalidQuery, match="mark at least one row as bad"):
        fit(good, good[:0])
    with pytest.raises(InvalidQuery, match="16 dimensions"):
        fit(good[:, :5], good)
