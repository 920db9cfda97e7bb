"""A shard that follows its archive."""

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import lance
import numpy as np
import pytest
from shard_cases import ChangingArchive, Shards, check_version

from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.errors import InputError
from orbithash.encoders.vectors import VectorSpec
from orbithash.search.index.answers import Scope
from orbithash.search.protocol.errors import InvalidQuery
from orbithash.search.segments.dealing import Deal
from orbithash.search.segments.host import MAX_VERSIONS, ShardHost, VersionGone
from orbithash.search.segments.stop import Stop, Stopped
from orbithash.search.segments.versions import history, merging, source, upkeep
from orbithash.v1 import search_pb2


def new_case(tmp_path, seed=0, num_rows=200):
    case = ChangingArchive.create(tmp_path / "archive", seed)
    case.append(num_rows)
    return case


def count_whole_reads(monkeypatch):
    reads = []
    read = source.ShardSource.all_rows
    monkeypatch.setattr(source.ShardSource, "all_rows", lambda *args: reads.append(1) or read(*args))
    return reads


def test_nothing_is_held_before_a_version_is_followed(tmp_path):
    case = new_case(tmp_path)
    shards = Shards.of(case, 1, 0)
    assert not shards.hosts[0].holds(case.newest)
    with pytest.raises(VersionGone, match=f"version {case.newest} of the archive is not held"):
        shards.hosts[0].count(case.newest, "", Stop())
    assert shards.hosts[0].status().versions == ()


def test_only_the_last_versions_are_kept(tmp_path, monkeypatch):
    case = new_case(tmp_path, num_rows=20)
    first = case.newest
    shards = Shards.of(case, 1, 0)
    reads = count_whole_reads(monkeypatch)
    for number in range(MAX_VERSIONS + 2):
        shards.follow(case.newest)
        case.upsert(1, 1) if number % 2 else case.delete(1)
    newest = shards.hosts[0].status().versions[-1]
    assert shards.hosts[0].status().versions == tuple(range(newest - MAX_VERSIONS + 1, newest + 1))
    for version in (newest, newest - MAX_VERSIONS + 1):
        check_version(case, shards, version, num_searches=1)
    for call in (lambda host: host.count(first, "", Stop()), lambda host: host.follow(first)):
        with pytest.raises(VersionGone):
            call(shards.hosts[0])
    assert len(reads) == 1


def test_a_version_between_two_that_are_held_is_followed(tmp_path):
    case = new_case(tmp_path)
    first = case.newest
    case.delete(5)
    between = case.newest
    case.upsert(5, 5)
    shards = Shards.of(case, 2, 2)
    for version in (first, case.newest, between):
        shards.follow(version)
        check_version(case, shards, version)
    case.delete(3)
    shards.follow(case.newest)
    check_version(case, shards, case.newest)


def test_concurrent_callers_share_the_work(tmp_path, monkeypatch):
    case = new_case(tmp_path)
    reads = []
    is_read, may_read = threading.Event(), threading.Event()
    read = source.ShardSource.all_rows

    def slow(*args):
        reads.append(1)
        is_read.set()
        may_read.wait(60)
        return read(*args)

    monkeypatch.setattr(source.ShardSource, "all_rows", slow)
    host = Shards.of(case, 1, 0).hosts[0]
    with ThreadPoolExecutor(4) as executor:
        calls = [executor.submit(host.follow, case.newest) for _ in range(4)]
        assert is_read.wait(60)
        may_read.set()
        assert [call.result(60) for call in calls] == [len(case.versions[case.newest])] * 4
    assert len(reads) == 1


def test_searches_do_not_wait_for_a_version_that_is_being_read(tmp_path, monkeypatch):
    case = new_case(tmp_path)
    shards = Shards.of(case, 1, 0)
    held = case.newest
    shards.follow(held)
    case.upsert(5, 5)
    is_read, may_read = threading.Event(), threading.Event()
    written = source.ShardSource.written_rows

    def slow(*args):
        is_read.set()
        may_read.wait(60)
        return written(*args)

    monkeypatch.setattr(source.ShardSource, "written_rows", slow)
    with ThreadPoolExecutor(1) as executor:
        call = executor.submit(shards.follow, case.newest)
        assert is_read.wait(60)
        check_version(case, shards, held)
        may_read.set()
        call.result(60)
    check_version(case, shards, case.newest)


