"""Changes of an archive while it is searched, on real Lance datasets."""

import asyncio
import threading
from datetime import UTC, datetime

import numpy as np
import pytest
import shapely
from search_parts import StubEncoder, random_codes

from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.errors import ImageError, InputError
from orbithash.search.engine.backend import LocalBackend
from orbithash.search.protocol.errors import InvalidQuery, Overloaded, Unavailable
from orbithash.search.protocol.queries import Answer, Query
from orbithash.search.protocol.rows import Row, RowUpdate
from orbithash.search.segments.host import MAX_VERSIONS
from orbithash.search.service import maintenance as maintenance_module
from orbithash.search.service import service as service_module
from orbithash.search.service import showing as showing_module
from orbithash.search.service import supervision
from orbithash.search.service import writer as writer_module
from orbithash.search.service.service import Membership, Service, Target, open_service

BITS = 16


def code(number):
    return int(number).to_bytes(2)


class Backend(LocalBackend):
    """A backend whose `at` a test can delay or let fail."""

    async def before_at(self, version):
        """Replaced by tests; runs before each version is shown."""

    async def at(self, version):
        await self.before_at(version)
        return await super().at(version)


def run(folder, scenario, encoder=None, num_rows=0, model_id="m" * 32, index="flat", membership=None):
    """Run `scenario(service)` over a new archive with rows k0, k1, …, whose codes are 0, 1, …."""

    async def main():
        archive = Archive.open_or_create(folder, BITS, model_id)
        if num_rows:
            keys = [f"k{i}" for i in range(num_rows)]
            archive.upsert(
                Archive.table(np.arange(num_rows, dtype=">u2").view(np.uint8).reshape(-1, 2), BITS, keys, keys)
            )

        async def open_backend(target):
            return Backend(Archive.open(target.archive), encoder or StubEncoder(), target.num_shards, index)

        service = await open_service(open_backend, Target(str(folder), "", 3), membership=membership or Membership())
        try:
            await scenario(service)
        finally:
            await service.close()

    asyncio.run(main())


async def held(service: Service, **query):
    """Return the distance of each row by key, as a search returns them."""
    answer = await service.search(Query(code=code(0), k=5000, **query), 60.0)
    return {hit.key: hit.distance for hit in answer.hits}


def test_what_is_acknowledged_is_seen_and_committed(tmp_path):
    async def scenario(service):
        done = await service.upsert([Row(key="a", code=code(7)), Row(key="b", code=code(1))])
        assert await held(service) == {"a": 3, "b": 1}
        assert Archive.open(tmp_path / "a").version == done.version == service.describe().archive_version
        ids = Archive.open(tmp_path / "a").find(["a", "b"])
        await service.upsert([Row(key="a", code=code(1), label="new", uri="file:///a")])
        assert await held(service) == {"a": 1, "b": 1}
        assert Archive.open(tmp_path / "a").find(["a", "b"]) == ids
        assert (await service.delete(["b", "never", "a"])).removed == 2
        assert await held(service) == {}

    run(tmp_path / "a", scenario)


def test_all_columns_of_a_row_arrive(tmp_path):
    row = Row(
        key="a",
        code=code(0),
        uri="s3://b/a",
        label="harbor",
        caption="boats",
        datetime=datetime(2024, 5, 1, 12, tzinfo=UTC),
        lon=3.5,
        lat=-50.25,
        footprint=b"\x01\x01\x00\x00\x00" + bytes(16),
        thumbnail=b"jpeg",
    )

    async def scenario(service):
        await service.upsert([row])
        (hit,) = (
            await service.search(Query(key="a", include=("uri", "caption", "thumbnail", "footprint", "code")), 60.0)
        ).hits
        for name in ("key", "label", "datetime", "lon", "lat"):
            assert getattr(hit, name) == getattr(row, name)
        assert hit.extra == {name: getattr(row, name) for name in ("uri", "caption", "thumbnail", "footprint", "code")}

    run(tmp_path / "a", scenario)


