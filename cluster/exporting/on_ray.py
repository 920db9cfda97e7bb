"""Parts of an export on Ray Data: read, exchange rows between the nodes, write parts.

    portions (driver) -> read -> exchange by range -> write a part (tasks) -> file (driver)

The driver writes the files, so that the nodes need no file system in common.
"""

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from orbithash.cluster.encoding.encode import quiet_data
from orbithash.cluster.exporting.parts import FileKind
from orbithash.cluster.exporting.ranges import Ranges
from orbithash.cluster.exporting.rows import POSITION, Portion, RowReader
from orbithash.cluster.exporting.sorting import sorted_slices
from orbithash.cluster.runtime import check_resources, connected, worker_error
from orbithash.encoders.places.contents import Contents

__all__ = ["parts_on_ray"]

_RANGE = "range"


def parts_on_ray(
    reader: RowReader, portions: list[Portion], ranges: Ranges, kind: FileKind, workers: tuple[int, int]
) -> Iterator[tuple[int, bytes, Contents]]:
    """Yield the number, the bytes and the contents of each part that has rows, in any order; at least one row passes.

    Args:
        reader: reads the rows.
        portions: all portions of the archive.
        ranges: the ranges of the parts.
        kind: what a file is.
        workers: minimum and maximum number of tasks at the same time; of reading and of writing.
    """
    # Ray is imported within: it reads the authentication that `connected` sets up.
    with connected():
        yield from _parts(reader, portions, ranges, kind, workers)


def _parts(
    reader: RowReader, portions: list[Portion], ranges: Ranges, kind: FileKind, workers: tuple[int, int]
) -> Iterator[tuple[int, bytes, Contents]]:
    import ray
    import ray.data
    from ray.exceptions import RayError

    def read(block: pa.Table) -> Iterator[pa.Table]:
        for row in block.to_pylist():
            table = reader.read(Portion(**row))
            if len(table):
                numbers = ranges.numbers(table[POSITION].to_numpy(), table["id"].to_numpy())
                yield table.append_column(_RANGE, pa.array(numbers))

    def write(rows: pa.Table) -> pa.Table:
        number = rows[_RANGE][0].as_py()
        content, contents = kind.write_bytes(sorted_slices([rows]))
        return pa.table(
            {
                _RANGE: [number],
                "content": pa.array([content], pa.large_binary()),
                "contents": [json.dumps(contents.to_json())],
            }
        )

    with quiet_data():
        check_resources(f"exporting with {workers[0]} workers", [{"CPU": 1}] * workers[0])
        most = workers[1]
        listed = pa.table({name: [getattr(each, name) for each in portions] for name in Portion._fields})
        blocks = [listed.slice(number, 1) for number in range(len(listed))]
        dataset: Any = ray.data.from_arrow(blocks)
        dataset = dataset.map_batches(
            read,
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=1,
            compute=ray.data.TaskPoolStrategy(size=min(most, len(blocks))),
        )
        # A partition of the exchange has one range, or a few.
        dataset = dataset.groupby(_RANGE, num_partitions=len(ranges)).map_groups(
            write,
            batch_format="pyarrow",
            num_cpus=1,
            compute=ray.data.TaskPoolStrategy(size=min(most, len(ranges))),
        )
        try:
            for row in dataset.iter_rows():
                yield int(row[_RANGE]), row["content"], Contents.from_json(json.loads(row["contents"]))
        except RayError as error:
            raise worker_error(error) from error
