"""Search in this process, without a service: for notebooks, scripts and evaluations."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.archive.tables import fixed_size_rows
from orbithash.encoders.codes import Codes, Encoded, check_bits, check_codes
from orbithash.encoders.errors import InputError
from orbithash.search.engine.rescoring import COLUMNS, check_rescore, num_with_ties, ranked
from orbithash.search.index.answers import Distances, Ids, Scope
from orbithash.search.index.merge import Merged, merge
from orbithash.search.protocol.queries import OVERSAMPLING, Rescore, check_filter, check_rescoring, shortlist_size
from orbithash.search.segments.dealing import Deal
from orbithash.search.segments.host import ShardHost
from orbithash.search.segments.stop import Stop

__all__ = ["LocalAnswer", "LocalIndex"]


@dataclass(frozen=True)
class LocalAnswer:
    """Hits of one query, ordered by (distance, id) or rescored.

    Attributes:
        ids: uint64 [m], m <= k.
        distances: int32 [m], in bits, ascending unless the answer is rescored.
        keys: the m keys of the rows; empty for an index over an array.
        ties_at_cutoff: number of rows at the distance of the last hit (rescored: of the last row of the shortlist),
            including the hits.
        is_exact: whether no row nearer than the hits can be missing.
        scores: float64 [m], as `Hit.score`, NaN for a row without a stored vector; None without rescoring.
        shortlist_radius: distance of the last row of the shortlist; None without rescoring or rows.
        is_shortlist_bounded: whether the shortlist lacks rows that tie with its last, because there were too many.
    """

    ids: Ids
    distances: Distances
    keys: tuple[str, ...]
    ties_at_cutoff: int
    is_exact: bool
    scores: npt.NDArray[np.float64] | None = None
    shortlist_radius: int | None = None
    is_shortlist_bounded: bool = False

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

    def __init__(self, codes: Codes, *, bits: int | None = None, ids: Ids | None = None, index: str = "exact") -> None:
        """Index an array of codes.

        Args:
            codes: uint8 [N, B], packed.
            bits: bits of a code; None: 8 B.
            ids: uint64 [N], unique; None: the positions from 0.
            index: name of the index (see `orbithash.search.index.row_index`).

        Raises:
            InputError: codes, bits and ids do not fit each other, or the index is unknown.
        """
        if codes.ndim != 2:
            raise InputError(f"an index requires codes uint8 [N, B], got shape {list(codes.shape)}")
        bits = 8 * codes.shape[1] if bits is None else bits
        ids = np.arange(len(codes), dtype=np.uint64) if ids is None else ids
        flat = pa.array(np.ascontiguousarray(check_codes(codes, check_bits(bits))).reshape(-1))
        table = pa.table({"code": pa.FixedSizeListArray.from_arrays(flat, codes.shape[1])})
        self._fill(ShardHost.of_rows(ids, table, bits, index), bits, None)

    @classmethod
    def open(cls, path: str | Path, version: int | None = None, *, index: str = "exact") -> "LocalIndex":
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
        host = ShardHost(archive.path, archive.bits, Deal(1), 0, index)
        host.follow(archive.version)
        opened._fill(host, archive.bits, archive)
        return opened

    def _fill(self, host: ShardHost, bits: int, archive: Archive | None) -> None:
        self.bits = bits
        self._archive = archive
        self._host = host
        self._version = 0 if archive is None else archive.version
        self._num_rows = host.num_rows(self._version)

    def __len__(self) -> int:
        return self._num_rows

    def __repr__(self) -> str:
        source = "" if self._archive is None else f"{self._archive.path!r}, version={self._archive.version}, "
        return f"LocalIndex({source}rows={len(self)}, bits={self.bits})"

    def search(
        self,
        codes: Codes | Encoded,
        k: int = 10,
        *,
        radius: int | None = None,
        filter: str = "",
        rescore: Rescore = "",
        oversampling: float = OVERSAMPLING,
    ) -> list[LocalAnswer]:
        """Return the k nearest rows of each query.

        Args:
            codes: queries uint8 [Q, B], packed; or the result of `HashModel.encode_items`, which rescoring requires.
            k: maximum number of hits per query.
            radius: maximum distance in bits, inclusive; None: no limit.
            filter: rows to search, as CQL2 text (see `orbithash.search.segments.filters.expressions`); "": all.
            rescore: rank a shortlist again by `vector` or `asymmetric`, as `Query.rescore`; "": order by distance.
            oversampling: rows of the shortlist for each hit.

        Raises:
            InputError: a wrong shape or type of codes, k < 1, radius < 0, an invalid filter, a filter or rescoring on
                an index over an array, or queries or an archive without what rescoring needs.
        """
        queries = codes if isinstance(codes, Encoded) else Encoded(codes, None, None)
        codes = queries.codes
        if codes.ndim != 2:
            raise InputError(f"a search requires codes uint8 [Q, B], got shape {list(codes.shape)}; write code[None]")
        if radius is not None and radius < 0:
            raise InputError(f"the radius is {radius} bits; it must be at least 0")
        if filter and self._archive is None:
            raise InputError("a filter requires the columns of an archive; use LocalIndex.open")
        check_filter(filter)
        scope = Scope(radius, filter=filter)
        if rescore:
            if self._archive is None:
                raise InputError("rescoring requires the columns of an archive; use LocalIndex.open")
            check_rescoring(k, rescore, oversampling)
            return [self._rescored(one, k, scope, rescore, oversampling) for one in queries.split()]
        found = self._host.search(self._version, codes, k, scope, Stop())
        merged = merge([found], [k] * len(codes))
        keys = self._keys(merged)
        return [self._answer(answer, keys) for answer in merged]

    def _rescored(self, query: Encoded, k: int, scope: Scope, rescore: Rescore, oversampling: float) -> LocalAnswer:
        if rescore == "asymmetric" and query.outputs is None:
            raise InputError("rescore asymmetric requires queries with outputs: encode_items(..., with_outputs=True)")
        assert self._archive is not None, "checked by search"
        check_rescore(rescore, query, self._archive.vector is not None)

        def search(size: int, scope: Scope) -> Merged:
            return merge([self._host.search(self._version, query.codes, size, scope, Stop())], [size])[0]

        shortlist = search(shortlist_size(k, oversampling), scope)
        if (size := num_with_ties(shortlist)) > len(shortlist.ids):
            shortlist = search(size, replace(scope, radius=int(shortlist.distances[-1])))
        column = COLUMNS[rescore]
        values = fixed_size_rows(self._host.read(self._version, shortlist.ids, [column], Stop())[column])
        best = ranked(rescore, query, shortlist, values, k)
        answer = self._answer(best.hits, self._keys([best.hits]))
        return replace(answer, scores=best.scores, shortlist_radius=best.radius, is_shortlist_bounded=best.is_bounded)

    def _answer(self, found: Merged, keys: dict[int, str]) -> LocalAnswer:
        names = () if self._archive is None else tuple(keys[id_] for id_ in found.ids.tolist())
        return LocalAnswer(found.ids, found.distances, names, found.ties, self._host.is_exact)

    def _keys(self, answers: Sequence[Merged]) -> dict[int, str]:
        """Return the keys of all hits by id."""
        if self._archive is None or not answers:
            return {}
        ids = np.unique(np.concatenate([answer.ids for answer in answers]))
        keys = self._host.read(self._version, ids, ["key"], Stop())["key"].to_pylist()
        return dict(zip(ids.tolist(), keys, strict=True))
