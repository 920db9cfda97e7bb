"""`bench export`: an archive to one GeoParquet file, beside a bare pyarrow write of the same table.

Each contestant runs in a process of its own, whose peak of resident memory is reported. pyarrow writes the rows of the
file that orbithash wrote, with the same columns, compression and row groups; the time of reading them is not counted.
"""

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from orbithash.cluster.bench.report import environment
from orbithash.cluster.exporting.export import export
from orbithash.cluster.output import say
from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.errors import InputError
from orbithash.encoders.vectors import VectorSpec
from orbithash.trainers.data.memory_use import peak_memory_of_process_mb

__all__ = ["bench_export", "write_random_archive"]

_BITS, _DIMS = 64, 64
# Rows of one commit.
_ROWS_PER_COMMIT = 100_000
_MAX_ROWS, _MAX_THUMBNAIL = 10**9, 1_000_000


def bench_export(rows: int, thumbnail_bytes: int) -> dict[str, Any]:
    """Measure rows per second and peaks of memory.

    Args:
        rows: number of random rows, with places, times, codes of 64 bits and vectors of 64 dimensions.
        thumbnail_bytes: size of the thumbnail of a row.
    """
    for name, value, low, high in (("--rows", rows, 1, _MAX_ROWS), ("--thumbnail", thumbnail_bytes, 0, _MAX_THUMBNAIL)):
        if not low <= value <= high:
            raise InputError(f"{name} is {value}; from {low} to {high:,} are allowed")
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        say(f"writing an archive of {rows:,} rows")
        _alone(write_random_archive, folder / "archive", rows, thumbnail_bytes)
        say("orbithash export")
        export_s, export_mib = _alone(_export, folder / "archive", folder / "a.parquet")
        size = (folder / "a.parquet").stat().st_size
        say("a bare pyarrow write of the same table")
        write_s, write_mib = _alone(_bare_write, folder / "a.parquet", folder / "b.parquet")
    return {
        **environment("export", "orbithash", "pyarrow", "pylance", "shapely"),
        "rows": rows,
        "thumbnail_bytes": thumbnail_bytes,
        "file_mib": size / 2**20,
        "export_rows_per_s": rows / export_s,
        "pyarrow_rows_per_s": rows / write_s,
        "share_of_pyarrow": write_s / export_s,
        "export_peak_mib": export_mib,
        "pyarrow_peak_mib": write_mib,
    }


def write_random_archive(path: Path, rows: int, thumbnail_bytes: int) -> float:
    """Create an archive of random rows, each a square of some kilometres; return the seconds that this took."""
    import shapely

    began = time.perf_counter()
    rng = np.random.default_rng(0)
    archive = Archive.create(path, _BITS, "0" * 32, VectorSpec(_DIMS, 0.01))
    begin = datetime(2024, 1, 1, tzinfo=UTC)
    for start in range(0, rows, _ROWS_PER_COMMIT):
        count = min(_ROWS_PER_COMMIT, rows - start)
        numbers = range(start, start + count)
        lon, lat = rng.uniform(-179, 178, count), rng.uniform(-85, 84, count)
        table = Archive.table(
            rng.integers(0, 256, (count, _BITS // 8), np.uint8),
            _BITS,
            [f"scenes/{number:09d}.tif" for number in numbers],
            [f"s3://bucket/scenes/{number:09d}.tif" for number in numbers],
            vector=rng.integers(-127, 128, (count, _DIMS), np.int8),
            label=[f"class {number % 20}" for number in numbers],
            datetime=[begin + timedelta(seconds=number) for number in numbers],
            lon=lon.tolist(),
            lat=lat.tolist(),
            footprint=shapely.to_wkb(shapely.box(lon, lat, lon + 0.05, lat + 0.05)),
            thumbnail=[rng.bytes(thumbnail_bytes) for _ in numbers],
        )
        archive.commit(Archive.write_fragments(path, table))
    return time.perf_counter() - began


def _alone(work: Callable[..., float], *arguments: Any) -> tuple[float, float]:
    """Run `work` in a new process; return its seconds and the peak of the process's resident memory, MiB."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measured, work, *arguments).result()


def _measured(work: Callable[..., float], *arguments: Any) -> tuple[float, float]:
    seconds = work(*arguments)
    return seconds, peak_memory_of_process_mb()


def _export(archive: Path, out: Path) -> float:
    began = time.perf_counter()
    export(str(archive), out)
    return time.perf_counter() - began


def _bare_write(given: Path, out: Path) -> float:
    """Write the rows of a Parquet file again; return the seconds of the writing alone."""
    import pyarrow.parquet as pq

    read = pq.ParquetFile(given)
    seconds = 0.0
    with pq.ParquetWriter(out, read.schema_arrow, compression="zstd") as writer:
        for number in range(read.num_row_groups):
            table = read.read_row_group(number)
            began = time.perf_counter()
            writer.write_table(table, row_group_size=len(table))
            seconds += time.perf_counter() - began
        began = time.perf_counter()
    return seconds + time.perf_counter() - began
