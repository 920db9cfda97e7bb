import asyncio
import logging
import tempfile
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest
from search_parts import (
    Case,
    MemoryArchive,
    MemoryShard,
    StubEncoder,
    StubShard,
    hits_of,
    local_engine,
    memory_shards,
    oracle,
    random_case,
    random_codes,
    small_case,
    snapshot_of,
)

from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.errors import ImageError
from orbithash.search.engine.engine import Engine
from orbithash.search.engine.snapshot import Snapshot
from orbithash.search.protocol.errors import DeadlineExceeded, InvalidQuery, KeyNotFound, Overloaded, Unavailable
from orbithash.search.protocol.queries import MAX_IMAGE_BYTES, MAX_K, Coverage, Query
from orbithash.search.segments.dealing import Deal


async def nothing():
    pass


async def fails():
    raise RuntimeError("the shard's secret")


async def never():
    await asyncio.Event().wait()


def stub_engine(case, *befores, **options):
    """Return an engine over one stub shard per function in `befores`, and the stubs."""
    shards = memory_shards(case, len(befores))
    stubs = [StubShard(shard, before) for shard, before in zip(shards, befores, strict=True)]
    return Engine(snapshot_of(case, stubs), **options), stubs


def search(engine, timeout_s=30.0, **query):
    return asyncio.run(engine.search(Query(**query), timeout_s))


@pytest.mark.parametrize("seed", range(4000, 4100))
def test_equals_the_oracle(seed):
    case = random_case(seed)

    async def scenario():
        engine = local_engine(case)
        wanted = [(query, k) for k in case.ks for query in case.queries]
        # All at once, so that queries of different k share batches.
        answers = await asyncio.gather(*(engine.search(Query(code=query.tobytes(), k=k), 60.0) for query, k in wanted))
        for (query, k), answer in zip(wanted, answers, strict=True):
            assert hits_of(answer) == oracle(case.ids, case.codes, query, k)
            assert answer.coverage == Coverage(len(case.ids), len(case.ids), case.num_shards, case.num_shards)

    asyncio.run(scenario())


def test_hits_carry_what_the_archive_knows():
    case = small_case()
    engine = local_engine(case)
    answer = search(engine, code=case.queries[0].tobytes(), k=30)
    archive = MemoryArchive(case.ids, case.codes, case.bits)
    for hit in answer.hits:
        row = archive.row(hit.id)
        for name in ("key", "label", "lon", "lat", "datetime"):
            assert getattr(hit, name) == row[name]
    assert {hit.label is None for hit in answer.hits} == {True, False}
    assert (answer.model_id, answer.archive_version) == ("model-of-the-test", 7)
    assert answer.took_ms > 0


def test_a_key_stands_for_its_code():
    case = small_case()
    answer = search(local_engine(case), key="place/7.tif", k=6)
    assert hits_of(answer) == oracle(case.ids, case.codes, case.codes[7], 6)


def test_an_image_is_encoded():
    case = small_case()

    async def encode(images):
        assert images == [b"an image file"]
        return case.codes[9:10]

    answer = search(local_engine(case, encode), image=b"an image file", k=4)
    assert hits_of(answer) == oracle(case.ids, case.codes, case.codes[9], 4)


@pytest.mark.parametrize(("k", "include"), [(7, ("uri", "code")), (300, ("caption",)), (300, ()), (9, ("thumbnail",))])
def test_rows_are_the_same_whether_they_come_with_the_search_or_after_it(k, include):
    case = small_case(num_rows=400, num_shards=3)
    answer = search(
        stub_engine(case, nothing, nothing, nothing)[0], code=case.queries[0].tobytes(), k=k, include=include
    )
    assert hits_of(answer) == oracle(case.ids, case.codes, case.queries[0], k)
    archive = MemoryArchive(case.ids, case.codes, case.bits)
    for hit in answer.hits:
        row = archive.row(hit.id)
        assert (hit.key, hit.label, hit.lon, hit.datetime) == (row["key"], row["label"], row["lon"], row["datetime"])
        values = {name: bytes(row[name]) if name == "code" else row[name] for name in include}
        assert hit.extra == {name: value for name, value in values.items() if value is not None}


@pytest.mark.parametrize("include", [(), ("thumbnail",)])
def test_a_shard_that_dies_before_its_rows_are_read_makes_the_answer_unavailable(include):
    case = small_case(num_rows=400)
    num_calls = 0

    async def dies():
        nonlocal num_calls
        num_calls += 1
        if num_calls > 1:
            raise RuntimeError("the shard's secret")

    engine, _ = stub_engine(case, nothing, dies)
    with pytest.raises(Unavailable, match="holds some of the rows") as caught:
        search(engine, code=case.queries[0].tobytes(), k=300, include=include)
    assert "secret" not in str(caught.value)
    assert num_calls > 1


