"""`bench search`: orbithash's indexes and other engines over the same codes, in one process on one core.

The engines take turns in rounds, and ratios are computed within a round, so that a slow phase of the machine affects
all engines. Every answer is compared with the exact answer.
"""

import ctypes
import gc
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from orbithash.cluster.bench.codes import BenchCodes, CodeSource, near_codes
from orbithash.cluster.bench.engines import (
    DEFAULT_ENGINES,
    ENGINES,
    Engine,
    EngineInput,
    distances_to,
    nearest_rows,
    one_core,
    words_of,
)
from orbithash.cluster.bench.report import environment, print_table, show, write_results
from orbithash.cluster.output import say
from orbithash.encoders.codes import Codes, check_bits
from orbithash.encoders.errors import InputError

__all__ = ["BATCH", "SearchBench", "bench_search", "show_search"]

BATCH = 64
_NUM_WARM_UP = 3
_RADIUS_ENGINES = ("exact", "flat")


class Target(NamedTuple):
    """Minimum ratios of the times of faiss-flat and exact: medians, 99th percentiles, and queries in batches."""

    p50: float | None = None
    p99: float | None = None
    batched: float | None = None


# By kind of codes, bits and rows, for k = 10 and a mixture of 10,000 centres with a flip rate of 0.06.
_TARGETS = {
    ("mixture", 64, 10_000_000): Target(p50=100, p99=10),
    ("mixture", 128, 1_000_000): Target(p50=5),
    ("mixture", 256, 1_000_000): Target(p50=5),
    ("random", 64, 10_000_000): Target(p50=1 / 1.1, batched=3),
}


