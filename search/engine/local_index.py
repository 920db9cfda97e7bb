"""Search in this process, without a service: for notebooks, scripts and evaluations."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.codes import Codes, check_codes
from orbithash.encoders.errors import InputError
from orbithash.search.engine.filters import parse_filter
from orbithash.search.engine.selections import select
from orbithash.search.index.host import Selection, ShardHost
from orbithash.search.index.indexes import is_exact_index
from orbithash.search.index.merge import Merged, merge
from orbithash.search.index.shard import Distances, Ids
from orbithash.search.protocol.queries import check_filter

__all__ = ["LocalAnswer", "LocalIndex"]

# Number of filters whose rows are kept.
_MAX_SELECTIONS = 16


@dataclass(frozen=True)
class LocalAnswer:
    """Hits of one query, ordered by (distance, id).

    Attributes:
        ids: uint64 [m], m <= k.
        distances: int32 [m], in bits, ascending.
        keys: the m keys of the rows; empty for an index over an array.
        ties_at_cutoff: number of rows at the distance of the last hit, including the hits.
        is_exact: whether no row nearer than the hits can be missing.
    """

    ids: Ids
    distances: Distances
    keys: tuple[str, ...]
    ties_at_cutoff: int
    is_exact: bool

    def __len__(self) -> int:
        return len(self.ids)


class LocalIndex:
    """Index over an archive (`LocalIndex.open`) or an array of codes, with the order and ties of the service.

    The index holds one version of an archive; open it again to see changes. Safe for concurrent searches.

    >>> import numpy as np
    >>> index = LocalIndex(np.array([[0b00000000], [0b00000001], [0b11111111]], np.uint8))
    >>> [answer] = index.search(np.array([[0b00000011]], np.uint8), k=2)
    >>> answer.ids.tolist(), answer.distances.tolist(), answer.ties_at_cutoff
    ([1, 0], [1, 2], 1)
    """

    def __init__(self, codes: Codes, *, bits: int | None = None, ids: Ids | None = None, index: str = "flat") -> None:
        """Index an array of codes.

        Args:
            codes: uint8 [N, B], packed.
            bits: bits of a code; None: 8 B.
            ids: uint64 [N], unique; None: the positions from 0.
            index: name of the index (see `orbithash.search.index.indexes`).

        Raises:
            InputError: codes, bits and ids do not fit each other, or the index is unknown.
        """
        if codes.ndim != 2:
            raise InputError(f"an index requires codes uint8 [N, B], got shape {list(codes.shape)}")
        bits = 8 * codes.shape[1] if bits is None else bits
        ids = np.arange(len(codes), dtype=np.uint64) if ids is None else ids
        self._build(iter([(ids, check_codes(codes, bits))]), bits, index, None)

    @classmethod
    def open(cls, path: str | Path, version: int | None = None, *, index: str = "flat") -> "LocalIndex":
        """Load the codes of an archive.

        >>> index = LocalIndex.open("archive")  # doctest: +SKIP
        >>> [answer] = index.search(codes, k=10, filter="label = 'harbor'")  # doctest: +SKIP

        Args:
            path: folder or URI of the archive.
            version: version to load; None: the newest.
            index: name of the index.

        Raises:
            InputError: `path` is not an archive, or the index is unknown.
        """
        archive = Archive.open(path, version)
        opened = cls.__new__(cls)
        opened._build(archive.code_batches(), archive.bits, index, archive)
        return opened

    def _build(self, parts: Iterator[tuple[Ids, Codes]], bits: int, index: str, archive: Archive | None) -> None:
        self.bits = bits
        self._is_exact = is_exact_index(index)
        self._archive = archive
        self._host = ShardHost(lambda version: parts, bits, number=0, num_shards=1, index=index)
        self._num_rows = self._host.num_rows(0)
        self._selections: OrderedDict[str, Selection] = OrderedDict()

    def __len__(self) -> int:
        return self._num_rows

    def __repr__(self) -> str:
        source = "" if self._archive is None else f"{self._archive.path!r}, version={self._archive.version}, "
        return f"LocalIndex({source}rows={len(self)}, bits={self.bits})"

    def search(self, codes: Codes, k: int = 10, *, radius: int | None = None, filter: str = "") -> list[LocalAnswer]:
        """Return the k nearest rows of each query.

        Args:
            codes: queries uint8 [Q, B], packed.
            k: maximum number of hits per query.
            radius: maximum distance in bits, inclusive; None: no limit.
            filter: rows to search, as CQL2 text (see `orbithash.search.engine.filters`); "": all.

        Raises:
            InputError: a wrong shape or type of codes, k < 1, radius < 0, an invalid filter, or a filter on an index
                over an array.
        """
        if codes.ndim != 2:
            raise InputError(f"a search requires codes uint8 [Q, B], got shape {list(codes.shape)}; write code[None]")
        if radius is not None and radius < 0:
            raise InputError(f"the radius is {radius} bits; it must be at least 0")
        selection = self._selection(filter) if filter else None
        found = self._host.search(0, codes, k, radius, None, selection)
        merged = merge([found], [k] * len(codes))
        keys = self._keys(merged)
        return [
            LocalAnswer(
                answer.ids,
                answer.distances,
                tuple(keys[id_] for id_ in answer.ids.tolist()) if self._archive is not None else (),
                answer.ties,
                self._is_exact,
            )
            for answer in merged
        ]

    def _keys(self, answers: Sequence[Merged]) -> dict[int, str]:
        """Return the keys of all hits by id."""
        if self._archive is None or not answers:
            return {}
        ids = np.unique(np.concatenate([answer.ids for answer in answers]))
        return dict(zip(ids.tolist(), self._archive.take(ids, ["key"])["key"].to_pylist(), strict=True))

    def _selection(self, text: str) -> Selection:
        if self._archive is None:
            raise InputError("a filter requires the columns of an archive; use LocalIndex.open")
        selection = self._selections.get(text)
        if selection is None:
            check_filter(text)
            selection = Selection(text, select(self._archive, parse_filter(text)))
            if len(self._selections) >= _MAX_SELECTIONS:
                self._selections.popitem(last=False)
            self._selections[text] = selection
        return selection
