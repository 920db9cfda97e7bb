"""`bench validation`: the metric of validation by compiled passes, beside plain NumPy.

NumPy has the distances and the relevance of all pairs of some queries and all items in memory, 4 million at once, and
uses one thread. The contestants take turns in rounds; each ratio is of one round, so that a slow phase of the machine
affects both.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orbithash.cluster.bench.report import environment, write_results
from orbithash.cluster.output import say
from orbithash.encoders.codes import check_bits, hamming, num_bytes
from orbithash.encoders.ranges import check_integer
from orbithash.trainers.metrics.average_precision import Histograms, average_precision
from orbithash.trainers.metrics.rankings import rank_histograms
from orbithash.trainers.metrics.retrieval import CHUNK_PAIRS, Retrieval

__all__ = ["ValidationBench", "bench_validation"]

# Minimum of the seconds of NumPy over those of the compiled passes, for the default sizes.
_TARGET = 10.0

_K, _CLASSES = 20, 20
_MAX_ITEMS, _MAX_ROUNDS = 10**8, 1000

Score = Callable[[Retrieval], float]


@dataclass(frozen=True)
class ValidationBench:
    """Settings of `bench validation`.

    Attributes:
        queries, database: numbers of codes that search and that are searched, of 20 classes.
        bits: length of a code.
        rounds: number of times that each contestant computes the metric.
    """

    queries: int = 2000
    database: int = 100_000
    bits: int = 64
    rounds: int = 5

    def check(self) -> None:
        """Raise `InputError` for an invalid setting."""
        check_bits(self.bits)
        for name, value, maximum in (
            ("--queries", self.queries, _MAX_ITEMS),
            ("--database", self.database, _MAX_ITEMS),
            ("--rounds", self.rounds, _MAX_ROUNDS),
        ):
            check_integer(value, name, 1, maximum)


def bench_validation(settings: ValidationBench, out: Path | None = None) -> dict[str, Any]:
    """Measure and return the result; with `out`, write results.json and report.html there."""
    import torch

    settings.check()
    given, num_threads = _codes(settings), torch.get_num_threads()
    contestants: dict[str, Score] = {"compiled": _compiled, "numpy": _numpy, "one thread": _compiled}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    say("compiling")
    queries, database, query_labels, labels = (array[:1] for array in given)
    _compiled(Retrieval(queries, database, query_labels, labels, settings.bits))
    scores = set()
    try:
        for number in range(settings.rounds):
            say(f"round {number + 1} of {settings.rounds}")
            for name, score in contestants.items():
                torch.set_num_threads(1 if name == "one thread" else num_threads)
                # A new object, so that the time includes the change of the codes' form.
                retrieval = Retrieval(*given, settings.bits)
                began = time.perf_counter()
                scores.add(score(retrieval))
                seconds[name].append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(num_threads)
    assert len(scores) == 1, f"the contestants differ: {scores}"
    ratio = float(np.median(np.divide(seconds["numpy"], seconds["compiled"])))
    is_asked = settings == ValidationBench(rounds=settings.rounds)
    target = f"target {_TARGET:g}: {'met' if ratio >= _TARGET else 'missed'}" if is_asked else "no target"
    result = {
        **environment("validation", "orbithash", "numpy", "numba", "torch"),
        "queries": settings.queries,
        "database": settings.database,
        "bits": settings.bits,
        "rounds": settings.rounds,
        "threads": num_threads,
        f"ap_min@{_K}": scores.pop(),
        "compiled_s": float(np.median(seconds["compiled"])),
        "compiled_one_thread_s": float(np.median(seconds["one thread"])),
        "numpy_s": float(np.median(seconds["numpy"])),
        "times_faster": ratio,
        "times_faster_target": target,
    }
    if out is not None:
        write_results(result, out)
    return result


def _codes(settings: ValidationBench) -> tuple[Any, Any, Any, Any]:
    """Return codes near the centre of their class, and the classes, of queries and database."""
    rng = np.random.default_rng(0)
    centres = rng.integers(0, 256, (_CLASSES, num_bytes(settings.bits)), np.uint8)
    labels = [rng.integers(0, _CLASSES, count) for count in (settings.queries, settings.database)]
    codes = []
    for of_part in labels:
        # Each bit differs from that of the centre with probability 1/4.
        flips = rng.integers(0, 256, (2, len(of_part), centres.shape[1]), np.uint8)
        codes.append(centres[of_part] ^ (flips[0] & flips[1]))
        padding = -settings.bits % 8
        codes[-1][:, -1] &= 256 - (1 << padding)
    return codes[0], codes[1], labels[0], labels[1]


def _compiled(retrieval: Retrieval) -> float:
    return float(average_precision(rank_histograms(retrieval), _K).mean())


def _numpy(retrieval: Retrieval) -> float:
    columns = retrieval.bits + 1
    items = np.zeros((len(retrieval.query_codes), columns), np.int64)
    relevant = np.zeros_like(items)
    rows = max(1, CHUNK_PAIRS // len(retrieval.database_codes))
    for start in range(0, len(items), rows):
        part = slice(start, start + rows)
        distances = hamming(retrieval.query_codes[part], retrieval.database_codes).astype(np.uint16)
        same = retrieval.query_labels[part, None] == retrieval.database_labels
        cells = distances + np.arange(len(distances))[:, None] * columns
        size = len(distances) * columns
        items[part] = np.bincount(cells.ravel(), minlength=size).reshape(-1, columns)
        relevant[part] = np.bincount(cells[same], minlength=size).reshape(-1, columns)
    return float(average_precision(Histograms(items, relevant), _K).mean())
