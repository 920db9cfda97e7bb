"""`bench manifest`: the start of a rank with a large manifest, and the hashes of many small files.

The start is beside a bare pyarrow read of the same file, each in a process of its own; memory is the growth of a
process's peak from just before. Hashing with all threads is beside one thread, and beside the same files remembered, in
turns; each time the median counts.
"""

import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from orbithash.cluster.bench.report import environment
from orbithash.cluster.output import say
from orbithash.encoders.errors import InputError
from orbithash.trainers.data.labels import label_arrays
from orbithash.trainers.data.memory_use import memory_mb, peak_memory_of_process_mb, reset_peak_memory
from orbithash.trainers.datasets import MANIFEST, Images, Manifest
from orbithash.trainers.datasets.hashes import SETTLED_S, hash_files

__all__ = ["bench_manifest"]

_NUM_CLASSES = 40
_ROUNDS = 5
_MAX_COUNT, _MAX_FILES, _MAX_BYTES = 10**8, 10**6, 2**24


def bench_manifest(count: int, num_files: int, file_bytes: int) -> dict[str, Any]:
    """Measure seconds and memory of reading a manifest, and files hashed per second.

    Args:
        count: number of images of the generated manifest.
        num_files: number of files to hash.
        file_bytes: size of each file.

    Raises:
        InputError: an argument is out of its range.
    """
    for name, value, high in (
        ("--count", count, _MAX_COUNT),
        ("--files", num_files, _MAX_FILES),
        ("--file-bytes", file_bytes, _MAX_BYTES),
    ):
        if not 1 <= value <= high:
            raise InputError(f"{name} is {value}; from 1 to {high:,} are allowed")
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        say(f"a manifest of {count:,} images")
        _write(folder / MANIFEST, count)
        start_s, start_mib = _alone(_start, folder / MANIFEST)
        read_s, read_mib = _alone(_bare_read, folder / MANIFEST)
        say(f"hashes of {num_files:,} files")
        _write_files(folder / "files", num_files, file_bytes)
        hashing, _ = _alone(_hash_in_turns, folder, num_files)
    return {
        **environment("manifest", "pyarrow"),
        "images": count,
        "rank_start_s": start_s,
        "bare_read_s": read_s,
        "rank_start_mib": start_mib,
        "bare_read_mib": read_mib,
        "files": num_files,
        "file_bytes": file_bytes,
        "threads": len(os.sched_getaffinity(0)),
        **{f"{name}_files_per_s": num_files / seconds for name, seconds in hashing.items()},
        "ratio_to_one_thread": hashing["one_thread"] / hashing["all_threads"],
        "ratio_of_remembered": hashing["all_threads"] / hashing["remembered"],
    }


def _alone(work: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """Run `work` in a new process; return what it returns, and by how much the peak of its memory grew, MiB."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measured, work, *arguments).result()


def _measured(work: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    cpu = torch.device("cpu")
    reset_peak_memory(cpu)
    before = memory_mb(cpu)
    found = work(*arguments)
    return found, peak_memory_of_process_mb() - before


def _write(path: Path, count: int) -> None:
    """Write a manifest of images of one class each, in the parts of a usual split."""
    rng = np.random.default_rng(0)
    labels = rng.integers(_NUM_CLASSES, size=count).tolist()
    paths = [f"class_{label:02d}/scene_{row:08d}.tif" for row, label in enumerate(labels)]
    images = Images.of_columns(
        id=paths,
        path=paths,
        labels=[[label] for label in labels],
        split=rng.choice(["train", "validation", "test"], count, p=[0.7, 0.1, 0.2]).tolist(),
        sha256=rng.integers(0, 256, (count, 32), np.uint8).view("V32").ravel().tolist(),
        captions=[()] * count,
        second=[None] * count,
        second_sha256=[None] * count,
    )
    classes = tuple(f"class_{label:02d}" for label in range(_NUM_CLASSES))
    Manifest("folder", "random", 0, 0.1, classes, images).write(path)


def _start(path: Path) -> float:
    """Do what a rank does with its manifest before it reads an image."""
    began = time.perf_counter()
    manifest = Manifest.read(path)
    parts = [manifest.part(split) for split in ("train", "validation")]
    labels = label_arrays(len(manifest.classes), *parts)
    assert [len(part) for part in parts] == [len(array) for array in labels]
    return time.perf_counter() - began


def _bare_read(path: Path) -> float:
    import pyarrow.parquet as pq

    began = time.perf_counter()
    table = pq.read_table(path, memory_map=True, use_threads=False)
    seconds = time.perf_counter() - began
    assert table.num_rows
    return seconds


def _write_files(folder: Path, count: int, num_bytes: int) -> None:
    rng = np.random.default_rng(0)
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:06d}").write_bytes(rng.bytes(num_bytes))


def _hash_in_turns(folder: Path, num_files: int) -> dict[str, float]:
    """Return the median seconds of hashing with one thread, with all threads, and of hashes that are remembered."""
    paths = [f"{number:06d}" for number in range(num_files)]
    # `hash_files` takes a thread for each CPU of the process.
    cpus = os.sched_getaffinity(0)
    # Hashes of younger files are not remembered.
    time.sleep(SETTLED_S + 0.5)
    seconds: dict[str, list[float]] = {"one_thread": [], "all_threads": [], "remembered": []}
    for turn in range(_ROUNDS):
        for name, allowed in (("one_thread", {min(cpus)}), ("all_threads", cpus), ("remembered", cpus)):
            first = "one_thread" if name == "one_thread" else "all_threads"
            os.environ["ORBITHASH_CACHE"] = str(folder / f"cache-{first}-{turn}")
            os.sched_setaffinity(0, allowed)
            began = time.perf_counter()
            hashes = hash_files(folder / "files", paths)
            seconds[name].append(time.perf_counter() - began)
            assert all(isinstance(sha256, bytes) for sha256 in hashes)
    return {name: float(np.median(values)) for name, values in seconds.items()}
