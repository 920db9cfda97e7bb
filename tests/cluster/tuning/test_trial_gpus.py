"""Each trial has GPUs of its own, a part of one, or none: what Ray Tune is asked for."""

from types import SimpleNamespace

import pytest

from orbithash.cluster.tuning.running import _tuner


class Asked(Exception):
    pass


@pytest.mark.parametrize("gpus", [0, 0.25, 1])
def test_trials_have_gpus_of_their_own_or_none(tmp_path, monkeypatch, gpus):
    def with_resources(trainable, resources):
        raise Asked(trainable.keywords["num_gpus"], resources)

    monkeypatch.setattr("ray.tune.with_resources", with_resources)
    tuning = SimpleNamespace(cpus=2, gpus=gpus, metric="ap_min@20")
    with pytest.raises(Asked) as asked:
        _tuner(tmp_path / "base", tmp_path, tuning, 2, lambda number, records: {}, 1, lambda number, text: None)
    assert asked.value.args == (gpus, {"CPU": 2, "GPU": gpus})
