"""Files of segments: written whole or not at all, equal for equal rows, and refused when anything in them is wrong."""

import json
import os
import resource
import stat
import struct
import subprocess
import sys
import textwrap
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from segment_parts import batches_of, codes_in, random_ids, random_table

from orbithash.encoders.archive.tables import make_table
from orbithash.encoders.errors import InputError
from orbithash.search.segments import layout
from orbithash.search.segments.boxes import _bound_simple
from orbithash.search.segments.chunks import COLUMNS
from orbithash.search.segments.files import (
    DamagedSegment,
    build_segment,
    merge_segments,
    open_segment,
    remove_segments,
    warm_up,
    write_segment,
)
from orbithash.search.segments.hits import _write_messages

BITS = 20


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def write_random(folder, rng, num_rows=100):
    ids, table = random_ids(rng, num_rows), random_table(rng, num_rows, BITS, 5)
    return write_segment(folder, batches_of(rng, ids, table), BITS)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def contents(folder):
    return {name: (folder / name).read_bytes() for name in names_in(folder)}


def assert_equal(segment, ids, table):
    """The segment has exactly these rows."""
    order = np.argsort(ids)
    rows = np.arange(len(ids))
    np.testing.assert_array_equal(segment.ids_of(rows), ids[order])
    np.testing.assert_array_equal(segment.codes_of(rows), codes_in(table, segment.bits)[order])
    names = [name for name in COLUMNS if name in table.column_names]
    expected = table.select(names).take(pa.array(order))
    assert segment.columns.take(rows, names).to_pydict() == expected.to_pydict()
    answer = segment.search(codes_in(table, segment.bits)[:3], len(ids))
    assert np.sort(answer.ids[:1], axis=1).tolist() == [ids[order].tolist()] * min(1, len(ids))


@pytest.mark.parametrize("seed", range(8))
def test_written_opened_and_merged(tmp_path, small_chunks, seed):
    """The files depend on the rows alone: not on batches, on their order, or on the segments that rows were in."""
    rng = np.random.default_rng(seed)
    bits, num_rows = int(rng.choice([8, 64, 100, 512])), int(rng.choice([1, 16, 17, 100]))
    ids, table = random_ids(rng, num_rows), random_table(rng, num_rows, bits, rng.choice([0, 5]))
    written = write_segment(tmp_path / "a", batches_of(rng, ids, table), bits)
    assert_equal(written, ids, table)
    assert written.is_mapped
    assert_equal(open_segment(tmp_path / "a", written.name, bits), ids, table)
    order = np.argsort(ids)
    in_order = write_segment(tmp_path / "b", batches_of(rng, ids[order], table.take(pa.array(order))), bits)
    # Each row lives in one of three parts, which share ids, and is dead in some others.
    home = rng.integers(0, 3, num_rows)
    parts = []
    for number in range(3):
        is_here = (home == number) | (rng.random(num_rows) < 0.3)
        rows = np.flatnonzero(is_here)
        dead = random_table(rng, num_rows, bits, 5)
        dead = dead.select([name for name in dead.column_names if name in table.column_names])
        mixed = pa.concat_tables(
            [table.slice(0, 0), *((table if home[row] == number else dead).slice(row, 1) for row in rows)],
            promote_options="permissive",
        )
        part = batches_of(rng, ids[rows], mixed)
        segment = write_segment(tmp_path / "parts", part, bits) if number else build_segment(part, bits)
        lives = home[rows[np.argsort(ids[rows])]] == number
        parts.append((segment, np.packbits(lives, bitorder="little")))
    merged = merge_segments(tmp_path / "c", parts, bits)
    assert_equal(merged, ids, table)
    assert {written.name, in_order.name, merged.name} == {written.name}
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")
    in_memory = merge_segments(None, [*parts[:2], (parts[2][0], parts[2][1])], bits)
    assert_equal(in_memory, ids, table)
    assert not in_memory.is_mapped
    again = merge_segments(tmp_path / "d", [(in_memory, None)], bits)
    assert again.name == written.name

    def read(names, among=None):
        rows = np.arange(num_rows) if among is None else np.flatnonzero(np.isin(ids, among))
        return ids[rows], table.select(list(names)).take(pa.array(rows))

    assert_equal(merge_segments(None, parts, bits, read=read), ids, table)


def test_a_segment_of_other_rows_has_another_name(tmp_path, rng):
    ids, table = np.arange(50, dtype=np.uint64), random_table(rng, 50, BITS)
    names = {write_segment(tmp_path / "s", [(ids, table)], BITS).name}
    for column in ("key", "label", "lon", "footprint"):
        place = table.column_names.index(column)
        values = table[column].to_pylist()
        values[7] = None if values[7] is not None else values[8]
        names.add(
            write_segment(tmp_path / "s", [(ids, table.set_column(place, table.field(place), [values]))], BITS).name
        )
    names.add(write_segment(tmp_path / "s", [(ids + np.uint64(1), table)], BITS).name)
    assert len(names) >= 5


