"""What things cost: measured, the constants of `plan.py`.

`MEASURED` is what they cost on the machine of docs/results.md; `fitted` puts in what `orbithash bench search` left on
another one.
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
    """What things cost, in seconds of a core and bytes.

    Attributes:
        source: where the figures are from.
        scan_s: of one query in one shard, whatever its size.
        code_s, byte_s: of comparing it with one distinct code, and of each of the code's bytes.
        scan_tail: how many times as long as the median scan the 99th of 100 takes.
        call_s: of the gateway for one call of one shard, whatever is asked.
        hop_s: passing until a call is there and its answer back, while nobody works.
        query_s: of the gateway for one query, whatever the shards.
        merge_s, merge_hit_s: of merging the answer of one shard to one query, and of each of its hits.
        take_s, take_hit_s: of reading the rows of hits that are not in memory, for a batch and for each hit.
        load_s: of a copy of a shard while it reads the archive, for each row of it: it reads all and keeps its own.
        build_s: of making a shard, for each of its rows.
        change_s: of a commit, for each row of each shard, whatever the number of rows that change.
        copy_bytes, gateway_bytes: of the process of a copy of a shard and of a gateway, without rows.
        key_chars: of a row's key.
        column_bytes, index_bytes, thumbnail_bytes: on disk of a row's columns but code and thumbnail, of its place in
            the index of keys, and of its thumbnail.
        is_by_code: equal codes are in one shard. Rows are dealt by their ids.
        is_shared: gateways share copies of shards. Each has its own.
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
    copy_bytes: float
    gateway_bytes: float
    key_chars: float
    column_bytes: float
    index_bytes: float
    thumbnail_bytes: float
    is_by_code: bool = False
    is_shared: bool = False

    def compare_s(self, bits: int) -> float:
        """Seconds of comparing a query with one distinct code."""
        return self.code_s + self.byte_s * num_bytes(bits)


# All on the machine of docs/results.md, 2 cores; docs/scaling.md has the commands and the figures themselves.
MEASURED = Costs(
    source="2 cores (AMD EPYC), 2026-11-22",
    # orbithash bench search --rows R --bits B --queries 256 --engine flat --engine faiss-flat: medians of a lone query
    # over 10^5 to 10^7 random codes of 64 bits, 10^6 and 10^7 of 256 and 512, 10^6 of 128.
    scan_s=47e-6,
    code_s=0.355e-9,
    byte_s=0.0272e-9,
    scan_tail=2.5,
    # orbithash bench fanout --actors 16: CPU time of the process that asks, and what a lone query takes beyond it.
    call_s=620e-6,
    hop_s=500e-6,
    # orbithash bench serve --local (docs/results.md), without the scan.
    query_s=500e-6,
    # merge_ms of orbithash bench fanout, by the numbers of shards and hits.
    merge_s=1.5e-6,
    merge_hit_s=0.1e-6,
    # Of an archive of 10^6 and 10^7 rows (docs/scaling.md): RowCache.read, ShardHost.num_rows, Shard.changed.
    take_s=3e-3,
    take_hit_s=75e-6,
    load_s=30e-9,
    build_s=1.4e-6,
    change_s=110e-9,
    # Resident memory of the actors and of the gateway under orbithash bench soak, without the rows; 50 MB of a copy are
    # what it reads ahead.
    copy_bytes=340e6,
    gateway_bytes=450e6,
    # The archives of orbithash bench serve, and thumbnails of UC Merced.
    key_chars=25.5,
    column_bytes=47,
    index_bytes=16,
    thumbnail_bytes=4700,
)


def fitted(files: Sequence[Path]) -> Costs:
    """`MEASURED` with the scan as `orbithash bench search` found it, one file for each size.

    Least squares of relative errors over seconds = a + b x codes x seconds a code, the last being what a code of that
    width costs in `MEASURED`. From one size b alone is found.
    """
    found = [_measured(path) for path in files]
    seconds, codes, bits, tails = (np.array(column) for column in zip(*found, strict=True))
    work = codes * np.array([MEASURED.compare_s(int(width)) for width in bits])
    fixed_s = MEASURED.scan_s
    if len(set(work.tolist())) > 1:
        terms = np.stack([1 / seconds, work / seconds], axis=1)
        fixed_s = float(np.linalg.lstsq(terms, np.ones(len(work)), rcond=None)[0][0])
    # A scan takes no less than nothing, and the codes have a part in it.
    fixed_s = min(max(0.0, fixed_s), 0.9 * float(seconds.min()))
    share = work / seconds
    factor = float(share @ (1 - fixed_s / seconds) / (share @ share))
    return replace(
        MEASURED,
        source=f"scans: {', '.join(map(str, files))}; all else: {MEASURED.source}",
        scan_s=fixed_s,
        code_s=factor * MEASURED.code_s,
        byte_s=factor * MEASURED.byte_s,
        scan_tail=max(1.0, float(tails[work.argmax()])),
    )


def _measured(path: Path) -> tuple[float, float, int, float]:
    """Median seconds of a scan, distinct codes, bits, and how many times the median the 99th of 100 is."""
    what = f"--bench {path}"
    try:
        result = json.loads(path.read_text())
        flat, radius = result["engines"]["flat"], result["radius"]
        found = flat["p50_ms"] * 1e-3, result["rows"] * result["distinct_share"], result["bits"], flat["p99_ms"] * 1e-3
        is_good = radius is None and all(math.isfinite(value) and value > 0 for value in found)
    except OSError as error:
        raise InputError(f"{what}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError):
        is_good = False
    if not is_good:
        raise InputError(f"{what} is no results.json of `orbithash bench search --out`, without --radius, of flat")
    median_s, codes, bits, late_s = found
    return median_s, codes, bits, late_s / median_s
