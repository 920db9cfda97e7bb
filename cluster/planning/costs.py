"""The constants of the cost model.

`MEASURED` are those of the machine of docs/results; `fitted` replaces those of searches by measurements of
`orbithash bench search` on another machine.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from orbithash.cluster.planning.requirements import CodeKind
from orbithash.cluster.serving.memory import CACHED_BYTES, PROCESS_BYTES
from orbithash.encoders.errors import InputError

__all__ = ["MEASURED", "Costs", "Probe", "fitted"]

# A search that probes tables changes to comparing all codes before it has taken this multiple of that time.
MAX_PROBE = 1.2


class Probe(NamedTuple):
    """Median seconds of a lone query that probes the tables of `codes` distinct learned codes of this length."""

    bits: int
    codes: float
    seconds: float


@dataclass(frozen=True)
class Costs:
    """Costs in seconds of one core and in bytes.

    Attributes:
        source: where the constants were measured.
        scan_s: fixed cost of one query in one shard.
        word_s: cost of comparing a query with one distinct code, per 64 bits of the code.
        batch_share: share of that cost for each query of a batch of 64, because its queries share the reads.
        probes: measured searches of learned codes by probing; other lengths and numbers are interpolated.
        scan_tail, probe_tail: ratio of the 99th percentile of a search to its median, by comparing all codes and by
            probing.
        call_s, shard_call_s: cost of one call to one shard, in the gateway and in the shard's process.
        hop_s: latency of a call and its answer, without work.
        query_s: cost of one query in the gateway, without shards.
        merge_s, merge_hit_s: cost of merging one shard's answer to one query: per answer, and per hit.
        load_s: cost of reading a shard's part of the archive and building its segments, per row of the shard.
        map_s: cost of mapping and checking a shard's own files instead, per row.
        filter_s: cost of a new filter, per row: LIKE, the most expensive of those without a geometry.
        replica_bytes, gateway_bytes: memory of the process of a replica and of a gateway, without rows.
        column_bytes, index_bytes, thumbnail_bytes: size of a row on disk: its columns without code and thumbnail, its
            entry in the index of keys, its thumbnail.
        mapped_bytes: size of a row in a shard's own files: its columns, mapped when they are needed.
        cached_bytes: the part of them that has to stay in the page cache: columns that hits show and filters read.
        is_by_code: equal codes are in one shard (not implemented: rows are dealt by blocks of ids).
    """

    source: str
    scan_s: float
    word_s: float
    batch_share: float
    probes: tuple[Probe, ...]
    scan_tail: float
    probe_tail: float
    call_s: float
    shard_call_s: float
    hop_s: float
    query_s: float
    merge_s: float
    merge_hit_s: float
    load_s: float
    map_s: float
    filter_s: float
    replica_bytes: float
    gateway_bytes: float
    column_bytes: float
    index_bytes: float
    thumbnail_bytes: float
    mapped_bytes: float
    cached_bytes: float
    is_by_code: bool = False

    def compare_s(self, bits: int) -> float:
        """Return the seconds of comparing a lone query with one distinct code."""
        return self.word_s * math.ceil(bits / 64)

    def search_s(self, kind: CodeKind, codes: float, bits: int, batch: float = 1.0) -> float:
        """Return the seconds of one query of a batch in a shard with this number of distinct codes."""
        # 1 alone, batch_share in a batch of 64.
        shared = self.batch_share + (1 - self.batch_share) * (64 / min(max(batch, 1), 64) - 1) / 63
        scan_s = self.scan_s + codes * self.compare_s(bits) * shared
        return scan_s if kind == "random" else min(self.scan_s + self._probe_s(codes, bits), MAX_PROBE * scan_s)

    def tail(self, kind: CodeKind) -> float:
        """Return the ratio of the 99th percentile of a search to its median."""
        return self.scan_tail if kind == "random" else self.probe_tail

    def _probe_s(self, codes: float, bits: int) -> float:
        """Return the seconds of probing, by power laws between the measured numbers of codes and lengths."""
        lengths = sorted({probe.bits for probe in self.probes})
        of_lengths = [_power_law([probe[1:] for probe in self.probes if probe.bits == each], codes) for each in lengths]
        return _power_law(list(zip(map(float, lengths), of_lengths, strict=True)), float(bits))


def _power_law(points: Sequence[tuple[float, float]], at: float) -> float:
    """Return y at x = `at`, linear in the logarithms between points (x, y); the outer ones continue as a constant."""
    below = max((point for point in points if point[0] <= at), default=min(points))
    above = min((point for point in points if point[0] >= at), default=max(points))
    if below[0] >= above[0]:
        return below[1]
    share = math.log(at / below[0]) / math.log(above[0] / below[0])
    return math.exp((1 - share) * math.log(below[1]) + share * math.log(above[1]))


# Measured on the machine of docs/results, 2 cores; docs/operate/scaling.md has the commands and the results.
MEASURED = Costs(
    source="2 cores (AMD EPYC), 2026-11-28",
    # orbithash bench search --rows R --bits B --engine exact --engine faiss-flat: medians of a lone query over random
    # codes, and in batches of 64.
    scan_s=4e-6,
    word_s=0.26e-9,
    batch_share=0.35,
    # The same with --codes mixture (10,000 centres, flip 0.06).
    probes=(Probe(64, 1e6, 28e-6), Probe(64, 1e7, 35e-6), Probe(128, 1e6, 45e-6), Probe(256, 1e6, 64e-6)),
    scan_tail=1.3,
    probe_tail=5.0,
    # orbithash bench fanout --actors 16: CPU time of the calling process and of a shard, and the latency beyond them.
    call_s=370e-6,
    shard_call_s=500e-6,
    hop_s=500e-6,
    # orbithash bench serve --local (docs/results), minus the search.
    query_s=300e-6,
    # merge_ms of orbithash bench fanout, for different numbers of shards and hits.
    merge_s=1.5e-6,
    merge_hit_s=0.1e-6,
    # orbithash bench changes --rows 10000000.
    load_s=0.41e-6,
    map_s=0.015e-6,
    filter_s=45e-9,
    # Resident memory of actors and gateway under orbithash bench soak, without rows.
    replica_bytes=PROCESS_BYTES,
    gateway_bytes=450e6,
    # The archives of orbithash bench serve, and thumbnails of UC Merced.
    column_bytes=47,
    index_bytes=16,
    thumbnail_bytes=4700,
    # Segment files of those archives; without the URI and columns that are unknown for all rows.
    mapped_bytes=121,
    cached_bytes=CACHED_BYTES,
)


def fitted(files: Sequence[Path]) -> Costs:
    """Return `MEASURED` with the costs of searches fitted to results of `orbithash bench search`, one file per size.

    Results of random codes are fitted by seconds = a + b * codes * (seconds per code of that length in `MEASURED`), by
    least squares of the relative errors; with one size, only b is fitted. Results of other codes replace the measured
    searches by probing.
    """
    results = [_measured(path) for path in files]
    costs = replace(MEASURED, source=f"searches: {', '.join(map(str, files))}; other costs: {MEASURED.source}")
    if scans := [result for result in results if result.is_random]:
        costs = _with_scans(costs, scans)
    if probes := [result for result in results if not result.is_random]:
        fitted_probes = tuple(Probe(each.bits, each.codes, max(1e-9, each.seconds - costs.scan_s)) for each in probes)
        tail = max(1.0, max(probes, key=lambda each: each.codes).tail)
        costs = replace(costs, probes=fitted_probes, probe_tail=tail)
    return costs


class _Result(NamedTuple):
    """Median seconds of a lone query over `codes` distinct codes; ratio of its 99th percentile to the median."""

    is_random: bool
    codes: float
    bits: int
    seconds: float
    tail: float


def _with_scans(costs: Costs, scans: Sequence[_Result]) -> Costs:
    seconds = np.array([scan.seconds for scan in scans])
    work = np.array([scan.codes * costs.compare_s(scan.bits) for scan in scans])
    fixed_s = costs.scan_s
    if len(set(work.tolist())) > 1:
        terms = np.stack([1 / seconds, work / seconds], axis=1)
        fixed_s = float(np.linalg.lstsq(terms, np.ones(len(work)), rcond=None)[0][0])
    # The fixed cost is not negative, and the codes have a share in every scan.
    fixed_s = min(max(0.0, fixed_s), 0.9 * float(seconds.min()))
    share = work / seconds
    factor = float(share @ (1 - fixed_s / seconds) / (share @ share))
    tail = max(1.0, scans[int(work.argmax())].tail)
    return replace(costs, scan_s=fixed_s, word_s=factor * costs.word_s, scan_tail=tail)


def _measured(path: Path) -> _Result:
    """Return the result in a file; `InputError` if it is not one that can be fitted."""
    try:
        result = json.loads(path.read_text())
        exact, radius, kind = result["engines"]["exact"], result["radius"], result["codes"]
        found = _Result(
            kind.startswith("random"),
            result["rows"] * result["distinct_share"],
            result["bits"],
            exact["p50_ms"] * 1e-3,
            exact["p99_ms"] / exact["p50_ms"],
        )
        is_valid = radius is None and all(math.isfinite(value) and value > 0 for value in found[1:])
    except OSError as error:
        raise InputError(f"--bench {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError):
        is_valid = False
    if not is_valid:
        raise InputError(
            f"--bench {path}: invalid file; a results.json of `orbithash bench search --out` without --radius that "
            "measured the engine exact is needed"
        )
    return found
