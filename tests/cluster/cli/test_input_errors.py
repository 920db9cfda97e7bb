"""Errors for invalid input: one line, exit code 2, and no change on disk."""

import os
import resource
import shutil
import socket

import numpy as np
import pytest
import torchvision
from cluster_parts import TINY
from safetensors.torch import save_file

from orbithash.cluster.training import train as training
from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.errors import InputError
from orbithash.encoders.networks.model import HashModel
from orbithash.trainers.loop.export import make_card
from orbithash.trainers.loop.run import make_run

# Training.


@pytest.mark.parametrize("name", ["empty", "absent", "flat", "file"])
def test_training_needs_a_folder_of_images(refused, tmp_path, bad_images, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "flat").mkdir()
    for path in (tmp_path / "flat" / "a.jpg", tmp_path / "file"):
        shutil.copy(bad_images / "good.jpg", path)
    words = {
        "empty": "holds no image (.jpg, .jpeg, .png, .tif, .tiff",
        "absent": "does not exist",
        "flat": "only 1 images; protocol random needs at least 5",
        "file": "is not a folder",
    }
    folder = tmp_path / name
    refused("train", "dhcl", "--data", folder, "--out", tmp_path / "run", words=[folder, words[name]])


@pytest.mark.parametrize("bits", [0, 7, 1000])
def test_bits_out_of_range(refused, tmp_path, labelled, bits):
    limit = 512 if bits > 512 else 8
    refused(
        *("train", "dhcl", "--data", labelled, "--out", tmp_path / "run", "--bits", bits),
        words=[f"bits is {bits}", limit],
    )


def test_unknown_method(refused, tmp_path, labelled):
    refused(
        *("train", "dhlc", "--data", labelled, "--out", tmp_path / "run"),
        words=["unknown method 'dhlc'", "are mhcln, dhcl, cdne"],
    )


def test_all_wrong_settings_are_reported_together(refused, tmp_path, labelled):
    settings = ("--set", "bathc_size=3", "--set", "lr=abc", "--set", "epochs", "--set", "image_size=1")
    refused(
        *("train", "dhcl", "--data", labelled, "--out", tmp_path / "run", *settings),
        words=[
            "found 4 problems",
            "unknown key 'bathc_size'; did you mean batch_size?",
            "lr is 'abc'",
            "'epochs' is not of the form key=value",
            "image_size is 1",
        ],
        lines=5,
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xd8\xff\xe0", "not a YAML file"),
        (b"a: [", "not a YAML file"),
        (b"- bits", "a config file contains keys and values, got list"),
        (b"recipe: [1]", "the section recipe contains keys and values, got [1]"),
        (b"recipe: {methd: dhcl}", "section recipe: unknown key 'methd'; did you mean method?"),
        (b"recipe: {validation: 2}", "section recipe: validation is 2: input should be less than or equal to 0.5"),
        (b"recipe: {method: cdne}", "is for cdne, not for dhcl; use cdne"),
        (b"bitts: 8", "unknown key 'bitts'; did you mean bits?"),
        (None, "config.yaml': neither a file nor a shipped recipe"),
    ],
)
def test_an_invalid_config_file(refused, tmp_path, labelled, content, words):
    file = tmp_path / "config.yaml"
    if content is not None:
        file.write_bytes(content)
    refused("train", "dhcl", "--data", labelled, "--out", tmp_path / "run", "--config", file, words=[words])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--dataset", "nope"), ["unknown dataset 'nope'; there are ucmd, aid, nwpu-resisc45, "]),
        (("--dataset", "ucmd"), ["these are not the 21 classes of ucmd"]),
        (
            ("--protocol", "nope"),
            ["unknown protocol 'nope'; there are dhcl, dhcl-released, mhcln, cdne, duch, mrhash, random"],
        ),
        (("--weights", "nope.safetensors"), ["nope.safetensors: no such weights file"]),
        (
            ("--weights", "IMAGENET1K_V9"),
            ["'IMAGENET1K_V9'", "neither a file nor torchvision weights", "IMAGENET1K_V1"],
        ),
        (("--workers", "0"), ["--workers is '0'; MIN:MAX with 1 <= MIN <= MAX"]),
        (("--workers", "2:1"), ["--workers is '2:1'; MIN:MAX with 1 <= MIN <= MAX"]),
        (("--gpus-per-worker", "-1"), ["--gpus-per-worker is -1; a number of GPUs, 0 or more"]),
        (("--gpus-per-worker", "nan"), ["--gpus-per-worker is nan"]),
        (("--gpus-per-worker", "0.5"), ["--gpus-per-worker is 0.5; a whole number is needed", "cannot share a GPU"]),
        (("--gpus-per-worker", "1.5"), ["--gpus-per-worker is 1.5; a whole number is needed"]),
    ],
)
def test_training_options(refused, tmp_path, labelled, options, words):
    refused("train", "dhcl", "--data", labelled, "--out", tmp_path / "run", *TINY, *options, words=words)