def test_outlines_of_clients_are_cut_at_180_degrees(tmp_path):
    fiji = shapely.Polygon([(179, -18), (-179, -18), (-179, -16), (179, -16)])
    angola = shapely.box(13, -18, 15, -16)

    async def scenario(service):
        await service.upsert([Row(key="a", code=code(0), footprint=fiji.wkb), Row(key="b", code=code(1))])
        await service.update([RowUpdate("b", {"footprint": fiji.wkb})])
        await service.upsert([Row(key="c", code=code(2), footprint=angola.wkb)])
        assert await held(service, filter="S_INTERSECTS(footprint, BBOX(177, -19, -178, -15))") == {"a": 0, "b": 1}
        assert await held(service, filter="S_INTERSECTS(footprint, BBOX(12, -19, 16, -15))") == {"c": 1}
        for request in (
            service.upsert([Row(key="d", code=code(3), footprint=b"not WKB")]),
            service.update([RowUpdate("a", {"footprint": shapely.box(0, 0, 1, 99).wkb})]),
        ):
            with pytest.raises(InvalidQuery, match=r"footprint.*(it is not WKB|latitudes from -90 to 90)"):
                await request
        assert "d" not in await held(service)

    run(tmp_path / "a", scenario)


def test_longitudes_of_clients_are_stored_within_180_degrees(tmp_path):
    async def scenario(service):
        await service.upsert([Row(key="a", code=code(0), lon=-181.0), Row(key="b", code=code(1), lon=10.0)])
        await service.update([RowUpdate("b", {"lon": 190.0})])
        assert await held(service, filter="lon = 179") == {"a": 0}
        assert await held(service, filter="lon = -170") == {"b": 1}

    run(tmp_path / "a", scenario)


def test_an_image_becomes_a_code_and_a_thumbnail(tmp_path):
    async def encode(images):
        if b"bad" in images:
            raise ImageError("not an image")
        return np.array([[0, len(image)] for image in images], np.uint8)

    async def scenario(service):
        await service.upsert([Row(key="a", image=b"xx"), Row(key="b", code=code(9)), Row(key="c", image=b"yyyy")])
        answer = await service.search(Query(code=code(0), include=("code", "thumbnail")), 60.0)
        assert {hit.key: (hit.extra["code"], hit.extra.get("thumbnail")) for hit in answer.hits} == {
            "a": (code(2), b"thumbnail of xx"),
            "b": (code(9), None),
            "c": (code(4), b"thumbnail of yyyy"),
        }
        with pytest.raises(InvalidQuery, match=r"image: not an image \(row 'e'\)"):
            await service.upsert([Row(key="d", image=b"z"), Row(key="e", image=b"bad")])
        assert "d" not in await held(service)

    run(tmp_path / "a", scenario, StubEncoder(encode))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (Row(key="", code=code(1)), "a key has 1 to 4,096 characters"),
        (Row(key="a\nb", code=code(1)), "no control characters"),
        (Row(key="a"), "exactly one of image, code and vector"),
        (Row(key="a", code=code(1), image=b"x"), "exactly one of image, code and vector"),
        (Row(key="a", code=b"123"), "code"),
        (Row(key="a", code=code(1), lon=360.5), "from -360 to 360 degrees"),
        (Row(key="a", code=code(1), lat=float("nan")), "from -90 to 90 degrees"),
        (Row(key="a", code=code(1), thumbnail=bytes(10**6)), "at most 262,144 bytes"),
    ],
)
def test_refused_rows_write_nothing(tmp_path, row, words):
    async def scenario(service):
        before = service.describe()
        with pytest.raises(InvalidQuery, match=words):
            await service.upsert([Row(key="good", code=code(2)), row])
        assert service.describe() == before

    run(tmp_path / "a", scenario)


def test_several_writers_at_once_share_commits(tmp_path):
    async def scenario(service):
        before = service.describe().archive_version
        done = await asyncio.gather(
            *(service.upsert([Row(key=f"{writer}/{row}", code=code(row)) for row in range(20)]) for writer in range(30))
        )
        assert len(await held(service)) == 600
        assert service.describe().archive_version == max(each.version for each in done) < before + 10
        # Wishes for one key, in order: the last one counts.
        await asyncio.gather(
            service.upsert([Row(key="x", code=code(1)), Row(key="x", code=code(3))]),
            service.delete(["x"]),
            service.upsert([Row(key="x", code=code(7))]),
            service.delete(["0/0"]),
        )
        assert (await held(service))["x"] == 3
        assert "0/0" not in await held(service)

    run(tmp_path / "a", scenario)


