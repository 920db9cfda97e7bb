"""Numbers of the rows of a shard by distance and by group."""

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from orbithash.encoders.codes import Codes, check_codes
from orbithash.search.index.answers import Counts
from orbithash.search.index.code_rows import words_of
from orbithash.search.index.rankings import GroupName
from orbithash.search.segments import bits
from orbithash.search.segments.rankings.keys import integers
from orbithash.search.segments.segment import Segment
from orbithash.search.segments.selections import Selected
from orbithash.search.segments.stop import Stop
from orbithash.search.segments.versions.shard_version import ShardVersion

__all__ = ["count_by", "count_distances"]

# The unit of NumPy's times in which rows are grouped.
_UNITS = {"month": "M", "year": "Y"}


def count_distances(shard: ShardVersion, selected: Sequence[Selected] | None, code: Codes, stop: Stop) -> Counts:
    """Return the number of selected rows (None: of all) at each distance of a code uint8 [B], int64 [bits + 1]."""
    check_codes(code[None], shard.bits)
    [query] = words_of(code[None])
    counts = np.zeros(shard.bits + 1, np.int64)
    for segment, is_chosen in _chosen(shard, selected):
        stop.check()
        code_rows = segment.code_rows
        distances = np.bitwise_count(code_rows.words ^ query).sum(axis=1, dtype=np.int64)
        if code_rows.starts is not None:
            distances = np.repeat(distances, np.diff(code_rows.starts))
        if is_chosen is not None:
            distances = distances[is_chosen[code_rows.rows]]
        counts += np.bincount(distances, minlength=len(counts))
    return counts


def count_by(
    shard: ShardVersion, selected: Sequence[Selected] | None, by: GroupName, stop: Stop
) -> tuple[dict[str, int], int]:
    """Return the number of selected rows (None: of all) by group, ascending, and of those without a value."""
    column = "label" if by == "label" else "datetime"
    groups: Counter[str] = Counter()
    num_chosen = 0
    for segment, is_chosen in _chosen(shard, selected):
        num_chosen += segment.num_rows if is_chosen is None else int(is_chosen.sum())
        first = 0
        for chunk in segment.columns.chunks(column) if column in segment.columns.names else ():
            stop.check()
            values, are_counted = integers(chunk.indices if by == "label" else chunk)
            if is_chosen is not None:
                are_counted = are_counted & is_chosen[first : first + len(values)]
            first += len(values)
            values = values[are_counted]
            if by == "label":
                numbers = np.bincount(values, minlength=len(chunk.dictionary))
                for number in np.flatnonzero(numbers).tolist():
                    groups[chunk.dictionary[number].as_py()] += int(numbers[number])
            else:
                times = values.view("datetime64[us]").astype(f"datetime64[{_UNITS[by]}]")
                for time, number in zip(*np.unique(times, return_counts=True), strict=True):
                    groups[str(time)] += int(number)
    return dict(sorted(groups.items())), num_chosen - groups.total()


def _chosen(
    shard: ShardVersion, selected: Sequence[Selected] | None
) -> Iterator[tuple[Segment, npt.NDArray[np.bool_] | None]]:
    """Yield each segment, and which of its rows exist and are selected, bool [N]; None: all."""
    for number, part in enumerate(shard.parts):
        chosen = bits.both(part.alive, None if selected is None else selected[number].passing)
        yield part.segment, None if chosen is None else bits.to_mask(chosen, part.segment.num_rows)