def test_weights_of_another_backbone(refused, tmp_path, labelled):
    weights = tmp_path / "weights.safetensors"
    save_file(torchvision.models.get_model("mobilenet_v3_small").state_dict(), weights)
    options = (*TINY, "--weights", weights, "--set", "backbone=resnet18")
    refused(
        *("train", "dhcl", "--data", labelled, "--out", tmp_path / "run", *options),
        words=[weights, "not the weights of backbone resnet18", "give the weights of this backbone"],
    )


def test_out_with_other_files(refused, tmp_path, labelled):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "notes.txt").touch()
    file = tmp_path / "file"
    file.touch()
    train = ("train", "dhcl", "--data", labelled, *TINY, "--out")
    refused(*train, foreign, words=[foreign, "is not empty and holds no run; give another --out"])
    refused(*train, file, words=[file, "no folder can be created there", "give another --out"])
    refused(*train, file / "run", words=["no folder can be created there", "give another --out"])


def test_out_of_a_run_that_was_killed_while_its_folder_was_written(tmp_path, labelled):
    """The manifest is written before the settings; the same command goes on."""
    run = make_run("dhcl", labelled, settings=["batch_size=4"], bits=16)
    folder = tmp_path / "run"
    training.claim_folder(run, folder)
    (folder / "config.yaml").unlink()
    (folder / ".config.yaml.x.part").touch()
    training.check_training(run, folder)
    assert training.claim_folder(run, folder)
    # A file of somebody else is not overwritten.
    (folder / "config.yaml").unlink()
    (folder / "manifest.parquet").write_bytes(b"PAR1 of somebody else")
    with pytest.raises(InputError, match="is not empty and holds no run; give another --out"):
        training.check_training(run, folder)


def test_a_disk_that_is_full_when_the_run_folder_is_written(tmp_path, labelled):
    run = make_run("dhcl", labelled, bits=16)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(InputError, match=r"the run cannot be written there \(.*\); give another --out$") as caught:
            training.claim_folder(run, tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "run").iterdir())


def test_out_of_another_run(refused, tmp_path, labelled):
    run = make_run("dhcl", labelled, bits=16)
    training.claim_folder(run, tmp_path / "run")
    refused(
        *("train", "dhcl", "--data", labelled, "--out", tmp_path / "run", "--bits", "24", "--set", "seed=1"),
        words=["holds another run", "bits was 16, is 24", "seed was 0, is 1", "give another --out"],
    )


@pytest.mark.ray
def test_more_training_workers_than_cpus(ray_cluster, refused, tmp_path, labelled):
    options = (*TINY, "--workers", "5", "--set", "batch_size=10")
    refused(
        *("train", "dhcl", "--data", labelled, "--out", tmp_path / "run", *options),
        words=["training with 5 workers needs 5 CPUs, the cluster has 4; ask for fewer"],
    )


# Evaluation.


@pytest.fixture
def run_folder(tmp_path, labelled):
    """A run folder with an untrained model."""
    settings = ["backbone=mobilenet_v3_small", "image_size=32"]
    run = make_run("dhcl", labelled, protocol="random", settings=settings, bits=16)
    training.claim_folder(run, tmp_path / "run")
    method = run.build()
    HashModel(make_card(run, method, {}), method.network).save(tmp_path / "run" / "model")
    return tmp_path / "run"


def test_evaluation_without_a_run_folder(refused, tmp_path, labelled):
    refused("evaluate", tmp_path / "nope", "--data", labelled, words=["not a run folder", "No such file"])


def test_evaluation_of_an_unfinished_run(refused, run_folder, labelled):
    shutil.rmtree(run_folder / "model")
    refused("evaluate", run_folder, "--data", labelled, words=["has no model yet; run the same train command again"])


def test_evaluation_of_a_shorter_length_that_was_not_trained(refused, run_folder, labelled):
    # A folder that the user added is not a model of the run.
    shutil.copytree(run_folder / "model", run_folder / "model-kept")
    words = [run_folder, "no model of 8 bits; there is 16"]
    refused("evaluate", run_folder, "--data", labelled, "--bits", "8", words=words)


