"""The archive, compared with a dict, read by other processes, and with writers that are killed."""

import datetime as dt
import multiprocessing
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.errors import ArchiveBusy, InputError

BITS = 12
MODEL = "model-one"


def random_codes(num_rows, seed=0):
    codes = np.random.default_rng(seed).integers(0, 256, (num_rows, 2), dtype=np.uint8)
    codes[:, 1] &= 0xF0
    return codes


def rows(keys, seed=0, **columns):
    return Archive.table(random_codes(len(keys), seed), BITS, list(keys), [f"file:{key}" for key in keys], **columns)


def add(archive, keys, seed=0):
    archive.commit(Archive.write_fragments(archive.path, rows(keys, seed)))


@pytest.fixture
def archive(tmp_path):
    return Archive.create(tmp_path / "archive", BITS, MODEL)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# Rows


def test_a_new_archive_is_empty_and_describes_itself(archive):
    ids, codes = archive.codes()
    assert (archive.num_rows, archive.bits, archive.model_id) == (0, BITS, MODEL)
    assert (ids.dtype, ids.shape, codes.dtype, codes.shape) == (np.uint64, (0,), np.uint8, (0, 2))
    assert archive.keys() == set()
    assert archive.refused() == {}
    assert archive.find(["a"]) == {}
    assert archive.schema.metadata == {
        b"orbithash.format_version": b"3",
        b"orbithash.bits": b"12",
        b"orbithash.model_id": b"model-one",
    }


def test_columns_are_those_of_the_contract(archive):
    assert {field.name: (str(field.type), field.nullable) for field in archive.schema} == {
        "key": ("string", False),
        "code": ("fixed_size_list<item: uint8>[2]", False),
        "uri": ("string", False),
        "label": ("string", True),
        "caption": ("string", True),
        "datetime": ("timestamp[us, tz=UTC]", True),
        "lon": ("double", True),
        "lat": ("double", True),
        "footprint": ("binary", True),
        "thumbnail": ("binary", True),
        "stamp": ("string", True),
    }


def test_every_column_comes_back(archive):
    taken = dt.datetime(2015, 5, 2, 1, 31, 4, 5, tzinfo=dt.UTC)
    table = rows(
        ["a", "ü b"],
        label=["forest", None],
        caption=[None, "A lake ."],
        datetime=[taken, None],
        lon=[140.5, float("nan")],
        lat=[-36.25, None],
        footprint=[b"\x01", None],
        thumbnail=[None, b"\xff\xd8"],
        stamp=["1-2-3/4", None],
    )
    archive.commit(Archive.write_fragments(archive.path, table))
    first, second = Archive.open(archive.path).take([0, 1], archive.schema.names).to_pylist()
    codes = random_codes(2)
    assert first == {
        "key": "a",
        "code": codes[0].tolist(),
        "uri": "file:a",
        "label": "forest",
        "caption": None,
        "datetime": taken,
        "lon": 140.5,
        "lat": -36.25,
        "footprint": b"\x01",
        "thumbnail": None,
        "stamp": "1-2-3/4",
    }
    assert second["key"] == "ü b"
    assert second["lon"] is None, "NaN is no place"
    assert second["thumbnail"] == b"\xff\xd8"


def test_codes_are_ordered_by_id_after_every_kind_of_change(archive):
    """Random histories compared with a dict: the rows, their ids, and that no id ever changes."""
    rng = np.random.default_rng(5)
    expected, ids_seen = {}, {}
    changes = ["append", "optimize"]
    for step, change in enumerate([*changes, *rng.choice(changes, 24, p=[0.7, 0.3])]):
        new = [f"it's {step} {i}" for i in range(rng.integers(1, 5))]
        if change == "append":
            add(archive, new, step)
            expected |= dict(zip(new, random_codes(len(new), step).tolist(), strict=True))
        else:
            archive.optimize()
        ids, codes = archive.codes()
        assert (np.diff(ids.astype(np.int64)) > 0).all()
        keys = archive.take(ids, ["key"])["key"].to_pylist()
        assert dict(zip(keys, codes.tolist(), strict=True)) == expected
        assert archive.keys() == set(expected)
        assert archive.num_rows == len(expected)
        for key, row in zip(keys, ids.tolist(), strict=True):
            assert archive.find([key]) == {key: row}
            assert ids_seen.setdefault(key, row) == row, f"{key} changed its id in {change}"


