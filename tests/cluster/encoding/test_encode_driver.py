"""The driver of encoding: portions, commits, workers, and an archive that cannot be written."""

import subprocess
import threading

import numpy as np
import pytest
from cluster_parts import BITS, write_image
from object_store import ENVIRONMENT, no_permission, s3_client, s3_server

from orbithash.cluster.encoding import encode as job
from orbithash.cluster.encoding import items as lookup
from orbithash.cluster.encoding.commits import Commits
from orbithash.cluster.encoding.stages import MAX_BATCH_BYTES, Written, rows_within
from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.errors import InputError
from orbithash.encoders.imagery.images import Rendering
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.sources.sources import Item


@pytest.fixture
def archive(tmp_path):
    return Archive.create(tmp_path / "archive", BITS, "model")


def fragments(archive, *keys):
    codes = np.zeros((len(keys), BITS // 8), np.uint8)
    return Archive.write_fragments(archive.path, Archive.table(codes, BITS, keys, keys))


def written(fragments=(), refused=()):
    """Return the result of `write` for new rows and (key, reason) of refused items."""
    keys, reasons = [key for key, _ in refused], [reason for _, reason in refused]
    values = {"fragments": list(fragments), "refused": keys, "reasons": reasons, "stamps": [None] * len(keys)}
    counts = {"replacing": b"", "num_rows": 0, "num_replaced": 0}
    seconds = dict.fromkeys(("began", "decode_s", "encode_s", "write_s"), 0.0)
    return Written(**(counts | seconds | values))


def test_portions_of_new_items(archive, monkeypatch):
    monkeypatch.setattr(lookup, "LOOK_UP", 3)
    monkeypatch.setattr(lookup, "PORTION", 4)
    archive.commit(fragments(archive, "1", "2", "4"))
    archive.refuse([("7", "broken")])
    listed = iter([Item(str(number), "nowhere") for number in range(12)])
    portions = lookup.new_items(listed, archive)
    first = next(portions)
    assert [item.key for item in first.items] == ["0", "3", "5", "6", "8"]
    assert (first.num_done, first.num_refused, first.num_items) == (3, 1, 9)
    assert next(listed).key == "9", "later items are not listed yet"
    rest = next(portions)
    assert ([item.key for item in rest.items], rest.num_done) == (["10", "11"], 0)
    assert list(portions) == []


def test_what_comes_together_is_committed_together(archive):
    parts = [fragments(archive, str(number)) for number in range(6)]
    before = archive.version
    with Commits(archive, every_s=300) as commits:
        commits.add(written(parts[0]))
        # The first one is committed at once.
        while Archive.open(archive.path).num_rows < 1:
            pass
        for one in parts[1:]:
            commits.add(written(one, [("a", "broken")]))
            for _ in range(10):
                assert Archive.open(archive.path).num_rows == 1
    assert archive.num_rows == 6
    assert archive.version == before + 2
    assert archive.refused() == {"a": "broken"}


def test_what_had_arrived_stays_when_a_job_fails(archive):

    def work():
        with Commits(archive, every_s=300) as commits:
            commits.add(written(fragments(archive, "1")))
            commits.add(written(fragments(archive, "2")))
            raise RuntimeError("a worker failed")

    with pytest.raises(RuntimeError, match="a worker failed"):
        work()
    assert archive.num_rows == 2


def test_a_commit_that_fails_ends_the_job(archive):
    one = fragments(archive, "1")
    failed = threading.Event()

    def commit(_):
        failed.set()
        raise OSError("No space left on device")

    def work():
        with Commits(archive) as commits:
            commits.add(written(one))
            failed.wait(300)
            while True:
                commits.add(written())

    archive.commit = commit
    with pytest.raises(OSError, match="No space left"):
        work()
    # The error of the last commit is raised at the end of the block.
    with pytest.raises(OSError, match="No space left"), Commits(archive) as commits:
        commits.add(written(one))


def test_batches_are_bounded_by_their_bytes():
    assert rows_within(64, Preprocessing(Rendering(), resize=224, crop=224)) == 64
    many = Preprocessing(Rendering(bands=tuple(range(1, 14))), resize=1024, crop=1024)
    assert rows_within(64, many) == MAX_BATCH_BYTES // (1024 * 1024 * 13) == 2
    assert rows_within(64, Preprocessing(Rendering(bands=tuple(range(1, 65))), resize=1024, crop=1024)) == 1


@pytest.mark.parametrize("gpus", [-1, 1.5, float("nan"), float("inf")])
def test_gpus_that_no_worker_can_have(gpus):
    with pytest.raises(InputError, match=r"--gpus-per-worker is .*; a (whole )?number"):
        job.Workers(1, 1, gpus)


def test_workers_of_a_cluster(monkeypatch, ray_cluster):
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 16.0, "GPU": 2.0})
    assert job.Workers().on_cluster() == (1, 2, 1)
    assert job.Workers(gpus=0.25).on_cluster() == (1, 8, 0.25)
    assert job.Workers(gpus=0).on_cluster() == (1, 16, 0)
    with pytest.raises(InputError, match="encoding with 3 workers needs 3 GPUs, the cluster has 2"):
        job.Workers(3, 3).on_cluster()
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 16.0})
    assert job.Workers(3, 5).on_cluster() == (3, 5, 0)


