"""Random archives that change, and what a loop over all of their rows says about each version."""

from collections.abc import Callable
from dataclasses import dataclass, field

import lance
import numpy as np

from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.codes import Codes
from orbithash.search.index.answers import NO_HIT, Scope
from orbithash.search.index.merge import merge
from orbithash.search.segments.dealing import Deal
from orbithash.search.segments.host import ShardHost
from orbithash.search.segments.stop import Stop
from orbithash.v1 import search_pb2

WIDTHS = (8, 12, 16, 20, 64, 65, 100, 128, 512)

FILTERS: dict[str, Callable[[dict], bool]] = {
    "": lambda row: True,
    "label = 'c1'": lambda row: row["label"] == "c1",
    "label IS NULL OR lon > 0.5": lambda row: row["label"] is None or row["lon"] > 0.5,
    "NOT label = 'c2' AND lon BETWEEN 0.2 AND 0.8": lambda row: (
        row["label"] not in (None, "c2") and 0.2 <= row["lon"] <= 0.8
    ),
    "key LIKE 'k%1'": lambda row: row["key"].startswith("k") and row["key"].endswith("1"),
    "S_INTERSECTS(footprint, BBOX(0.25, -1, 0.75, 1)) AND label IN ('c0', 'c2')": lambda row: (
        0.25 <= row["lon"] <= 0.75 and row["label"] in ("c0", "c2")
    ),
    "lon > 7": lambda row: False,
}


def near_oracle(rows, code, k, passes, radius=None, after=None):
    """Return hits [(distance, id)] and ties at the cut-off among rows {id: row}."""
    number = int.from_bytes(code.tobytes())
    every = sorted(
        ((int.from_bytes(row["code"].tobytes()) ^ number).bit_count(), id_) for id_, row in rows.items() if passes(row)
    )
    every = [hit for hit in every if (radius is None or hit[0] <= radius) and (after is None or hit > after)]
    hits = every[:k]
    return hits, sum(distance == hits[-1][0] for distance, _ in every) if hits else 0


@dataclass
class ChangingArchive:
    """An archive that another program changes, with the rows {id: row} of each of its versions.

    Attributes:
        pool: codes that many rows share.
    """

    path: str
    bits: int
    rng: np.random.Generator
    pool: Codes
    versions: dict[int, dict[int, dict]] = field(default_factory=dict)
    num_made: int = 0

    @classmethod
    def create(cls, path, seed, max_rows=300):
        rng = np.random.default_rng(seed)
        bits = int(rng.choice([*WIDTHS, rng.integers(8, 513)]))
        pool = np.packbits(rng.integers(0, 2, (int(rng.choice([2, 20, 400])), bits), dtype=np.uint8), axis=1)
        archive = Archive.create(path, bits, "m" * 32)
        made = cls(archive.path, bits, rng, pool)
        made._remember(archive)
        made.append(int(rng.choice([0, 1, 30, max_rows])))
        return made

    @property
    def newest(self):
        return max(self.versions)

    def change(self):
        """Make one commit of a random kind, now and then several."""
        for _ in range(int(self.rng.choice([1, 1, 1, 3]))):
            match self.rng.integers(8):
                case 0 | 1:
                    self.append(int(self.rng.integers(1, 40)))
                case 2 | 3:
                    self.upsert(int(self.rng.integers(1, 20)), int(self.rng.integers(0, 10)))
                case 4 | 5:
                    self.delete(int(self.rng.integers(1, 60)))
                case 6:
                    lance.dataset(self.path).optimize.compact_files(materialize_deletions_threshold=0.0)
                    self._remember(Archive.open(self.path))
                case 7:
                    lance.dataset(self.path).create_scalar_index("key", "BTREE")
                    self._remember(Archive.open(self.path))

    def append(self, number):
        rows = [self._row(f"k{self.num_made + i}") for i in range(number)]
        self.num_made += number
        if rows:
            archive = Archive.open(self.path)
            archive.commit(Archive.write_fragments(self.path, self._table(rows)))
            self._remember(archive)

    def upsert(self, num_known, num_new):
        keys = self._some_keys(num_known) + [f"k{self.rng.integers(1000)}" for _ in range(num_new)] or ["k0"]
        archive = Archive.open(self.path)
        archive.upsert(self._table([self._row(key) for key in dict.fromkeys(keys)]))
        self._remember(archive)

    def delete(self, number):
        archive = Archive.open(self.path)
        archive.delete(self._some_keys(number))
        self._remember(archive)

    def _some_keys(self, number):
        keys = sorted(row["key"] for row in self.versions[self.newest].values())
        return [str(key) for key in self.rng.permutation(keys)[:number]]

    def _row(self, key):
        number = int(self.rng.integers(4))
        label = None if number == 3 else f"c{number}"
        return {"key": key, "code": self.code(), "label": label, "lon": float(self.rng.random())}

    def code(self):
        """Return a code of the pool, or one near it, or any."""
        code = self.pool[self.rng.integers(len(self.pool))]
        match self.rng.integers(4):
            case 0:
                flips = np.packbits(self.rng.random(self.bits) < 2 / self.bits)
                return code ^ flips
            case 1:
                return np.packbits(self.rng.integers(0, 2, self.bits, dtype=np.uint8))
        return code

    def _table(self, rows):
        keys = [row["key"] for row in rows]
        codes = np.stack([row["code"] for row in rows])
        columns = {name: [row[name] for row in rows] for name in ("label", "lon")}
        return Archive.table(codes, self.bits, keys, keys, lat=[0.0] * len(rows), **columns)

    def _remember(self, archive):
        ids, table = archive.scan(["key", "code", "label", "lon"])
        rows = table.to_pylist()
        for row in rows:
            row["code"] = np.array(row["code"], np.uint8)
        for version in range(self.newest + 1 if self.versions else archive.version, archive.version + 1):
            # Versions in between, of one call, have the rows of the call's end or beginning; they are not asked for.
            if version == archive.version:
                self.versions[version] = dict(zip(ids.tolist(), rows, strict=True))


