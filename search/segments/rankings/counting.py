"""Numbers of the rows of a shard by distance and by group."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from orbithash.encoders.codes import Codes, check_codes, words_of
from orbithash.encoders.compiled import flat, read_only
from orbithash.search.index.answers import Counts
from orbithash.search.index.distance_counts import add_distances
from orbithash.search.index.rankings import GroupName
from orbithash.search.segments import bits
from orbithash.search.segments.rankings.keys import ALL_ROWS, validity, values_of
from orbithash.search.segments.segment import Segment
from orbithash.search.segments.selections import Selected
from orbithash.search.segments.stop import Stop
from orbithash.search.segments.versions.shard_version import ShardVersion

__all__ = ["count_by", "count_distances"]

# Codes that are compared between two looks at the deadline.
_CODES_AT_ONCE = 2**20

_NO_STARTS = read_only(np.empty(0, np.uint32))


class _Group(NamedTuple):
    """The column that rows are grouped by, and the unit of its times; None: a column of labels."""

    column: str
    unit: str | None


_GROUPS: dict[GroupName, _Group] = {
    "label": _Group("label", None),
    "month": _Group("datetime", "M"),
    "year": _Group("datetime", "Y"),
}


def count_distances(shard: ShardVersion, selected: Sequence[Selected] | None, code: Codes, stop: Stop) -> Counts:
    """Return the number of selected rows (None: of all) at each distance of a code uint8 [B], int64 [bits + 1]."""
    check_codes(code[None], shard.bits)
    query = flat(words_of(code[None]))
    counts = np.zeros(shard.bits + 1, np.int64)
    for number, part in enumerate(shard.parts):
        chosen, (words, starts, rows) = part.alive, part.segment.code_rows
        if selected is not None and (few := selected[number].few) is not None:
            words, starts, rows = few.words, None, few.rows
        elif selected is not None:
            chosen = bits.both(chosen, selected[number].passing)
        code_rows = flat(words), _NO_STARTS if starts is None else flat(starts), flat(rows)
        counted = ALL_ROWS if chosen is None else read_only(chosen)
        for begin in range(0, len(words), _CODES_AT_ONCE):
            stop.check()
            add_distances(query, *code_rows, begin, min(begin + _CODES_AT_ONCE, len(words)), counted, counts)
    return counts


def count_by(
    shard: ShardVersion, selected: Sequence[Selected] | None, by: GroupName, stop: Stop
) -> tuple[dict[str, int], int]:
    """Return the number of selected rows (None: of all) by group, ascending, and of those without a value."""
    column, unit = _GROUPS[by]
    groups: Counter[str] = Counter()
    num_chosen = 0
    for number, part in enumerate(shard.parts):
        segment = part.segment
        chosen = bits.both(part.alive, None if selected is None else selected[number].passing)
        num_chosen += segment.num_rows if chosen is None else bits.count(chosen)
        of_segment: Counter[int] = Counter()
        for values in _chosen_values(segment, column, chosen, stop):
            if unit is not None:
                # Rounded down, also before 1970.
                values = values.view("datetime64[us]").astype(f"datetime64[{unit}]").view(np.int64)
            of_segment.update(dict(zip(*(each.tolist() for each in np.unique_counts(values)), strict=True)))
        names = _names(np.array([*of_segment], np.int64), segment, unit)
        groups.update(dict(zip(names, of_segment.values(), strict=True)))
    return dict(sorted(groups.items())), num_chosen - groups.total()


def _names(values: npt.NDArray[Any], segment: Segment, unit: str | None) -> list[str]:
    """Return the groups of distinct values of a segment."""
    if unit is not None:
        return [str(time) for time in values.view(f"datetime64[{unit}]")]
    if not len(values):
        return []
    # The same for all chunks.
    labels: list[str] = segment.columns.chunks("label")[0].dictionary.take(pa.array(values)).to_pylist()
    return labels


def _chosen_values(segment: Segment, column: str, chosen: bits.Bits | None, stop: Stop) -> Iterator[npt.NDArray[Any]]:
    """Yield the values of the chosen rows (None: of all) that are not null, chunk by chunk; labels as their numbers."""
    if column not in segment.columns.names:
        return
    is_chosen = None if chosen is None else bits.to_mask(chosen, segment.num_rows)
    first = 0
    for chunk in segment.columns.chunks(column):
        stop.check()
        numbers = chunk.indices if pa.types.is_dictionary(chunk.type) else chunk
        values = values_of(numbers, np.int32 if pa.types.is_dictionary(chunk.type) else np.int64, len(chunk))
        is_counted = None if is_chosen is None else is_chosen[first : first + len(chunk)]
        if numbers.null_count:
            is_known = bits.to_mask(validity(numbers), len(chunk))
            is_counted = is_known if is_counted is None else is_known & is_counted
        first += len(chunk)
        yield values if is_counted is None else values[is_counted]
