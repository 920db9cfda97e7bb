"""encode --watch: new and changed images become rows until it is stopped, also while others write the archive."""

import json
import signal

import numpy as np
import pytest
from cluster_parts import wait_for, write_image

from orbithash.cluster.encoding import watch as watching
from orbithash.cluster.encoding.encode import Job, Workers
from orbithash.cluster.encoding.items import Source
from orbithash.encoders.archive.archive import Archive
from orbithash.search.client.client import Client
from orbithash.search.protocol.rows import Row

RNG = np.random.default_rng(0)


def stored(archive):
    """Return the keys of all rows; none occurs twice."""
    opened = Archive.open(archive)
    keys = opened.take(opened.codes()[0], ["key"])["key"].to_pylist()
    assert len(keys) == len(set(keys))
    return set(keys)


@pytest.fixture
def watcher(model, tmp_path):
    """Make watchers in this process."""

    def make(source, **options):
        job = Job.of(Source(str(source), **options), model, str(tmp_path / "archive"), Workers())
        return watching._Watcher(job, Archive.open_or_create(job.archive, job.bits, job.model_id))

    return make


@pytest.mark.slow
def test_a_watched_folder(start, model, tmp_path):
    source, archive = tmp_path / "images", tmp_path / "archive"
    source.mkdir()
    write_image(source / "first.png", RNG)
    process = start("encode", source, "--model", model, "--archive", archive, "--watch", "--json")
    # The folder of a dataset exists a moment before its first version.
    wait_for(lambda: any(archive.glob("_versions/*")) and stored(archive) == {"first.png"}, process)
    (source / "sub").mkdir()
    write_image(source / "sub" / "second.png", RNG)
    (source / "broken.png").write_bytes(b"broken")
    wait_for(lambda: stored(archive) == {"first.png", "sub/second.png"}, process)
    wait_for(lambda: Archive.open(archive).refused().keys() == {"broken.png"}, process)

    with Archive.open(archive).writing():
        write_image(source / "third.png", RNG)
        wait_for(lambda: "is being written by another process" in process.err.read_text(), process)
        assert "third.png" not in stored(archive)
    wait_for(lambda: "third.png" in stored(archive), process)

    # A gateway of the same archive shows new images, and takes changes in between.
    gateway = start("serve", archive, "--model", model, "--local", "--address", "127.0.0.1:0")
    line = wait_for(lambda: [one for one in gateway.err.read_text().splitlines() if "ready at " in one], gateway)[0]
    expected = stored(archive)
    with Client(line.split("ready at ")[1].split(";")[0], timeout_s=60) as client:
        for i in range(5):
            write_image(source / f"{i}.png", RNG)
            client.upsert([Row(key=f"upserted/{i}", image=(source / "first.png").read_bytes())])
            expected |= {f"{i}.png", f"upserted/{i}"}
        wait_for(lambda: {hit.key for hit in client.search(code=bytes(4), k=20).hits} == expected, process)

    process.send_signal(signal.SIGTERM)
    assert process.wait(300) == 0, process.err.read_text()
    assert "Traceback" not in process.err.read_text()
    summary = json.loads(process.out.read_text())
    assert (summary["num_listed"], summary["num_encoded"], summary["num_refused"]) == (9, 8, 1)
    assert summary["rows_in_archive"] == 13
    assert stored(archive) == expected


def test_a_file_is_taken_when_it_stays_as_it_is(watcher, tmp_path):
    source = tmp_path / "images"
    source.mkdir()
    looks = watcher(source)
    assert looks._look() == [], "a folder may be empty"
    (source / "a.png").write_bytes(b"the begin")
    assert looks._look() == []
    with (source / "a.png").open("ab") as file:
        file.write(b"ning and more")
    assert looks._look() == [], "it grew"
    assert [item.key for item in looks._look()] == ["a.png"]
    settled = looks._look()
    assert [item.key for item in settled] == ["a.png"], "it was not encoded yet"
    looks._take(settled)
    assert looks._look() == []
    (source / "a.png").write_bytes(b"repaired")
    assert looks._look() == [], "it has just changed"
    assert [item.key for item in looks._look()] == ["a.png"]


def test_a_list_names_files_that_come_later(watcher, tmp_path):
    listed = tmp_path / "list.txt"
    listed.write_text("a.png\n")
    looks = watcher(listed)
    assert looks._look() == looks._look() == []
    (tmp_path / "a.png").write_bytes(b"here")
    assert looks._look() == []
    listed.write_bytes(b"a.png\n\xff")
    assert looks._look() == [], "a list that cannot be read now"
    listed.write_text("a.png\nb.png\n")
    (tmp_path / "b.png").write_bytes(b"here, too")
    settled = looks._look()
    assert [item.key for item in settled] == ["a.png"]
    looks._take(settled)
    assert [item.key for item in looks._look()] == ["b.png"]


def test_rows_that_others_wrote_meanwhile_are_not_written_again(watcher, tmp_path):
    source = tmp_path / "images"
    source.mkdir()
    for name in ("a.png", "b.png"):
        write_image(source / name, RNG)
    first, second = watcher(source), watcher(source)
    first._look()
    settled = first._look()
    # As if one had looked before the other wrote.
    first._encode_here(settled)
    second._encode_here(settled)
    assert stored(tmp_path / "archive") == {"a.png", "b.png"}
    assert (first._tally.num_encoded, second._tally.num_encoded) == (2, 0)


def test_changed_and_repaired_files_are_encoded_again(watcher, tmp_path):
    source = tmp_path / "images"
    source.mkdir()
    write_image(source / "a.png", RNG)
    (source / "b.png").write_bytes(b"broken")
    looks = watcher(source)
    archive = Archive.open(tmp_path / "archive")

    def look_twice():
        looks._look()
        settled = looks._look()
        looks._encode(settled)
        looks._take(settled)
        archive.refresh()
        return bytes(archive.codes()[1][0])

    first = look_twice()
    assert (archive.keys(), archive.refused().keys()) == ({"a.png"}, {"b.png"})
    write_image(source / "a.png", np.random.default_rng(99))
    write_image(source / "b.png", RNG)
    assert look_twice() != first
    assert (archive.keys(), archive.refused()) == ({"a.png", "b.png"}, {})
    assert (looks._tally.num_encoded, looks._tally.num_replaced, looks._tally.num_refused) == (3, 1, 1)


def test_a_watched_source_that_is_wrong_from_the_start(refused, model, tmp_path):
    options = ("--model", model, "--archive", tmp_path / "archive", "--watch")
    refused("encode", tmp_path / "nowhere", *options, words=["nowhere does not exist"])
    (tmp_path / "twice.txt").write_text("a.png\na.png\n")
    refused("encode", tmp_path / "twice.txt", *options, words=["'a.png' is there more than once"])