def test_more_than_can_wait_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "_MAX_WAITING", 10)

    async def scenario(service):
        outcomes = await asyncio.gather(
            *(service.upsert([Row(key=f"{w}/{r}", code=code(r)) for r in range(6)]) for w in range(4)),
            return_exceptions=True,
        )
        refused = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
        assert refused
        assert all(isinstance(outcome, Overloaded) for outcome in refused)
        assert len(await held(service)) == 6 * (4 - len(refused))

    run(tmp_path / "a", scenario)


def test_an_archive_that_another_process_writes_is_unavailable_for_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "_LOCK_S", 0.1)

    async def scenario(service):
        with Archive.open(tmp_path / "a").writing():
            with pytest.raises(Unavailable, match="cannot be written now; another program may be writing"):
                await service.upsert([Row(key="a", code=code(1))])
            assert len(await held(service)) == 4
        await service.upsert([Row(key="a", code=code(1))])
        assert len(await held(service)) == 5

    run(tmp_path / "a", scenario, num_rows=4)


def test_what_other_programs_write_is_followed(tmp_path, monkeypatch):
    monkeypatch.setattr(service_module, "_FOLLOW_EVERY_S", 0.01)

    async def scenario(service):
        follower = asyncio.create_task(service.follow())
        await asyncio.to_thread(Archive.open(tmp_path / "a").delete, ["k1"])
        async with asyncio.timeout(60):
            while "k1" in await held(service):
                await asyncio.sleep(0.01)
        follower.cancel()
        await asyncio.to_thread(Archive.open(tmp_path / "a").delete, ["k2"])
        # A change that comes after one that was not seen brings both.
        await service.upsert([Row(key="new", code=code(0))])
        assert set(await held(service)) == {"k0", "k3", "new"}

    run(tmp_path / "a", scenario, num_rows=4)


def test_refresh_sees_what_other_programs_write(tmp_path):
    async def scenario(service):
        await asyncio.to_thread(Archive.open(tmp_path / "a").delete, ["k1"])
        assert "k1" in await held(service)
        await service.refresh()
        assert "k1" not in await held(service)

    run(tmp_path / "a", scenario, num_rows=4)


def test_many_small_commits_are_joined_and_nothing_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(maintenance_module, "_PAUSE_S", 0.0)

    async def scenario(service):
        for number in range(23):
            await service.upsert([Row(key=f"k{number}", code=code(number))])
        assert set(await held(service)) == {f"k{number}" for number in range(23)}
        async with asyncio.timeout(60):
            while len(Archive.open(tmp_path / "a")._dataset.get_fragments()) >= 16:
                await asyncio.sleep(0.01)
        assert set(await held(service)) == {f"k{number}" for number in range(23)}

    run(tmp_path / "a", scenario)


def test_another_archive_takes_its_place_without_a_failed_query(tmp_path):
    rng = np.random.default_rng(0)
    other = Archive.create(tmp_path / "b", 64, "n" * 32)
    keys = [f"b{i}" for i in range(50)]
    other.upsert(Archive.table(random_codes(rng, 50, 64), 64, keys, keys))

    async def scenario(service):
        answers = []

        async def ask_safely():
            while not done.is_set():
                found = await asyncio.gather(
                    *(service.search(Query(key=key, k=3), 60.0) for key in ("k0", "b0")), return_exceptions=True
                )
                answers.extend(found)

        done = asyncio.Event()
        asking = asyncio.create_task(ask_safely())
        await service.upsert([Row(key="last", code=code(5))])
        now = await service.refresh(str(tmp_path / "b"), "")
        assert (now.rows, now.bits, now.model_id) == (50, 64, "n" * 32)
        done.set()
        await asking
        # Each query is of one of the archives, and only the key of the other one is unknown.
        for first, second in zip(answers[::2], answers[1::2], strict=True):
            assert isinstance(first, Answer) or isinstance(second, Answer)
        await service.upsert([Row(key="late", code=bytes(8))])
        assert Archive.open(tmp_path / "b").find(["late"])
        assert not Archive.open(tmp_path / "a").find(["late"])
        with pytest.raises(InvalidQuery, match=r"archive: .*does not exist"):
            await service.refresh(str(tmp_path / "nowhere"), "")
        assert service.describe().rows == 51

    run(tmp_path / "a", scenario, num_rows=4)


