"""`bench rank`: rows in the order of a linear function of their vectors, beside bare products and reading of memory.

orbithash ranks rows of segments that are mapped from files, as shards do. The baselines read one array in memory. All
take turns in rounds, with the same number of threads, each of which has an equal part of the rows. Ratios are computed
within a round, so that a slow phase of the machine affects all alike.
"""

import itertools
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from orbithash.cluster.bench.report import environment, print_table, show, write_results
from orbithash.cluster.output import say
from orbithash.encoders.errors import InputError

__all__ = ["RankBench", "bench_rank", "show_rank"]

# The minimum of orbithash's bytes per second, as a share of the best bare product's.
_TARGET = 0.5

_MAX_ROWS, _MAX_DIMS, _MAX_K = 10**9, 4096, 10_000

# Bits of the codes; all rows have the same code.
_BITS = 8

_READING, _RANKING = "read memory", "orbithash"

Vectors = npt.NDArray[np.int8]
# Works on the rows from `begin` to `end`.
Work = Callable[[int, int], Any]


@dataclass(frozen=True)
class RankBench:
    """Settings of `bench rank`.

    Attributes:
        rows, dims: number and dimensions of random vectors int8.
        k: number of rows in the answer.
        rounds: number of times that each contestant works through all rows.
    """

    rows: int = 10_000_000
    dims: int = 64
    k: int = 100
    rounds: int = 7

    def check(self) -> None:
        """Raise `InputError` for an invalid setting."""
        for name, value, maximum in (
            ("--rows", self.rows, _MAX_ROWS),
            ("--dims", self.dims, _MAX_DIMS),
            ("-k", self.k, _MAX_K),
            ("--rounds", self.rounds, 1000),
        ):
            if not 1 <= value <= maximum:
                raise InputError(f"{name} is {value}; from 1 to {maximum:,} are allowed")


def bench_rank(settings: RankBench, out: Path | None = None) -> dict[str, Any]:
    """Measure and return the result; with `out`, write results.json there."""
    settings.check()
    with TemporaryDirectory() as folder, ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        measured = pool.submit(_measure, settings, Path(folder)).result()
    result = {**environment("rank", "orbithash", "numpy", "numba", "torch"), **measured}
    if out is not None:
        write_results(result, out)
    return result


def show_rank(result: dict[str, Any], as_json: bool) -> None:
    """Print a result as JSON or as a table."""
    if as_json:
        show(result, True)
        return
    show({name: value for name, value in result.items() if name not in ("threads", "absent")}, False)
    for name, reason in result["absent"].items():
        print(f"{name:<26} {reason}")
    columns = ("", "threads", "GB/s", "ms", "orbithash's share of it")
    rows = [
        (name, threads, f"{metrics['gb_per_s']:.1f}", f"{metrics['ms']:.1f}", f"{metrics['ratio']:.2f}")
        for threads, of_threads in result["threads"].items()
        for name, metrics in of_threads.items()
    ]
    print_table(columns, rows, 100)


def _measure(settings: RankBench, folder: Path) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    say(f"drawing {settings.rows:,} vectors")
    vectors = np.frombuffer(bytearray(rng.bytes(settings.rows * settings.dims)), np.int8)
    vectors = vectors.reshape(settings.rows, settings.dims)
    # Of int8, so that a product of int8 has the same weights.
    weights = rng.integers(-127, 128, settings.dims).astype(np.int8)
    num_cores = len(os.sched_getaffinity(0))
    products, absent = _products(vectors, weights)
    _check_products(products, vectors, weights)
    ranking = _ranking(settings, vectors, weights, num_cores, folder)
    contestants: dict[str, Work] = {_READING: _reading(vectors), **products, _RANKING: ranking}
    by_threads = {}
    for num_threads in sorted({1, num_cores}):
        say(f"{settings.rounds} rounds with {num_threads} threads")
        seconds = _run_rounds(contestants, settings, num_threads)
        by_threads[str(num_threads)] = {
            name: {
                "gb_per_s": vectors.nbytes / float(np.median(of_name)) / 1e9,
                "ms": float(np.median(of_name)) * 1e3,
                "ratio": float(np.median(of_name / seconds[_RANKING])),
            }
            for name, of_name in seconds.items()
        }
    shares = {
        threads: min(of_threads[name]["ratio"] for name in products) for threads, of_threads in by_threads.items()
    }
    is_asked = (settings.rows, settings.dims) == (10_000_000, 64)
    return {
        "rows": settings.rows,
        "dims": settings.dims,
        "k": settings.k,
        "rounds": settings.rounds,
        **{
            f"of_best_product_{threads}": f"{share:.2f} of its bandwidth "
            + (f"(target {_TARGET:g}: {'met' if share >= _TARGET else 'missed'})" if is_asked else "(no target)")
            for threads, share in shares.items()
        },
        "answers": "equal",
        "absent": absent,
        "threads": by_threads,
    }


