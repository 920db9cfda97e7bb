"""Labels of parts as arrays, against loops over their images."""

import numpy as np
import pytest

from orbithash.trainers.data.labels import label_arrays
from orbithash.trainers.datasets import Image, Images


def images_of(labels):
    return Images.of(Image(str(i), str(i), of_image, "train", "0" * 64) for i, of_image in enumerate(labels))


def test_labels_are_indices_or_a_matrix_if_any_image_has_several():
    one, other = label_arrays(4, images_of([(0,), (), (3,)]), images_of([(1,)]))
    assert (one.tolist(), other.tolist()) == ([0, -1, 3], [1])
    assert one.dtype == np.int64
    one, other = label_arrays(4, images_of([(0,), (), (3,)]), images_of([(1, 2)]))
    assert (one.astype(int).tolist(), other.astype(int).tolist()) == (
        [[1, 0, 0, 0], [0] * 4, [0, 0, 0, 1]],
        [[0, 1, 1, 0]],
    )
    assert one.dtype == np.bool_


@pytest.mark.parametrize("most", [1, 4])
def test_labels_are_those_of_the_images(most):
    rng = np.random.default_rng(most)
    lists = [tuple(rng.choice(7, rng.integers(most + 1), replace=False).tolist()) for _ in range(200)]
    found, none = label_arrays(7, images_of(lists), images_of([]))
    assert len(none) == 0
    for row, labels in zip(found, lists, strict=True):
        assert set(np.flatnonzero(row).tolist() if most > 1 else {int(row)} - {-1}) == set(labels)