def test_scan_among_ids(archive):
    add(archive, "abcd")
    ids, table = archive.scan(["key"], np.array([3, 1, 99], np.uint64))
    assert dict(zip(ids.tolist(), table["key"].to_pylist(), strict=True)) == {1: "b", 3: "d"}
    ids, table = archive.scan(["key", "lon"], np.empty(0, np.uint64))
    assert (len(ids), table.column_names, table.num_rows) == (0, ["key", "lon"], 0)
    assert archive.scan(["key"], np.array([2**64 - 1], np.uint64))[1].num_rows == 0


def test_the_newest_version_can_be_asked_for_while_a_change_is_made(archive):
    """A dataset of Lance panics when it is read while a change is made through it."""
    done = threading.Event()
    seen, failed = [], []

    def ask():
        while not done.is_set():
            try:
                seen.append(archive.newest_version())
            except BaseException as error:
                failed.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        for number in range(60):
            add(archive, [f"{number}"], number)
            archive.delete([f"{number}"])
    finally:
        done.set()
        asking.join()
    assert not failed
    assert seen == sorted(seen)


def test_take_keeps_order_and_repeats(archive):
    add(archive, "abc")
    assert archive.take([2, 0, 2], ["key"])["key"].to_pylist() == ["c", "a", "c"]
    assert archive.take(np.array([1], np.uint64), ["uri", "key"]).to_pylist() == [{"uri": "file:b", "key": "b"}]
    assert archive.take([], ["key", "lon"]).to_pydict() == {"key": [], "lon": []}


@pytest.mark.parametrize("row", [3, -1, 2**63, 2**64 - 1])
def test_take_refuses_an_unknown_id(archive, row):
    add(archive, "abc")
    with pytest.raises(InputError, match=f"no row with id {row} in version 2"):
        archive.take([0, row], ["key"])


def test_take_refuses_an_unknown_column(archive):
    with pytest.raises(InputError, match="no column lonn; the archive has key, code"):
        archive.take([0], ["lonn"])


@pytest.mark.parametrize("key", ["o'hare", "' OR 1=1 --", "''", '"', "\\", "\\'", "%", " ", "x;y", "日本"])
def test_no_key_escapes_from_the_filter(archive, key):
    add(archive, ["plain", key, "other"])
    assert archive.find([key]) == {key: 1}
    archive.optimize()
    assert archive.find([key]) == {key: 1}
    assert archive.find([key + "'"]) == {}


@pytest.mark.parametrize(
    ("codes", "bits", "columns", "message"),
    [
        (np.zeros((1, 2), np.int8), 12, {}, "codes must be uint8, got int8"),
        (np.zeros((1, 3), np.uint8), 12, {}, "a code of 12 bits has 2 bytes"),
        (np.ones((1, 2), np.uint8), 12, {}, "4 pad bits"),
        (np.zeros(2, np.uint8), 12, {}, "got shape"),
        (np.zeros((2, 2), np.uint8), 12, {}, "2 codes with 1 values of key"),
        (np.zeros((1, 2), np.uint8), 12, {"lon": [1.0, 2.0]}, "1 codes with 2 values of lon"),
        (np.zeros((1, 2), np.uint8), 12, {"color": ["red"]}, "no column color"),
    ],
)
def test_table_refuses_what_does_not_fit(codes, bits, columns, message):
    with pytest.raises(InputError, match=message):
        Archive.table(codes, bits, ["a"], ["b"], **columns)


@pytest.mark.parametrize("key", ["", "a\nb", "a\tb", "\x1b[2J", "a\u2028b", "x" * 4097, "\ud800"])
def test_table_refuses_invalid_keys(key):
    with pytest.raises(InputError, match="a key has"):
        Archive.table(random_codes(2), BITS, ["a", key], ["b", "c"])


@pytest.mark.parametrize(
    "key", ["Screenshot 3.05.12\u202fPM.png", "v\u00a013.05", "\u200d", "\U0001f469\u200d\U0001f680", "\ue000"]
)
def test_any_other_character_may_be_in_a_key(archive, key):
    add(archive, [key])
    assert archive.find([key]) == {key: 0}
    assert archive.delete([key]).tolist() == [0]


def test_table_refuses_rows_without_key():
    with pytest.raises(InputError, match="key is unknown for 1 rows"):
        Archive.table(random_codes(2), BITS, ["a", None], ["b", "c"])


def test_table_takes_no_rows_and_slices_of_codes():
    assert Archive.table(random_codes(0), BITS, [], []).num_rows == 0
    wide = np.random.default_rng(0).integers(0, 256, (6, 4), dtype=np.uint8)
    table = Archive.table(wide[::2, 1:3], 16, list("abc"), list("abc"))
    assert table["code"].to_pylist() == wide[::2, 1:3].tolist()


