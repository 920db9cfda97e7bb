"""What changed between two versions of an archive: for every two versions, the same as a comparison of all rows."""

import shutil
from datetime import timedelta

import lance
import numpy as np
import pyarrow as pa
import pytest

from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.archive.changes import CannotFollow, changes_since, commit_id, num_ids, part_batches

COLUMNS = ("key", "code", "label")


class Blocks:
    """The ids of every `step`-th block of `size` ids; `are_listed`: whether they are given as ranges."""

    def __init__(self, step=1, number=0, size=4, are_listed=True):
        self.step, self.number, self.size, self.are_listed = step, number, size, are_listed

    def contains(self, ids):
        return ids // np.uint64(self.size) % np.uint64(self.step) == self.number

    def ranges(self, num_ids, max_ranges):
        if not self.are_listed:
            return None
        firsts = range(self.number * self.size, num_ids, self.step * self.size)
        return [(first, min(first + self.size, num_ids)) for first in firsts]


def rows(rng, keys, label):
    codes = rng.integers(0, 256, (len(keys), 2), np.uint8)
    return Archive.table(codes, 16, keys, keys, label=[label] * len(keys))


def as_dict(batches):
    found = {}
    for ids, table in batches:
        for id_, row in zip(ids.tolist(), table.to_pylist(), strict=True):
            assert id_ not in found
            found[id_] = (row["key"], tuple(row["code"]), row["label"])
    return found


def all_rows(archive, part):
    return as_dict(part_batches(archive, COLUMNS, part, num_ids(archive)))


def check(path, older, newer, part):
    before, after = Archive.open(path, older), Archive.open(path, newer)
    changes = changes_since(after, older, part)
    written = as_dict(changes.batches(COLUMNS))
    assert sorted(written) == sorted(changes.written.tolist())
    gone = {*changes.removed.tolist(), *written}
    kept = {id_: row for id_, row in all_rows(before, part).items() if id_ not in gone}
    assert kept | written == all_rows(after, part), (older, newer)
    return changes


def change(rng, archive, step):
    """Make one commit of a random kind."""
    known = sorted(archive.keys())
    picked = [str(key) for key in rng.permutation(known)[: rng.integers(1, 8)]]
    match rng.integers(7):
        case 0 | 1:
            new = [f"n{step}-{number}" for number in range(rng.integers(1, 9))]
            archive.commit(Archive.write_fragments(archive.path, rows(rng, new, f"append {step}")))
        case 2 | 3:
            # The keys may be those of rows that were deleted before: they get new ids.
            keys = [*picked, *{f"k{number}" for number in rng.integers(0, 40, 4)} - {*picked}]
            archive.upsert(rows(rng, keys, f"upsert {step}"))
        case 4:
            archive.delete(picked)
        case 5:
            lance.dataset(archive.path).optimize.compact_files(materialize_deletions_threshold=0.0)
        case 6:
            lance.dataset(archive.path).create_scalar_index("key", "BTREE")
    archive.refresh()


@pytest.mark.parametrize("seed", range(4))
def test_changes_between_any_two_versions_are_those_of_all_rows(seed, tmp_path):
    rng = np.random.default_rng(seed)
    archive = Archive.create(tmp_path / "archive", 16, "m" * 32)
    archive.commit(Archive.write_fragments(archive.path, rows(rng, [f"k{i}" for i in range(40)], "first")))
    first = archive.version
    for step in range(14):
        change(rng, archive, step)
    parts = [Blocks(), Blocks(3, 1), Blocks(3, 2, are_listed=False)]
    for older in range(first - 1, archive.version):
        for newer in rng.integers(older + 1, archive.version + 1, 2).tolist():
            check(archive.path, older, newer, parts[rng.integers(3)])


def test_rows_that_compaction_moved_are_not_read_again(tmp_path):
    rng = np.random.default_rng(0)
    archive = Archive.create(tmp_path / "archive", 16, "m" * 32)
    for part in range(3):
        archive.commit(Archive.write_fragments(archive.path, rows(rng, [f"k{part}-{i}" for i in range(20)], "x")))
    before = archive.version
    archive.upsert(rows(rng, ["k0-0", "new"], "y"))
    lance.dataset(archive.path).optimize.compact_files()
    archive.refresh()
    changes = check(archive.path, before, archive.version, Blocks())
    assert sorted(changes.written.tolist()) == [0, 60]
    assert not len(changes.removed)


