"""Which segments of a shard to merge, as in a log-structured merge tree.

Segments are merged until each has at least twice the rows of all smaller ones together. The number of segments grows
with the logarithm of the number of rows, and so does the number of times that a row is written again.
"""

from collections.abc import Collection, Sequence

from orbithash.search.segments.files import merge_segments
from orbithash.search.segments.segment import Segment
from orbithash.search.segments.versions.shard_version import LiveSegment

__all__ = ["MAX_ROWS", "SMALL_ROWS", "segments_to_merge", "small_segments", "with_segment"]

# Segments that together have fewer rows than this are merged at once.
SMALL_ROWS = 4096

# Maximum number of rows of a segment.
MAX_ROWS = 2**25

# A segment has at least this many times the rows of all smaller ones together.
_RATIO = 2

# A segment is written again without its dead rows when they are at least this share of all, and this number.
_DEAD_SHARE, _MIN_DEAD = 0.25, SMALL_ROWS


def small_segments(num_alive: Sequence[int], num_new: int) -> list[int]:
    """Return the numbers of the segments to merge at once with `num_new` new rows: the smallest ones.

    `num_alive`: rows of each segment that exist.
    """
    chosen: list[int] = []
    total = num_new
    for number in sorted(range(len(num_alive)), key=lambda number: num_alive[number]):
        total += num_alive[number]
        if total >= SMALL_ROWS:
            break
        chosen.append(number)
    return chosen


def segments_to_merge(num_alive: Sequence[int], num_rows: Sequence[int], max_rows: int = MAX_ROWS) -> list[int]:
    """Return the numbers of the segments to merge next; empty if no merge is due.

    Args:
        num_alive: rows of each segment that exist.
        num_rows: rows of each segment, with those that do not exist any more.
        max_rows: maximum number of rows of a merged segment.
    """
    order = sorted(range(len(num_alive)), key=lambda number: num_alive[number])
    chosen: list[int] = []
    total = 0
    for place, number in enumerate(order):
        if place and num_alive[number] < _RATIO * total and total + num_alive[number] <= max_rows:
            chosen = order[: place + 1]
        total += num_alive[number]
        if total > max_rows:
            break
    if chosen:
        return chosen
    for number in order:
        num_dead = num_rows[number] - num_alive[number]
        if num_dead >= max(_MIN_DEAD, _DEAD_SHARE * num_rows[number]):
            return [number]
    return []


def with_segment(
    parts: list[LiveSegment], new: Segment, busy: Collection[str], bits: int, index: str
) -> list[LiveSegment]:
    """Return segments and a new one, after merging the small ones in memory.

    Args:
        parts: the segments.
        new: a segment with other ids.
        busy: names of segments that are not to be merged.
        bits: bits of a code.
        index: name of the index.
    """
    free = [part for part in parts if part.num_alive and part.segment.name not in busy]
    small = [free[number] for number in small_segments([part.num_alive for part in free], new.num_rows)]
    if not small:
        return [*parts, LiveSegment.of(new)]
    pairs = [(part.segment, part.alive) for part in small]
    merged = merge_segments(None, [*pairs, (new, None)], bits, index)
    merged_names = {part.segment.name for part in small}
    return [*(part for part in parts if part.segment.name not in merged_names), LiveSegment.of(merged)]