def test_evaluation_of_a_damaged_run(refused, run_folder, labelled):
    manifest = run_folder / "manifest.parquet"
    manifest.write_bytes(manifest.read_bytes()[:-100])
    refused("evaluate", run_folder, "--data", labelled, words=[manifest, "the manifest is damaged"])
    for content in (b"method: [", b"- dhcl", b"\xff\xd8\xff"):
        (run_folder / "config.yaml").write_bytes(content)
        refused("evaluate", run_folder, "--data", labelled, words=["config.yaml: damaged"])


def test_evaluation_without_the_images(refused, run_folder, tmp_path):
    refused("evaluate", run_folder, "--data", tmp_path / "nope", words=["nope is not a folder", "--data"])


def test_evaluation_with_changed_images(refused, run_folder, labelled, tmp_path):
    changed = tmp_path / "changed"
    shutil.copytree(labelled, changed)
    (changed / "beach" / "beach3.png").write_bytes(b"other")
    (changed / "river" / "river4.png").unlink()
    refused(
        *("evaluate", run_folder, "--data", changed),
        words=["found 2 problems", "beach/beach3.png: another file than", "river/river4.png: absent"],
        lines=3,
    )


def test_evaluation_on_images_of_the_training(refused, run_folder, labelled):
    refused(
        *("evaluate", run_folder, "--data", labelled, "--protocol", "dhcl"),
        words=["queries of protocol dhcl were training or validation images of this run"],
    )
    refused("evaluate", run_folder, "--data", labelled, "--protocol", "nope", words=["unknown protocol 'nope'"])


# Encoding.


@pytest.mark.parametrize("workers", ["0", "5:2", "abc", "1:2:3", ":", "-1"])
def test_workers_without_a_valid_range(refused, tmp_path, scenes, model, workers):
    refused(
        *("encode", scenes, "--model", model, "--archive", tmp_path / "archive", f"--workers={workers}"),
        words=[f"--workers is {workers!r}", "MIN:MAX with 1 <= MIN <= MAX"],
    )


@pytest.mark.ray
def test_more_encoding_workers_than_cpus(ray_cluster, refused, tmp_path, scenes, model):
    refused(
        *("encode", scenes, "--model", model, "--archive", tmp_path / "archive", "--workers", "9"),
        words=["encoding with 9 workers needs 5 CPUs, the cluster has 4; ask for fewer"],
    )


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("empty", "holds no image"),
        ("nope", "nope does not exist"),
        ("notes.md", "neither a folder nor an image"),
        ("list.txt", "lists no image"),
        ("table.parquet", "table.parquet"),
    ],
)
def test_sources_without_images(refused, tmp_path, model, source, words):
    (tmp_path / "empty").mkdir()
    for name in ("notes.md", "list.txt", "table.parquet"):
        (tmp_path / name).touch()
    refused("encode", tmp_path / source, "--model", model, "--archive", tmp_path / "archive", words=[words])


@pytest.mark.parametrize("tile", [0, 15, 1_000_000])
def test_tiles_of_an_invalid_size(refused, tmp_path, scenes, model, tile):
    refused(
        *("encode", scenes, "--model", model, "--archive", tmp_path / "archive", "--tile", tile),
        words=[f"the tile's side is {tile} pixels"],
    )


def test_a_model_folder_with_a_flipped_byte(refused, tmp_path, scenes, model):
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    weights = broken / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    encode = ("encode", scenes, "--archive", tmp_path / "archive", "--model")
    refused(*encode, broken, words=[broken, "model.safetensors is damaged"])
    card = broken / "model.json"
    card.write_text(card.read_text().replace('"one"', '"eno"'))
    refused(*encode, broken, words=[card, "damaged"])
    refused(*encode, tmp_path / "nope", words=["nope: not a model folder", "training writes one to RUN/model"])


def test_folders_that_are_not_archives(refused, tmp_path, scenes, model):
    foreign, file = tmp_path / "foreign", tmp_path / "file"
    foreign.mkdir()
    (foreign / "notes.txt").touch()
    file.touch()
    encode = ("encode", scenes, "--model", model, "--archive")
    refused(*encode, foreign, words=[foreign, "is not an archive of codes; choose a new or an empty folder"])
    refused(*encode, file, words=[file, "is not an archive of codes"])
    refused(*encode, file / "archive", words=["no archive can be made there"])