def test_other_shards_without_a_failed_query_or_a_lost_row(tmp_path):
    """While rows are written and searched: acknowledged rows stay visible."""

    async def scenario(service):
        acknowledged, done = [], asyncio.Event()

        async def write(who):
            number = 0
            while not done.is_set():
                await service.upsert([Row(key=f"{who}{number}", code=code(number % 7))])
                acknowledged.append(f"{who}{number}")
                number += 1

        async def ask():
            while not done.is_set():
                key = acknowledged[-1] if acknowledged else "k0"
                answer = await service.search(Query(key=key, k=1), 60.0)
                assert (len(answer.hits), answer.coverage.fraction) == (1, 1)
                await asyncio.sleep(0)

        working = [
            *(asyncio.create_task(write(who)) for who in "abcd"),
            *(asyncio.create_task(ask()) for _ in range(4)),
        ]
        for num_shards in (5, 1, 8, 2):
            now = await service.refresh(num_shards=num_shards)
            assert len(now.shards) == num_shards
            seen = len(acknowledged)
            while len(acknowledged) < seen + 9:
                assert not any(task.done() for task in working), "a write or a search failed"
                await asyncio.sleep(0)
        done.set()
        await asyncio.gather(*working)
        now = service.describe()
        assert now.rows == sum(shard.rows for shard in now.shards) == 4 + len(acknowledged)
        assert len((await service.refresh()).shards) == 2, "as many as before"
        for wrong in (-1, 1025):
            with pytest.raises(InvalidQuery, match="shards: from 1 to 1,024, or 0 for the current number"):
                await service.refresh(num_shards=wrong)

    run(tmp_path / "a", scenario, num_rows=4)


def test_a_failed_commit_is_reported_and_the_next_one_succeeds(tmp_path, monkeypatch):
    original = Archive.write
    failures = iter([RuntimeError("the disk is full"), InputError("cannot be written")])

    def fail(self, table):
        for failure in failures:
            raise failure
        return original(self, table)

    monkeypatch.setattr(Archive, "write", fail)

    async def scenario(service):
        with pytest.raises(RuntimeError, match="the disk is full"):
            await service.upsert([Row(key="a", code=code(1))])
        with pytest.raises(Unavailable, match="cannot be written now"):
            await service.upsert([Row(key="a", code=code(1))])
        await service.upsert([Row(key="b", code=code(1))])
        assert set(await held(service)) == {"b"}

    run(tmp_path / "a", scenario)


class Panic(BaseException):
    """Like a panic of native code: not an `Exception`."""


def test_a_panic_of_native_code_is_reported_too(tmp_path, monkeypatch):
    original = Archive.write
    failures = iter([Panic("already borrowed")])

    def fail(self, table):
        for failure in failures:
            raise failure
        return original(self, table)

    monkeypatch.setattr(Archive, "write", fail)

    async def scenario(service):
        with pytest.raises(Unavailable, match="cannot be written now"):
            await service.upsert([Row(key="a", code=code(1))])
        await service.upsert([Row(key="b", code=code(1))])
        assert set(await held(service)) == {"b"}

    run(tmp_path / "a", scenario)


def test_filters_hold_through_changes(tmp_path):
    """Random histories against a dict: each answer is of the newest version, whichever filters were cached."""
    rng = np.random.default_rng(3)
    labels = ("beach", "forest", "river")
    filters = [f"label = '{label}'" for label in labels] + ["label IN ('beach', 'river')", "key LIKE 'k1%'"]
    passes = [lambda key, label, wanted=wanted: label == wanted for wanted in labels]
    passes += [lambda key, label: label in ("beach", "river"), lambda key, label: key.startswith("k1")]

    async def scenario(service):
        rows = {}
        for _ in range(40):
            keys = [f"k{number}" for number in rng.choice(30, rng.integers(1, 6), replace=False)]
            if rng.random() < 0.3:
                await service.delete(keys)
                rows = {key: label for key, label in rows.items() if key not in keys}
            else:
                new = {key: str(rng.choice(labels)) for key in keys}
                await service.upsert([Row(key=key, code=code(1), label=label) for key, label in new.items()])
                rows |= new
            for number in rng.choice(len(filters), 2, replace=False):
                wanted = {key for key, label in rows.items() if passes[number](key, label)}
                assert set(await held(service, filter=filters[number])) == wanted

    run(tmp_path / "a", scenario)


