"""A backbone of each library: it trains, and its model folder encodes and answers without the source of the weights."""

import shutil

import numpy as np
import pytest
from backbone_models import TIMM, write_all
from method_parts import CLASSES, trained, write_data

from orbithash.encoders.imagery.images import read_image
from orbithash.encoders.networks.model import HashModel
from orbithash.trainers.config import load_config
from orbithash.trainers.datasets import make_manifest
from orbithash.trainers.loop.export import export_models
from orbithash.trainers.loop.run import Run, check_run
from orbithash.trainers.methods import get_method

SOURCES = ("timm", "hf", "hf dual", "open_clip", "torchgeo")

MHCLN = {"method": "mhcln", "batch_size": 12, "steps_per_epoch": 30, "hidden": (16,), "epochs": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "first")


def make_run(data, method, **settings):
    config = load_config(get_method(method).Config, bits=16, **settings)
    return Run(method, config, make_manifest(data, protocol="random"), data)


@pytest.mark.parametrize("source", SOURCES)
def test_a_model_of_each_library_trains_encodes_and_is_searched(data, tmp_path, source):
    """On frozen features. The source is removed before the model folder is read."""
    from orbithash.search.segments.segment import Segment

    settings = write_all(tmp_path / "source")[source]
    if source == "torchgeo":
        # The images are pictures of three bands without names.
        settings |= {"bands": (1, 2, 3), "values": "picture", "image_size": 64}
    run = make_run(data, **MHCLN, **settings)
    check_run(run, 1)
    trained(run, tmp_path)
    model, _ = export_models(run, tmp_path / "epoch2")
    model_id = model.save(tmp_path / "model")
    shutil.rmtree(tmp_path / "source")

    loaded = HashModel.load(tmp_path / "model")
    assert loaded.model_id == model_id
    images = [read_image(data / image.path, loaded.preprocessing.rendering) for image in run.manifest.images]
    codes = loaded.encode(images)
    assert np.array_equal(codes, model.encode(images))
    spec = loaded.card.network.backbone
    assert spec.source == source.split()[0]
    assert spec.origin
    assert "random" not in spec.origin
    # The nearest other image has the same colour: the classes differ in colour only.
    classes = np.array([image.path.split("/")[0] for image in run.manifest.images])
    answer = Segment.build(np.arange(len(codes), dtype=np.uint64), codes, loaded.bits).search(codes, 2)
    assert (answer.distances[:, 0] == 0).all()
    second = answer.ids[:, 1].astype(int)
    assert (classes[second] == classes).mean() > 0.6, f"chance is about {1 / len(CLASSES):.2f}"


def test_images_default_to_those_that_the_backbone_was_trained_on(tiny_backbones):
    kind = get_method("mhcln").Config
    config = load_config(kind, backbone=f"timm:{TIMM}")
    assert (config.image_size, config.interpolation, config.preprocessing().mean) == (160, "bicubic", (0.5,) * 3)
    config = load_config(kind, **tiny_backbones["hf"])
    assert (config.image_size, config.interpolation, config.preprocessing().std) == (32, "bicubic", (0.25,) * 3)
    assert load_config(kind, **tiny_backbones["open_clip"]).preprocessing().mean == (0.4,) * 3
    config = load_config(kind, **tiny_backbones["torchgeo"])
    assert (config.bands, config.values, config.image_size) == (("B04", "B03", "B02"), "reflectance", 224)
    # What the user gives stays.
    config = load_config(kind, **tiny_backbones["hf"], image_size=48, band_mean=0.1, band_std=0.2)
    assert (config.image_size, config.band_mean) == (48, (0.1,))
