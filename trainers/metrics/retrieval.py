"""Queries against a database: codes, labels and relevance.

Labels have two forms. One class per item: integers [N], -1 if unknown. Any number of classes per item: bool [N, C], all
false if unknown. A database item is relevant to a query if they share at least one class. Unlabelled database items are
relevant to no query and stay in the ranking as distractors.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from orbithash.encoders.codes import MAX_BITS, MIN_BITS, check_codes, words_of
from orbithash.encoders.errors import InputError
from orbithash.encoders.ranges import check_integer

__all__ = [
    "CHUNK_PAIRS",
    "VALIDATION_SIZES",
    "Labels",
    "Packed",
    "Retrieval",
    "check_labels",
    "labelled",
    "num_labels",
    "query_chunks",
    "shared_labels",
    "with_label",
]

Labels = npt.NDArray[np.integer] | npt.NDArray[np.bool_]

Words = npt.NDArray[np.uint64]

# Entries of an epoch's record that state the size of validation; its other entries `validation/…` are metrics.
VALIDATION_SIZES = ("validation/queries", "validation/database")

# Number of pairs of query and database item whose results are summed together.
CHUNK_PAIRS = 4_000_000


def check_labels(labels: Labels, count: int, what: str) -> None:
    """Raise `InputError` unless these are the labels of `count` items in one of the two forms."""
    is_integers = labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer)
    if len(labels) != count or not (is_integers or (labels.ndim == 2 and labels.dtype == np.bool_)):
        raise InputError(f"{what} are {count} integers or bool [{count}, classes], got {labels.dtype} {labels.shape}")


def labelled(labels: Labels) -> npt.NDArray[np.bool_]:
    """Return which items have a label, bool [N]."""
    known: npt.NDArray[np.bool_] = labels >= 0 if labels.ndim == 1 else np.asarray(labels.any(1))
    return known


def with_label(labels: Labels, label: int) -> npt.NDArray[np.bool_]:
    """Return which items are of this class, bool [N]."""
    members: npt.NDArray[np.bool_] = labels == label if labels.ndim == 1 else labels[:, label].astype(np.bool_)
    return members


def num_labels(labels: Labels) -> int:
    """Return the largest label plus one: the minimum length of a list of class names."""
    return int(labels.max(initial=-1)) + 1 if labels.ndim == 1 else int(labels.shape[1])


def shared_labels(query: Labels, database: Labels) -> npt.NDArray[np.bool_] | npt.NDArray[np.int16]:
    """Return the number of classes that each query shares with each item: bool [Q, N] for single labels, else int16.

    All queries must be labelled, because -1 would match -1.
    """
    if query.ndim == 1:
        same: npt.NDArray[np.bool_] = query[:, None] == database[None, :]
        return same
    # Float products use BLAS; numbers of classes are exact in float32.
    return (query.astype(np.float32) @ database.astype(np.float32).T).astype(np.int16)


class Packed(NamedTuple):
    """Codes and labels as the kernels read them; see `kernels`.

    Attributes:
        queries, words: codes of the queries uint64 [Q, W], and of the database uint64 [W, N].
        query_labels, labels: labels of the queries uint64 [Q, L], and of the database uint64 [L, N].
        is_single: whether a label is the number of a class, and not a bit for each class.
        excluded: int64 [Q], the item that a query does not rank; -1: none.
    """

    queries: Words
    words: Words
    query_labels: Words
    labels: Words
    is_single: bool
    excluded: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Retrieval:
    """Queries and database of an evaluation, checked for consistency.

    Attributes:
        query_codes: uint8 [Q, ceil(bits/8)], Q >= 1.
        database_codes: uint8 [N, ceil(bits/8)].
        query_labels: integers [Q] or bool [Q, C]; every query has a label.
        database_labels: integers [N], -1 if unknown, or bool [N, C].
        bits: length of a code.
        exclude: integers [Q], the position in the database of an item to exclude from each query's ranking (usually the
            query itself); -1 or None: no item.
        max_bits: largest length that is allowed; baselines may have longer codes than models.

    Raises:
        InputError: shapes, types or labels are inconsistent.
    """

    query_codes: npt.NDArray[np.uint8]
    database_codes: npt.NDArray[np.uint8]
    query_labels: Labels
    database_labels: Labels
    bits: int
    exclude: npt.NDArray[np.integer] | None = None
    max_bits: int = MAX_BITS

    def __post_init__(self) -> None:
        check_integer(self.bits, "bits", MIN_BITS, self.max_bits)
        for side, codes, labels in (
            ("query", self.query_codes, self.query_labels),
            ("database", self.database_codes, self.database_labels),
        ):
            check_codes(codes, self.bits)
            if codes.ndim != 2 or not len(codes):
                raise InputError(
                    f"the {side} codes are {codes.shape}; an evaluation needs codes [N, bytes] with N >= 1"
                )
            check_labels(labels, len(codes), f"{side} labels")
        if self.query_labels.shape[1:] != self.database_labels.shape[1:]:
            raise InputError(
                f"query labels {self.query_labels.shape} and database labels {self.database_labels.shape} differ in "
                "the number of classes"
            )
        unknown = int(np.count_nonzero(~labelled(self.query_labels)))
        if unknown:
            raise InputError(
                f"{unknown} of {len(self.query_labels)} queries have no label, so no item is relevant to them; "
                "remove these queries"
            )
        if self.exclude is not None:
            if self.exclude.shape != (len(self.query_codes),) or not np.issubdtype(self.exclude.dtype, np.integer):
                raise InputError(
                    f"positions to exclude are {len(self.query_codes)} integers, got {self.exclude.dtype} "
                    f"{self.exclude.shape}"
                )
            if self.exclude.min() < -1 or self.exclude.max() >= len(self.database_codes):
                raise InputError(
                    f"positions to exclude run from {self.exclude.min()} to {self.exclude.max()}; "
                    f"-1 to {len(self.database_codes) - 1} are allowed"
                )

    @property
    def multi_label(self) -> bool:
        """Whether an item may have several classes."""
        return self.query_labels.ndim == 2

    @cached_property
    def packed(self) -> Packed:
        """The codes and labels as the kernels read them."""
        excluded = np.full(len(self.query_codes), -1) if self.exclude is None else self.exclude
        return Packed(
            words_of(self.query_codes),
            np.ascontiguousarray(words_of(self.database_codes).T),
            _label_words(self.query_labels),
            np.ascontiguousarray(_label_words(self.database_labels).T),
            not self.multi_label,
            excluded.astype(np.int64),
        )

    @property
    def num_items(self) -> npt.NDArray[np.int64]:
        """Length of each query's ranking, int64 [Q]."""
        num_excluded = 0 if self.exclude is None else (self.exclude >= 0).astype(np.int64)
        return np.asarray(np.full(len(self.query_codes), len(self.database_codes)) - num_excluded, np.int64)


def _label_words(labels: Labels) -> Words:
    """Return labels as uint64 [N, L]: a bit for each class, or the number of the class."""
    if labels.ndim == 2:
        return words_of(np.packbits(labels, axis=1))
    return labels.astype(np.int64).view(np.uint64)[:, None]


def query_chunks(retrieval: Retrieval, chunk_pairs: int = CHUNK_PAIRS) -> Iterator[slice]:
    """Yield the queries in chunks of at most `chunk_pairs` pairs with the database, at least one query each."""
    rows = max(1, chunk_pairs // len(retrieval.database_codes))
    for start in range(0, len(retrieval.query_codes), rows):
        yield slice(start, min(start + rows, len(retrieval.query_codes)))
