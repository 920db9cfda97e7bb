"""A shard in one version of the archive: segments, and the rows of each that exist."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from orbithash.encoders.codes import Codes
from orbithash.search.index.answers import Ids, ShardAnswer
from orbithash.search.index.merge import join
from orbithash.search.index.row_index import RowMask
from orbithash.search.segments import bits as rows_as_bits
from orbithash.search.segments.bits import Bits
from orbithash.search.segments.columns import ArchiveColumns
from orbithash.search.segments.segment import Segment
from orbithash.search.segments.selections import Selected
from orbithash.search.segments.stop import Stop

__all__ = ["LiveSegment", "ShardVersion"]

Numbers = npt.NDArray[np.int64]


class LiveSegment(NamedTuple):
    """A segment in one version.

    Attributes:
        segment: the rows.
        alive: the rows that exist in the version; None: all.
        num_alive: number of the rows that exist.
    """

    segment: Segment
    alive: Bits | None
    num_alive: int

    @classmethod
    def of(cls, segment: Segment, alive: Bits | None = None) -> "LiveSegment":
        """Return a segment of which these rows exist (None: all)."""
        return cls(segment, alive, segment.num_rows if alive is None else rows_as_bits.count(alive))

    def rows_of(self, ids: Ids) -> Numbers:
        """Return the row of each id, int64 [N]; -1 for ids without a row that exists."""
        rows = self.segment.rows_of(ids)
        if self.alive is not None:
            is_here = rows >= 0
            is_here[is_here] = rows_as_bits.contains(self.alive, rows[is_here])
            rows = np.where(is_here, rows, -1)
        return rows

    def without(self, ids: Ids) -> "LiveSegment":
        """Return the segment without the rows of these ids. Shares the bits if none of the ids has a row."""
        rows = self.rows_of(ids)
        rows = np.unique(rows[rows >= 0])
        if not len(rows):
            return self
        alive = rows_as_bits.without(self.alive, rows, self.segment.num_rows)
        return LiveSegment(self.segment, alive, self.num_alive - len(rows))


@dataclass(frozen=True)
class ShardVersion:
    """The rows of a shard in one version of the archive. Immutable.

    Attributes:
        version: number of the version.
        commit_id: id of the commit that made the version.
        bits: bits of a code.
        parts: the segments, the largest first; no two have a row that exists with the same id.
    """

    version: int
    commit_id: str
    bits: int
    parts: tuple[LiveSegment, ...]

    @classmethod
    def of(cls, version: int, commit_id: str, bits: int, parts: Sequence[LiveSegment]) -> "ShardVersion":
        """Return a version of those of the segments of which rows exist."""
        parts = sorted((part for part in parts if part.num_alive), key=lambda part: -part.num_alive)
        return cls(version, commit_id, bits, tuple(parts))

    @cached_property
    def num_rows(self) -> int:
        """Number of rows."""
        return sum(part.num_alive for part in self.parts)

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The segments, in the order of `parts`."""
        return tuple(part.segment for part in self.parts)

    @cached_property
    def reads_archive(self) -> bool:
        """Whether columns are read from the archive when they are needed first."""
        return any(isinstance(segment.columns, ArchiveColumns) for segment in self.segments)

    @cached_property
    def column_names(self) -> tuple[str, ...]:
        """Names of the columns that the segments have."""
        return self.segments[0].columns.names if self.segments else ()

    def search(
        self,
        queries: Codes,
        k: int,
        radius: int | None,
        after: tuple[int, int] | None,
        selected: Sequence[Selected] | None,
        stop: Stop,
    ) -> ShardAnswer:
        """Return the k nearest rows of each query, without columns, among those that exist and are selected.

        Args:
            queries: uint8 [Q, ceil(bits/8)].
            k: maximum number of hits of a query.
            radius: maximum distance in bits, inclusive; None: no limit.
            after: return only rows after this (distance, id) in the order; None: from the first.
            selected: the rows that pass a filter, of each segment; None: all.
            stop: checked between segments.
        """
        answers: list[ShardAnswer] = []
        for number, part in enumerate(self.parts):
            stop.check()
            if selected is None:
                mask = RowMask(part.alive)
            else:
                mask = RowMask(part.alive, selected[number].passing, selected[number].few)
            answer = part.segment.search(queries, k, radius, after, mask)
            answers.append(answer)
            # Rows beyond the k-th of one segment cannot be among the k nearest of all.
            if answer.distances.shape[1] == k and len(queries):
                farthest = int(answer.distances[:, -1].max())
                radius = farthest if radius is None else min(radius, farthest)
        if not answers:
            nothing = np.zeros((len(queries), 0), np.int32), np.zeros((len(queries), 0), np.uint64)
            return ShardAnswer(*nothing, np.zeros(len(queries), np.int64), num_rows=0)
        joined = answers[0] if len(answers) == 1 else join(answers, k)
        return joined if joined.num_rows == self.num_rows else replace(joined, num_rows=self.num_rows)

    def num_matching(self, selected: Sequence[Selected]) -> int:
        """Return the number of rows that are selected."""
        return sum(_num_both(part, of_part) for part, of_part in zip(self.parts, selected, strict=True))

    def hits(self, ids: Ids, include: Sequence[str]) -> list[bytes]:
        """Return rows by id, in their order, as `Segment.hits`. Raises `LookupError` for an id without a row."""
        found = self._found(ids)
        if len(found) == 1:
            number, rows, _ = found[0]
            return self.segments[number].hits(rows, include)
        hits = [b""] * len(ids)
        for number, rows, places in found:
            for place, hit in zip(places.tolist(), self.segments[number].hits(rows, include), strict=True):
                hits[place] = hit
        return hits

    def read(self, ids: Ids, columns: Sequence[str]) -> pa.Table:
        """Return columns of segments, and `code`, of rows by id, in their order.

        Raises `LookupError` for an id without a row.
        """
        nothing = np.empty(0, np.int64)
        tables, order = [], []
        # Without rows, the first segment gives the types of the columns.
        for number, rows, places in self._found(ids) or [(0, nothing, nothing)]:
            segment = self.segments[number]
            names = [name for name in columns if name != "code"]
            of_segment = segment.columns.take(rows, names) if names else {}
            codes = {"code": _code_array(segment.codes_of(rows))} if "code" in columns else {}
            table = pa.table({**{name: of_segment[name] for name in names}, **codes})
            tables.append(table.select(list(columns)))
            order.append(places)
        if len(tables) == 1:
            return tables[0]
        back = np.empty(len(ids), np.int64)
        back[np.concatenate(order)] = np.arange(len(ids))
        return pa.concat_tables(tables).take(pa.array(back))

    def scroll(self, selected: Sequence[Selected] | None, after: int | None, limit: int) -> Ids:
        """Return the first `limit` ids above `after` of rows that are selected (None: of all), ascending."""
        found = [np.empty(0, np.uint64)]
        for number, (segment, alive, _) in enumerate(self.parts):
            begin = 0 if after is None else segment.ids.num_up_to(after)
            passing = alive if selected is None else rows_as_bits.both(alive, selected[number].passing)
            if passing is None:
                rows = np.arange(begin, min(begin + limit, segment.num_rows), dtype=np.uint32)
            else:
                rows = rows_as_bits.rows(passing, begin, limit)
            found.append(segment.ids_of(rows))
        return np.sort(np.concatenate(found))[:limit]

    def _found(self, ids: Ids) -> list[tuple[int, Numbers, Numbers]]:
        """Return (number of a segment, its rows, their places in `ids`) for each segment that has some of the ids."""
        found, num_found = [], 0
        for number, part in enumerate(self.parts):
            rows = part.rows_of(ids)
            places = np.flatnonzero(rows >= 0)
            if len(places):
                found.append((number, rows[places], places))
                num_found += len(places)
                if num_found == len(ids):
                    break
        if num_found < len(ids):
            raise LookupError(f"{len(ids) - num_found} of {len(ids)} rows are not in version {self.version}")
        return found


def _num_both(part: LiveSegment, selected: Selected) -> int:
    if part.alive is None:
        return selected.num_passing
    return rows_as_bits.count(part.alive & selected.passing)


def _code_array(codes: Codes) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(codes).reshape(-1)), codes.shape[1])