@pytest.mark.parametrize(("num_failing", "min_coverage"), [(1, 0.0), (1, 1.0), (2, 0.0)])
def test_a_search_whose_version_is_gone_is_repeated_on_the_next_one(num_failing, min_coverage):
    case = small_case(num_rows=60)
    newer = Engine(snapshot_of(case, memory_shards(case))).snapshot

    async def gone():
        engine.swap(newer)
        raise Unavailable("the shard no longer holds this version")

    engine, stubs = stub_engine(case, *[gone] * num_failing, *[nothing] * (2 - num_failing))
    answer = search(engine, code=case.queries[0].tobytes(), k=8, min_coverage=min_coverage)
    assert hits_of(answer) == oracle(case.ids, case.codes, case.queries[0], 8)
    assert answer.coverage == Coverage(60, 60, 2, 2)
    assert [len(stub.calls) for stub in stubs] == [1, 1]


@pytest.mark.parametrize("refusal", [InvalidQuery(("filter", "no column x")), Overloaded("40 filters wait", 1.0)])
def test_what_a_shard_refuses_is_the_answer_and_no_failure(refusal):
    async def refuses():
        raise refusal

    engine, _ = stub_engine(small_case(), nothing, refuses)
    with pytest.raises(type(refusal)) as caught:
        search(engine, code=b"ab", filter="x = 1")
    assert str(caught.value) == str(refusal)


def test_a_branch_reports_what_it_searched_of_its_shards():
    case = small_case(num_rows=90, num_shards=3)
    shards = memory_shards(case)
    query = case.queries[0]

    class Branch:
        """Two shards, of which the second does not answer."""

        num_rows = 60
        num_replicas = num_healthy = 1

        async def search(self, *args):
            return replace(await shards[0].search(*args), num_rows=30, num_shards=1, num_matching=11)

    class Other:
        num_rows = 30

        async def search(self, *args):
            return replace(await shards[2].search(*args), num_matching=4)

    archive = MemoryArchive(case.ids, case.codes, case.bits)
    engine = Engine(Snapshot.of(archive, shards, Deal(3), StubEncoder(), branches=[Branch(), Other()]))
    answer = search(engine, code=query.tobytes(), k=8)
    is_searched = case.ids % 3 != 1
    assert hits_of(answer) == oracle(case.ids[is_searched], case.codes[is_searched], query, 8)
    assert answer.coverage == Coverage(60, 90, 2, 3)
    assert answer.matching_rows is None
    # Rows that are read after the search come from the shards themselves.
    many = search(engine, code=query.tobytes(), k=300)
    assert hits_of(many) == oracle(case.ids[is_searched], case.codes[is_searched], query, 300)


class QuickShard(MemoryShard):
    """A shard that answers at once if the test says so."""

    is_quick = has_rows_at_hand = True

    def __init__(self, *args):
        super().__init__(*args)
        self.calls = []

    def search_now(self, queries, k, scope):
        self.calls.append((len(queries), k))
        if not self.is_quick:
            return None
        # It never waits.
        try:
            self.search(queries, k, scope, 1.0).send(None)
        except StopIteration as end:
            return end.value

    def hits_now(self, ids, include):
        return self._hits(ids.tolist(), include) if self.has_rows_at_hand else None


def quick_engine(case):
    owners = Deal(case.num_shards).owner(case.ids)
    archive = MemoryArchive(case.ids, case.codes, case.bits)
    shards = [QuickShard(archive, case.ids[owners == n], case.codes[owners == n]) for n in range(case.num_shards)]
    return Engine(Snapshot.of(archive, shards, Deal(case.num_shards), StubEncoder())), shards


@pytest.mark.parametrize("has_rows_at_hand", [True, False])
@pytest.mark.parametrize("is_quick", [True, False])
def test_short_searches_of_one_call_share_batches(is_quick, has_rows_at_hand):
    case = small_case(num_rows=100, num_shards=2)
    engine, shards = quick_engine(case)
    for shard in shards:
        shard.is_quick, shard.has_rows_at_hand = is_quick, has_rows_at_hand
    sent = [Query(code=code.tobytes(), k=k) for code in case.queries for k in (8, 12, 60)]
    others = [Query(code=b"abc"), Query(key="place/7.tif", k=3), Query(code=case.codes[7].tobytes(), k=300), Query(k=0)]
    answers = asyncio.run(engine.search_many([*sent, *others], 30.0))
    for query, answer in zip(sent, answers, strict=False):
        assert hits_of(answer) == oracle(case.ids, case.codes, np.frombuffer(query.code, np.uint8), query.k)
    # k of similar size only; the other shard is not asked for nothing.
    assert shards[0].calls == [(6, 12), (3, 60)]
    assert shards[1].calls == (shards[0].calls if is_quick else [])
    refused, by_key, many, invalid = answers[len(sent) :]
    assert (type(refused), type(invalid)) == (InvalidQuery, InvalidQuery)
    assert hits_of(by_key) == oracle(case.ids, case.codes, case.codes[7], 3)
    assert hits_of(many) == oracle(case.ids, case.codes, case.codes[7], 300)