def test_more_gpus_than_there_are(ray_cluster, cli, scenes, model, tmp_path):
    options = ("--model", model, "--archive", tmp_path / "archive", "--gpus-per-worker", "1")
    ended = cli("encode", scenes, *options)
    assert ended.code == 2
    assert "error: encoding with 1 workers needs 1 GPUs, the cluster has 0" in ended.err
    assert not (tmp_path / "archive").exists()


@pytest.fixture
def small_disk(tmp_path):
    """Mount a file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
@pytest.mark.ray
def test_a_full_disk(ray_cluster, cli, model, small_disk, tmp_path):
    source, archive = tmp_path / "images", small_disk / "archive"
    source.mkdir()
    rng = np.random.default_rng(0)
    for i in range(100):
        write_image(source / f"{i}.png", rng)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(2**20 - 60 * 2**10))
    ended = cli("encode", source, "--model", model, "--archive", archive)
    assert ended.code == 1
    said = ended.err[ended.err.index("error: ") :]
    assert len(said.splitlines()) == 1, said
    assert "No space left" in said
    assert not archive.exists(), "a new archive without a row"
    filler.unlink()
    ended = cli("encode", source, "--model", model, "--archive", archive)
    assert ended.code == 0, ended.err
    assert Archive.open(archive).num_rows == 100


def test_an_archive_that_is_read_only(refused, scenes, model, small_disk):
    archive = small_disk / "archive"
    from orbithash.encoders.networks.card import read_model_folder

    card, model_id, _ = read_model_folder(model)
    Archive.create(archive, card.bits, model_id)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    refused("encode", scenes, "--model", model, "--archive", archive, words=["cannot be written: Read-only file"])


@pytest.mark.slow
def test_an_archive_in_a_bucket_without_permission(refused, labelled, model, monkeypatch):
    with s3_server() as endpoint:
        s3_client(endpoint, "codes")
        with no_permission(endpoint) as credentials:
            places = {"AWS_ENDPOINT": f"http://{endpoint}", "AWS_ALLOW_HTTP": "true"}
            for name, value in (ENVIRONMENT | credentials | places).items():
                monkeypatch.setenv(name, value)
            options = ("--model", model, "--archive", "s3://codes/archive")
            refused(
                "encode",
                labelled,
                *options,
                words=["s3://codes/archive cannot be read: no permission; check the credentials"],
            )


@pytest.mark.slow
def test_from_one_object_store_into_another(start, labelled, model):
    with s3_server() as endpoint:
        client = s3_client(endpoint, "tiles", "codes")
        for path in labelled.rglob("*.png"):
            client.upload_file(str(path), "tiles", path.relative_to(labelled).as_posix())
        environment = ENVIRONMENT | {
            "AWS_ENDPOINT_URL": f"http://{endpoint}",
            "AWS_ENDPOINT": f"http://{endpoint}",
            "AWS_ALLOW_HTTP": "true",
        }
        before = f"import os; os.environ.update({environment!r})"
        for num_before in (0, 30):
            options = ("--model", model, "--archive", "s3://codes/archive", "--json")
            process = start("encode", "s3://tiles", *options, before=before)
            assert process.wait(300) == 0, process.err.read_text()
            assert f'"num_done_before": {num_before},' in process.out.read_text()
            assert '"rows_in_archive": 30' in process.out.read_text()
