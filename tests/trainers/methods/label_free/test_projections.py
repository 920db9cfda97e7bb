"""Principal directions and the rotation of ITQ against numpy and scipy."""

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes

from orbithash.trainers.methods.label_free import projections
from orbithash.trainers.methods.label_free.projections import (
    first_features,
    itq_rotation,
    principal_directions,
    random_directions,
    unit,
)

NUM_ROWS, WIDTH, BITS = 300, 24, 16


def centred(seed=0, num_rows=NUM_ROWS, width=WIDTH):
    """Return centred rows of clusters, as features have them."""
    rng = np.random.default_rng(seed)
    rows = 2 * rng.random((5, width))[rng.integers(0, 5, num_rows)] + 0.7 * rng.standard_normal((num_rows, width))
    return (rows - rows.mean(0)).astype(np.float32)


def test_principal_directions_are_the_right_singular_vectors():
    rows = centred()
    axes = np.linalg.svd(rows.astype(float), full_matrices=False)[2][:BITS]
    found = principal_directions(rows, BITS)
    assert (found[np.arange(BITS), np.abs(found).argmax(1)] > 0).all()
    assert np.abs((found * axes).sum(1)) == pytest.approx(1, abs=1e-9)


def test_there_are_no_more_principal_directions_than_rows_vary_in():
    rows = centred(num_rows=10)
    assert principal_directions(rows, BITS).shape == (9, WIDTH)
    flat = centred()
    flat[:, 12:] = 0
    assert principal_directions(flat, BITS).shape == (12, WIDTH)
    assert principal_directions(np.zeros((5, WIDTH), np.float32), BITS).shape == (0, WIDTH)


def distance_to_signs(rows, rotation):
    turned = rows @ rotation
    return float(((np.where(turned >= 0, 1, -1) - turned) ** 2).sum())


def test_itq_alternates_between_signs_and_rotation():
    rows = centred().astype(float)
    rows = rows @ np.linalg.svd(rows, full_matrices=False)[2][:BITS].T
    expected = np.linalg.qr(np.random.default_rng(3).standard_normal((BITS, BITS)))[0]
    losses = [distance_to_signs(rows, expected)]
    for _ in range(50):
        expected, _ = orthogonal_procrustes(rows, np.where(rows @ expected >= 0, 1.0, -1.0))
        losses.append(distance_to_signs(rows, expected))
    assert losses == sorted(losses, reverse=True)
    rotation = itq_rotation(rows.astype(np.float32), 3)
    assert rotation @ rotation.T == pytest.approx(np.eye(BITS), abs=1e-9)
    assert distance_to_signs(rows, rotation) == pytest.approx(losses[-1], rel=1e-3)
    assert losses[-1] < distance_to_signs(rows, np.eye(BITS))


def test_directions_do_not_depend_on_the_number_of_threads(monkeypatch):
    monkeypatch.setattr(projections, "CHUNK_ROWS", 1000)
    rows = centred(num_rows=5000, width=200)
    before, found = torch.get_num_threads(), []
    try:
        for num_threads in (1, 4):
            torch.set_num_threads(num_threads)
            directions = principal_directions(rows, 64)
            found.append((directions, itq_rotation((rows @ directions.T).astype(np.float32), 0, iterations=5)))
            assert torch.get_num_threads() == num_threads
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*found, strict=True):
        assert (one == other).all()


def test_the_first_random_directions_do_not_depend_on_their_number():
    assert (random_directions(16, WIDTH, 1)[:8] == random_directions(8, WIDTH, 1)).all()
    assert (random_directions(8, WIDTH, 1) != random_directions(8, WIDTH, 2)).all()


def test_the_directions_of_the_first_features():
    rows = centred()
    assert (rows @ first_features(3, WIDTH).T == rows[:, :3]).all()


def test_unit_length():
    rows = np.array([[3, 4], [0, 0]], np.float32)
    assert unit(rows).tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0, 0]]
