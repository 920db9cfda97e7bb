"""For every number of shards and replicas, every way of writing and asking: the answer of a loop over all rows."""

import asyncio
from itertools import pairwise

import numpy as np
import pytest
from search_parts import StubEncoder, random_codes
from shard_cases import FILTERS, ChangingArchive, Shards, check_version, near_oracle

from orbithash.encoders.archive.archive import Archive
from orbithash.search.client.async_client import AsyncClient
from orbithash.search.engine.backend import LocalBackend
from orbithash.search.engine.snapshot import Snapshot
from orbithash.search.gateway.gateway import start_gateway
from orbithash.search.protocol.queries import Cursor, Example, Query
from orbithash.search.protocol.rows import Row
from orbithash.search.segments.versions import merging, source
from orbithash.search.service.service import Target, open_service
from orbithash.search.shards.replicas import Hedging, Replica, ReplicatedShard

# Archives, and shards over each of them: other numbers of shards, other blocks of ids, other versions, other files.
NUM_ARCHIVES, SHARDS_AN_ARCHIVE = 44, 10
# Services with changes, half of them by another program.
NUM_SERVICES, SERVICES_A_TEST = 64, 8


class ReplicatedBackend:
    """Each shard has several replicas, which hold its rows each."""

    def __init__(self, num_replicas, archive, *args):
        self.archive, self.encoder, self.index = archive, args[0], args[2]
        self._backends = [LocalBackend(archive, *args) for _ in range(num_replicas)]

    async def at(self, version):
        snapshots = [await backend.at(version) for backend in self._backends]
        replicas = [snapshot.shards for snapshot in snapshots]
        shards = [
            ReplicatedShard(list(of_shard), [Replica() for _ in of_shard], Hedging())
            for of_shard in zip(*replicas, strict=True)
        ]
        first = snapshots[0]
        return Snapshot.of(first.archive, shards, first.deal, first.encoder)

    async def close(self):
        for backend in self._backends:
            await backend.close()


def random_row(rng, key, pool):
    number = int(rng.integers(4))
    return {
        "key": key,
        "code": pool[rng.integers(len(pool))],
        "label": None if number == 3 else f"c{number}",
        "lon": float(rng.random()),
    }


def as_row(row):
    return Row(key=row["key"], code=row["code"].tobytes(), label=row["label"], lon=row["lon"], lat=0.0)


def as_table(rows, bits):
    columns = {name: [row[name] for row in rows] for name in ("key", "label", "lon")}
    codes = np.stack([row["code"] for row in rows])
    return Archive.table(codes, bits, **columns, uri=columns["key"], lat=[0.0] * len(rows))


async def change(rng, service, rows_by_key, pool):
    """Add, change and remove some rows, in several concurrent calls."""
    new = [random_row(rng, f"n{rng.integers(10**6)}", pool) for _ in range(rng.integers(0, 20))]
    keys = list(rows_by_key)
    rng.shuffle(keys)
    again = [random_row(rng, key, pool) for key in keys[: rng.integers(0, 20)]]
    gone = keys[20 : 20 + int(rng.integers(0, 30))]
    if rng.random() < 0.5:
        # Another program; the service follows it.
        archive = Archive.open(service.backend.archive.path)
        for rows in (new, again):
            if rows:
                archive.upsert(as_table(rows, archive.bits))
        archive.delete(gone)
        await service.refresh()
    else:
        wishes = [service.upsert(list(map(as_row, rows))) for rows in (new, again) if rows]
        if gone:
            wishes.append(service.delete(gone))
        await asyncio.gather(*wishes)
    for row in (*new, *again):
        rows_by_key[row["key"]] = row
    for key in gone:
        del rows_by_key[key]


async def check(rng, ask, rows, bits, pool):
    for _ in range(4):
        text, passes = list(FILTERS.items())[rng.integers(len(FILTERS))]
        code = pool[rng.integers(len(pool))] if rng.random() < 0.5 else random_codes(rng, 1, bits)[0]
        k = int(rng.choice([1, 3, 10, len(rows) + 5]))
        radius = None if rng.random() < 0.5 else int(rng.integers(0, bits))
        given = {"code": code.tobytes()}
        if rows and rng.random() < 0.3:
            row = rows[list(rows)[rng.integers(len(rows))]]
            given, code = {"key": row["key"]}, row["code"]
        if rng.random() < 0.15:
            given, code = recommended(rng, bits, pool)
        answer = await ask(Query(**given, k=k, radius=radius, filter=text, include=("code",)))
        expected = near_oracle(rows, code, k, passes, radius)
        assert ([(hit.distance, hit.id) for hit in answer.hits], answer.ties_at_cutoff) == expected, (text, radius)
        for hit in answer.hits:
            row = rows[hit.id]
            assert (hit.key, hit.label, hit.lon) == (row["key"], row["label"], row["lon"])
            assert hit.extra["code"] == row["code"].tobytes()
        assert answer.coverage.fraction == 1
        assert answer.matching_rows == (sum(map(passes, rows.values())) if text else None)
        if answer.next is not None:
            page = await ask(Query(**given, k=k, radius=radius, filter=text, after=answer.next))
            after = near_oracle(rows, code, k, passes, radius, (answer.next.distance, answer.next.id))
            assert ([(hit.distance, hit.id) for hit in page.hits], page.ties_at_cutoff) == after


