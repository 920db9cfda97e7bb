"""The labels of parts of a manifest as the arrays that metrics and batches take."""

import numpy as np

from orbithash.trainers.datasets import Images
from orbithash.trainers.metrics.retrieval import Labels

__all__ = ["label_arrays"]


def label_arrays(num_classes: int, *parts: Images) -> list[Labels]:
    """Return the labels of each part, all in the same form: integers [N] if no image has two classes, else bool [N, C].

    The two forms are those of `retrieval`.
    """
    lists = [part.labels for part in parts]
    arrays: list[Labels] = []
    if all(counts.max(initial=0) <= 1 for counts, _ in lists):
        for counts, values in lists:
            single = np.full(len(counts), -1)
            single[counts > 0] = values
            arrays.append(single)
        return arrays
    for counts, values in lists:
        several = np.zeros((len(counts), num_classes), np.bool_)
        several[np.repeat(np.arange(len(counts)), counts), values] = True
        arrays.append(several)
    return arrays
