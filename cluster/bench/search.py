"""Searches of one set of codes by our indexes and by other engines, side by side in one process on one core.

The engines take turns in rounds, so that a moment at which the machine is slow hits all of them, and what is compared
is compared within a round. Engines that are given a row more than once, or forget one, are found out: what they answer
is compared with the exact answer.
"""

import ctypes
import gc
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from orbithash.cluster.bench.engines import (
    ENGINES,
    Engine,
    Given,
    distances_to,
    nearest_rows,
    one_core,
    words_of,
)
from orbithash.cluster.output import say
from orbithash.encoders.codes import Codes, check_bits, num_bytes, pack, unpack
from orbithash.encoders.errors import InputError

__all__ = ["BATCH", "SearchBench", "bench_search", "show_search"]

BATCH = 64
_WARM_UP = 3
_RADIUS_ENGINES = ("flat", "multi-hash")
# Bits of a row's code that are flipped to make a query of it.
_FLIPPED = 1 / 32

# What `flat` may take of the time of `faiss-flat`, by the share of distinct codes, for 10^6 codes of 64 bits.
_TARGETS = {None: 1.2, 0.1: 0.25}


@dataclass(frozen=True)
class SearchBench:
    """What is measured.

    Attributes:
        rows, bits: of random codes.
        distinct: their share of distinct codes; None: each code is drawn for itself.
        k: hits of a query.
        queries: asked of each engine, one at a time and again in batches of `BATCH`.
        radius: the largest distance of a hit, for the engines that know one; None: any.
        archive: the codes of this archive instead.
        engines: names out of `ENGINES`; empty: all.
    """

    rows: int = 1_000_000
    bits: int = 64
    distinct: float | None = None
    k: int = 10
    queries: int = 512
    radius: int | None = None
    archive: Path | None = None
    engines: tuple[str, ...] = ()

    def check(self) -> None:
        """`InputError` for what cannot be measured."""
        check_bits(self.bits)
        if self.distinct is not None and not 0 < self.distinct <= 1:
            raise InputError(f"--distinct is {self.distinct:g}; a share above 0 and up to 1 is needed")
        if self.distinct is not None and self.archive is not None:
            raise InputError("--distinct is of random codes, --archive has codes of its own; give one of them")
        for name, value in (("-k", self.k), ("--queries", self.queries)):
            if value < 1:
                raise InputError(f"{name} is {value}; at least 1 is needed")
        if self.archive is None and self.rows < self.k:
            raise InputError(f"--rows is {self.rows}; at least -k of them ({self.k}) are needed")
        if self.radius is not None and self.radius < 0:
            raise InputError(f"--radius is {self.radius}; 0 or more is needed")
        known = ENGINES if self.radius is None else _RADIUS_ENGINES
        if unknown := [name for name in self.engines if name not in known]:
            where = "" if self.radius is None else " for --radius"
            raise InputError(f"--engine {unknown[0]}: there are {', '.join(known)}{where}")

    @property
    def names(self) -> list[str]:
        """The engines to compare, in their usual order."""
        usual = list(ENGINES) if self.radius is None else list(_RADIUS_ENGINES)
        return [name for name in usual if not self.engines or name in self.engines]

    @property
    def target(self) -> float | None:
        """The largest ratio of flat to faiss-flat that is good enough; None for codes without a target."""
        has_one = (self.archive, self.rows, self.bits) == (None, 1_000_000, 64)
        return _TARGETS.get(self.distinct) if has_one else None


def bench_search(asked: SearchBench, out: Path | None = None) -> dict[str, Any]:
    """Measures; with `out`, leaves results.json and plots there."""
    from orbithash.cluster.bench.throughput import circumstances

    asked.check()
    with (
        TemporaryDirectory() as folder,
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool,
    ):
        measured = pool.submit(_measure, asked, Path(folder)).result()
    result = {**circumstances("search", "orbithash", "numpy"), **measured}
    if out is not None:
        from orbithash.cluster.bench.plots import latency_bars, recall_over_rate

        out.mkdir(parents=True, exist_ok=True)
        (out / "results.json").write_text(json.dumps(result, indent=2) + "\n")
        recall_over_rate(result["engines"], out / "recall.png")
        latency_bars(result["engines"], out / "latency.png")
    return result


