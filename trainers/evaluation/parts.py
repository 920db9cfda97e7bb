"""Queries and database of an evaluation: items, their codes and their classes."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from orbithash.encoders.errors import InputError
from orbithash.trainers.metrics.retrieval import Labels, check_labels

__all__ = ["EncodedPart", "class_names", "own_positions", "present_labels"]


@dataclass(frozen=True)
class EncodedPart:
    """Items and their codes.

    Attributes:
        ids: unique; the same id in queries and database means the same item.
        codes: uint8 [N, ceil(K/8)].
        labels: integers [N], index of the class, -1 if unknown; or bool [N, C], the classes of each item.
        paths: image file of each item, relative to the root of the images.
        sentences: sentence of each item if the part is text; `paths` are not opened then.
        outputs: int8 [N, K], outputs of the head, as `Encoded`; None: not known, so that they do not rescore.
        vectors: int8 [N, d], stored vectors; None: not known.
    """

    ids: Sequence[str]
    codes: npt.NDArray[np.uint8]
    labels: Labels
    paths: Sequence[str]
    sentences: Sequence[str] | None = None
    outputs: npt.NDArray[np.int8] | None = None
    vectors: npt.NDArray[np.int8] | None = None

    def __post_init__(self) -> None:
        lengths = {"ids": len(self.ids), "codes": len(self.codes), "labels": len(self.labels), "paths": len(self.paths)}
        optional = {"sentences": self.sentences, "outputs": self.outputs, "vectors": self.vectors}
        lengths |= {name: len(values) for name, values in optional.items() if values is not None}
        if len(set(lengths.values())) > 1:
            raise InputError(f"ids, codes, labels and paths of a part must have one entry per item, got {lengths}")
        check_labels(self.labels, len(self.ids), "labels")
        if len(set(self.ids)) < len(self.ids):
            (id, count), *_ = Counter(self.ids).most_common(1)
            raise InputError(f"the id {id!r} occurs {count} times in one part; ids must be unique")

    def select(self, positions: npt.NDArray[np.integer]) -> "EncodedPart":
        """Return the items at these positions."""
        indices = positions.tolist()
        return EncodedPart(
            ids=[self.ids[i] for i in indices],
            codes=self.codes[positions],
            labels=self.labels[positions],
            paths=[self.paths[i] for i in indices],
            sentences=None if self.sentences is None else [self.sentences[i] for i in indices],
            outputs=None if self.outputs is None else self.outputs[positions],
            vectors=None if self.vectors is None else self.vectors[positions],
        )


def own_positions(query: EncodedPart, database: EncodedPart) -> npt.NDArray[np.int64]:
    """Return the position in the database of the item with each query's id, int64 [Q]; -1 if it is absent."""
    positions = {id: position for position, id in enumerate(database.ids)}
    return np.array([positions.get(id, -1) for id in query.ids], np.int64)


def present_labels(labels: Labels) -> list[int]:
    """Return the labels that occur, ascending."""
    present: list[int] = (np.unique(labels) if labels.ndim == 1 else np.flatnonzero(labels.any(0))).tolist()
    return [label for label in present if label >= 0]


def class_names(classes: Sequence[str], label: npt.NDArray[Any]) -> str:
    """Return the name of an item's class, the names of all its classes, or "unknown"."""
    return ", ".join(classes[i] for i in present_labels(label[None])) or "unknown"