@dataclass(frozen=True)
class SearchBench:
    """Settings of `bench search`.

    Attributes:
        rows, bits: number and length of generated codes.
        source: where the codes come from.
        k: number of hits per query.
        queries: number of queries, sent one at a time and again in batches of `BATCH`.
        radius: maximum distance of a hit, for the engines that support it; None: no limit.
        engines: names from `ENGINES`; empty: `DEFAULT_ENGINES`.
    """

    rows: int = 1_000_000
    bits: int = 64
    source: CodeSource = field(default_factory=CodeSource)
    k: int = 10
    queries: int = 512
    radius: int | None = None
    engines: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise `InputError` for an invalid setting."""
        check_bits(self.bits)
        self.source.check()
        for name, value in (("-k", self.k), ("--queries", self.queries)):
            if value < 1:
                raise InputError(f"{name} is {value}; at least 1 is needed")
        if self.source.archive is None and self.rows < self.k:
            raise InputError(f"--rows is {self.rows}; at least -k of them ({self.k}) are needed")
        if self.radius is not None and self.radius < 0:
            raise InputError(f"--radius is {self.radius}; 0 or more is needed")
        known = ENGINES if self.radius is None else _RADIUS_ENGINES
        if unknown := [name for name in self.engines if name not in known]:
            where = "" if self.radius is None else " for --radius"
            raise InputError(f"--engine {unknown[0]} does not exist; allowed{where}: {', '.join(known)}")

    @property
    def names(self) -> list[str]:
        """The engines to compare, in the order of `ENGINES`."""
        chosen = self.engines or (DEFAULT_ENGINES if self.radius is None else _RADIUS_ENGINES)
        return [name for name in ENGINES if name in chosen]

    @property
    def target(self) -> Target:
        """The ratios that these codes ask for; none for other codes than those of `_TARGETS`."""
        is_usual = (self.k, self.radius, self.source.distinct) == (10, None, None)
        if self.source.kind == "mixture":
            is_usual = is_usual and (self.source.centres, self.source.flip) == (10_000, 0.06)
        return _TARGETS.get((self.source.kind, self.bits, self.rows), Target()) if is_usual else Target()


def bench_search(settings: SearchBench, out: Path | None = None) -> dict[str, Any]:
    """Measure and return the result; with `out`, write results.json and plots there."""
    settings.check()
    with (
        TemporaryDirectory() as folder,
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool,
    ):
        measured = pool.submit(_measure, settings, Path(folder)).result()
    result = {**environment("search", "orbithash", "numpy", "numba"), **measured}
    if "exact" in settings.names and settings.radius is None:
        say("compiling the kernels without and with a cache")
        result["compiling"] = _compile_times(measured["bits"])
    if out is not None:
        from orbithash.cluster.bench.plots import latency_bars, recall_over_rate

        write_results(result, out)
        recall_over_rate(result["engines"], out / "recall.png")
        latency_bars(result["engines"], out / "latency.png")
    return result


def show_search(result: dict[str, Any], as_json: bool) -> None:
    """Print a result as JSON or as a table."""
    if as_json:
        show(result, True)
        return
    show({name: value for name, value in result.items() if name not in ("engines", "absent")}, False)
    for name, reason in result["absent"].items():
        print(f"{name:<26} {reason}")
    columns = ("engine", "build s", "bytes/row", "p50 ms", "p95 ms", "p99 ms", "lone/s", "batched/s", "recall", "exact")
    rows = [
        (
            name,
            f"{metrics['build_s']:.1f}",
            f"{metrics['bytes_per_row']:.1f}",
            *(f"{metrics[f'p{share}_ms']:.3f}" for share in (50, 95, 99)),
            *(f"{metrics[f'{how}_queries_per_s']:,.0f}" for how in ("lone", "batched")),
            f"{metrics['recall']:.4f}",
            f"{metrics['exact_share']:.4f}",
        )
        for name, metrics in result["engines"].items()
    ]
    print_table(columns, rows, width=120)
    print("bytes/row: " + "; ".join(f"{name} {each['bytes_are']}" for name, each in result["engines"].items()))
    print("exact: share of answers with the same ids in the same order as the exact answer by (distance, id)")


def _measure(settings: SearchBench, folder: Path) -> dict[str, Any]:
    """Measure in a process of its own, so that its memory and threads are those of the engines."""
    with one_core():
        rng = np.random.default_rng(0)
        codes, queries, bits, kind, query_kind = _codes(settings, rng)
        if settings.k > len(codes):
            raise InputError(f"-k is {settings.k}, there are {len(codes)} rows; give at most that number")
        engines, absent, metrics_by_name = _build(settings, codes, bits, folder)
        say("the exact answer")
        truth = nearest_rows(codes, queries, settings.k, settings.radius)
        # Collect the garbage of loading and building before anything is timed.
        gc.collect()
        gc.freeze()
        say(f"one query at a time: {len(queries)} of each engine")
        lone, lone_rows = _run_rounds(engines, queries, settings.k, 1)
        say(f"batches of {BATCH}")
        batched, batched_rows = _run_rounds(engines, queries, settings.k, BATCH)
    for name, metrics in metrics_by_name.items():
        for share in (50, 95, 99):
            metrics[f"p{share}_ms"] = 1e3 * float(np.percentile(np.concatenate(lone[name]), share))
        metrics["lone_queries_per_s"] = _rate(lone[name], len(queries))
        metrics["batched_queries_per_s"] = _rate(batched[name], len(queries))
        judged = [_judge(codes, queries, truth, rows[name]) for rows in (lone_rows, batched_rows)]
        metrics["recall"], metrics["exact_share"] = (float(min(values)) for values in zip(*judged, strict=True))
        metrics["is_exact"] = metrics["exact_share"] == 1
    import faiss

    result: dict[str, Any] = {
        "faiss": faiss.__version__,
        "rows": len(codes),
        "bits": bits,
        "codes": kind,
        "distinct_share": len(np.unique(np.ascontiguousarray(codes).view(f"V{codes.shape[1]}"))) / len(codes),
        "queries": f"{len(queries)}, {query_kind}",
        "k": settings.k,
        "radius": settings.radius,
        "cores": 1,
    }
    reference = "faiss-flat" if settings.radius is None else "flat"
    if "exact" in lone and reference in lone:
        result |= _ratios(settings.target, reference, lone, batched)
    return {**result, "absent": absent, "engines": metrics_by_name}


def _ratios(
    target: Target, reference: str, lone: dict[str, "_Seconds"], batched: dict[str, "_Seconds"]
) -> dict[str, str]:
    """Return how many times as fast as the reference `exact` is, as text with the targets."""
    ratios = {
        "p50": np.median([_ratio(np.median, *pair) for pair in zip(lone[reference], lone["exact"], strict=True)]),
        # A round is too short for its 99th percentile.
        "p99": _ratio(_p99, *(np.concatenate(lone[name]) for name in (reference, "exact"))),
        "batched": np.median(
            [_ratio(np.sum, *pair) for pair in zip(batched[reference], batched["exact"], strict=True)]
        ),
    }
    lines = {}
    for name, ratio in ratios.items():
        asked = getattr(target, name)
        verdict = "no target" if asked is None else f"target {asked:.3g}: {'met' if ratio >= asked else 'missed'}"
        lines[f"exact_{name}"] = f"{ratio:.3g} times as fast as {reference} ({verdict})"
    return lines


def _ratio(statistic: Callable[[Any], Any], slow: Any, fast: Any) -> float:
    return float(statistic(slow) / statistic(fast))


def _p99(seconds: Any) -> Any:
    return np.percentile(seconds, 99)


def _compile_times(bits: int) -> str:
    """Return the seconds in which new processes compile the kernels, without and with compiled code in the cache."""
    seconds = []
    with TemporaryDirectory() as folder:
        for _ in range(2):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                seconds.append(pool.submit(_seconds_to_compile, bits, folder).result())
    return f"{seconds[0]:.1f} s without a cache, {seconds[1]:.1f} s with it"


def _seconds_to_compile(bits: int, folder: str) -> float:
    os.environ["NUMBA_CACHE_DIR"] = folder
    from orbithash.search.index.row_index import warm_up

    return warm_up(bits)


def _codes(settings: SearchBench, rng: np.random.Generator) -> BenchCodes:
    """Return the codes by ascending id, and the queries."""
    drawn = settings.source.draw(settings.rows, settings.bits, settings.queries, rng)
    if settings.radius is None or settings.source.kind == "mixture":
        return drawn
    # Random queries rarely have a row within a radius.
    share = min(0.5, settings.radius / (2 * drawn.bits))
    queries = near_codes(drawn.codes, drawn.bits, settings.queries, share, rng)
    return drawn._replace(queries=queries, query_kind=f"codes of rows, each bit flipped with probability {share:g}")


def _build(
    settings: SearchBench, codes: Codes, bits: int, folder: Path
) -> tuple[dict[str, Engine], dict[str, str], dict[str, dict[str, Any]]]:
    """Return the engines by name, the reason for each absent one, and the metrics of building."""
    engines: dict[str, Engine] = {}
    absent: dict[str, str] = {}
    metrics: dict[str, dict[str, Any]] = {}
    for name in settings.names:
        kind = ENGINES[name]
        if not kind.is_installed:
            absent[name] = f"absent: pip install {kind.package}"
            continue
        say(f"building {name}")
        own_folder = folder / name
        own_folder.mkdir()
        before = _resident_bytes()
        begun = time.perf_counter()
        try:
            engines[name] = kind.make(EngineInput(codes, bits, settings.radius, own_folder))
        except Exception as err:
            if not kind.package:
                raise
            # The fault of another project does not stop the comparison.
            absent[name] = f"cannot be used: {str(err).partition(chr(10))[0]}"
            continue
        seconds = time.perf_counter() - begun
        num_bytes_ = engines[name].num_bytes
        metrics[name] = {
            "build_s": seconds,
            "bytes_per_row": (max(0, _resident_bytes() - before) if num_bytes_ is None else num_bytes_) / len(codes),
            "bytes_are": engines[name].bytes_are,
            "version": version(kind.package.split()[-1]) if kind.package else "",
        }
    return engines, absent, metrics


def _resident_bytes() -> int:
    """Return the resident memory of this process, without memory that is free but not returned to the system."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmRSS:")).split()[1])