def _run_rounds(
    contestants: dict[str, Work], settings: RankBench, num_threads: int
) -> dict[str, npt.NDArray[np.float64]]:
    """Return the seconds of each round of each contestant."""
    import torch

    bounds = [settings.rows * part // num_threads for part in range(num_threads + 1)]
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    # Each thread of ours is one thread of torch.
    with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        # The first round is not counted.
        for number in range(settings.rounds + 1):
            # The order alternates, so that no contestant always follows the same one.
            for name in list(contestants)[:: -1 if number % 2 else 1]:
                begun = time.perf_counter()
                list(pool.map(contestants[name], bounds[:-1], bounds[1:]))
                if number:
                    seconds[name].append(time.perf_counter() - begun)
    return {name: np.array(of_name) for name, of_name in seconds.items()}


def _reading(vectors: Vectors) -> Work:
    values = vectors.reshape(-1)

    def read(begin: int, end: int) -> Any:
        part = values[begin * vectors.shape[1] : end * vectors.shape[1]]
        return part[: len(part) // 8 * 8].view(np.int64).sum()

    return read


def _products(vectors: Vectors, weights: Vectors) -> tuple[dict[str, Work], dict[str, str]]:
    """Return the bare products that this machine can compute, and the reason for each absent one.

    Their results are int32, or int8 that wrap around.
    """
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows, vector = torch.from_numpy(vectors), torch.from_numpy(weights)
    column = vector[:, None].contiguous()
    products: dict[str, Work] = {
        "torch int8 to int32": lambda begin, end: torch._int_mm(rows[begin:end], column)[:, 0].numpy(),
        "torch int8": lambda begin, end: torch.mv(rows[begin:end], vector).numpy(),
        "numpy int8": lambda begin, end: vectors[begin:end] @ weights,
    }
    absent = {}
    for name in list(products):
        try:
            products[name](0, len(vectors))
        except RuntimeError as error:
            absent[name] = f"absent: {str(error).partition(chr(10))[0]}"
            del products[name]
    return products, absent


def _check_products(products: dict[str, Work], vectors: Vectors, weights: Vectors) -> None:
    count = min(len(vectors), 1000)
    exact = vectors[:count].astype(np.int64) @ weights.astype(np.int64)
    for name, product in products.items():
        found = product(0, len(vectors))[:count]
        assert np.array_equal(found, exact.astype(found.dtype)), f"{name} computes something else"


def _ranking(settings: RankBench, vectors: Vectors, weights: Vectors, num_cores: int, folder: Path) -> Work:
    """Write the vectors as segments, one per core, and return the ranking of their rows, after a check of an answer."""
    from orbithash.search.index.rankings import LinearOrder, Ranked, merge_ranked
    from orbithash.search.segments.files import write_segment
    from orbithash.search.segments.rankings.ranking import rank
    from orbithash.search.segments.stop import Stop
    from orbithash.search.segments.versions.shard_version import LiveSegment, ShardVersion

    bounds = [settings.rows * part // num_cores for part in range(num_cores + 1)]
    say(f"writing {num_cores} segments")
    segments = {
        (begin, end): LiveSegment.of(write_segment(folder, _batches(vectors, begin, end), _BITS))
        for begin, end in itertools.pairwise(bounds)
        if begin < end
    }
    order = LinearOrder(tuple(weights.tolist()))

    def ranked(begin: int, end: int) -> Ranked:
        parts = [segment for (first, last), segment in segments.items() if begin <= first and last <= end]
        return rank(ShardVersion.of(1, "", _BITS, parts), None, order, settings.k, None, None, Stop())

    expected = _first_rows(vectors, weights, settings.k)
    for division in ([(0, settings.rows)], list(segments)):
        answer = merge_ranked([ranked(*part) for part in division], settings.k)
        assert (answer.keys.tolist(), answer.ids.tolist(), answer.num_ranked) == (*expected, settings.rows)
    return ranked


_ROWS_AT_ONCE = 2**16


def _batches(vectors: Vectors, begin: int, end: int) -> Any:
    """Yield the rows of a segment as `write_segment` takes them."""
    import pyarrow as pa

    for start in range(begin, end, _ROWS_AT_ONCE):
        part = vectors[start : min(start + _ROWS_AT_ONCE, end)]
        table = pa.table(
            {
                "code": pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(len(part), np.uint8)), 1),
                "vector": pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1)), part.shape[1]),
            }
        )
        yield np.arange(start, start + len(part), dtype=np.uint64), table


def _first_rows(vectors: Vectors, weights: Vectors, k: int) -> tuple[Sequence[int], Sequence[int]]:
    """Return the keys and the numbers of the k first rows, computed by NumPy."""
    keys = np.empty(len(vectors), np.int64)
    for start in range(0, len(vectors), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        # Of float64, which holds every sum exactly.
        keys[part] = -(vectors[part].astype(np.float64) @ weights)
    count = min(k, len(keys))
    near = np.flatnonzero(keys <= np.partition(keys, count - 1)[count - 1])
    best = near[np.lexsort((near, keys[near]))][:count]
    return keys[best].tolist(), best.tolist()