def test_an_error_is_that_of_all_callers_and_the_next_call_tries_again(tmp_path, monkeypatch):
    case = new_case(tmp_path)
    host = Shards.of(case, 1, 0).hosts[0]
    with monkeypatch.context() as patched:
        patched.setattr(source.ShardSource, "all_rows", lambda *args: 1 / 0)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                host.follow(case.newest)
    assert host.follow(case.newest) == len(case.versions[case.newest])


def test_changes_during_a_merge_are_part_of_the_merged_segment(tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "SMALL_ROWS", 1)
    case = new_case(tmp_path, num_rows=60)
    shards = Shards.of(case, 1, 0)
    # This thread merges.
    monkeypatch.setattr(upkeep.Upkeep, "notify", lambda self: None)
    shards.follow(case.newest)
    merge = upkeep.merge_segments
    merges = []

    def merge_and_change(*args):
        merged = merge(*args)
        if not merges:
            case.delete(10)
            shards.follow(case.newest)
            case.upsert(10, 3)
            shards.follow(case.newest)
        merges.append(merged)
        return merged

    monkeypatch.setattr(upkeep, "merge_segments", merge_and_change)
    case.append(50)
    shards.follow(case.newest)
    before = case.newest
    shards.merge_all()
    assert merges
    assert case.newest > before
    for version in (before, case.newest):
        check_version(case, shards, version)


def test_searches_beside_merges_and_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "SMALL_ROWS", 5)
    case = new_case(tmp_path, num_rows=100)
    shards = Shards.of(case, 1, 0, folder=tmp_path / "segments")
    shards.follow(case.newest)
    host, version = shards.hosts[0], case.newest
    queries = np.stack([case.code() for _ in range(3)])
    scopes = [Scope(), Scope(filter="label = 'c1'"), Scope(with_rows=True, include=("code",))]

    def ask(scope):
        answer = host.search(version, queries, 20, scope, Stop())
        return answer.distances.tolist(), answer.ids.tolist(), answer.ties.tolist(), answer.rows, answer.num_matching

    expected = list(map(ask, scopes))
    is_done = threading.Event()

    def search():
        count = 0
        while not is_done.is_set() or not count:
            assert list(map(ask, scopes)) == expected
            count += 1

    with ThreadPoolExecutor(2) as executor:
        searches = [executor.submit(search) for _ in range(2)]
        try:
            for _ in range(12):
                case.change()
                shards.follow(case.newest)
        finally:
            is_done.set()
        for each in searches:
            each.result(60)
    shards.merge_all()
    check_version(case, shards, case.newest)
    shards.close()