def test_codes_of_another_width_are_not_written(archive):
    wrong = Archive.table(np.zeros((1, 3), np.uint8), 24, ["a"], ["b"])
    with pytest.raises(InputError, match=r"rows of other columns .* \(12 bits\)"):
        Archive.write_fragments(archive.path, wrong)


# Versions and writers


def test_a_reader_keeps_its_version_until_it_refreshes(archive):
    add(archive, "ab")
    reader = Archive.open(archive.path)
    add(archive, "cd")
    assert (reader.version, reader.keys(), len(reader.codes()[0])) == (2, {"a", "b"}, 2)
    reader.refresh()
    assert (reader.version, reader.num_rows) == (3, 4)
    assert Archive.open(archive.path, version=2).num_rows == 2
    with pytest.raises(InputError, match="cannot be read"):
        Archive.open(archive.path, version=9)


def test_fragments_are_invisible_until_they_are_committed_together(archive):
    first = Archive.write_fragments(archive.path, rows("ab"))
    second = Archive.write_fragments(archive.path, rows("cd", 1))
    archive.refresh()
    assert (archive.num_rows, archive.version) == (0, 1)
    archive.commit(first + second)
    assert (archive.num_rows, archive.version) == (4, 2)
    np.testing.assert_array_equal(archive.codes()[1], np.concatenate([random_codes(2), random_codes(2, 1)]))


def test_committing_nothing_makes_no_version(archive):
    archive.commit([])
    archive.refresh()
    assert archive.version == 1


def write_in_a_process(path, keys, seed):
    return Archive.write_fragments(path, rows(keys, seed))


def commit_in_a_process(path, name, num_commits):
    archive = Archive.open(path)
    for number in range(num_commits):
        add(archive, [f"{name} {number} {i}" for i in range(10)], number)


def test_fragments_written_by_other_processes_are_committed(archive):
    parts = [["a", "b"], ["c"], ["d", "e", "f"]]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        written = pool.starmap(write_in_a_process, [(archive.path, keys, i) for i, keys in enumerate(parts)])
    archive.commit([fragment for fragments in written for fragment in fragments])
    for seed, keys in enumerate(parts):
        for key, code in zip(keys, random_codes(len(keys), seed).tolist(), strict=True):
            assert archive.take([archive.find([key])[key]], ["code"])["code"].to_pylist() == [code]


def test_commits_of_two_processes_both_land(archive):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=commit_in_a_process, args=(archive.path, name, 8)) for name in "xy"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    archive.refresh()
    assert archive.keys() == {f"{name} {number} {i}" for name in "xy" for number in range(8) for i in range(10)}
    assert archive.version == 1 + 16
    assert archive.codes()[0].tolist() == list(range(160))


CHILD = """
import sys
import threading
import numpy as np
from orbithash.encoders.archive.archive import Archive
archive = Archive.open(sys.argv[1])
def table(number):
    keys = [f"{number} {i}" for i in range(10)]
    return Archive.table(np.zeros((10, 2), np.uint8), 12, keys, keys)
def say(text):
    print(text, flush=True)
"""


def run_child(archive, script):
    command = [sys.executable, "-c", CHILD + script, archive.path]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_death_between_writing_and_committing_leaves_the_old_version(archive):
    add(archive, "ab")
    script = "with archive.writing():\n  Archive.write_fragments(archive.path, table(0)); say('written'); input()"
    with run_child(archive, script) as child:
        assert child.stdout.readline() == "written\n"
        with pytest.raises(InputError, match="is being written by another process"), archive.writing():
            pass
        child.kill()
    assert len(list(Path(archive.path, "data").iterdir())) == 2, "the dead writer's data file is there"
    with archive.writing():
        assert (archive.version, archive.keys()) == (2, {"a", "b"})
        add(archive, "cd")
    archive.optimize()
    assert Archive.open(archive.path).keys() == set("abcd")


@pytest.mark.parametrize("num_seen", [1, 4, 9])
def test_death_amid_commits_leaves_whole_commits(archive, num_seen):
    script = "for n in range(10**9):\n  archive.commit(Archive.write_fragments(archive.path, table(n))); say(n)"
    with run_child(archive, script) as child:
        for _ in range(num_seen):
            child.stdout.readline()
        child.kill()
    archive.refresh()
    num_commits, rest = divmod(archive.num_rows, 10)
    assert rest == 0
    assert num_commits >= num_seen
    assert archive.keys() == {f"{n} {i}" for n in range(num_commits) for i in range(10)}
    assert len(archive.codes()[0]) == archive.num_rows