@dataclass
class Shards:
    """All shards of an archive in this process."""

    hosts: list[ShardHost]
    deal: Deal

    @classmethod
    def of(cls, case, num_shards, shift, index="exact", folder=None):
        deal = Deal(num_shards, shift)
        hosts = [ShardHost(case.path, case.bits, deal, number, index, folder) for number in range(num_shards)]
        return cls(hosts, deal)

    def follow(self, version):
        return sum(host.follow(version) for host in self.hosts)

    def merge_all(self):
        """Merge in the calling thread until nothing is left to merge."""
        for host in self.hosts:
            while host._upkeep.work():
                pass

    def close(self):
        for host in self.hosts:
            host.close()

    def search(self, version, queries, ks, scope):
        """Return (hits, ties) and rows of each query, merged from all shards."""
        answers = [host.search(version, queries, max(ks), scope, Stop()) for host in self.hosts]
        return answers, merge(answers, ks)


def check_version(case, shards, version, num_searches=3):
    """Compare all ways to ask for a version with a loop over its rows."""
    rng, rows = case.rng, case.versions[version]
    for _ in range(num_searches):
        text = str(rng.choice(list(FILTERS)))
        passes = FILTERS[text]
        queries = np.stack([case.code() for _ in range(int(rng.choice([1, 1, 2, 70 if len(rows) < 1000 else 3])))])
        ks = [int(k) for k in rng.choice([1, 3, 10, len(rows) + 5], len(queries))]
        radius = None if rng.random() < 0.5 else int(rng.integers(0, case.bits))
        after = None
        if rows and rng.random() < 0.3:
            # A place that may be a row's or not.
            after = int(rng.integers(0, case.bits // 2)), int(rng.integers(0, 2 * max(rows) + 2))
        scope = Scope(radius, after, text, ("code",), with_rows=True)
        answers, merged = shards.search(version, queries, ks, scope)
        for query, k, found in zip(queries, ks, merged, strict=True):
            expected = near_oracle(rows, query, k, passes, radius, after)
            got = list(zip(found.distances.tolist(), found.ids.tolist(), strict=True)), found.ties
            assert got == expected, (version, text, radius, after, k)
        num_matching = [answer.num_matching for answer in answers]
        assert (
            num_matching == [None] * len(answers) if not text else sum(num_matching) == sum(map(passes, rows.values()))
        )
        for answer in answers:
            ids = answer.ids[answer.distances != NO_HIT].tolist()
            assert len(ids) == len(answer.rows)
            for id_, hit in list(zip(ids, answer.rows, strict=True))[:5]:
                check_hit(rows, id_, hit)
    check_rows(case, shards, version)


def check_hit(rows, id_, message):
    hit, row = search_pb2.Hit.FromString(message), rows[id_]
    label = hit.label if hit.HasField("label") else None
    assert (hit.id, hit.key, label, hit.lon, hit.code) == (
        id_,
        row["key"],
        row["label"],
        row["lon"],
        row["code"].tobytes(),
    )


def check_rows(case, shards, version):
    """Compare rows by id and by filter."""
    rng, rows = case.rng, case.versions[version]
    text = str(rng.choice(list(FILTERS)))
    passing = sorted(id_ for id_, row in rows.items() if FILTERS[text](row))
    assert sum(host.count(version, text, Stop()) for host in shards.hosts) == len(passing)
    after = None if rng.random() < 0.5 else int(rng.integers(0, max(rows, default=0) + 2))
    expected = [id_ for id_ in passing if after is None or id_ > after]
    found = np.concatenate([host.scroll(version, text, after, 7, Stop()) for host in shards.hosts])
    assert np.sort(found)[:7].tolist() == expected[:7]
    for number, host in enumerate(shards.hosts):
        ids = np.array(sorted(rows), np.uint64)
        ids = rng.permutation(ids[shards.deal.part(ids, number)])[:20]
        for columns in (("key", "code"), ("code",), ("key",), ("lon", "code", "label")):
            table = host.read(version, ids, columns, Stop())
            assert table.column_names == [*columns]
            found = table.to_pylist()
            for row in found:
                if "code" in row:
                    row["code"] = bytes(row["code"])
            expected = [{**rows[id_], "code": rows[id_]["code"].tobytes()} for id_ in ids.tolist()]
            assert found == [{name: row[name] for name in columns} for row in expected]
        for id_, hit in zip(ids.tolist(), host.hits(version, ids, ("code",), Stop()), strict=True):
            check_hit(rows, id_, hit)