def show_search(result: dict[str, Any], as_json: bool) -> None:
    """Prints a result for a machine or for a person."""
    from orbithash.cluster.bench.throughput import show

    if as_json:
        show(result, True)
        return
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    show({name: value for name, value in result.items() if name not in ("engines", "absent")}, False)
    for name, reason in result["absent"].items():
        print(f"{name:<26} {reason}")
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    heads = ("engine", "build s", "bytes/row", "p50 ms", "p95 ms", "p99 ms", "lone/s", "batched/s", "recall", "exact")
    for head in heads:
        table.add_column(head, justify="left" if head == "engine" else "right")
    for name, figures in result["engines"].items():
        table.add_row(
            name,
            f"{figures['build_s']:.1f}",
            f"{figures['bytes_per_row']:.1f}",
            *(f"{figures[f'p{share}_ms']:.3f}" for share in (50, 95, 99)),
            *(f"{figures[f'{how}_queries_per_s']:,.0f}" for how in ("lone", "batched")),
            f"{figures['recall']:.4f}",
            f"{figures['exact_share']:.4f}",
        )
    Console(width=None if Console().is_terminal else 120).print(table)
    print("bytes/row: " + "; ".join(f"{name} {each['bytes_are']}" for name, each in result["engines"].items()))
    print("exact: the share of answers that have the same ids in the same order as the exact answer by (distance, id)")


def _measure(asked: SearchBench, folder: Path) -> dict[str, Any]:
    """In a process of its own, whose memory and threads are those of the engines."""
    with one_core():
        rng = np.random.default_rng(0)
        codes, bits = _codes(asked, rng)
        if asked.k > len(codes):
            raise InputError(f"-k is {asked.k}, there are {len(codes)} rows; ask for at most as many")
        queries, kind = _queries(asked, codes, bits, rng)
        engines, absent, about = _build(asked, codes, bits, folder)
        say("the exact answer")
        truth = nearest_rows(codes, queries, asked.k, asked.radius)
        # Reads and writes of the codes are behind us, and so is what they left to be collected.
        gc.collect()
        gc.freeze()
        say(f"one query at a time: {len(queries)} of each engine")
        lone, lone_rows = _rounds(engines, queries, asked.k, 1)
        say(f"batches of {BATCH}")
        batched, batched_rows = _rounds(engines, queries, asked.k, BATCH)
    for name, figures in about.items():
        for share in (50, 95, 99):
            figures[f"p{share}_ms"] = 1e3 * float(np.percentile(np.concatenate(lone[name]), share))
        figures["lone_queries_per_s"] = _rate(lone[name], len(queries))
        figures["batched_queries_per_s"] = _rate(batched[name], len(queries))
        judged = [_judge(codes, queries, truth, rows[name]) for rows in (lone_rows, batched_rows)]
        figures["recall"], figures["exact_share"] = (float(min(values)) for values in zip(*judged, strict=True))
        figures["is_exact"] = figures["exact_share"] == 1
    import faiss

    result: dict[str, Any] = {
        "faiss": faiss.__version__,
        "rows": len(codes),
        "bits": bits,
        "codes": "random" if asked.archive is None else str(asked.archive),
        "distinct_share": len(np.unique(np.ascontiguousarray(codes).view(f"V{codes.shape[1]}"))) / len(codes),
        "queries": f"{len(queries)}, {kind}",
        "k": asked.k,
        "radius": asked.radius,
        "cores": 1,
    }
    pair = ("flat", "faiss-flat") if asked.radius is None else ("multi-hash", "flat")
    if all(name in lone for name in pair):
        ours, other = ([float(np.median(of_round)) for of_round in lone[name]] for name in pair)
        result[f"{pair[0]}_to_{pair[1]}"] = float(np.median(np.divide(ours, other)))
        if asked.radius is None:
            result["target"] = "none for these codes" if asked.target is None else f"at most {asked.target:g}"
    return {**result, "absent": absent, "engines": about}


def _codes(asked: SearchBench, rng: np.random.Generator) -> tuple[Codes, int]:
    """Codes uint8 [N, B] by ascending id, and their bits."""
    if asked.archive is not None:
        from orbithash.encoders.archive.archive import Archive

        archive = Archive.open(asked.archive)
        return np.ascontiguousarray(archive.codes()[1]), archive.bits
    count = asked.rows if asked.distinct is None else max(1, round(asked.distinct * asked.rows))
    codes = _random_codes(count, asked.bits, rng)
    if count < asked.rows:
        repeated = np.concatenate([np.arange(count), rng.integers(0, count, asked.rows - count)])
        codes = codes[rng.permutation(repeated)]
    return codes, asked.bits


