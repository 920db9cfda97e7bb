"""Helpers of the tests of segments: tables of random rows, and the values that they must come back with."""

from datetime import UTC, datetime, timedelta
from itertools import pairwise

import numpy as np
import shapely

from orbithash.encoders.archive.tables import make_table

MODULES_WITH_CHUNKS = ("chunks", "columns", "hits", "writing", "files", "rankings.keys")


def random_table(rng, num_rows, bits, dims=None, first=0):
    """Rows of an archive in which every column but key and uri may be null, with keys and labels of any characters."""

    def some(values, share=0.7):
        return [value if rng.random() < share else None for value in values]

    begin = datetime(1890, 1, 1, tzinfo=UTC)
    labels = ["beach", "Fluß", "", "森", "a" * 300, "x\ny", "🛰"]
    lon, lat = rng.uniform(-180, 180, num_rows), rng.uniform(-90, 90, num_rows)
    boxes = shapely.box(lon, lat, lon + rng.uniform(0, 1, num_rows), lat + rng.uniform(0, 1, num_rows))
    vectors = some([row.tobytes() for row in rng.integers(-127, 128, (num_rows, dims), np.int8)]) if dims else None
    return make_table(
        random_codes(rng, num_rows, bits),
        bits,
        [f"{rng.choice(['a/b', 'ü', '🛰', 'z' * 200])}/{first + row}" for row in range(num_rows)],
        [f"s3://bucket/{first + row}.tif" for row in range(num_rows)],
        vector=vectors,
        label=some(rng.choice(labels, num_rows).tolist()),
        caption=some([f"picture {row} of a Straße" for row in range(num_rows)], rng.choice([0, 0.5, 1])),
        datetime=some([begin + timedelta(microseconds=int(step)) for step in rng.integers(0, 2**53, num_rows)]),
        lon=some(lon.tolist()),
        lat=some(lat.tolist()),
        footprint=some(shapely.to_wkb(boxes).tolist(), rng.choice([0, 0.5, 1])),
        stamp=[f"stamp {row}" for row in range(num_rows)],
    )


def random_codes(rng, num_rows, bits):
    """Codes of which about half occur more than once."""
    codes = np.packbits(rng.integers(0, 2, (num_rows, bits), dtype=np.uint8), axis=1)
    return codes[rng.integers(0, max(1, num_rows), num_rows)]


def codes_in(table, bits):
    return np.array(table["code"].to_pylist(), np.uint8).reshape(len(table), (bits + 7) // 8)


def random_ids(rng, num_rows):
    """Unique ids in any order: consecutive, in a range of 2^32, or over all of uint64."""
    match rng.integers(3):
        case 0:
            ids = np.arange(num_rows) + int(rng.integers(1000))
        case 1:
            ids = 2**63 - 1000 + rng.choice(10 * num_rows + 1, num_rows, replace=False).astype(np.uint64)
        case _:
            ids = np.unique(rng.integers(0, 2**64, 2 * num_rows + 1, np.uint64))[:num_rows]
    return rng.permutation(ids.astype(np.uint64))


def batches_of(rng, ids, table):
    """The rows in batches of random lengths, one of them without rows."""
    cuts = [0, *sorted(rng.integers(0, len(ids) + 1, 3).tolist()), len(ids)]
    cuts.insert(1, cuts[1])
    return [(ids[start:stop], table.slice(start, stop - start)) for start, stop in pairwise(cuts)]
