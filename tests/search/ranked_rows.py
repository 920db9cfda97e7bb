"""Archives whose rows have vectors, places and times, and what a loop over the rows says about orders and counts."""

from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import numpy as np

from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.vectors import VectorSpec
from orbithash.search.index.ranking_kernels import offer_places
from orbithash.search.index.rankings import ByTime, LinearOrder, PlaceOrder, RandomOrder, Ranked

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
NO_BITS = np.empty(0, np.uint8)
NO_BITS.flags.writeable = False

FILTERS = {
    "": lambda row: True,
    "label = 'c1'": lambda row: row["label"] == "c1",
    "lat > 20 OR label IS NULL": lambda row: (row["lat"] is not None and row["lat"] > 20) or row["label"] is None,
    "NOT key LIKE 'k%7'": lambda row: not row["key"].endswith("7"),
    "key = 'k3'": lambda row: row["key"] == "k3",
    "lon > 500": lambda row: False,
}


@dataclass
class RankedRows:
    """An archive, and its rows {id: columns}. Values repeat, so that rows have equal keys, and any may be null."""

    path: str
    bits: int
    dims: int
    rng: np.random.Generator
    rows: dict[int, dict] = field(default_factory=dict)
    num_made: int = 0

    @classmethod
    def create(cls, path, seed, bits=20, dims=5):
        rng = np.random.default_rng(seed)
        archive = Archive.create(path, bits, "m" * 32, VectorSpec(dims, 0.1) if dims else None)
        return cls(archive.path, bits, dims, rng)

    @property
    def version(self):
        return Archive.open(self.path).version

    def write(self, num_new, num_known=0):
        """Add rows, and replace others, in one commit."""
        keys = [f"k{self.num_made + i}" for i in range(num_new)] + self._some_keys(num_known)
        self.num_made += num_new
        rows = [self._row(key) for key in keys]
        columns = {
            name: [row[name] for row in rows]
            for name in ("label", "lon", "lat", "datetime", *["vector"] * bool(self.dims))
        }
        codes = np.stack([row["code"] for row in rows])
        ids = Archive.open(self.path).upsert(Archive.table(codes, self.bits, keys, keys, **columns))
        self.rows.update(zip(ids.tolist(), rows, strict=True))

    def delete(self, number):
        keys = self._some_keys(number)
        Archive.open(self.path).delete(keys)
        self.rows = {id_: row for id_, row in self.rows.items() if row["key"] not in keys}

    def _some_keys(self, number):
        return self.rng.permutation(sorted(row["key"] for row in self.rows.values()))[:number].tolist()

    def _row(self, key):
        rng = self.rng

        def some(value):
            return value if rng.random() < 0.8 else None

        vector = rng.choice([-128, -127, -1, 0, 1, 2, 127], self.dims).astype(np.int8)
        lon, lat = ((10.0, 20.0), (-179.5, -90.0), (rng.uniform(-180, 180), rng.uniform(-90, 90)))[rng.integers(3)]
        place = some((lon, lat)) or (None, None)
        time = rng.choice([-62_135_596_800_000_000, -1, 0, 1, 86_400_000_000, rng.integers(0, 2**50)])
        return {
            "key": key,
            "code": np.packbits(rng.integers(0, 2, self.bits, dtype=np.uint8)) & np.uint8(rng.choice([0xF0, 0x80, 0])),
            "label": some(str(rng.choice(["c1", "c2", "", "Fluß"]))),
            "lon": place[0],
            "lat": place[1],
            "datetime": some(EPOCH + timedelta(microseconds=int(time))),
            "vector": some(vector.tobytes()),
        }

    def order(self):
        """Return a random order."""
        weights = tuple(self.rng.integers(-300, 300, self.dims).tolist())
        return [
            LinearOrder(weights),
            LinearOrder(weights, int(self.rng.integers(-9000, 9000))),
            LinearOrder((0,) * self.dims, 3),
            PlaceOrder(float(self.rng.uniform(-360, 360)), float(self.rng.uniform(-90, 90))),
            RandomOrder(int(self.rng.integers(0, 2**64, dtype=np.uint64))),
            ByTime(),
            ByTime(newest_first=True),
        ][self.rng.integers(7)]

    def ranked(self, order, k, max_key=None, after=None, text=""):
        """Return what `ShardClient.rank` must return for all rows, from a loop over them."""
        passing = {id_: row for id_, row in self.rows.items() if FILTERS[text](row)}
        keys = {id_: key_of(order, id_, row) for id_, row in passing.items()}
        every = sorted((key, id_) for id_, key in keys.items() if key is not None)
        within = [hit for hit in every if max_key is None or hit[0] <= max_key]
        first = [hit for hit in within if after is None or hit > after][:k]
        return Ranked(
            np.array([key for key, _ in first], np.int64),
            np.array([id_ for _, id_ in first], np.uint64),
            len(every),
            len(within),
            len(passing) if text else None,
            len(self.rows),
        )

    def distances(self, code, text=""):
        """Return the number of rows at each distance."""
        counts = [0] * (self.bits + 1)
        for row in self.rows.values():
            if FILTERS[text](row):
                counts[int(np.bitwise_count(row["code"] ^ code).sum())] += 1
        return counts

    def groups(self, by, text=""):
        """Return the number of rows of each group, and of the others."""
        passing = [row for row in self.rows.values() if FILTERS[text](row)]
        if by == "label":
            names = [row["label"] for row in passing]
        else:
            length = {"month": 7, "year": 4}[by]
            names = [row["datetime"] and row["datetime"].isoformat()[:length] for row in passing]
        groups = Counter(name for name in names if name is not None)
        return dict(groups), len(passing) - groups.total()


def key_of(order, id_, row):
    """Return the key of a row in an order, None if it has none."""
    match order:
        case LinearOrder(weights, pivot) if row["vector"] is not None:
            product = sum(w * v for w, v in zip(weights, np.frombuffer(row["vector"], np.int8).tolist(), strict=True))
            return -product if pivot is None else abs(product - pivot)
        case PlaceOrder() if row["lon"] is not None:
            [key] = place_keys([row["lon"]], [row["lat"]], order)
            return key
        case RandomOrder(seed):
            return splitmix64(splitmix64(seed) ^ id_) >> 1
        case ByTime(newest_first) if row["datetime"] is not None:
            key = (row["datetime"] - EPOCH) // timedelta(microseconds=1)
            return -key if newest_first else key
    return None


def splitmix64(state):
    z = (state + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def place_keys(lons, lats, order):
    """Return the keys of places in the order of the places, as the kernel computes them for these rows together."""
    places = [np.array(each, np.float64) for each in (lons, lats)]
    for each in places:
        each.flags.writeable = False
    num_rows = len(lons)
    keys, rows, counts = np.empty(num_rows, np.int64), np.empty(num_rows, np.int64), np.zeros(3, np.int64)
    limits = (2**63 - 1, -(2**63), -1, 2**63 - 1)
    offer_places(*places, order.lon, order.lat, num_rows, 0, NO_BITS, NO_BITS, *limits, keys, rows, counts)
    assert counts.tolist() == [num_rows] * 3
    return keys[np.argsort(rows)].tolist()


def same_ranked(ranked, expected):
    """Return whether two results are equal, arrays with their types."""
    return all(
        ours.dtype == theirs.dtype and np.array_equal(ours, theirs)
        for ours, theirs in zip(ranked[:2], expected[:2], strict=True)
    ) and tuple(ranked[2:]) == tuple(expected[2:])
