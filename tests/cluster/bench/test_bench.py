"""The benchmarks run and state what they compare; how fast anything is, is nothing to assert."""

import os

import pytest

from orbithash.cluster.bench.throughput import bench_encode, bench_train
from orbithash.encoders.errors import InputError


@pytest.mark.slow
def test_bench_encode(ray_cluster):
    result = bench_encode(None, None, 128)
    assert result["images"] == 128
    for baseline in ("whole_loop", "encode_loop"):
        ratio = result["pipeline_images_per_s"] / result[f"{baseline}_images_per_s"]
        assert result[f"ratio_to_{baseline}"] == pytest.approx(ratio)
    assert result["pipeline_start_s"] > 0


@pytest.mark.slow
def test_bench_train(ray_cluster, shared):
    weights = shared / "weights" / "mobilenet_v2_imagenet.safetensors"
    workers = min(2, os.cpu_count())
    result = bench_train(None, str(weights), 2, workers)
    assert result["images_per_worker_and_step"] * workers == 32
    for baseline in ("bare_loop", "bare_loops", "kept_loops"):
        ratio = result["worker_images_per_s"] / result[f"{baseline}_images_per_s"]
        assert result[f"ratio_to_{baseline}"] == pytest.approx(ratio)
    assert result["worker_start_s"] > 0
    assert result["worker_peak_memory_mb"] > 0


def test_too_little_to_measure():
    with pytest.raises(InputError, match="--count is 5"):
        bench_encode(None, None, 5)
    with pytest.raises(InputError, match="--epochs is 1"):
        bench_train(None, None, 1)
    with pytest.raises(InputError, match="--workers is 0"):
        bench_train(None, None, 2, 0)
