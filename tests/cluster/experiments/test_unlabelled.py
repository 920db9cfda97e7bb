"""A folder without labels becomes searchable with one command."""

import numpy as np
import pytest
from images import encoded

from orbithash.cluster.cli.main import app
from orbithash.cluster.experiments.unlabelled import run_unlabelled
from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.errors import InputError


def write_images(folder, count):
    rng = np.random.default_rng(0)
    # Subfolders of one image are no classes that a method could learn from.
    for i in range(count):
        (folder / f"day{i}").mkdir(parents=True)
        (folder / f"day{i}" / "tile.png").write_bytes(encoded(rng.integers(0, 255, (40, 40, 3), np.uint8), "PNG"))
    return folder


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_few_images_are_encoded_by_random_projections(tmp_path, tiny_backbones, capsys):
    data = write_images(tmp_path / "mine", 6)
    settings = (f"backbone={tiny_backbones['timm']['backbone']}",)
    weights = tiny_backbones["timm"]["weights"]
    run_unlabelled(tmp_path / "out", data, weights, settings)
    assert "fewer than 64 images to fit to: random projections (lsh)" in capsys.readouterr().err
    assert Archive.open(str(tmp_path / "out/archive")).num_rows == 6


def test_it_needs_a_folder():
    with pytest.raises(InputError, match="--unlabelled needs a folder of images as --data"):
        app(["demo", "--unlabelled"], standalone_mode=False)