def test_what_lies_under_a_null_does_not_matter(tmp_path):
    names, lon, key = [f"{row}" for row in range(40)], np.arange(40.0), np.array([row % 3 > 0 for row in range(40)])
    tables = []
    for hidden in (5.0, 7.0):
        lons = pa.array(np.where(key, lon, hidden)).view(pa.float64())
        validity = pa.py_buffer(np.packbits(key, bitorder="little").tobytes())
        lons = pa.Array.from_buffers(pa.float64(), 40, [validity, lons.buffers()[1]])
        text = pa.array([name if is_known else f"hidden {hidden}" for name, is_known in zip(names, key, strict=True)])
        labels = pa.Array.from_buffers(pa.string(), 40, [validity, *text.buffers()[1:]])
        table = make_table(np.zeros((40, 2), np.uint8), 16, names, names)
        for name, array in (("lon", lons), ("label", labels), ("caption", labels)):
            table = table.set_column(table.column_names.index(name), name, array)
        assert table["caption"].to_pylist() == [name if known else None for name, known in zip(names, key, strict=True)]
        tables.append(table)
    ids = np.arange(40, dtype=np.uint64)
    assert len({write_segment(tmp_path, [(ids, table)], 16).name for table in tables}) == 1


def test_only_their_owner_may_read_the_files(tmp_path, rng):
    write_random(tmp_path / "new" / "s", rng)
    assert stat.S_IMODE((tmp_path / "new" / "s").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "new" / "s").iterdir()} == {0o600}


def test_batches_that_are_refused_leave_nothing(tmp_path, rng):
    folder = tmp_path / "s"
    table = random_table(rng, 4, BITS)

    def stopped():
        yield np.arange(4, dtype=np.uint64), table
        raise ConnectionError("the archive is gone")

    ids = np.array([1, 2, 3, 1], np.uint64)
    for batches, bits, error in [
        ([(ids, table)], BITS, InputError),
        ([(ids[:3], table)], BITS, InputError),
        ([(ids, random_table(rng, 4, 32))], BITS, InputError),
        (stopped(), BITS, ConnectionError),
    ]:
        with pytest.raises(error):
            write_segment(folder, batches, bits)
        assert names_in(folder) == []