def test_a_filter_that_is_looked_up_while_rows_change(tmp_path):
    """Each query answers from the version that was shown when it arrived, or from a later one."""

    async def scenario(service):
        await service.upsert([Row(key=f"n{i}", code=code(i), label="river") for i in range(3)])
        asking = [asyncio.create_task(held(service, filter="label = 'river'"))]
        for number in range(3):
            await asyncio.sleep(0)
            await service.upsert([Row(key=f"n{number}", code=code(0), label="beach")])
            asking.append(asyncio.create_task(held(service, filter="label = 'river'")))
        found = [set(keys) for keys in await asyncio.gather(*asking)]
        for expected, keys in zip([{"n0", "n1", "n2"}, {"n1", "n2"}, {"n2"}, set()], found, strict=True):
            assert keys == expected

    run(tmp_path / "a", scenario)


def test_a_search_that_is_slower_than_changes_ends_on_its_version(tmp_path, monkeypatch):
    """Changes wait for the searches on the version that they displace."""
    may_go_on = asyncio.Event()
    monkeypatch.setattr(showing_module, "_LAST_SEARCHES_S", 60.0)

    async def encode(images):
        await may_go_on.wait()
        return np.zeros((len(images), 2), np.uint8)

    async def scenario(service):
        searching = asyncio.create_task(service.search(Query(image=b"slow"), 60.0))
        await asyncio.sleep(0)
        for number in range(MAX_VERSIONS - 1):
            await service.upsert([Row(key=f"n{number}", code=code(0))])
        changing = asyncio.create_task(service.upsert([Row(key="last", code=code(0))]))
        while Archive.open(tmp_path / "a").version == service.describe().archive_version:
            await asyncio.sleep(0.01)
        assert not changing.done()
        may_go_on.set()
        assert {hit.key for hit in (await searching).hits} == {"k0", "k1"}
        await changing
        assert "last" in await held(service)

    run(tmp_path / "a", scenario, StubEncoder(encode), num_rows=2)


def test_a_caller_that_leaves_does_not_take_back_its_rows(tmp_path):
    async def scenario(service):
        task = asyncio.create_task(service.upsert([Row(key="a", code=code(1))]))
        await asyncio.sleep(0)
        task.cancel()
        await service.upsert([Row(key="b", code=code(1))])
        assert set(await held(service)) == {"a", "b"}

    run(tmp_path / "a", scenario)


def test_batches_of_queries(tmp_path):
    async def scenario(service):
        found = await service.search_many([Query(key="k1", k=1), Query(key="nobody"), Query(code=b"1")], 60.0)
        assert [type(each).__name__ for each in found] == ["Answer", "KeyNotFound", "InvalidQuery"]
        with pytest.raises(InvalidQuery, match="a call has 1 to 256 queries, got 0"):
            await service.search_many([], 60.0)
        with pytest.raises(InvalidQuery, match="may ask for 100,000 hits and rows of shortlists in total, got 110,000"):
            await service.search_many([Query(key="k1", k=10_000)] * 11, 60.0)
        with pytest.raises(InvalidQuery, match="got 257"):
            await service.search_many([Query(key="k1")] * 257, 60.0)

    run(tmp_path / "a", scenario, num_rows=4)


@pytest.mark.parametrize(("index", "is_exact"), [("exact", True), ("flat", True), ("ivf", False), ("hnsw", False)])
def test_answers_of_approximate_indexes_are_marked(tmp_path, index, is_exact):
    async def scenario(service):
        for query in (Query(code=code(1)), Query(code=code(1), filter="key LIKE 'k%'"), Query(key="k1", radius=3)):
            assert (await service.search(query, 60.0)).is_exact == is_exact
        await service.upsert([Row(key="new", code=code(1))])
        assert (await service.search(Query(code=code(1)), 60.0)).is_exact == is_exact

    run(tmp_path / "a", scenario, num_rows=20, index=index)


