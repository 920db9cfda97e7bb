"""Files and folders appear whole or not at all, whatever ends the writer."""

import subprocess
import sys
import threading

import pytest

from orbithash.encoders.files import new_file, new_folder, recover_folder, write_file


class Stopped(Exception):
    pass


WRITER = """
import os, sys
from pathlib import Path
from orbithash.encoders.files import new_folder

path, last = Path(sys.argv[1]), int(sys.argv[2])
calls = 0

def audit(event, arguments):
    global calls
    if event in ("os.mkdir", "os.rename", "os.rmdir", "os.remove", "shutil.rmtree", "open"):
        calls += 1
        if calls == last:
            os._exit(7)

sys.addaudithook(audit)
with new_folder(path) as part:
    for name in "ab":
        (part / name).write_text("new")
"""


def stop_halfway(path):
    path.write_text("half")
    raise Stopped


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def content(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_a_file_is_replaced_and_its_folders_are_created(tmp_path):
    path = tmp_path / "a" / "b" / "c.txt"
    write_file(path, "first\n")
    write_file(path, b"second\n", durable=False)
    assert path.read_bytes() == b"second\n"
    assert names(path.parent) == ["c.txt"]


def test_an_error_leaves_the_older_file(tmp_path):
    path = tmp_path / "c.txt"
    write_file(path, "é")
    with pytest.raises(Stopped), new_file(path) as part:
        stop_halfway(part)
    assert path.read_text(encoding="utf-8") == "é"
    assert names(tmp_path) == ["c.txt"]


@pytest.mark.parametrize("exists", [False, True])
def test_an_error_leaves_the_older_folder_or_none(tmp_path, exists):
    path = tmp_path / "model"
    if exists:
        with new_folder(path) as part:
            (part / "a").write_text("old")
    with pytest.raises(Stopped), new_folder(path) as part:
        stop_halfway(part / "a")
    assert names(tmp_path) == (["model"] if exists else [])
    assert not exists or content(path) == {"a": "old"}


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "model"
    for name in ("a", "b"):
        with new_folder(path) as part:
            (part / "sub").mkdir()
            (part / "sub" / name).write_text(name)
    assert names(tmp_path) == ["model"]
    assert content(path / "sub") == {"b": "b"}


def test_a_process_killed_at_any_point_leaves_a_whole_folder(tmp_path):
    found = set()
    for last in range(1, 100):
        path = tmp_path / str(last) / "model"
        with new_folder(path) as part:
            for name in "ab":
                (part / name).write_text("old")
        ended = subprocess.run([sys.executable, "-c", WRITER, path, str(last)], check=False).returncode
        was_there = path.exists()
        recover_folder(path)
        # Whole: all of the old content, or all of the new.
        assert content(path) in ({"a": "old", "b": "old"}, {"a": "new", "b": "new"})
        found.add((was_there, content(path)["a"]))
        with new_folder(path) as part:
            (part / "c").write_text("next")
        assert content(path) == {"c": "next"}
        # The next writer removes what the killed one left, but for an empty folder.
        assert [name for name in names(path.parent) if not name.endswith(".new")] == ["model"]
        if ended == 0:
            break
    assert ended == 0
    assert found == {(True, "old"), (False, "old"), (True, "new")}


def test_writers_of_one_path_do_not_conflict(tmp_path):
    path = tmp_path / "model"
    failures = []

    def write(number):
        try:
            for _ in range(20):
                with new_folder(path, durable=False) as part:
                    for name in "ab":
                        (part / name).write_text(str(number))
                write_file(tmp_path / "file", str(number) * 1000, durable=False)
        except Exception as err:
            failures.append(err)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len({*content(path).values()}) == 1
    assert len({*(tmp_path / "file").read_text()}) == 1
    assert names(tmp_path) == ["file", "model"]


def test_a_part_that_is_being_written_is_not_taken_for_abandoned(tmp_path):
    path = tmp_path / "model"
    with new_folder(path) as first:
        with new_folder(path) as second:
            (second / "a").write_text("second")
        (first / "a").write_text("first")
    assert content(path) == {"a": "first"}
