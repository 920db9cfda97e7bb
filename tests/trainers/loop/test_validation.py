"""Validation: the sample of large parts, its size in the history, and the same mean on any number of ranks."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.distributed as dist
from method_parts import make_run as run_of
from method_parts import trained, write_data

from orbithash.encoders.codes import hamming, pack
from orbithash.trainers.datasets import Images
from orbithash.trainers.loop import parts
from orbithash.trainers.loop.loop import validate
from orbithash.trainers.loop.parts import load_validation_parts, validation_rows
from orbithash.trainers.methods.base import mean_scores
from orbithash.trainers.metrics.average_precision import Histograms, average_precision

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = ("validation/queries", "validation/database")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "images"
    write_data(root)
    return root


def make_run(data, **settings):
    """A run with 20 training images and 4 validation images at most."""
    return run_of(data, "itq", epochs=1, **settings)


# The sample.


def test_small_parts_are_used_whole(data):
    run = make_run(data)
    whole = {split: len(run.images(split)) for split in ("train", "validation")}
    assert min(whole.values()) >= 2
    for settings in ({}, {"validation_database": None}, {"validation_database": whole["train"]}):
        found = validation_rows(make_run(data, **settings))
        assert {split: rows.tolist() for split, rows in found.items()} == {s: [*range(n)] for s, n in whole.items()}


def test_the_sample_follows_from_the_seed_of_the_split(data):
    run = make_run(data, validation_queries=1, validation_database=7)
    rows = validation_rows(run)
    assert [len(rows[split]) for split in ("train", "validation")] == [7, 1]
    assert sorted(set(rows["train"].tolist())) == rows["train"].tolist()
    assert rows["train"].max() < len(run.images("train"))
    other_run = make_run(data, validation_queries=1, validation_database=7, seed=5, bits=8)
    assert [r.tolist() for r in validation_rows(other_run).values()] == [r.tolist() for r in rows.values()]
    by_seed = [
        tuple(validation_rows(dataclasses.replace(run, manifest=dataclasses.replace(run.manifest, seed=seed)))["train"])
        for seed in range(20)
    ]
    assert len(set(by_seed)) > 10
    # Every image can be drawn.
    assert set(np.concatenate(by_seed).tolist()) == set(range(len(run.images("train"))))


def test_only_queries_with_a_label_are_drawn(data):
    run = make_run(data, validation_queries=1)
    kept = run.images("validation").ids[-1]
    images = Images.of(
        image if image.split != "validation" or image.id == kept else dataclasses.replace(image, labels=())
        for image in run.manifest.images
    )
    for seed in range(5):
        manifest = dataclasses.replace(run.manifest, images=images, seed=seed)
        sampled = dataclasses.replace(run, manifest=manifest)
        assert sampled.images("validation")[validation_rows(sampled)["validation"]].ids == [kept]


def test_the_metric_is_that_of_the_sample_and_states_its_size(data, tmp_path, monkeypatch):
    run = make_run(data, validation_queries=1, validation_database=7)
    read = []

    def recorded(root, images, *given, **more):
        read.append(len(images))
        return load_tables(root, images, *given, **more)

    load_tables = parts.load_tables
    monkeypatch.setattr(parts, "load_tables", recorded)
    record = trained(run, tmp_path).history[-1]
    assert [record[name] for name in SIZES] == [1, 7]
    # The training part, for its batches; of the validation part, the sample.
    assert read == [len(run.images("train")), 1]
    read.clear()
    beside = validate(run, tmp_path / "epoch1")
    assert read == [7, 1]
    assert {name: record[name] for name in beside} == beside
    reference, queries = load_validation_parts(run, run.build(), None, "cpu", "auto")
    rows = validation_rows(run)
    for part, split in ((reference, "train"), (queries, "validation")):
        assert part.ids == run.images(split)[rows[split]].ids
        assert part.labels.tolist() == run.labels()[split][rows[split]].tolist()
    whole = trained(make_run(data)).history[-1]
    assert [whole[name] for name in SIZES] == [len(run.images("validation")), len(run.images("train"))]


# Ranks.

WORLD_SIZE, BITS = 2, 16


def given(multi):
    """Codes and labels of 11 queries and 130 items. Some have no label."""
    rng = np.random.default_rng(multi)
    labels = [rng.random((n, 5)) < 0.3 if multi else rng.integers(-1, 4, n) for n in (11, 130)]
    return *(pack(rng.random((n, BITS)) < 0.3) for n in (11, 130)), *labels


def scored(multi, rank=0, world_size=1):
    """The means of three definitions; and with one labelled query only, and with none."""
    queries, database, query_labels, database_labels = given(multi)
    found = []
    for known in (np.arange(11) >= 0, np.arange(11) == 4, np.arange(11) < 0):
        labels = np.where(known[:, None], query_labels, False) if multi else np.where(known, query_labels, -1)
        mine = slice(rank, None, world_size)
        found.append(
            mean_scores(
                queries[mine],
                database[mine],
                labels[mine],
                database_labels[mine],
                BITS,
                ("ap_min", "ap_first_k", "ap_k"),
            )
        )
    return found


def work(rank, folder):
    """What each process runs."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=WORLD_SIZE)
    torch.save([scored(multi, rank, WORLD_SIZE) for multi in (False, True)], folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_the_mean_does_not_depend_on_the_number_of_ranks(tmp_path):
    torch.multiprocessing.spawn(work, (tmp_path,), nprocs=WORLD_SIZE)
    expected = [scored(multi) for multi in (False, True)]
    for rank in range(WORLD_SIZE):
        assert torch.load(tmp_path / f"{rank}.pt") == expected


@pytest.mark.parametrize("multi", [False, True])
def test_the_mean_is_that_of_all_pairs(multi):
    queries, database, query_labels, database_labels = given(multi)
    distances, scores = hamming(queries, database), []
    for query, label in enumerate(query_labels):
        relevant = (database_labels & label).any(1) if multi else database_labels == label
        if not (label.any() if multi else label >= 0):
            continue
        counts = [np.bincount(row, minlength=BITS + 1)[None] for row in (distances[query], distances[query][relevant])]
        scores.append([average_precision(Histograms(*counts), 20, d)[0] for d in ("ap_min", "ap_first_k", "ap_k")])
    assert 0 < len(scores) < 11
    whole, _, none = scored(multi)
    assert whole == [np.array(column).mean() for column in zip(*scores, strict=True)]
    assert none is None
