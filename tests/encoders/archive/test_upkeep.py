"""Upkeep of an archive: which fragments are joined, when keys are indexed, which versions are kept."""

import datetime as dt

import numpy as np
import pytest
from test_archive import BITS, MODEL, add

from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.errors import ArchiveBusy, InputError


@pytest.fixture
def archive(tmp_path):
    return Archive.create(tmp_path / "archive", BITS, MODEL)


def fragment_rows(archive):
    """Rows of each fragment, in order."""
    import lance

    return [fragment.count_rows() for fragment in lance.dataset(archive.path).get_fragments()]


def add_many(archive, num_commits, num_rows, name):
    codes = np.zeros((num_rows, 2), np.uint8)
    for number in range(num_commits):
        keys = [f"{name} {number} {row}" for row in range(num_rows)]
        archive.commit(Archive.write_fragments(archive.path, Archive.table(codes, BITS, keys, keys)))


def test_compaction_leaves_large_fragments_alone(archive):
    add_many(archive, 1, 20_000, "large")
    add_many(archive, 15, 2, "small")
    assert archive.prepare_compaction() is None, "a few small fragments are no reason"
    add_many(archive, 1, 2, "last")
    before = archive.codes()
    compaction = archive.prepare_compaction()
    assert archive.commit_compaction(compaction)
    assert fragment_rows(archive) == [20_000, 32]
    np.testing.assert_array_equal(archive.codes()[0], before[0])
    np.testing.assert_array_equal(archive.codes()[1], before[1])
    assert archive.prepare_compaction() is None


def test_each_tier_is_joined_into_the_next(archive):
    for tier in range(16):
        add_many(archive, 16, 70, tier)
        archive.optimize()
    assert fragment_rows(archive) == [16 * 16 * 70]


def test_compaction_is_prepared_while_others_write(archive):
    add_many(archive, 16, 2, "small")
    reader = Archive.open(archive.path)
    compaction = reader.prepare_compaction()
    with archive.writing():
        add(archive, ["meanwhile"])
        archive.delete(["meanwhile"])
    with reader.writing():
        assert reader.commit_compaction(compaction)
    assert fragment_rows(archive)[0] == 32
    assert Archive.open(archive.path).num_rows == 32


def test_compaction_of_rows_that_changed_meanwhile_is_dropped(archive):
    add_many(archive, 16, 2, "small")
    compaction = archive.prepare_compaction()
    archive.delete(["small 3 1"])
    assert not archive.commit_compaction(compaction)
    assert fragment_rows(archive) == [1 if number == 3 else 2 for number in range(16)]
    assert archive.commit_compaction(archive.prepare_compaction())
    assert fragment_rows(archive) == [31]


def test_many_deleted_rows_are_a_reason_to_compact(archive):
    add_many(archive, 1, 5000, "large")
    archive.delete([f"large 0 {row}" for row in range(900)])
    assert archive.prepare_compaction() is None
    archive.delete([f"large 0 {row}" for row in range(900, 1200)])
    archive.optimize()
    import lance

    assert [one.metadata.num_deletions for one in lance.dataset(archive.path).get_fragments()] == [0]
    assert archive.num_rows == 3800


def test_keys_are_indexed_where_rows_are_many(archive, monkeypatch):
    import lance

    from orbithash.encoders.archive import upkeep

    monkeypatch.setattr(upkeep, "_MAX_UNINDEXED", 10)
    monkeypatch.setattr(upkeep, "_MAX_INDEX_PARTS", 3)
    add_many(archive, 1, 10, "a")
    assert not archive.update_index()
    add_many(archive, 1, 1, "b")
    parts = []
    for number in range(5):
        assert archive.update_index()
        assert not archive.update_index()
        parts.append(len(lance.dataset(archive.path).describe_indices()[0].segments))
        add_many(archive, 1, 11, number)
    assert parts == [1, 2, 3, 1, 2], "new parts are merged when they are many"
    assert "ScalarIndexQuery" in lance.dataset(archive.path).scanner(filter="key = '3'").explain_plan()
    assert archive.find(["a 0 3", "2 0 10", "4 0 10", "never"]).keys() == {"a 0 3", "2 0 10", "4 0 10"}