def test_each_query_of_a_call_has_its_own_error():
    engine, _ = quick_engine(small_case())
    late = asyncio.run(engine.search_many([Query(code=b"ab"), Query(code=b"ab")], 0.0))
    assert [type(error) for error in late] == [DeadlineExceeded, DeadlineExceeded]
    engine, _ = stub_engine(small_case(), nothing, fails)
    code = b"ab"
    partial, refused = asyncio.run(engine.search_many([Query(code=code), Query(code=code, min_coverage=0.9)], 30.0))
    assert partial.coverage.fraction == 0.5
    assert type(refused) is Unavailable


@pytest.mark.parametrize(
    ("query", "fields"),
    [
        ({}, ["query"]),
        ({"code": b"ab", "key": "x"}, ["query"]),
        ({"code": b"ab", "k": 0}, ["k"]),
        ({"code": b"ab", "k": MAX_K + 1}, ["k"]),
        ({"code": b"ab", "k": True}, ["k"]),
        ({"image": b""}, ["image"]),
        ({"image": bytes(MAX_IMAGE_BYTES + 1)}, ["image"]),
        ({"key": "x" * 5000, "k": -1}, ["key", "k"]),
        ({"key": ""}, ["key"]),
        ({"code": b"abc"}, ["code"]),
        ({"code": b""}, ["code"]),
    ],
)
def test_wrong_queries_are_refused_with_all_that_is_wrong(query, fields):
    with pytest.raises(InvalidQuery) as caught:
        search(local_engine(small_case()), **query)
    assert [field for field, _ in caught.value.violations] == fields
    assert "\n" not in str(caught.value)


def test_set_pad_bits_are_refused():
    case = small_case(bits=12)
    with pytest.raises(InvalidQuery, match="pad bits"):
        search(local_engine(case), code=b"\x00\x01")


def test_an_invalid_image_is_the_users_fault_and_other_failures_are_not():
    async def refuse(images):
        raise ImageError("not an image: PDF")

    async def crash(images):
        raise RuntimeError("out of memory")

    with pytest.raises(InvalidQuery, match="image: not an image: PDF"):
        search(local_engine(small_case(), refuse), image=b"%PDF")
    with pytest.raises(RuntimeError, match="out of memory"):
        search(local_engine(small_case(), crash), image=b"%PDF")


def test_unknown_key():
    with pytest.raises(KeyNotFound, match="nowhere"):
        search(local_engine(small_case()), key="nowhere")


def test_a_failing_shard_makes_the_answer_partial(caplog):
    case = small_case()
    engine, _ = stub_engine(case, nothing, fails, nothing)
    query = case.queries[0]
    answer = search(engine, code=query.tobytes(), k=8)
    held = case.ids % 3 != 1
    assert hits_of(answer) == oracle(case.ids[held], case.codes[held], query, 8)
    assert answer.coverage == Coverage(27, 40, 2, 3)
    assert answer.coverage.fraction == 27 / 40
    assert "shard 1 of 3 did not answer" in caplog.text
    assert "the shard's secret" in caplog.text


def test_a_silent_shard_makes_the_answer_partial_in_the_time_shards_have():
    case = small_case()
    engine, stubs = stub_engine(case, nothing, never, shard_timeout_s=0.05)
    answer = search(engine, code=case.queries[0].tobytes(), k=8)
    assert answer.coverage == Coverage(20, 40, 1, 2)
    assert [call[2] for stub in stubs for call in stub.calls] == [0.05, 0.05]


def test_all_shards_failing_is_unavailable(caplog):
    caplog.set_level(logging.CRITICAL)
    engine, _ = stub_engine(small_case(), fails, fails)
    with pytest.raises(Unavailable, match="none of 2 shards") as caught:
        search(engine, code=b"ab")
    assert "secret" not in str(caught.value)


def test_one_silent_and_one_failing_is_unavailable():
    engine, _ = stub_engine(small_case(), fails, never, shard_timeout_s=0.05)
    with pytest.raises(Unavailable):
        search(engine, code=b"ab")


def test_all_shards_silent_is_a_passed_deadline():
    engine, _ = stub_engine(small_case(), never, never)
    with pytest.raises(DeadlineExceeded, match="within"):
        search(engine, timeout_s=0.1, code=b"ab")