def recommended(rng, bits, pool):
    """Return examples, and the code of their majority vote, counted bit by bit."""
    wanted, unwanted = (pool[rng.integers(len(pool), size=rng.integers(low, 4))] for low in (1, 0))
    code = np.zeros(bits, np.uint8)
    for bit in range(bits):
        share = [np.unpackbits(codes, axis=1)[:, bit] * 2.0 - 1 for codes in (wanted, unwanted)]
        balance = share[0].mean() - (share[1].mean() if len(unwanted) else 0)
        code[bit] = np.unpackbits(wanted[0])[bit] if abs(balance) < 1e-9 else balance > 0
    given = {
        "positives": tuple(Example(code=each.tobytes()) for each in wanted),
        "negatives": tuple(Example(code=each.tobytes()) for each in unwanted),
    }
    return given, np.packbits(code)


async def scenario(seed, folder):
    rng = np.random.default_rng(seed)
    bits = int(rng.choice([8, 16, 20, 64, 100, 128, 512]))
    pool = random_codes(rng, int(rng.choice([2, 20, 400])), bits)
    num_rows = int(rng.choice([0, 1, 30, 300]))
    rows_by_key = {f"k{i}": random_row(rng, f"k{i}", pool) for i in range(num_rows)}
    written = Archive.create(folder, bits, "m" * 32)
    # Fragments in random order, so that ids and keys are unrelated.
    order = rng.permutation(num_rows)
    for start, stop in pairwise([0, num_rows // 3, num_rows]):
        rows = [rows_by_key[f"k{i}"] for i in order[start:stop]]
        if rows:
            written.commit(Archive.write_fragments(folder, as_table(rows, bits)))
    num_shards, num_replicas = int(rng.integers(1, 9)), int(rng.integers(1, 4))
    index = str(rng.choice(["exact", "flat"]))

    async def open_backend(target):
        return ReplicatedBackend(num_replicas, Archive.open(target.archive), StubEncoder(), target.num_shards, index)

    service = await open_service(open_backend, Target(str(folder), "", num_shards))
    gateway = await start_gateway(service, "127.0.0.1:0")
    try:
        async with AsyncClient(gateway.address, 60.0) as client:
            for _ in range(2):
                ids, table = Archive.open(folder).scan(["key"])
                rows = {int(id_): rows_by_key[key] for id_, key in zip(ids, table["key"].to_pylist(), strict=True)}
                assert len(rows) == len(rows_by_key) == service.describe().rows
                await check(rng, lambda query: service.search(query, 60.0), rows, bits, pool)
                await check(rng, client.search, rows, bits, pool)
                await change(rng, service, rows_by_key, pool)
    finally:
        await gateway.stop(0)
        await service.close()


@pytest.mark.parametrize("first", range(0, NUM_SERVICES, SERVICES_A_TEST))
def test_every_way_of_serving_equals_the_oracle(first, tmp_path):
    for seed in range(first, first + SERVICES_A_TEST):
        asyncio.run(scenario(9000 + seed, tmp_path / str(seed)))


@pytest.mark.parametrize("seed", range(NUM_ARCHIVES))
def test_shards_that_follow_an_archive_equal_the_oracle(seed, tmp_path, monkeypatch):
    max_rows = 6000 if seed % 12 == 0 else 300
    case = ChangingArchive.create(tmp_path / "archive", seed, max_rows)
    rng = np.random.default_rng(seed)
    for _ in range(5):
        case.change()
    versions = sorted(case.versions)
    for number in range(SHARDS_AN_ARCHIVE):
        # Many segments, or few.
        monkeypatch.setattr(merging, "SMALL_ROWS", int(rng.choice([1, 30, 4096])))
        monkeypatch.setattr(source, "MAX_ROWS", int(rng.choice([max_rows // 16, 2**25])))
        folder = tmp_path / str(number) if rng.random() < 0.6 else None
        shape = (
            int(rng.choice([1, 1, 2, 3, 5, 8])),
            int(rng.integers(0, 7)),
            str(rng.choice(["exact", "exact", "flat"])),
        )
        shards = Shards.of(case, *shape, folder)
        held = []
        for version in np.sort(rng.choice(versions, 3)).tolist():
            assert shards.follow(version) == len(case.versions[version])
            held.append(version)
            if rng.random() < 0.4:
                shards.merge_all()
            check_version(case, shards, held[rng.integers(len(held))], num_searches=2)
            if rng.random() < 0.3:
                shards.close()
                shards = Shards.of(case, *shape, folder)
                held = []
        shards.close()


def test_a_cursor_is_a_place_and_not_a_row():
    assert Cursor(3, 7) == (3, 7)
