"""The constants of the cost model.

`MEASURED` are those of the machine of docs/results.md; `fitted` replaces those of the scan by measurements of
`orbithash bench search` on another machine.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from orbithash.encoders.codes import num_bytes
from orbithash.encoders.errors import InputError

__all__ = ["MEASURED", "Costs", "fitted"]


@dataclass(frozen=True)
class Costs:
    """Costs in seconds of one core and in bytes.

    Attributes:
        source: where the constants were measured.
        scan_s: fixed cost of one query in one shard.
        code_s, byte_s: cost of comparing a query with one distinct code: per code, and per byte of the code.
        scan_tail: ratio of the 99th percentile of a scan to its median.
        call_s: cost of one call to one shard in the gateway.
        hop_s: latency of a call and its answer, without work.
        query_s: cost of one query in the gateway, without shards.
        merge_s, merge_hit_s: cost of merging one shard's answer to one query: per answer, and per hit.
        take_s, take_hit_s: cost of reading the rows of hits from disk: per batch, and per hit.
        load_s: cost of reading the archive, per row of the archive: each replica reads all rows and keeps its own.
        build_s: cost of building a shard, per row of the shard.
        change_s: cost of a commit, per row of the shard, whatever the number of changed rows.
        replica_bytes, gateway_bytes: memory of the process of a replica and of a gateway, without rows.
        key_chars: length of a key.
        column_bytes, index_bytes, thumbnail_bytes: size of a row on disk: its columns without code and thumbnail, its
            entry in the index of keys, its thumbnail.
        is_by_code: equal codes are in one shard (not implemented: rows are dealt by id).
        is_shared: gateways share the replicas of shards (not implemented: each gateway has its own).
    """

    source: str
    scan_s: float
    code_s: float
    byte_s: float
    scan_tail: float
    call_s: float
    hop_s: float
    query_s: float
    merge_s: float
    merge_hit_s: float
    take_s: float
    take_hit_s: float
    load_s: float
    build_s: float
    change_s: float
    replica_bytes: float
    gateway_bytes: float
    key_chars: float
    column_bytes: float
    index_bytes: float
    thumbnail_bytes: float
    is_by_code: bool = False
    is_shared: bool = False

    def compare_s(self, bits: int) -> float:
        """Return the seconds of comparing a query with one distinct code."""
        return self.code_s + self.byte_s * num_bytes(bits)


# Measured on the machine of docs/results.md, 2 cores; docs/scaling.md has the commands and the results.
MEASURED = Costs(
    source="2 cores (AMD EPYC), 2026-11-22",
    # orbithash bench search --rows R --bits B --queries 256 --engine flat --engine faiss-flat: medians of a lone query
    # over 10^5 to 10^7 random codes of 64 bits, 10^6 and 10^7 of 256 and 512, 10^6 of 128.
    scan_s=47e-6,
    code_s=0.355e-9,
    byte_s=0.0272e-9,
    scan_tail=2.5,
    # orbithash bench fanout --actors 16: CPU time of the calling process, and the latency of a lone query beyond it.
    call_s=620e-6,
    hop_s=500e-6,
    # orbithash bench serve --local (docs/results.md), minus the scan.
    query_s=500e-6,
    # merge_ms of orbithash bench fanout, for different numbers of shards and hits.
    merge_s=1.5e-6,
    merge_hit_s=0.1e-6,
    # Archives of 10^6 and 10^7 rows (docs/scaling.md): RowCache.read, ShardHost.num_rows, Shard.changed.
    take_s=3e-3,
    take_hit_s=75e-6,
    load_s=30e-9,
    build_s=1.4e-6,
    change_s=110e-9,
    # Resident memory of actors and gateway under orbithash bench soak, without rows; 50 MB of a replica are its read
    # buffer.
    replica_bytes=340e6,
    gateway_bytes=450e6,
    # The archives of orbithash bench serve, and thumbnails of UC Merced.
    key_chars=25.5,
    column_bytes=47,
    index_bytes=16,
    thumbnail_bytes=4700,
)


def fitted(files: Sequence[Path]) -> Costs:
    """Return `MEASURED` with the costs of the scan fitted to results of `orbithash bench search`, one file per size.

    Fits seconds = a + b * codes * (seconds per code of that length in `MEASURED`) by least squares of the relative
    errors. With one size, only b is fitted.
    """
    found = [_measured(path) for path in files]
    seconds, codes, bits, tails = (np.array(column) for column in zip(*found, strict=True))
    work = codes * np.array([MEASURED.compare_s(int(width)) for width in bits])
    fixed_s = MEASURED.scan_s
    if len(set(work.tolist())) > 1:
        terms = np.stack([1 / seconds, work / seconds], axis=1)
        fixed_s = float(np.linalg.lstsq(terms, np.ones(len(work)), rcond=None)[0][0])
    # The fixed cost is not negative, and the codes have a share in every scan.
    fixed_s = min(max(0.0, fixed_s), 0.9 * float(seconds.min()))
    share = work / seconds
    factor = float(share @ (1 - fixed_s / seconds) / (share @ share))
    return replace(
        MEASURED,
        source=f"scans: {', '.join(map(str, files))}; other costs: {MEASURED.source}",
        scan_s=fixed_s,
        code_s=factor * MEASURED.code_s,
        byte_s=factor * MEASURED.byte_s,
        scan_tail=max(1.0, float(tails[work.argmax()])),
    )


def _measured(path: Path) -> tuple[float, float, int, float]:
    """Return the median seconds of a scan, distinct codes, bits, and the ratio of the 99th percentile to the median."""
    try:
        result = json.loads(path.read_text())
        flat, radius = result["engines"]["flat"], result["radius"]
        found = flat["p50_ms"] * 1e-3, result["rows"] * result["distinct_share"], result["bits"], flat["p99_ms"] * 1e-3
        is_valid = radius is None and all(math.isfinite(value) and value > 0 for value in found)
    except OSError as error:
        raise InputError(f"--bench {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError):
        is_valid = False
    if not is_valid:
        raise InputError(
            f"--bench {path}: invalid file; a results.json of `orbithash bench search --out` without --radius that "
            "measured the engine flat is needed"
        )
    median_s, codes, bits, p99_s = found
    return median_s, codes, bits, p99_s / median_s
