"""Checkpoints on other file systems: checks of the storage before training, and resuming from an S3 server."""

import json
import signal
import socket

import pyarrow.fs
import pytest
from cluster_parts import TINY, family, kill, wait_for
from object_store import ENVIRONMENT, no_permission, s3_client, s3_server

from orbithash.cluster.training import checkpoints
from orbithash.cluster.training.checkpoints import Storage
from orbithash.encoders.errors import InputError
from orbithash.encoders.networks.model import HashModel
from orbithash.trainers.loop.export import best_epoch


@pytest.fixture
def keys(monkeypatch):
    """Set credentials in the environment; without them, pyarrow queries the network for some."""
    for key, value in ENVIRONMENT.items():
        monkeypatch.setenv(key, value)


@pytest.fixture
def s3(keys):
    """An S3 server with a bucket `runs`: the query part of its URIs, and pyarrow's file system on it."""
    with s3_server() as address:
        system = pyarrow.fs.S3FileSystem(endpoint_override=address, scheme="http", allow_bucket_creation=True)
        system.create_dir("runs")
        yield f"?endpoint_override={address}&scheme=http&region=us-east-1", system


def refusal(uri, is_new=True):
    with pytest.raises(InputError) as caught:
        Storage.of(str(uri)).check(is_new)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_is_created_and_left_empty(tmp_path):
    place = Storage.of(str(tmp_path / "new" / "folder"))
    place.check(is_new=True)
    assert not place.is_remote
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    assert Storage.of((tmp_path / "x").as_uri()).is_remote is False


def test_invalid_storages_are_refused(tmp_path):
    assert "unknown kind of storage; give a path, s3://BUCKET/PATH" in refusal("ftp://host/path")
    (tmp_path / "file").touch()
    assert str(tmp_path / "file" / "run") in refusal(tmp_path / "file" / "run")
    (tmp_path / "old" / "ray").mkdir(parents=True)
    assert "holds the checkpoints of another run" in refusal(tmp_path / "old")
    Storage.of(str(tmp_path / "old")).check(is_new=False)


@pytest.mark.slow
def test_an_unreachable_server(keys):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    uri = f"s3://runs/first?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
    assert "cannot be reached; check the address and the network" in refusal(uri)


def test_a_server_that_never_answers(keys, monkeypatch):
    monkeypatch.setattr(checkpoints, "ANSWER_TIMEOUT_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"s3://runs/first?endpoint_override=127.0.0.1:{silent.getsockname()[1]}&scheme=http&region=us-east-1"
        assert "no answer in 1 s" in refusal(uri)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        ("When creating key 'x': AWS Error ACCESS_DENIED during PutObject: Forbidden", "no permission to write there"),
        ("AWS Error NETWORK_CONNECTION during HeadBucket: curlCode: 7", "cannot be reached"),
        ("[Errno 28] No space left on device", "[Errno 28] No space left on device"),
    ],
)
def test_errors_of_a_store_are_one_line(error, line):
    assert checkpoints._explain(OSError(f"{error}\n")).startswith(line)


@pytest.mark.slow
def test_a_missing_bucket(s3):
    options, system = s3
    assert "the bucket 'none' does not exist; create it first" in refusal(f"s3://none/first{options}")
    Storage.of(f"s3://runs/first{options}").check(is_new=True)
    assert system.get_file_info("runs/first/.orbithash").type == pyarrow.fs.FileType.NotFound


def test_a_bucket_without_permission(keys, monkeypatch):
    with s3_server() as endpoint:
        s3_client(endpoint, "runs")
        with no_permission(endpoint) as credentials:
            for name, value in credentials.items():
                monkeypatch.setenv(name, value)
            message = refusal(f"s3://runs/first?endpoint_override={endpoint}&scheme=http&region=us-east-1")
    assert message.endswith("no permission to write there; check the credentials")


def test_invalid_options(refused, tmp_path, labelled):
    train = ("train", "dhcl", "--data", labelled, "--out", tmp_path / "run", *TINY)
    refused(*train, "--storage", "ftp://host/path", words=["--storage ftp://host/path: unknown kind of storage"])
    refused(*train, "--keep", "0", words=["--keep is 0; at least 1"])
    refused(*train, "--track", "nope", words=["--track is 'nope'; the trackers are mlflow, wandb"])


@pytest.mark.slow
def test_a_killed_run_resumes_from_s3(s3, start, labelled, tmp_path):
    # s3 before start: its processes need the credentials in their environment.
    options, system = s3
    run, epochs = tmp_path / "run", 5
    uri = f"s3://runs/first{options}"
    settings = ("backbone=mobilenet_v3_small", "image_size=32", "batch_size=4", f"epochs={epochs}")
    words = [word for setting in settings for word in ("--set", setting)]
    command = ("train", "dhcl", "--data", labelled, "--out", run, "--bits", "16", *words)
    process = start(*command, "--storage", uri, "--keep", "2")

    def snapshot():
        info = system.get_file_info("runs/first/ray/checkpoint_manager_snapshot.json")
        if info.type == pyarrow.fs.FileType.NotFound:
            return []
        with system.open_input_stream(info.path) as stream:
            return json.loads(stream.read())["checkpoint_results"]

    wait_for(lambda: len(snapshot()) >= 1, process)
    process.send_signal(signal.SIGSTOP)
    before = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kill(process, *family(process.pid))
    assert len(before) < epochs
    assert not (run / "ray").exists(), "nothing is kept in the run folder"

    # Without --storage: it is read from the run folder.
    process = start(*command, "--keep", "2")
    assert process.wait(timeout=300) == 0, process.err.read_text()
    after = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in after] == list(range(1, epochs + 1))
    assert after[0] == before[0]
    assert HashModel.load(run / "model").card.metrics == best_epoch(after)
    # The last checkpoint, which is uploaded at the end, and the two best ones.
    kept = {result["metrics"]["epoch"] for result in snapshot()}
    best = sorted(after, key=lambda record: (record["score"], record["epoch"]))[-2:]
    assert kept == {epochs, *(record["epoch"] for record in best)}