def test_versions_share_segments(tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "SMALL_ROWS", 1)
    case = new_case(tmp_path, num_rows=3000)
    host = Shards.of(case, 1, 0).hosts[0]
    host.follow(case.newest)
    before = host.status().num_bytes
    for _ in range(5):
        case.delete(1)
        host.follow(case.newest)
    num_rows = max(map(len, case.versions.values()))
    assert host.status().num_bytes - before <= 5 * (num_rows // 8 + 1)


def test_unused_versions_are_dropped_after_some_time(tmp_path, monkeypatch):
    case = new_case(tmp_path)
    host = Shards.of(case, 1, 0).hosts[0]
    host.follow(case.newest)
    case.delete(1)
    host.follow(case.newest)
    host._history.drop_unused()
    assert len(host.status().versions) == 2
    monkeypatch.setattr(history, "_UNUSED_S", 0.0)
    host._history.drop_unused()
    assert host.status().versions == (case.newest,)


@pytest.mark.parametrize("kind", ["cleaned up", "restored", "overwritten", "replaced"])
@pytest.mark.parametrize("has_files", [False, True])
def test_what_cannot_be_followed_is_read_as_a_whole(kind, has_files, tmp_path, monkeypatch):
    case = new_case(tmp_path)
    shards = Shards.of(case, 2, 2, folder=tmp_path / "segments" if has_files else None)
    shards.follow(case.newest)
    case.delete(3)
    shards.follow(case.newest)
    reads = count_whole_reads(monkeypatch)
    match kind:
        case "cleaned up":
            case.upsert(3, 3)
            lance.dataset(case.path).cleanup_old_versions(older_than=timedelta(0), retain_versions=1)
        case "restored":
            lance.dataset(case.path, version=2).restore()
            case._remember(Archive.open(case.path))
        case "overwritten":
            table = case._table([case._row("x")]).replace_schema_metadata(Archive.open(case.path).schema.metadata)
            lance.write_dataset(table, case.path, mode="overwrite", enable_stable_row_ids=True)
            case._remember(Archive.open(case.path))
        case "replaced":
            shutil.rmtree(case.path)
            number = case.newest
            case = ChangingArchive.create(tmp_path / "archive", 0)
            while case.newest < number:
                case.append(7)
    shards.follow(case.newest)
    check_version(case, shards, case.newest)
    assert len(reads) == 2
    case.upsert(2, 2)
    shards.follow(case.newest)
    check_version(case, shards, case.newest)
    assert len(reads) == 2
    shards.close()


def test_an_archive_of_another_model_is_not_followed(tmp_path):
    case = new_case(tmp_path)
    host = Shards.of(case, 1, 0).hosts[0]
    host.follow(case.newest)
    shutil.rmtree(case.path)
    archive = Archive.create(case.path, case.bits, "n" * 32)
    with pytest.raises(InputError, match="was replaced by an archive of another model; open it anew"):
        host.follow(archive.version)


def test_columns_that_segments_lack_are_read_from_the_archive(tmp_path):
    archive = Archive.create(tmp_path / "archive", 8, "m" * 32)
    thumbnails = [b"first", None]
    table = Archive.table(np.zeros((2, 1), np.uint8), 8, ["a", "b"], ["a", "b"], thumbnail=thumbnails)
    ids = archive.upsert(table)
    host = ShardHost(archive.path, 8, Deal(1), 0)
    host.follow(archive.version)
    for number in (0, 1):
        [hit] = host.hits(archive.version, ids[number : number + 1], ("thumbnail", "uri"), Stop())
        hit = search_pb2.Hit.FromString(hit)
        assert (hit.key, hit.uri, hit.thumbnail) == ("ab"[number], "ab"[number], thumbnails[number] or b"")
    assert host.read(archive.version, ids, ["thumbnail", "key"], Stop()).to_pydict() == {
        "thumbnail": thumbnails,
        "key": ["a", "b"],
    }


def test_many_rows_without_files_are_read_when_they_are_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "MAX_ROWS_IN_MEMORY", 10)
    case = new_case(tmp_path)
    shards = Shards.of(case, 2, 2)
    for _ in range(3):
        shards.follow(case.newest)
        check_version(case, shards, case.newest)
        case.change()


def test_invalid_filters_and_stopped_calls_raise(tmp_path):
    case = new_case(tmp_path)
    host = Shards.of(case, 1, 0).hosts[0]
    host.follow(case.newest)
    assert host.is_ready(case.newest, "")
    with pytest.raises(InvalidQuery):
        host.count(case.newest, "colour = 'x'", Stop())
    stop = Stop()
    stop.cancel()
    for call in (
        lambda: host.search(case.newest, np.zeros((1, (case.bits + 7) // 8), np.uint8), 1, Scope(), stop),
        lambda: host.hits(case.newest, np.array([0], np.uint64), (), stop),
        lambda: host.count(case.newest, "lon > 0.5", stop),
    ):
        with pytest.raises(Stopped):
            call()


@pytest.mark.parametrize("kind", ["mapped", "in memory", "read when needed"])
def test_every_combination_of_columns_is_read(kind, tmp_path, monkeypatch):
    if kind == "read when needed":
        monkeypatch.setattr(source, "MAX_ROWS_IN_MEMORY", 0)
    rng = np.random.default_rng(0)
    archive = Archive.create(tmp_path / "archive", 12, "m" * 32, VectorSpec(3, 0.5))
    for first in (0, 30):
        keys = [f"k{number}" for number in range(first, first + 30)]
        codes = np.packbits(rng.integers(0, 2, (30, 12), dtype=np.uint8), axis=1)
        vectors = [None if number % 4 == 0 else rng.integers(-9, 9, 3, np.int8).tobytes() for number in range(30)]
        archive.upsert(Archive.table(codes, 12, keys, keys, vector=vectors))
    host = ShardHost(archive.path, 12, Deal(1), 0, folder=tmp_path / "segments" if kind == "mapped" else None)
    host.follow(archive.version - 1)
    host.follow(archive.version)
    ids = rng.permutation(np.arange(60, dtype=np.uint64))[:20]
    for columns in (["code"], ["vector"], ["code", "vector"], ["vector", "key", "code"], ["stamp", "code"], ["stamp"]):
        for asked in (ids, ids[:1], ids[:0]):
            found = host.read(archive.version, asked, columns, Stop())
            assert found.column_names == columns
            assert found.to_pylist() == archive.take(asked, columns).to_pylist()
    host.close()