def _random_codes(count: int, bits: int, rng: np.random.Generator) -> Codes:
    codes = rng.integers(0, 256, (count, num_bytes(bits)), np.uint8)
    if bits % 8:
        codes[:, -1] &= 0xFF << (8 - bits % 8) & 0xFF
    return codes


def _queries(asked: SearchBench, codes: Codes, bits: int, rng: np.random.Generator) -> tuple[Codes, str]:
    """Queries uint8 [Q, B], and in words what they are."""
    if asked.archive is None and asked.radius is None:
        return _random_codes(asked.queries, bits, rng), "random codes"
    # Of random queries few have a row within a radius.
    share = _FLIPPED if asked.radius is None else min(0.5, asked.radius / (2 * bits))
    rows = unpack(codes[rng.integers(0, len(codes), asked.queries)], bits)
    return pack(rows ^ (rng.random(rows.shape) < share)), f"codes of rows, each bit flipped with probability {share:g}"


def _build(
    asked: SearchBench, codes: Codes, bits: int, folder: Path
) -> tuple[dict[str, Engine], dict[str, str], dict[str, dict[str, Any]]]:
    """The engines, why others are absent, and what building each took."""
    engines: dict[str, Engine] = {}
    absent: dict[str, str] = {}
    about: dict[str, dict[str, Any]] = {}
    for name in asked.names:
        kind = ENGINES[name]
        if not kind.is_installed:
            absent[name] = f"absent: pip install {kind.package}"
            continue
        say(f"building {name}")
        place = folder / name
        place.mkdir()
        before = _resident_bytes()
        begun = time.perf_counter()
        try:
            engines[name] = kind.make(Given(codes, bits, asked.radius, place))
        except Exception as err:
            if not kind.package:
                raise
            # Another project's: the others can still be compared.
            absent[name] = f"cannot be used: {str(err).partition(chr(10))[0]}"
            continue
        seconds = time.perf_counter() - begun
        kept = engines[name].num_bytes
        about[name] = {
            "build_s": seconds,
            "bytes_per_row": (max(0, _resident_bytes() - before) if kept is None else kept) / len(codes),
            "bytes_are": engines[name].bytes_are,
            "version": version(kind.package.split()[-1]) if kind.package else "",
        }
    return engines, absent, about


def _resident_bytes() -> int:
    gc.collect()
    # What is free already but kept for later would be counted otherwise.
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmRSS:")).split()[1])


# Seconds of each call, by round.
_Seconds = list[list[float]]


def _rounds(
    engines: dict[str, Engine], queries: Codes, k: int, size: int
) -> tuple[dict[str, _Seconds], dict[str, npt.NDArray[np.int64]]]:
    """Every query of every engine, `size` at a time, in rounds of `BATCH` queries: seconds and rows [Q, k] by name."""
    seconds: dict[str, _Seconds] = {name: [] for name in engines}
    rows: dict[str, list[npt.NDArray[np.int64]]] = {name: [] for name in engines}
    for number, start in enumerate(range(0, len(queries), BATCH)):
        part = queries[start : start + BATCH]
        # There and back, so that none always follows the same one.
        for name in list(engines)[:: -1 if number % 2 else 1]:
            engine = engines[name]
            for query in part[:_WARM_UP]:
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
    """Queries a second: the median of the rounds."""
    counts = [min(BATCH, num_queries - BATCH * number) for number in range(len(seconds))]
    return float(np.median([count / sum(of_round) for count, of_round in zip(counts, seconds, strict=True)]))


def _judge(
    codes: Codes, queries: Codes, truth: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]
) -> tuple[float, float]:
    """Recall by distance, a hit being as near as the last true one, and the share of answers equal to the truth."""
    words = words_of(codes)
    shares: list[float] = []
    for query, wanted, given in zip(words_of(queries), truth, rows, strict=True):
        wanted, given = wanted[wanted >= 0], np.unique(given[given >= 0])
        last = distances_to(words[wanted], query).max(initial=0)
        hits = np.count_nonzero(distances_to(words[given], query) <= last) if len(wanted) else 0
        shares.append(min(1.0, hits / len(wanted)) if len(wanted) else 1.0)
    return float(np.mean(shares)), float((truth == rows).all(axis=1).mean())