def test_every_truncation_is_found(tmp_path, rng):
    segment = write_random(tmp_path, rng)
    for name, content in contents(tmp_path).items():
        for length in range(0, len(content), max(1, len(content) // 50)):
            (tmp_path / name).write_bytes(content[:length])
            with pytest.raises(DamagedSegment) as error:
                open_segment(tmp_path, segment.name, BITS)
            assert "\n" not in str(error.value)
        (tmp_path / name).write_bytes(content + b"\0")
        with pytest.raises(DamagedSegment):
            open_segment(tmp_path, segment.name, BITS)
        (tmp_path / name).write_bytes(content)
    open_segment(tmp_path, segment.name, BITS)


def test_every_flipped_bit_is_found(tmp_path, rng):
    segment = write_random(tmp_path, rng)
    for name, content in contents(tmp_path).items():
        # All of the header, and places anywhere.
        places = [*range(0, 600, 9), *rng.integers(0, len(content), 120).tolist(), len(content) - 1]
        for place in places:
            damaged = bytearray(content)
            damaged[place] ^= 1 << int(rng.integers(8))
            (tmp_path / name).write_bytes(damaged)
            with pytest.raises(DamagedSegment):
                open_segment(tmp_path, segment.name, BITS)
        (tmp_path / name).write_bytes(content)
    open_segment(tmp_path, segment.name, BITS)


def test_files_that_do_not_belong_together(tmp_path, rng):
    first, second = write_random(tmp_path, rng), write_random(tmp_path, rng)
    codes, columns = tmp_path / f"{first.name}.codes", tmp_path / f"{first.name}.columns"
    whole = contents(tmp_path)

    def assert_damaged(words, name=first.name, bits=BITS):
        with pytest.raises(DamagedSegment, match=words):
            open_segment(tmp_path, name, bits)

    assert_damaged("holds codes of 20 bits, not of 21", bits=21)
    assert_damaged("No such file", name="f" * 32)
    columns.write_bytes(whole[f"{second.name}.columns"])
    assert_damaged("bytes instead of|checksum")
    columns.unlink()
    assert_damaged("columns cannot be opened: No such file")
    columns.write_bytes(whole[columns.name])
    codes.unlink()
    assert_damaged("codes cannot be opened: No such file")
    codes.write_bytes(whole[f"{second.name}.codes"])
    assert_damaged(f"holds the segment {second.name}")
    codes.write_bytes(b"not a segment, but long enough for a header")
    assert_damaged("not a file of a segment")
    codes.unlink()
    codes.mkdir()
    assert_damaged("not a file")
    codes.rmdir()
    codes.symlink_to(tmp_path / f"{second.name}.codes")
    assert_damaged("cannot be opened")
    codes.unlink()
    codes.write_bytes(whole[codes.name])
    for mode in (0o620, 0o602):
        columns.chmod(mode)
        assert_damaged("can be written by other users")
    columns.chmod(0o600)
    assert open_segment(tmp_path, first.name, BITS).num_rows == first.num_rows


def test_another_format_version(tmp_path, rng, monkeypatch):
    monkeypatch.setattr(layout, "FORMAT_VERSION", 999)
    segment = write_random(tmp_path, rng)
    assert open_segment(tmp_path, segment.name, BITS).num_rows == 100
    monkeypatch.undo()
    with pytest.raises(DamagedSegment, match="format version 999; this orbithash reads"):
        open_segment(tmp_path, segment.name, BITS)


def test_a_header_of_any_length(tmp_path, rng):
    """A length beyond the file, and one that only a wrong header claims."""
    segment = write_random(tmp_path, rng)
    path = tmp_path / f"{segment.name}.codes"
    content = path.read_bytes()
    for length in (0, 1, 2**20, 2**32 - 1):
        path.write_bytes(content[:12] + struct.pack("<I", length) + content[16:])
        with pytest.raises(DamagedSegment):
            open_segment(tmp_path, segment.name, BITS)


def test_a_folder_that_others_can_write_is_refused(tmp_path, rng):
    (tmp_path / "s").mkdir()
    (tmp_path / "s").chmod(0o770)
    with pytest.raises(InputError, match=r"can be written by other users; .* chmod go-w"):
        write_random(tmp_path / "s", rng)
    assert names_in(tmp_path / "s") == []


def test_an_index_of_another_name_is_built_in_memory(tmp_path, rng):
    segment = write_random(tmp_path, rng)
    other = open_segment(tmp_path, segment.name, BITS, "flat")
    queries = segment.codes_of(np.arange(5))
    np.testing.assert_array_equal(other.search(queries, 7).ids, segment.search(queries, 7).ids)


@contextmanager
def largest_file(num_bytes):
    """Let this process write files of at most this size: a full disk. Python ignores the signal."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk(tmp_path, rng):
    batches = batches_of(rng, random_ids(rng, 300), random_table(rng, 300, BITS))
    size = max(map(len, contents_of(tmp_path / "whole", batches).values()))
    (tmp_path / "s").mkdir()
    (tmp_path / "s").chmod(0o700)
    for limit in (0, 1, 100, 1000, size // 2, size - 1):
        with largest_file(limit), pytest.raises(OSError, match="large") as error:
            write_segment(tmp_path / "s", batches, BITS)
        assert names_in(tmp_path / "s") == []
        # While somebody keeps the error, no file is open that would take its room on the disk.
        assert error.value.__traceback__ is not None
        assert not [path for path in open_files() if str(tmp_path) in path]
    with largest_file(size):
        write_segment(tmp_path / "s", batches, BITS)


def open_files():
    """The files that this process has open, also those without a name."""
    return [str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]


def contents_of(folder, batches):
    write_segment(folder, batches, BITS)
    return contents(folder)


def test_a_folder_that_cannot_be_made(tmp_path, rng):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Not a directory"):
        write_random(tmp_path / "file" / "s", rng)


def test_two_writers_of_the_same_rows(tmp_path, rng):
    ids, table = random_ids(rng, 200), random_table(rng, 200, BITS)
    batches = batches_of(rng, ids, table)
    start = threading.Barrier(4)
    segments = []

    def write():
        start.wait()
        segments.append(write_segment(tmp_path, batches, BITS))

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(segments) == 4
    assert names_in(tmp_path) == sorted(f"{segments[0].name}.{kind}" for kind in ("codes", "columns"))
    for segment in segments:
        assert_equal(segment, ids, table)
    assert_equal(open_segment(tmp_path, segments[0].name, BITS), ids, table)


def test_a_damaged_segment_is_replaced(tmp_path, rng):
    batches = [(random_ids(rng, 50), random_table(rng, 50, BITS))]
    segment = write_segment(tmp_path, batches, BITS)
    whole = contents(tmp_path)
    for name in whole:
        path = tmp_path / name
        path.unlink()
        path.write_bytes(whole[name][:-5])
        path.chmod(0o600)
        assert write_segment(tmp_path, batches, BITS).name == segment.name
        assert contents(tmp_path) == whole


def test_removal(tmp_path, rng):
    segments = [write_random(tmp_path, rng) for _ in range(3)]
    kept, *removed = segments
    rows = np.arange(100)
    before = [segment.hits(rows, ("uri",)) for segment in removed]
    (tmp_path / ".0.part").mkdir()
    (tmp_path / ".0.part" / "columns").write_bytes(b"left by a writer that was killed")
    (tmp_path / "abc.columns").write_bytes(b"left by a writer that was killed between two renames")
    (tmp_path / "manifest.json").write_text("{}")
    assert remove_segments(tmp_path, [kept.name])
    assert names_in(tmp_path) == sorted(["manifest.json", f"{kept.name}.codes", f"{kept.name}.columns"])
    # Those that are mapped can still be read, also what was not read before.
    for segment, hits in zip(removed, before, strict=True):
        assert segment.hits(rows[::-1], ("uri",)) == hits[::-1]
        assert segment.hits(rows, ("caption",))
        with pytest.raises(DamagedSegment):
            open_segment(tmp_path, segment.name, BITS)


def test_nothing_is_removed_while_a_segment_is_written(tmp_path, rng):
    ids, table = random_ids(rng, 50), random_table(rng, 50, BITS)

    def batches():
        assert not remove_segments(tmp_path, [])
        yield ids, table

    segment = write_segment(tmp_path, batches(), BITS)
    assert open_segment(tmp_path, segment.name, BITS).num_rows == 50
    assert remove_segments(tmp_path, [])
    assert names_in(tmp_path) == []


# Kills writers in the middle of their work, one after the other, each in a folder that two of them share.
WRITERS = """
    import os, random, signal, sys, time
    from pathlib import Path

    import numpy as np
    from segment_parts import batches_of, random_ids, random_table

    from orbithash.search.segments.columns import ColumnsInMemory
    from orbithash.search.segments.files import merge_segments, remove_segments, write_segment


    rng = np.random.default_rng(3)
    rows = [batches_of(rng, random_ids(rng, 300), random_table(rng, 300, 20, 5)) for _ in range(6)]

    # Kernels are compiled here, not in each writer.
    ColumnsInMemory.of(random_table(rng, 9, 20))


    def write_for_ever(folder, number, pipe):
        while True:
            segments = [write_segment(folder, batches, 20) for batches in rows[number % 5 :][:2]]
            os.write(pipe, b".")
            merge_segments(folder, [(segments[0], None)], 20)
            remove_segments(folder, [segments[0].name])


    for attempt in range(24):
        reader, pipe = os.pipe()
        if not (writer := os.fork()):
            write_for_ever(Path(sys.argv[1], str(attempt // 2)), attempt, pipe)
        os.close(pipe)
        assert os.read(reader, 1)
        time.sleep(random.Random(attempt).uniform(0, 0.05))
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        os.close(reader)
"""


def test_killed_at_any_moment(tmp_path):
    """After SIGKILL the folder holds whole segments, and parts that no name shows and that a removal clears away."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", textwrap.dedent(WRITERS), str(tmp_path)], check=True, env=environment)
    num_whole = num_parts = 0
    for folder in tmp_path.iterdir():
        whole = [name.removesuffix(".codes") for name in names_in(folder) if name.endswith(".codes")]
        for name in whole:
            assert open_segment(folder, name, BITS).num_rows == 300
        num_whole += len(whole)
        num_parts += len(names_in(folder)) - 2 * len(whole)
        assert remove_segments(folder, whole)
        assert names_in(folder) == sorted(f"{name}.{kind}" for name in whole for kind in ("codes", "columns"))
    assert num_whole
    assert num_parts, "no writer was killed while it wrote"


def test_the_description_is_json(tmp_path, rng):
    """A reader without this code can find the arrays."""
    segment = write_random(tmp_path, rng)
    content = (tmp_path / f"{segment.name}.codes").read_bytes()
    magic, version, length = struct.unpack("<8sII", content[:16])
    description = json.loads(content[24 : 24 + length])
    assert (magic, version, description["bits"], description["num_rows"]) == (b"orbitseg", 1, BITS, 100)
    for section in description["arrays"].values():
        assert (24 + length + section["offset"]) % 64 == 0


def test_kernels_are_compiled_before_the_first_search(tmp_path, rng):
    """Nothing is compiled for a segment of a file after `warm_up`, whatever the forms of its arrays."""
    assert warm_up(BITS) > 0
    kernels = (_write_messages, _bound_simple)
    before = [kernel._compiled.signatures for kernel in kernels]
    for segment in (
        write_random(tmp_path, rng),
        build_segment([(np.zeros(1, "u8"), random_table(rng, 1, BITS))], BITS),
    ):
        segment.hits(np.zeros(1, np.int64), ("uri", "caption"))
        segment.hits(np.zeros(1, np.uint32))
    assert [kernel._compiled.signatures for kernel in kernels] == before
    assert [len(signatures) for signatures in before] == [1, 1]