def test_one_writer_at_a_time(archive):
    with archive.writing():
        with pytest.raises(InputError, match="is being written by another process"):
            Archive.open(archive.path).writing().__enter__()
        assert Archive.open(archive.path).num_rows == 0, "readers need no lock"
    with archive.writing():
        pass


def test_a_writer_can_wait_for_its_turn(archive):
    def write():
        with Archive.open(archive.path).writing(60):
            return Archive.open(archive.path).version

    with ThreadPoolExecutor(1) as pool:
        with archive.writing():
            waiting = pool.submit(write)
            with pytest.raises(ArchiveBusy), Archive.open(archive.path).writing(0.05):
                pass
            add(archive, "ab")
            assert not waiting.done()
        assert waiting.result() == archive.version


def test_the_newest_version_is_known_during_a_change(archive):
    assert archive.newest_version() == archive.version
    add(Archive.open(archive.path), "ab")
    assert archive.newest_version() == archive.version + 1


def test_a_writer_starts_from_the_newest_version(archive):
    other = Archive.open(archive.path)
    add(other, "ab")
    with archive.writing():
        assert archive.keys() == {"a", "b"}


def test_the_lock_is_given_back_after_an_error(archive):
    with pytest.raises(ZeroDivisionError), archive.writing():
        1 / 0
    with archive.writing():
        pass


def test_refused_items_are_kept_beside_the_rows(archive):
    archive.refuse([])
    archive.unrefuse(["a.tif"])
    assert archive.refused_stamps(["a.tif"]) == {}
    archive.refuse([("a.tif", "truncated"), ("b.jpg", "the file is empty")], {"a.tif": "1"})
    archive.refuse([("a.tif", "first"), ("a.tif", "no valid data")], {"a.tif": "2"})
    opened = Archive.open(archive.path)
    assert opened.refused() == {"a.tif": "no valid data", "b.jpg": "the file is empty"}
    assert opened.refused_stamps(["b.jpg", "a.tif", "c"]) == {"a.tif": "2", "b.jpg": None}
    assert opened.num_rows == 0
    assert (Path(archive.path) / "_refused.lance").is_dir()
    for number in range(20):
        archive.refuse([(f"{number}", "broken")])
    archive.optimize()
    assert len(Archive.open(archive.path).refused()) == 22
    archive.unrefuse(["a.tif", "never"])
    assert "a.tif" not in archive.refused()


def test_origins_of_rows(archive):
    archive.commit(Archive.write_fragments(archive.path, rows(["a", "b"], stamp=["1-2/3", None])))
    assert archive.origins(["b", "a", "c"]) == {"a": ("file:a", "1-2/3"), "b": ("file:b", None)}
    assert archive.origins([]) == {}


def test_an_archive_describes_itself_in_one_line(archive):
    assert len(archive) == 0
    assert archive, "an archive without rows is an archive"
    add(archive, "abc")
    assert len(archive) == 3
    assert repr(archive) == f"Archive('{archive.path}', version=2, rows=3, bits=12)"


# Errors


def test_other_models_and_lengths_are_refused(archive):
    assert Archive.open_or_create(archive.path, BITS, MODEL).version == 1
    with pytest.raises(InputError, match="Codes of another model are refused, never mixed"):
        Archive.open_or_create(archive.path, BITS, "model-two")
    with pytest.raises(InputError, match="12-bit codes of model model-one, these are 16-bit"):
        Archive.open_or_create(archive.path, 16, MODEL)


def test_open_or_create_creates(tmp_path):
    archive = Archive.open_or_create(tmp_path / "deep" / "new", 64, MODEL)
    assert (archive.bits, archive.num_rows) == (64, 0)


@pytest.mark.parametrize("bits", [7, 513, True, 8.0, "16"])
def test_create_refuses_impossible_bits(tmp_path, bits):
    with pytest.raises(InputError, match="bits is"):
        Archive.create(tmp_path / "a", bits, MODEL)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("make", [Archive.create, Archive.open_or_create])
def test_a_folder_of_other_things_is_left_untouched(tmp_path, make):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.txt").write_text("mine")
    (tmp_path / "data").mkdir()
    before = contents(tmp_path)
    with pytest.raises(InputError, match="is not an archive of codes; choose a new or an empty folder"):
        make(tmp_path, BITS, MODEL)
    assert contents(tmp_path) == before
    with pytest.raises(InputError, match="choose a new or an empty folder"):
        make(tmp_path / "photos" / "a.txt", BITS, MODEL)
    assert contents(tmp_path) == before