def test_following_survives_any_error(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(service_module, "_FOLLOW_EVERY_S", 0.001)
    monkeypatch.setattr(service_module, "_MAX_FOLLOW_EVERY_S", 0.004)
    original = Archive.newest_version
    errors = [MemoryError("no room"), Panic("native code"), OSError("gone"), asyncio.CancelledError("executor")]
    failures = iter(errors)

    def newest_version(self):
        for failure in failures:
            raise failure
        return original(self)

    monkeypatch.setattr(Archive, "newest_version", newest_version)

    async def scenario(service):
        follower = asyncio.create_task(service.follow())
        await asyncio.to_thread(Archive.open(tmp_path / "a").delete, ["k1"])
        async with asyncio.timeout(60):
            while "k1" in await held(service):
                await asyncio.sleep(0.001)
        assert not follower.done()
        follower.cancel()
        with pytest.raises(asyncio.CancelledError):
            await follower

    run(tmp_path / "a", scenario, num_rows=4)
    assert caplog.text.count("following the archive failed") == len(errors)


def test_the_delay_after_failures_grows_to_its_limit(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(service_module, "_FOLLOW_EVERY_S", 0.001)
    monkeypatch.setattr(service_module, "_MAX_FOLLOW_EVERY_S", 0.003)
    monkeypatch.setattr(supervision, "_MIN_DELAY_S", 0.0)

    async def scenario(service):
        monkeypatch.setattr(Archive, "newest_version", lambda self: 1 / 0)
        follower = asyncio.create_task(service.follow())
        async with asyncio.timeout(60):
            while len(caplog.records) < 4:
                await asyncio.sleep(0.001)
        follower.cancel()

    run(tmp_path / "a", scenario)
    assert [record.args[1] for record in caplog.records[:4]] == [0.002, 0.003, 0.003, 0.003]


def test_the_old_version_is_searched_until_the_shards_have_the_new_one(tmp_path):
    async def scenario(service):
        may_load, is_loading = asyncio.Event(), asyncio.Event()

        async def before_at(version):
            is_loading.set()
            await may_load.wait()

        keys = [f"new{number}" for number in range(10)]
        table = Archive.table(np.zeros((10, 2), np.uint8), BITS, keys, keys, label=["x"] * 10)
        await asyncio.to_thread(Archive.open(tmp_path / "a").write, table)
        service._served.backend.before_at = before_at
        refreshing = asyncio.create_task(service.refresh())
        await is_loading.wait()
        assert set(await held(service)) == {"k0", "k1", "k2", "k3"}
        assert service.can_answer
        may_load.set()
        await refreshing
        assert set(await held(service)) == {"k0", "k1", "k2", "k3", *keys}
        assert set(await held(service, filter="label = 'x'")) == set(keys)

    run(tmp_path / "a", scenario, num_rows=4)


def test_a_commit_succeeds_whatever_maintenance_does(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(maintenance_module, "_PAUSE_S", 0.0)
    failures = {
        "prepare_compaction": OSError("no space"),
        "update_index": Panic("native code"),
        "clean_up": RuntimeError("object store"),
    }

    async def scenario(service):
        for number, (name, failure) in enumerate(failures.items()):
            with monkeypatch.context() as patch:
                called = threading.Event()

                def fail(self, called=called, failure=failure):
                    called.set()
                    raise failure

                patch.setattr(Archive, name, fail)
                done = await service.upsert([Row(key=f"n{number}", code=code(1))])
                assert done.version == service.describe().archive_version
                assert await asyncio.to_thread(called.wait, 60)
                assert f"n{number}" in await held(service)
        await service.upsert([Row(key="last", code=code(1))])
        assert set(await held(service)) == {"n0", "n1", "n2", "last"}

    run(tmp_path / "a", scenario)
    assert caplog.text.count("maintaining the archive failed") >= len(failures)


def test_compaction_does_not_hold_back_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(maintenance_module, "_PAUSE_S", 0.0)
    may_go_on, began = threading.Event(), threading.Event()

    def prepare_compaction(self):
        began.set()
        assert may_go_on.wait(60)

    monkeypatch.setattr(Archive, "prepare_compaction", prepare_compaction)

    async def scenario(service):
        await service.upsert([Row(key="a", code=code(1))])
        assert await asyncio.to_thread(began.wait, 60)
        await service.upsert([Row(key="b", code=code(1))])
        assert set(await held(service)) == {"a", "b"}
        may_go_on.set()

    run(tmp_path / "a", scenario)


def test_archives_are_maintained_from_the_start_and_by_one_gateway_only(tmp_path, monkeypatch):
    """What an earlier process left is maintained without a change; a gateway that joins leaves it alone."""
    monkeypatch.setattr(maintenance_module, "_PAUSE_S", 0.0)
    maintained = threading.Event()
    monkeypatch.setattr(Archive, "maintain", lambda self, timeout_s: maintained.set())

    async def joined(service):
        assert service._maintenance is None
        await service.upsert([Row(key="a", code=code(1))])

    run(tmp_path / "a", joined, membership=Membership(maintains=False))
    assert not maintained.is_set()

    async def first(service):
        for _ in range(2):
            assert await asyncio.to_thread(maintained.wait, 60)
            maintained.clear()
            # A change of another program.
            await asyncio.to_thread(Archive.open(tmp_path / "a").delete, ["a"])
            await service.refresh()

    run(tmp_path / "a", first)


def test_a_commit_that_cannot_be_shown_is_acknowledged_and_followed(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(service_module, "_FOLLOW_EVERY_S", 0.01)

    async def scenario(service):
        for number, failure in enumerate((OSError("the shards are gone"), Panic("native code"))):

            async def fail(version, failure=failure):
                raise failure

            service._served.backend.before_at = fail
            done = await service.upsert([Row(key=f"a{number}", code=code(1))])
            assert done.version == Archive.open(tmp_path / "a").version > service.describe().archive_version
            assert "was not shown to searches" in caplog.text
            assert service.follow_lag_s > 0
            del service._served.backend.before_at
            follower = asyncio.create_task(service.follow())
            async with asyncio.timeout(60):
                while f"a{number}" not in await held(service):
                    await asyncio.sleep(0.01)
            assert service.follow_lag_s == 0
            follower.cancel()

    run(tmp_path / "a", scenario)


def test_a_commit_that_is_not_shown_in_time_is_acknowledged(tmp_path, monkeypatch, caplog):
    """In time for the caller with the earliest deadline, and for all others within the limit."""
    monkeypatch.setattr(writer_module, "_SHOW_S", 6.0)

    async def scenario(service):
        may_show = asyncio.Event()

        async def before_at(version):
            await may_show.wait()

        service._served.backend.before_at = before_at
        hurried = asyncio.create_task(service.upsert([Row(key="a", code=code(1))], timeout_s=3.0))
        patient = asyncio.create_task(service.upsert([Row(key="b", code=code(1))], timeout_s=60))
        await hurried
        assert not patient.done(), "searches may see it in time"
        await patient
        assert await held(service) == {}
        may_show.set()
        await service.upsert([Row(key="c", code=code(1))])
        assert set(await held(service)) == {"a", "b", "c"}

    run(tmp_path / "a", scenario)
    assert "is committed, but searches do not see it yet" in caplog.text


def test_a_commit_waits_for_its_turn_within_the_deadline_of_its_callers(tmp_path):
    async def scenario(service):
        with Archive.open(tmp_path / "a").writing():
            with pytest.raises(Unavailable):
                await service.upsert([Row(key="late", code=code(1))], timeout_s=0.1)
            waiting = asyncio.create_task(service.upsert([Row(key="a", code=code(1))]))
            await asyncio.sleep(0.1)
        await waiting
        assert set(await held(service)) == {"a"}

    run(tmp_path / "a", scenario)


def test_removed_rows_are_acknowledged_though_other_rows_of_the_commit_cannot_be_written(tmp_path, monkeypatch):
    def fail(self, table):
        raise OSError("the disk is full")

    async def scenario(service):
        monkeypatch.setattr(Archive, "write", fail)
        outcomes = await asyncio.gather(
            service.delete(["k0"]),
            service.upsert([Row(key="k1", code=code(9))]),
            service.delete(["k2", "k1"]),
            service.upsert([Row(key="k2", code=code(9))]),
            return_exceptions=True,
        )
        # k1 was written and then removed, k2 removed and then written.
        assert [type(outcome).__name__ for outcome in outcomes] == ["Committed", "Committed", "OSError", "OSError"]
        assert set(await held(service)) == {"k2", "k3"}

    run(tmp_path / "a", scenario, num_rows=4)


def test_an_error_after_the_commit_is_not_an_error_of_the_change(tmp_path, monkeypatch):
    """Whatever reads the archive after the commit."""

    async def scenario(service):
        original = Archive.write

        def write(self, table):
            original(self, table)
            for name in ("find", "refresh", "take"):
                monkeypatch.setattr(Archive, name, lambda *_: 1 / 0)

        with monkeypatch.context():
            monkeypatch.setattr(Archive, "write", write)
            done = await service.upsert([Row(key="a", code=code(1))])
            monkeypatch.undo()
        assert done.version == Archive.open(tmp_path / "a").version
        assert Archive.open(tmp_path / "a").find(["a"])

    run(tmp_path / "a", scenario)


def test_closing_never_raises_and_closes_everything(tmp_path, caplog):
    async def scenario(service):
        original, closed = service._served.backend.close, []

        async def close():
            closed.append(True)
            await original()
            raise RuntimeError("the cluster is gone")

        service._served.backend.close = close
        await service.refresh(num_shards=2)
        await service.close()
        assert closed == [True], "the shards that were replaced, before their last searches were over"

    run(tmp_path / "a", scenario)
    assert "closing the old shards failed" in caplog.text


def test_a_deletion_by_filter_stays_with_its_archive(tmp_path, monkeypatch):
    """Also if another archive, with the same keys, is served before the last step."""
    monkeypatch.setattr(service_module, "_MAX_DELETE", 2)
    keys = [f"k{number}" for number in range(5)]
    other = Archive.create(tmp_path / "b", BITS, "n" * 32)
    other.write(Archive.table(np.zeros((5, 2), np.uint8), BITS, keys, keys))

    async def scenario(service):
        steps = service.delete_matching("key LIKE 'k%'")
        assert (await anext(steps))[0] == 2
        await service.upsert([Row(key="k9", code=code(0))])
        await service.refresh(str(tmp_path / "b"), "")
        assert [size async for size, _ in steps] == [2, 1]
        assert Archive.open(tmp_path / "a").keys() == {"k9"}, "a row that came later stays"
        assert Archive.open(tmp_path / "b").keys() == set(keys) == set(await held(service))

    run(tmp_path / "a", scenario, num_rows=5)


def test_refreshes_that_outlive_their_callers_are_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(service_module, "_MAX_REFRESHING", 3)

    async def scenario(service):
        may_go_on = asyncio.Event()

        async def before_at(version):
            await may_go_on.wait()

        await asyncio.to_thread(Archive.open(tmp_path / "a").delete, ["k1"])
        service._served.backend.before_at = before_at
        refreshing = [asyncio.create_task(service.refresh()) for _ in range(3)]
        while service._num_refreshing < 3:
            await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="3 refreshes are in progress"):
            await service.refresh()
        refreshing[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await refreshing[0]
        with pytest.raises(Overloaded):
            await service.refresh()
        may_go_on.set()
        assert [now.rows for now in await asyncio.gather(*refreshing[1:])] == [3, 3]
        await service.refresh()

    run(tmp_path / "a", scenario, num_rows=4)


def test_repeated_work_ends_with_its_event_loop():
    """A coroutine that is thrown away with its loop must not go on."""
    began = asyncio.Event()

    async def work():
        began.set()
        await asyncio.Event().wait()

    loop = asyncio.new_event_loop()
    repeated = supervision.repeat("work", work, 0.0, 1.0)
    task = loop.create_task(repeated)
    loop.run_until_complete(began.wait())
    repeated.close()
    assert repeated.cr_frame is None
    # The task has lost its coroutine.
    task._log_destroy_pending = False
    loop.close()