def test_shards_get_the_remaining_time_less_what_the_rest_needs():
    engine, (stub,) = stub_engine(small_case(), nothing, shard_timeout_s=100.0)
    search(engine, timeout_s=20.0, code=b"ab")
    assert 10 < stub.calls[0][2] <= 18


def test_a_slow_encoder_is_a_passed_deadline():
    async def encode(images):
        await never()

    with pytest.raises(DeadlineExceeded, match=r"no answer within 0\.05 s"):
        search(local_engine(small_case(), encode), timeout_s=0.05, image=b"x")


def test_a_time_out_inside_the_encoder_is_not_taken_for_the_deadline():
    async def encode(images):
        raise TimeoutError("the encoder's own")

    with pytest.raises(TimeoutError, match="the encoder's own"):
        search(local_engine(small_case(), encode), image=b"x")


def test_a_passed_deadline_starts_nothing():
    engine = local_engine(small_case())
    with pytest.raises(DeadlineExceeded, match="before"):
        search(engine, timeout_s=0.0, image=b"no_images would fail at it")


def test_an_impatient_query_leaves_and_the_others_of_its_batch_are_answered():
    async def scenario():
        case = small_case()
        gate, arrived = asyncio.Event(), asyncio.Event()

        async def hold():
            arrived.set()
            await gate.wait()

        engine, (stub,) = stub_engine(case, hold, max_fan_outs=1, shard_timeout_s=60.0)
        code = case.queries[0].tobytes()
        first = asyncio.create_task(engine.search(Query(code=code, k=3), 60.0))
        await arrived.wait()
        impatient = asyncio.create_task(engine.search(Query(code=code, k=3), 0.05))
        patient = asyncio.create_task(engine.search(Query(code=code, k=3), 60.0))
        with pytest.raises(DeadlineExceeded):
            await impatient
        gate.set()
        assert hits_of(await first) == hits_of(await patient)
        assert [call[0] for call in stub.calls] == [1, 1]

    asyncio.run(scenario())


def test_a_full_queue_refuses():
    async def scenario():
        gate, arrived = asyncio.Event(), asyncio.Event()

        async def hold():
            arrived.set()
            await gate.wait()

        engine, _ = stub_engine(small_case(), hold, max_fan_outs=1, max_waiting=0)
        first = asyncio.create_task(engine.search(Query(code=b"ab"), 30.0))
        await arrived.wait()
        with pytest.raises(Overloaded):
            await engine.search(Query(code=b"ab"), 30.0)
        gate.set()
        assert len((await first).hits) == 10

    asyncio.run(scenario())


def test_an_empty_archive_answers_with_nothing():
    case = small_case(num_rows=0)
    answer = search(local_engine(case), code=b"ab", k=3)
    assert hits_of(answer) == ([], 0)
    assert answer.coverage == Coverage(0, 0, 2, 2)
    assert answer.coverage.fraction == 1.0


def test_shards_of_another_version_are_refused():
    case = small_case()
    fewer = Case(case.bits, case.ids[1:], case.codes[1:], case.queries, [], 1)
    with pytest.raises(AssertionError, match="another version"):
        snapshot_of(case, memory_shards(fewer))


def test_over_an_archive_on_disk():
    bits, num_rows = 20, 50
    codes = random_codes(np.random.default_rng(8), num_rows, bits)
    keys = [f"harbor/it's {i}.tif" for i in range(num_rows)]
    when = datetime(2021, 6, 5, 4, 3, 2, 1, tzinfo=UTC)
    with tempfile.TemporaryDirectory() as folder:
        archive = Archive.create(folder, bits, "model")
        table = Archive.table(codes, bits, keys, keys, label=["harbor"] * num_rows, lon=[1.5] + [None] * 49)
        table = table.set_column(5, table.schema.field("datetime"), [[when] + [None] * 49])
        archive.commit(Archive.write_fragments(folder, table))
        ids, stored = archive.codes()
        np.testing.assert_array_equal(stored, codes)
        shards = memory_shards(Case(bits, ids, stored, codes[:1], [], 3), archive=archive)
        answer = search(Engine(Snapshot.of(archive, shards, Deal(3), StubEncoder())), key=keys[0], k=num_rows)
    assert hits_of(answer) == oracle(ids, codes, codes[0], num_rows)
    assert (answer.hits[0].key, answer.hits[0].label, answer.hits[0].lon) == (keys[0], "harbor", 1.5)
    assert (answer.hits[0].datetime, answer.hits[1].datetime, answer.hits[1].lon) == (when, None, None)
    assert (answer.model_id, answer.archive_version) == ("model", archive.version)