def test_clean_up_keeps_what_may_still_be_read(archive, monkeypatch):
    from orbithash.encoders.archive import upkeep

    monkeypatch.setattr(upkeep, "_MIN_REMOVED_VERSIONS", 1)
    for number in range(6):
        add(archive, [f"{number}"], number)
    early, before = Archive.open(archive.path, 2), archive.codes()
    archive.clean_up()
    assert early.num_rows == 1, "it is young"
    monkeypatch.setattr(upkeep, "_KEPT_FOR", dt.timedelta())
    archive.clean_up()
    assert early.num_rows == 1, "it is one of the last thousand"
    monkeypatch.setattr(upkeep, "_KEPT_VERSIONS", 3)
    archive.clean_up()
    with pytest.raises(InputError, match="cannot be read"):
        Archive.open(archive.path, 2)
    assert Archive.open(archive.path, archive.version - 2).num_rows == 4
    np.testing.assert_array_equal(archive.codes()[0], before[0])


def num_versions(archive):
    import lance

    return len(lance.dataset(archive.path).versions())


def test_old_versions_are_removed_by_what_is_on_disk(archive, monkeypatch):
    """Also if each process makes only a few commits, and never sees that there are many."""
    from orbithash.encoders.archive import upkeep

    monkeypatch.setattr(upkeep, "_KEPT_FOR", dt.timedelta())
    monkeypatch.setattr(upkeep, "_KEPT_VERSIONS", 3)
    monkeypatch.setattr(upkeep, "_MIN_REMOVED_VERSIONS", 4)
    counts = []
    for number in range(12):
        one = Archive.open(archive.path)
        add(one, [f"{number}"], number)
        cleaned = one.clean_up()
        counts.append(num_versions(archive))
        assert cleaned == (len(counts) > 1 and counts[-1] <= counts[-2])
    assert counts == [2, 3, 4, 5, 6, 3, 4, 5, 6, 3, 4, 5]


def test_old_versions_of_an_archive_that_changes_fast_are_removed(archive, monkeypatch):
    """The thousand newest versions can be younger than the minimum age."""
    from orbithash.encoders.archive import upkeep

    for number in range(20):
        add(archive, [f"{number}"], number)
    made_at = upkeep._made_at
    ages = {version: dt.timedelta(seconds=archive.version - version) for version in range(1, archive.version + 1)}

    def aged(dataset, version):
        return made_at(dataset, version) and dt.datetime.now() - ages[version]

    monkeypatch.setattr(upkeep, "_made_at", aged)
    monkeypatch.setattr(upkeep, "_KEPT_VERSIONS", 3)
    monkeypatch.setattr(upkeep, "_MIN_REMOVED_VERSIONS", 2)
    monkeypatch.setattr(upkeep, "_KEPT_FOR", dt.timedelta(seconds=9))
    # Only the reason is tested: the real versions are too young.
    assert archive.clean_up()
    assert num_versions(archive) == 21
    monkeypatch.setattr(upkeep, "_KEPT_FOR", dt.timedelta(seconds=90))
    assert not archive.clean_up()


def test_a_version_with_a_tag_stays(archive, monkeypatch):
    import lance

    from orbithash.encoders.archive import upkeep

    monkeypatch.setattr(upkeep, "_KEPT_FOR", dt.timedelta())
    monkeypatch.setattr(upkeep, "_KEPT_VERSIONS", 1)
    monkeypatch.setattr(upkeep, "_MIN_REMOVED_VERSIONS", 1)
    add(archive, ["a"])
    lance.dataset(archive.path).tags.create("published", 2)
    for name in "bcd":
        add(archive, [name])
    assert archive.clean_up()
    assert [version["version"] for version in lance.dataset(archive.path).versions()] == [2, 5]


def test_maintenance_takes_its_turn_with_writers(archive, monkeypatch):
    add_many(archive, 16, 2, "small")
    other = Archive.open(archive.path)
    with archive.writing(), pytest.raises(ArchiveBusy, match="is being written by another process"):
        other.maintain()
    original = Archive.prepare_compaction

    def prepare_compaction(self):
        with archive.writing():
            add(archive, ["meanwhile"])
        with pytest.raises(ArchiveBusy, match="is being maintained by another process"):
            archive.maintain()
        return original(self)

    monkeypatch.setattr(Archive, "prepare_compaction", prepare_compaction)
    other.maintain()
    assert fragment_rows(archive) == [33]
