"""`evaluate --workers`: workers encode, and every number is that of one process."""

import json

import numpy as np
import pytest
from cluster_parts import write_image

from orbithash.encoders.networks.model import HashModel
from orbithash.trainers import library

pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder, and the folder of its images."""
    monkeypatch.setenv("ORBITHASH_FEATURES", str(tmp_path / "training"))
    rng = np.random.default_rng(0)
    for number, name in enumerate(("beach", "forest", "river")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(10):
            write_image(tmp_path / "images" / name / f"{i}.png", rng, (80 * number, 100, 200 - 80 * number))
    settings = {"backbone": "mobilenet_v3_small", "image_size": 32, "bits": 16}
    library.train("itq", tmp_path / "images", tmp_path / "run", device="cpu", **settings)
    return tmp_path / "run", tmp_path / "images"


@pytest.mark.ray
def test_workers_compute_what_one_process_would(ray_cluster, cli, run, tmp_path, monkeypatch):
    folder, images = run
    # Rounding may change every code, so that each image is computed alone as well.
    monkeypatch.setattr("orbithash.encoders.networks.binarizer.MARGIN", 1e9)
    monkeypatch.setenv("ORBITHASH_FEATURES", str(tmp_path / "one"))
    expected, _, _ = library.evaluate_run(folder, images, device="cpu")
    alone = library.evaluation_features(folder, images, None, True, None, "cpu")["queries"].table()[:]

    monkeypatch.setenv("ORBITHASH_FEATURES", str(tmp_path / "many"))
    features, computed = HashModel.features, []
    monkeypatch.setattr(
        HashModel,
        "features",
        lambda self, images, **options: computed.append(len(images)) or features(self, images, **options),
    )
    ended = cli("evaluate", folder, "--data", images, "--workers", 2, "--json")
    assert ended.code == 0, ended.err
    # In the workers only.
    assert computed == []
    assert json.loads(ended.out) == json.loads(json.dumps(expected))
    by_workers = library.evaluation_features(folder, images, None, True, None, "cpu")["queries"].table()[:]
    assert by_workers.tobytes() == alone.tobytes()


def test_changed_images_and_wrong_numbers_are_refused_before_workers_start(cli, run, tmp_path, monkeypatch):
    folder, images = run
    monkeypatch.setattr("orbithash.cluster.experiments.evaluate.fill", None)
    monkeypatch.setenv("ORBITHASH_FEATURES", str(tmp_path / "many"))
    ended = cli("evaluate", folder, "--data", images, "--workers", 0)
    assert ended.code == 2
    assert "--workers is 0; at least 1 is needed" in ended.err
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    ended = cli("evaluate", folder, "--data", images, "--workers", 1, "--gpus-per-worker", 1)
    assert ended.code == 2
    assert "--gpus-per-worker is 1 and this process has no GPU to look up what the workers compute" in ended.err
    (images / "beach" / "0.png").write_bytes((images / "beach" / "1.png").read_bytes())
    ended = cli("evaluate", folder, "--data", images, "--workers", 1)
    assert ended.code == 2
    assert "beach/0.png: another file" in ended.err