# Seconds of each call in each round.
_Seconds = list[list[float]]


def _run_rounds(
    engines: dict[str, Engine], queries: Codes, k: int, size: int
) -> tuple[dict[str, _Seconds], dict[str, npt.NDArray[np.int64]]]:
    """Send every query to every engine, `size` at a time in rounds of `BATCH`; return seconds and rows [Q, k]."""
    seconds: dict[str, _Seconds] = {name: [] for name in engines}
    rows: dict[str, list[npt.NDArray[np.int64]]] = {name: [] for name in engines}
    for number, start in enumerate(range(0, len(queries), BATCH)):
        part = queries[start : start + BATCH]
        # The order alternates, so that no engine always follows the same one.
        for name in list(engines)[:: -1 if number % 2 else 1]:
            engine = engines[name]
            for query in part[:_NUM_WARM_UP]:
                engine.search(query[None], k)
            of_round = []
            for first in range(0, len(part), size):
                batch = part[first : first + size]
                begun = time.perf_counter()
                answer = engine.search(batch, k)
                of_round.append(time.perf_counter() - begun)
                found = engine.rows(answer)
                rows[name].append(np.pad(found, ((0, 0), (0, k - found.shape[1])), constant_values=-1))
            seconds[name].append(of_round)
    return seconds, {name: np.concatenate(parts) for name, parts in rows.items()}


def _rate(seconds: _Seconds, num_queries: int) -> float:
    """Return queries per second, the median of the rounds."""
    counts = [min(BATCH, num_queries - BATCH * number) for number in range(len(seconds))]
    return float(np.median([count / sum(of_round) for count, of_round in zip(counts, seconds, strict=True)]))


def _judge(
    codes: Codes, queries: Codes, truth: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]
) -> tuple[float, float]:
    """Return recall by distance (a hit is at most as far as the last true one) and the share of exact answers."""
    words = words_of(codes)
    shares: list[float] = []
    for query, exact, found in zip(words_of(queries), truth, rows, strict=True):
        exact, found = exact[exact >= 0], np.unique(found[found >= 0])
        last = distances_to(words[exact], query).max(initial=0)
        hits = np.count_nonzero(distances_to(words[found], query) <= last) if len(exact) else 0
        shares.append(min(1.0, hits / len(exact)) if len(exact) else 1.0)
    return float(np.mean(shares)), float((truth == rows).all(axis=1).mean())