def test_many_written_rows_are_read_without_a_list_of_ids(tmp_path, monkeypatch):
    monkeypatch.setattr("orbithash.encoders.archive.changes._MAX_IDS", 5)
    rng = np.random.default_rng(0)
    archive = Archive.create(tmp_path / "archive", 16, "m" * 32)
    for part in range(2):
        archive.commit(Archive.write_fragments(archive.path, rows(rng, [f"k{part}-{i}" for i in range(20)], "x")))
    for number in range(3):
        check(archive.path, 2, 3, Blocks(3, number))


def test_columns_that_are_replaced_in_place_are_changes(tmp_path):
    rng = np.random.default_rng(0)
    archive = Archive.create(tmp_path / "archive", 16, "m" * 32)
    archive.commit(Archive.write_fragments(archive.path, rows(rng, ["a", "b", "c"], "x")))
    before = archive.version
    dataset = lance.dataset(archive.path)
    merge = dataset.merge_insert("key").when_matched_update_all()
    merge.execute(pa.table({"key": ["b"], "label": ["y"]}))
    lance.dataset(archive.path).update({"label": "'z'"}, where="key = 'c'")
    archive.refresh()
    check(archive.path, before, archive.version, Blocks())


def test_concurrent_commits_are_changes_of_the_version_that_has_them(tmp_path):
    rng = np.random.default_rng(0)
    archive = Archive.create(tmp_path / "archive", 16, "m" * 32)
    archive.commit(Archive.write_fragments(archive.path, rows(rng, ["a", "b", "c"], "x")))
    first, second = lance.dataset(archive.path), lance.dataset(archive.path)
    fragments = Archive.write_fragments(archive.path, rows(rng, ["d"], "y"))
    for dataset, key in ((first, "b"), (second, "c")):
        merge = dataset.merge_insert("key").when_matched_update_all().when_not_matched_insert_all()
        merge.execute(rows(rng, [key], "z").replace_schema_metadata(archive.schema.metadata))
    # From a version that others have passed.
    archive.commit(fragments)
    archive.refresh()
    lance.dataset(archive.path).optimize.compact_files()
    newest = Archive.open(archive.path).version
    assert newest >= 5
    for older in range(1, newest):
        for newer in range(older + 1, newest + 1):
            check(archive.path, older, newer, Blocks())


@pytest.mark.parametrize("operation", ["restore", "overwrite"])
def test_versions_that_replace_all_rows_cannot_be_followed(operation, tmp_path):
    rng = np.random.default_rng(0)
    archive = Archive.create(tmp_path / "archive", 16, "m" * 32)
    archive.upsert(rows(rng, ["a", "b"], "x"))
    archive.delete(["a"])
    before = archive.version
    if operation == "restore":
        lance.dataset(archive.path, version=before - 1).restore()
    else:
        table = rows(rng, ["c"], "x").replace_schema_metadata(archive.schema.metadata)
        lance.write_dataset(table, archive.path, mode="overwrite", enable_stable_row_ids=True)
    archive.refresh()
    with pytest.raises(CannotFollow, match=operation.capitalize()):
        changes_since(archive, before, Blocks())
    assert len(all_rows(archive, Blocks())) == archive.num_rows


def test_a_version_that_was_removed_cannot_be_followed(tmp_path):
    rng = np.random.default_rng(0)
    archive = Archive.create(tmp_path / "archive", 16, "m" * 32)
    for step in range(3):
        archive.upsert(rows(rng, [f"k{step}"], "x"))
    lance.dataset(archive.path).cleanup_old_versions(older_than=timedelta(0), retain_versions=1)
    with pytest.raises(CannotFollow, match=r"version 2 of .* is not there any more"):
        changes_since(archive, 2, Blocks())


def test_a_commit_has_an_id_of_its_own(tmp_path):
    rng = np.random.default_rng(0)
    ids = []
    for _ in range(2):
        archive = Archive.create(tmp_path / "archive", 16, "m" * 32)
        archive.upsert(rows(rng, ["a"], "x"))
        assert commit_id(archive) == commit_id(Archive.open(archive.path, archive.version))
        ids += [commit_id(archive), commit_id(Archive.open(archive.path, 1))]
        shutil.rmtree(archive.path)
    assert len({*ids}) == 4
