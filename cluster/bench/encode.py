"""`bench encode` and `bench embeddings`: the Ray Data pipelines beside plain loops in one process.

The loops are measured before and after the pipeline, so that a machine that slows down meanwhile does not decide the
ratio. Only the ratios can be compared between machines.
"""

import os
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from orbithash.cluster.bench.inputs import (
    write_bench_scenes,
    write_random_model,
    write_vector_model,
    write_vector_table,
)
from orbithash.cluster.bench.report import environment
from orbithash.cluster.encoding.encode import BATCH_SIZE, encode
from orbithash.cluster.encoding.vectors import MAX_ENCODED_HERE, encode_vectors
from orbithash.cluster.output import say
from orbithash.cluster.runtime import connected
from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.errors import InputError
from orbithash.encoders.networks.model import HashModel
from orbithash.encoders.sources.records import Record, read_record
from orbithash.encoders.sources.sources import Item, list_source

__all__ = ["bench_embeddings", "bench_encode"]


def bench_encode(model: Path | None, data: Path | None, count: int) -> dict[str, Any]:
    """Measure images per second of `orbithash encode` beside plain loops in one process with as many threads.

    `whole_loop` does the same work: read, decode, encode, write. `encode_loop` gets decoded batches, so it shows the
    limit that the network sets. Without `model`, a network with random weights; without `data`, generated scenes.
    """
    if count < 2 * BATCH_SIZE:
        raise InputError(f"--count is {count}; at least {2 * BATCH_SIZE} images are needed to measure a rate")
    with tempfile.TemporaryDirectory() as temporary, connected():
        root = Path(temporary)
        folder = model or write_random_model(root / "model")
        source = _write_list(root, data or write_bench_scenes(root / "scenes", count), count)
        items = list_source(str(source))
        loaded = HashModel.load(folder)
        num_threads = os.cpu_count() or 1
        with _torch_threads(num_threads):
            say("plain loops, first time")
            before = _whole_loop(loaded, items, root / "plain0", num_threads), _encode_loop(loaded, items)
            say("the Ray Data pipeline")
            summary = encode(str(source), folder, str(root / "archive"))
            say("plain loops, second time")
            after = _whole_loop(loaded, items, root / "plain1", num_threads), _encode_loop(loaded, items)
        whole, encode_only = (sum(pair) / 2 for pair in zip(before, after, strict=True))
        return {
            **environment("encode", "ray", "torch"),
            "images": len(items),
            "network": loaded.card.network.backbone.name,
            "input_px": loaded.preprocessing.crop,
            "threads": num_threads,
            "pipeline_images_per_s": summary.rows_per_s,
            "pipeline_start_s": summary.start_s,
            "whole_loop_images_per_s": whole,
            "encode_loop_images_per_s": encode_only,
            "ratio_to_whole_loop": summary.rows_per_s / whole,
            "ratio_to_encode_loop": summary.rows_per_s / encode_only,
        }


def bench_embeddings(count: int, dims: int) -> dict[str, Any]:
    """Measure rows per second of `orbithash encode` on a table of vectors beside a plain loop in one process.

    The loop reads the vectors with pyarrow and encodes them with as many threads; it writes nothing. The vectors are
    `count` random float16 of `dims` dimensions, with ids and places. The memory is that of the driver, in MiB: at the
    start of the pipeline, and at most.
    """
    if count <= MAX_ENCODED_HERE:
        raise InputError(f"--rows is {count}; more than {MAX_ENCODED_HERE} are needed, which Ray Data encodes")
    with tempfile.TemporaryDirectory() as temporary, connected():
        root = Path(temporary)
        say(f"writing {count} vectors")
        table = write_vector_table(root / "vectors.parquet", count, dims)
        folder = write_vector_model(root / "model", dims)
        model, num_threads = HashModel.load(folder), os.cpu_count() or 1
        with _torch_threads(num_threads):
            say("the plain loop, first time")
            before = _vector_loop(model, table, dims)
            say("the Ray Data pipeline")
            with _memory_mib() as memory:
                summary = encode_vectors(str(table), folder, str(root / "archive"))
            say("the plain loop, second time")
            plain = (before + _vector_loop(model, table, dims)) / 2
        return {
            **environment("embeddings", "ray", "torch", "pyarrow"),
            "rows": count,
            "dims": dims,
            "bits": model.bits,
            "stored_vector_dims": model.card.vector.dims if model.card.vector else 0,
            "threads": num_threads,
            "pipeline_rows_per_s": summary.rows_per_s,
            "pipeline_start_s": summary.start_s,
            "loop_rows_per_s": plain,
            "ratio_to_loop": summary.rows_per_s / plain,
            "driver_mib_begin": memory[0],
            "driver_mib_max": max(memory),
        }


def _vector_loop(model: HashModel, table: Path, dims: int) -> float:
    """Return rows per second of reading the vectors of a file with pyarrow and encoding them."""
    import pyarrow.parquet as pq

    begun, count = time.perf_counter(), 0
    with pq.ParquetFile(table) as file:
        for batch in file.iter_batches(2**14, columns=["embedding"]):
            vectors = batch["embedding"].flatten().to_numpy().astype(np.float32).reshape(-1, dims)
            model.encode_items("vector", vectors)
            count += len(vectors)
    return count / (time.perf_counter() - begun)


@contextmanager
def _memory_mib() -> Iterator[list[float]]:
    """Add the resident memory of this process to the list during the block, five times a second."""
    samples, ended = [_resident_mib()], threading.Event()

    def watch() -> None:
        while not ended.wait(0.2):
            samples.append(_resident_mib())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        ended.set()
        thread.join()


def _resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@contextmanager
def _torch_threads(num_threads: int) -> Iterator[None]:
    """Set torch's number of threads for the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _write_list(root: Path, data: Path, count: int) -> Path:
    """Write a list of the first `count` images of a folder and return its path."""
    items = list_source(str(data))
    if len(items) < count:
        raise InputError(f"{data} has {len(items)} images, --count asks for {count}")
    path = root / "images.txt"
    path.write_text("".join(f"{item.path}\n" for item in items[:count]))
    return path


def _whole_loop(model: HashModel, items: list[Item], archive: Path, num_threads: int) -> float:
    """Return images per second of reading, decoding, encoding and writing in a simple loop that uses all threads."""
    target = Archive.create(archive, model.bits, model.model_id, model.card.vector)
    begun = time.perf_counter()
    with ThreadPoolExecutor(num_threads) as pool:
        for batch in _batched(items):
            records: list[Record] = list(pool.map(lambda item: read_record(item, model.preprocessing), batch))
            encoded = model.encode_items("image", np.stack([record.pixels for record in records]))
            columns = {
                name: [getattr(record, name) for record in records]
                for name in ("uri", "datetime", "lon", "lat", "footprint", "thumbnail")
            }
            keys = [item.key for item in batch]
            rows = Archive.table(encoded.codes, model.bits, key=keys, vector=encoded.vectors, **columns)
            target.commit(Archive.write_fragments(target.path, rows))
    return len(items) / (time.perf_counter() - begun)


def _encode_loop(model: HashModel, items: list[Item]) -> float:
    """Return images per second of the network over decoded batches."""
    batches = [np.stack([read_record(item, model.preprocessing).pixels for item in batch]) for batch in _batched(items)]
    begun = time.perf_counter()
    for batch in batches:
        model.encode_items("image", batch)
    return len(items) / (time.perf_counter() - begun)


def _batched(items: list[Item]) -> list[list[Item]]:
    return [items[start : start + BATCH_SIZE] for start in range(0, len(items), BATCH_SIZE)]