def test_create_refuses_an_archive(archive):
    add(archive, "ab")
    with pytest.raises(InputError, match="already holds a dataset"):
        Archive.create(archive.path, BITS, MODEL)
    assert Archive.open(archive.path).num_rows == 2


def test_create_follows_a_create_that_was_killed(tmp_path):
    (tmp_path / "a" / "_transactions").mkdir(parents=True)
    (tmp_path / "a" / "_transactions" / "0-x.txn").write_bytes(b"")
    (tmp_path / "a" / "_versions").mkdir()
    assert Archive.open_or_create(tmp_path / "a", BITS, MODEL).num_rows == 0


def test_what_is_not_an_archive_is_refused(tmp_path):
    import lance

    with pytest.raises(InputError, match="nowhere does not exist; `orbithash encode` makes one"):
        Archive.open(tmp_path / "nowhere")
    with pytest.raises(InputError, match="is not an archive of codes; `orbithash encode`"):
        Archive.open(tmp_path)
    lance.write_dataset(pa.table({"a": [1]}), tmp_path / "foreign")
    with pytest.raises(InputError, match="a Lance dataset, but not an archive of codes"):
        Archive.open(tmp_path / "foreign")
    with pytest.raises(InputError, match="a Lance dataset, but not an archive of codes"):
        Archive.open_or_create(tmp_path / "foreign", BITS, MODEL)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("format_version", "1", "format version 1; this orbithash reads 3: encode the images again"),
        ("bits", "24", "is damaged: its columns are not those of an archive of 24-bit codes"),
        ("bits", "many", "is damaged"),
    ],
)
def test_other_formats_are_refused(tmp_path, archive, name, value, message):
    import lance

    metadata = {key.decode(): text.decode() for key, text in archive.schema.metadata.items()}
    schema = archive.schema.with_metadata({**metadata, f"orbithash.{name}": value})
    lance.write_dataset(schema.empty_table(), tmp_path / "other", schema=schema)
    with pytest.raises(InputError, match=message):
        Archive.open(tmp_path / "other")


@pytest.mark.parametrize("length", [0, 1, 20, 0.5, -1])
def test_a_truncated_manifest_is_refused_in_one_line(archive, length):
    add(archive, "ab")
    newest = min(Path(archive.path, "_versions").glob("*.manifest"))
    data = newest.read_bytes()
    newest.write_bytes(data[: int(len(data) * length) if isinstance(length, float) else length])
    with pytest.raises(InputError, match="cannot be read, it may be damaged") as error:
        Archive.open(archive.path)
    assert "\n" not in str(error.value)
    assert ".rs:" not in str(error.value), "no places in Lance's source code"
    with pytest.raises(InputError, match="cannot be read"):
        Archive.open_or_create(archive.path, BITS, MODEL)


def test_a_missing_data_file_is_an_error_when_it_is_read(archive):
    add(archive, "ab")
    shutil.rmtree(Path(archive.path, "data"))
    with pytest.raises(InputError, match="cannot be read, it may be damaged"):
        Archive.open(archive.path).codes()


def test_refresh_notices_another_models_archive(archive):
    shutil.rmtree(archive.path)
    Archive.create(archive.path, BITS, "model-two")
    with pytest.raises(InputError, match="replaced by an archive of another model"):
        archive.refresh()


@pytest.mark.parametrize("name", ["a b", "a#b", "a%20b", "a?b", "ü", "a:b", "it's"])
def test_any_folder_name_will_do(tmp_path, name):
    archive = Archive.create(tmp_path / name, BITS, MODEL)
    add(archive, "a")
    archive.refuse([("b", "c")])
    assert (tmp_path / name).is_dir()
    assert (Archive.open(tmp_path / name).num_rows, archive.refused()) == (1, {"b": "c"})


def test_uris_work(tmp_path):
    """Lance's object store over local files is used like a bucket."""
    uri = f"file-object-store://{tmp_path}/bucket"
    archive = Archive.open_or_create(uri, BITS, MODEL)
    add(archive, "ab")
    archive.refuse([("x", "y")])
    with archive.writing():
        add(archive, "c")
    again = Archive.open_or_create(uri + "/", BITS, MODEL)
    assert (again.path, again.num_rows, again.refused()) == (uri, 3, {"x": "y"})
    assert Archive.open(f"file://{tmp_path}/bucket").path == str(tmp_path / "bucket")
    with pytest.raises(InputError, match="nothing"):
        Archive.open(f"file-object-store://{tmp_path}/nothing")
    with pytest.raises(InputError, match="already holds a dataset"):
        Archive.create(uri, BITS, MODEL)
