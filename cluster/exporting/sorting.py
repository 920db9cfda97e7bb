"""Order rows by ranges in bounded memory: rows wait in files without names, which end with the process."""

import math
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from orbithash.cluster.exporting.ranges import Ranges
from orbithash.cluster.exporting.rows import POSITION

__all__ = ["in_order", "sorted_slices"]

# Files that are open at the same time; more ranges are divided in several passes.
_FILES = 64
# Bytes of a slice of sorted rows.
_SLICE_BYTES = 16 * 2**20


def in_order(tables: Iterable[pa.Table], ranges: Ranges, folder: Path) -> Iterator[tuple[int, Iterator[pa.Table]]]:
    """Yield the number of each range, and slices of its rows in their order.

    Args:
        tables: the rows, with `id` and `POSITION`, in any order.
        ranges: the ranges; the rows of one are in memory at a time.
        folder: where rows wait; nothing stays there.
    """
    yield from _divided(tables, ranges, range(len(ranges)), folder)


def _divided(
    tables: Iterable[pa.Table], ranges: Ranges, numbers: range, folder: Path
) -> Iterator[tuple[int, Iterator[pa.Table]]]:
    """Yield the ranges with these numbers, to which all rows belong."""
    if len(numbers) == 1:
        yield numbers[0], sorted_slices([table for table in tables if len(table)])
        return
    # Ranges in each file.
    step = math.ceil(len(numbers) / _FILES)
    groups = [numbers[start : start + step] for start in range(0, len(numbers), step)]
    with ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile(dir=folder)) for _ in groups]
        writers: dict[int, Any] = {}
        for table in tables:
            of = (ranges.numbers(table[POSITION].to_numpy(), table["id"].to_numpy()) - numbers[0]) // step
            # Sorted, so that each file gets a slice.
            order = np.argsort(of, kind="stable")
            table, bounds = table.take(order), np.searchsorted(of[order], np.arange(len(groups) + 1))
            for number in np.flatnonzero(np.diff(bounds)).tolist():
                if number not in writers:
                    writers[number] = pa.ipc.new_stream(files[number], table.schema)
                rows = table.slice(bounds[number], bounds[number + 1] - bounds[number])
                writers[number].write_table(rows.combine_chunks())
        for writer in writers.values():
            writer.close()
        for number, (file, group) in enumerate(zip(files, groups, strict=True)):
            file.seek(0)
            waiting = _tables(file) if number in writers else iter(())
            yield from _divided(waiting, ranges, group, folder)
            file.close()


def _tables(file: Any) -> Iterator[pa.Table]:
    for batch in pa.ipc.open_stream(file):
        yield pa.Table.from_batches([batch])


def sorted_slices(tables: list[pa.Table]) -> Iterator[pa.Table]:
    """Yield rows in their order, in slices."""
    if not tables:
        return
    table = pa.concat_tables(tables).combine_chunks()
    tables.clear()
    order = np.lexsort((table["id"].to_numpy(), table[POSITION].to_numpy()))
    step = max(1, int(_SLICE_BYTES * len(table) / max(1, table.nbytes)))
    for start in range(0, len(order), step):
        yield table.take(order[start : start + step])