def test_an_archive_of_another_model(refused, tmp_path, scenes, archive, other_model):
    mine = tmp_path / "archive"
    shutil.copytree(archive, mine)
    refused(
        *("encode", scenes, "--model", other_model, "--archive", mine),
        words=[mine, "Codes of another model are refused, never mixed"],
    )


def test_an_archive_that_another_process_writes(refused, tmp_path, scenes, archive, model):
    mine = tmp_path / "archive"
    shutil.copytree(archive, mine)
    with Archive.open(mine).writing():
        refused(
            *("encode", scenes, "--model", model, "--archive", mine),
            words=[mine, f"is being written by another process ({os.getpid()} on ", "; wait until it ends"],
        )


def damage(archive, folder):
    shutil.copytree(archive, folder)
    for manifest in (folder / "_versions").glob("*.manifest"):
        manifest.write_bytes(manifest.read_bytes()[:-20])
    return folder


def test_a_damaged_archive(refused, tmp_path, scenes, archive, model):
    mine = damage(archive, tmp_path / "archive")
    words = [mine, "cannot be read, it may be damaged"]
    refused("encode", scenes, "--model", model, "--archive", mine, words=words)
    refused("serve", mine, "--model", model, "--local", words=words)


# Serving.


@pytest.fixture
def taken():
    """An address in use: serving fails there instead of running forever if invalid input is not refused."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"127.0.0.1:{listening.getsockname()[1]}"


def test_serving_with_another_model(refused, archive, other_model, taken):
    refused(
        *("serve", archive, "--model", other_model, "--local", "--address", taken),
        words=[archive, other_model, "give the model that made the archive"],
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--shards", "0"), "0 shards; from 1 to 1,024 are allowed"),
        (("--shards", "-1"), "-1 shards; from 1 to 1,024 are allowed"),
        (("--address", "0.0.0.0:0"), "loopback addresses only"),
        (("--address", "[::]:0"), "loopback addresses only"),
        (("--address", "localhost"), "an address is HOST:PORT"),
        (("--address", "127.0.0.1:65536"), "an address is HOST:PORT"),
    ],
)
def test_serving_options(refused, archive, model, taken, options, words):
    refused("serve", archive, "--model", model, "--local", "--address", taken, *options, words=[words])


def test_serving_a_folder_that_is_not_an_archive(refused, tmp_path, scenes, model):
    refused("serve", tmp_path / "nope", "--model", model, words=["does not exist; `orbithash encode` makes one"])
    refused("serve", scenes, "--model", model, words=["is not an archive of codes"])


def test_serving_on_a_taken_port(refused, archive, model, taken):
    refused(
        *("serve", archive, "--model", model, "--local", "--address", taken),
        words=[taken, "the port may be in use; give another port"],
    )


# Queries. Those that only a running gateway can refuse are in test_serve.


def test_no_gateway_at_the_address(refused):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    refused("query", "--code", "00ff", "--address", address, words=[f"no gateway at {address}", "orbithash serve"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "give at least one of --image, --text, --vector, --key, --code and --like, got none"),
        (
            ("--key", "a", "--weight", "text=2"),
            "--weight 'text=2' is not OPTION=NUMBER with an option of this query (key)",
        ),
        (
            ("--key", "a", "--like", "b", "--weight", "key"),
            "is not OPTION=NUMBER with an option of this query (key, like)",
        ),
        (("--key", "a", "--weight", "key=much"), "--weight 'key=much' is not OPTION=NUMBER"),
        (("--key", "a", "--weight", "key=1", "--weight", "key=2"), "--weight key is given twice"),
        (("--key", "a", "--weight", "key=0"), "a weight is a number above 0 and at most 1,000, got 0.0"),
        (("--key", "a", "--weight", "key=nan"), "a weight is a number above 0 and at most 1,000, got nan"),
        (("--unlike", "a"), "got none"),
        (("--vector", "nope.npy"), "--vector nope.npy: cannot be read (No such file or directory)"),
        (("--key", ""), "the value of --key is empty; give a value"),
        (("--code", "xyz"), "--code 'xyz' is not hexadecimal"),
        (("--code", "ff", "-k", "0"), "k is a whole number from 1 to 10,000, got 0"),
        (("--code", "ff", "-k", "10001"), "k is a whole number from 1 to 10,000, got 10001"),
        (("--code", "ff", "--rescore", "both"), "rescore: 'both'; allowed: vector and asymmetric"),
        (("--code", "ff", "--rescore", "vector", "--oversampling", "0.5"), "a number of at least 1, got 0.5"),
        (("--key", "a", "--rescore", "vector", "--after", "1:2"), "a rescored answer has no pages"),
        (("--code", "ff", "--timeout", "0"), "--timeout is 0"),
        (("--code", "ff", "--timeout", "nan"), "--timeout is nan"),
        (("--code", "ff", "--address", "nowhere"), "an address is HOST:PORT"),
        (("--image", "nope.png"), "nope.png: cannot be read (No such file or directory)"),
        (("--image", "."), "cannot be read (Is a directory)"),
    ],
)
def test_query_options(refused, options, words):
    refused("query", *options, words=[words])


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros(3, np.int8), "got shape [3] of format 'b'; convert it with astype('float32')"),
        (np.zeros((2, 3), np.float32), "got shape [2, 3] of format 'f'"),
        (np.zeros((), np.float32), "got shape [] of format 'f'"),
        (np.zeros(0, np.float32), "a vector has at least one dimension, got none"),
        (np.array([0, np.nan], np.float32), "a vector is finite in float32, got nan in dimension 1"),
        (np.array([1e300]), "a vector is finite in float32, got inf in dimension 0"),
        (np.zeros(20_000, np.float32), "at most 16,384 dimensions, got 80,000 bytes"),
        (np.array(["a"]), "a vector is an array"),
        (np.array([{}]), "not an array of numbers saved by numpy.save"),
    ],
)
def test_query_vectors(refused, tmp_path, array, words):
    path = tmp_path / "vector.npy"
    np.save(path, array, allow_pickle=True)
    refused("query", "--vector", str(path), words=[words])


def test_query_vectors_that_are_other_files(refused, tmp_path):
    path = tmp_path / "vector.npz"
    np.savez(path, np.zeros(3))
    refused("query", "--vector", str(path), words=["an archive of several arrays; save one array with numpy.save"])
    for content in (b"", b"no array", b"\x93NUMPY\x01\x00"):
        path.write_bytes(content)
        refused("query", "--vector", str(path), words=["not an array of numbers saved by numpy.save"])


def test_a_query_image_that_is_too_large(refused, tmp_path):
    image = tmp_path / "large.jpg"
    image.write_bytes(np.random.default_rng(0).bytes(20_000_000))
    refused("query", "--image", image, words=[image, "20,000,000 bytes", "at most 10,485,760"])


# Ray.


def test_no_cluster_at_the_address(start, tmp_path, scenes, model):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    before = f"import os; os.environ['RAY_ADDRESS'] = {address!r}"
    process = start("encode", scenes, "--model", model, "--archive", tmp_path / "archive", before=before)
    assert process.wait(timeout=120) == 2
    assert f"error: RAY_ADDRESS={address}: no cluster answers there" in process.err.read_text()
    assert not (tmp_path / "archive").exists()


# Any verb.


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("pack", "", "--out", "x.lance"), "an argument is empty; give a value"),
        (("pack", ".", "--out", ""), "the value of --out is empty; give a value"),
        (("pack", ".", "--out="), "the value of --out is empty"),
        (("train", "itq", "--data", "", "--out", "run"), "the value of --data is empty"),
        (("train", "itq", "--data", ".", "--out", ""), "the value of --out is empty"),
        (("encode", "", "--model", "m", "--archive", "a"), "an argument is empty"),
        (("encode", ".", "--model", "m", "--archive", ""), "the value of --archive is empty"),
        (("evaluate", "run", "--data", ""), "the value of --data is empty"),
        (("scenes", ""), "an argument is empty"),
    ],
)
def test_empty_values(refused, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    refused(*words, words=[message])


@pytest.mark.parametrize(
    ("uri", "kind"), [("s3://b/images", "remote"), ("s3://b/x.lance", "a packed data set"), ("x.lance", "a packed")]
)
@pytest.mark.parametrize(
    "words",
    [
        ("pack", "{}", "--out", "y.lance"),
        ("demo", "--data", "{}", "--out", "o"),
        ("demo", "--unlabelled", "--data", "{}", "--out", "o"),
        ("bench", "encode", "--data", "{}"),
        ("wald", "{}", "o"),
    ],
)
def test_verbs_that_need_local_images(refused, tmp_path, monkeypatch, uri, kind, words):
    monkeypatch.chdir(tmp_path)
    message = f"{uri} is {kind}" if "://" in uri else f"{tmp_path / uri} is {kind}"
    refused(*(word.format(uri) for word in words), words=[message, "must be local files"])


def test_options_whose_default_is_empty_may_be_empty(refused, tmp_path):
    refused("duplicates", tmp_path / "none", "--filter", "", words=["none"])
