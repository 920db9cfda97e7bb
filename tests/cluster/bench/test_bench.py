"""`bench encode` and `bench train`: what they compare, what they refuse, and that they run. Speed is never asserted."""

import os
import types
from contextlib import nullcontext

import numpy as np
import pytest

from orbithash.cluster.bench import encode as bench
from orbithash.cluster.bench.encode import bench_embeddings, bench_encode
from orbithash.cluster.bench.train import _rate, bench_train
from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.errors import InputError
from orbithash.encoders.networks.model import HashModel
from orbithash.encoders.sources.records import read_record
from orbithash.encoders.sources.sources import list_source


def test_the_plain_loop_does_the_work_of_encode(scenes, model, tmp_path):
    """It writes a row with the right code for every image."""
    loaded, items = HashModel.load(model), list_source(str(scenes))
    assert bench._whole_loop(loaded, items, tmp_path / "archive", 2) > 0
    archive = Archive.open(tmp_path / "archive")
    assert set(archive.keys()) == {item.key for item in items}
    codes = dict(zip(*archive.codes(), strict=True))
    ids = archive.find([item.key for item in items])
    for item in items[::7]:
        (code,) = loaded.encode_prepared(read_record(item, loaded.preprocessing).pixels[None])
        assert np.array_equal(codes[ids[item.key]], code)


def test_the_pipeline_is_compared_with_the_mean_of_loops_before_and_after(monkeypatch, scenes, model):
    whole, encode_only = iter([100.0, 300.0]), iter([50.0, 350.0])
    monkeypatch.setattr(bench, "BATCH_SIZE", 4)
    monkeypatch.setattr(bench, "_whole_loop", lambda *_: next(whole))
    monkeypatch.setattr(bench, "_encode_loop", lambda *_: next(encode_only))
    monkeypatch.setattr(bench, "encode", lambda *_: types.SimpleNamespace(rows_per_s=50.0, start_s=1.5))
    monkeypatch.setattr(bench, "connected", nullcontext)
    result = bench_encode(model, scenes, 8)
    assert (result["images"], result["pipeline_images_per_s"], result["pipeline_start_s"]) == (8, 50, 1.5)
    assert (result["whole_loop_images_per_s"], result["ratio_to_whole_loop"]) == (200, 0.25)
    assert (result["encode_loop_images_per_s"], result["ratio_to_encode_loop"]) == (200, 0.25)


def test_the_first_epoch_warms_up():
    assert _rate([{"images_per_s": value} for value in (1.0, 300.0, 500.0)]) == 400


def test_too_little_to_measure():
    with pytest.raises(InputError, match="--count is 5"):
        bench_encode(None, None, 5)
    with pytest.raises(InputError, match="--epochs is 1"):
        bench_train(None, None, 1)
    with pytest.raises(InputError, match="--workers is 0"):
        bench_train(None, None, 2, 0)


def test_fewer_images_than_asked_for(monkeypatch, scenes, model):
    monkeypatch.setattr(bench, "connected", nullcontext)
    with pytest.raises(InputError, match="images, --count asks for 1000"):
        bench_encode(model, scenes, 1000)


@pytest.mark.slow
def test_bench_encode(ray_cluster):
    result = bench_encode(None, None, 128)
    assert result["images"] == 128
    names = ("pipeline_images_per_s", "whole_loop_images_per_s", "encode_loop_images_per_s", "pipeline_start_s")
    assert min(result[name] for name in names) > 0


@pytest.mark.slow
def test_bench_embeddings(ray_cluster, monkeypatch):
    monkeypatch.setattr(bench, "MAX_ENCODED_HERE", 0)
    monkeypatch.setattr("orbithash.cluster.encoding.vectors.MAX_ENCODED_HERE", 0)
    result = bench_embeddings(3000, 32)
    assert (result["rows"], result["bits"], result["stored_vector_dims"]) == (3000, 64, 32)
    assert result["ratio_to_loop"] == pytest.approx(result["pipeline_rows_per_s"] / result["loop_rows_per_s"])
    assert 0 < result["driver_mib_begin"] <= result["driver_mib_max"]


def test_too_few_vectors_to_measure():
    with pytest.raises(InputError, match="--rows is 1000; more than 32768 are needed"):
        bench_embeddings(1000, 32)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_bench_train(ray_cluster, shared, monkeypatch):
    # A few batches of 32 for each of the eleven trainings.
    monkeypatch.setattr("orbithash.cluster.bench.train._NUM_SCENES", 168)
    weights = shared / "weights" / "mobilenet_v2_imagenet.safetensors"
    workers = min(2, os.cpu_count())
    result = bench_train(None, str(weights), 2, workers)
    assert result["images_per_worker_and_step"] * workers == 32
    loops = ("bare_loop", "bare_loops", "kept_loops", *(("gathering_loops", "ranks") if workers > 1 else ()))
    names = (
        "worker_images_per_s",
        "worker_start_s",
        "worker_peak_memory_mb",
        *(f"{name}_images_per_s" for name in loops),
    )
    assert min(result[name] for name in names) > 0
