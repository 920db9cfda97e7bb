"""`bench features`: what it compares and refuses, and that it runs. Speed is never asserted."""

import json
import types
from contextlib import nullcontext

import numpy as np
import pytest
from cluster_parts import write_image

from orbithash.cluster.bench.training import features as bench
from orbithash.cluster.bench.training.features import bench_features
from orbithash.encoders.errors import InputError


@pytest.fixture
def few_images(monkeypatch, tmp_path):
    """100 images of two classes in place of the generated scenes, and no minimum."""
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(50):
            write_image(tmp_path / "images" / name / f"{number}.png", rng)
    monkeypatch.setattr(bench, "write_bench_scenes", lambda folder, count: tmp_path / "images")
    monkeypatch.setattr(bench, "_MIN_BATCHES", 0)


def test_the_workers_are_compared_with_the_mean_of_loops_before_and_after(few_images, monkeypatch):
    loops = iter([100.0, 400.0, 300.0, 600.0])
    monkeypatch.setattr(bench, "_loops", lambda *_: next(loops))
    filled = types.SimpleNamespace(num_computed=32, images_per_s=50.0, start_s=1.5)
    monkeypatch.setattr(bench, "fill_for_training", lambda *_: filled)
    monkeypatch.setattr(bench, "connected", nullcontext)
    result = bench_features(40, 1)
    assert (result["images"], result["workers_images_per_s"], result["workers_start_s"]) == (32, 50, 1.5)
    assert (result["bare_loops_images_per_s"], result["ratio_to_bare_loops"]) == (200, 0.25)
    assert (result["kept_loops_images_per_s"], result["ratio_to_kept_loops"]) == (500, 0.1)


@pytest.mark.ray
def test_bench_features(ray_cluster, few_images, cli, monkeypatch, tmp_path):
    monkeypatch.setenv("ORBITHASH_FEATURES", str(tmp_path / "own"))
    ended = cli("bench", "features", "--count", 40, "--workers", 1, "--json")
    assert ended.code == 0, ended.err
    result = json.loads(ended.out)
    assert (result["bench"], result["workers"], result["network"]) == ("features", 1, "mobilenet_v2")
    assert 65 < result["images"] < 100
    ratio = result["workers_images_per_s"] / result["bare_loops_images_per_s"]
    assert result["ratio_to_bare_loops"] == pytest.approx(ratio)
    assert result["workers_start_s"] > 0
    # The store of the user has nothing of it.
    assert not (tmp_path / "own").exists()


def test_invalid_settings_of_bench_features():
    with pytest.raises(InputError, match="--workers is 0; 1 to"):
        bench_features(10_000, 0)
    with pytest.raises(InputError, match="--count is 255; at least 256"):
        bench_features(255, 1)
