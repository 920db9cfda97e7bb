"""The STAC item of a model: valid STAC, readable by pystac's MLM extension, and true to the model."""

import hashlib
import json
import re

import pystac
import pytest
from pystac.extensions.file import FileExtension
from pystac.extensions.mlm import MLMExtension, TaskType
from pystac.stac_object import STACObjectType
from pystac.validation.stac_validator import JsonSchemaSTACValidator

from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.imagery.rendering import Rendering
from orbithash.encoders.networks.card import (
    RANDOM_WEIGHTS,
    BackboneSpec,
    HeadSpec,
    ModelCard,
    NetworkSpec,
    ProjectionSpec,
    TextSpec,
)
from orbithash.encoders.places.code_description import STAC_FIELD, CodeDescription
from orbithash.trainers.config import load_config
from orbithash.trainers.datasets import Image, Manifest
from orbithash.trainers.loop.run import Run
from orbithash.trainers.methods import get_method
from orbithash.trainers.publishing.stac_item import MLM_SCHEMA, stac_item
from orbithash.trainers.publishing.statements import Licence, Statements
from orbithash.trainers.publishing.trained_model import TrainedModel

WEIGHTS = hashlib.sha256(b"weights").hexdigest()


def trained(folder, method="dhcl", rendering=None, backbone=None, **changes):
    """A model whose weights are those of no network, with the settings of its method."""
    rendering = rendering or Rendering()
    backbone = backbone or BackboneSpec(
        "torchvision", "resnet8", {}, "avg", "group", rendering.channels, 8, RANDOM_WEIGHTS
    )
    statistics = (
        {} if rendering.is_picture else {"mean": (0.1,) * rendering.channels, "std": (2.0,) * rendering.channels}
    )
    card = ModelCard(
        method=method,
        network=NetworkSpec(backbone, HeadSpec(20)),
        thresholds=(0.0,) * 20,
        label_code="none",
        label_weight=1,
        preprocessing=Preprocessing(rendering, 64, 32, **statistics),
        classes=("beach",),
        dataset={},
        metrics={"epoch": 1},
        **{"projection": ProjectionSpec(8, 4, 0.01), **changes},
    )
    manifest = Manifest("ucmd", "dhcl", 0, 0.1, ("beach",), (Image("a", "a.png", (0,), "train", "0" * 64),))
    config = load_config(get_method(method).Config, weights="/nowhere/weights.safetensors", norm="frozen-batch")
    model = TrainedModel(folder, card, "f" * 32, WEIGHTS, 1234, Run(method, config, manifest, folder), 3, (), ())
    # A cached property: there is no file to count in.
    model.__dict__["num_parameters"] = 99
    return model


def text_side():
    return TextSpec("0" * 64, 8, HeadSpec(20))


MODELS = {
    "picture": {},
    "text": {"method": "duch", "text": text_side()},
    "numbers": {"rendering": Rendering(("B04", "B03", "B02", "B08"), values="reflectance")},
    "radar": {"rendering": Rendering(("VV", "VH"), values="decibel")},
    "one band": {"rendering": Rendering((3,))},
    "embedding": {
        "backbone": BackboneSpec("embedding", "clay v1", {}, "none", "none", 3, 1024, "https://source.coop/clay")
    },
    "without vectors": {"projection": None},
}


@pytest.mark.parametrize("name", MODELS)
def test_an_item_is_valid(tmp_path, name):
    item = stac_item(trained(tmp_path, **MODELS[name]), Statements())
    check(item)
    assert json.loads(json.dumps(item, allow_nan=False)) == item


def check(item):
    """Validate against the schema of STAC that pystac ships, and by the rules of the MLM extension."""
    JsonSchemaSTACValidator().validate_core(item, STACObjectType.ITEM, item["stac_version"])
    assert MLM_SCHEMA in item["stac_extensions"]
    properties = item["properties"]
    assert re.fullmatch(r"[a-zA-Z][a-zA-Z0-9_.\-\s]+[a-zA-Z0-9]", properties["mlm:name"])
    assert properties["mlm:tasks"] == ["similarity-search"]
    assert re.fullmatch(r"\d+\.\d+\.\d+(\+[0-9a-zA-Z.-]+)?", properties["mlm:framework_version"])
    assert properties["mlm:architecture"]
    assert (properties["mlm:pretrained_source"] is None) == (not properties["mlm:pretrained"])
    described = {band["name"] for band in properties.get("bands", [])}
    for one in properties["mlm:input"]:
        assert set(one["bands"]) <= described
        check_array(one["input"])
        for scaling in one["value_scaling"] or []:
            assert set(scaling) == {"type", "mean", "stddev"}
        assert len(one["value_scaling"] or one["bands"]) == len(one["bands"])
        assert one["resize_type"] in (None, "interpolation-linear", "interpolation-cubic")
    for one in properties["mlm:output"]:
        check_array(one["result"])
        assert set(one["tasks"]) <= set(properties["mlm:tasks"])
    assert all(re.fullmatch(r"[0-9a-zA-Z_.-]+", key) for key in properties["mlm:hyperparameters"])
    models = [asset for asset in item["assets"].values() if "mlm:model" in asset["roles"]]
    assert [asset["mlm:artifact_type"] for asset in models] == ["safetensors"]
    for asset in item["assets"].values():
        assert not {"mlm:name", "mlm:input", "mlm:output", "mlm:hyperparameters"} & set(asset)
    # Through pystac and back.
    assert pystac.Item.from_dict(item).to_dict(include_self_link=False, transform_hrefs=False) == item


def check_array(array):
    assert len(array["shape"]) == len(array["dim_order"]) == len(set(array["dim_order"]))
    assert all(side == -1 or side > 0 for side in array["shape"])
    assert array["data_type"] in ("float32", "uint8", "int8", "int64")


def test_the_extension_of_pystac_reads_it(tmp_path):
    item = pystac.Item.from_dict(stac_item(trained(tmp_path, **MODELS["numbers"]), Statements()))
    model = MLMExtension.ext(item)
    assert (model.mlm_name, model.architecture, model.framework) == ("ucmd-dhcl-20", "resnet8", "PyTorch")
    assert model.tasks == [TaskType.SIMILARITY_SEARCH]
    assert (model.pretrained, model.pretrained_source, model.total_parameters) == (False, None, 99)
    (image,) = model.input
    assert image.bands == ["B04", "B03", "B02", "B08"]
    assert image.input.shape == [-1, 4, 32, 32]
    code, vector = model.output
    assert (code.name, code.result.shape, code.result.data_type) == ("code", [-1, 3], "uint8")
    assert (vector.name, vector.result.shape, vector.result.data_type) == ("vector", [-1, 4], "int8")
    file = FileExtension.ext(item.assets["model"])
    assert (file.size, file.checksum) == (1234, "1220" + WEIGHTS)


def test_scaling_and_codes_are_those_of_the_model(tmp_path):
    model = trained(tmp_path)
    properties = stac_item(model, Statements())["properties"]
    red = properties["mlm:input"][0]["value_scaling"][0]
    # Of 8-bit values.
    assert (red["mean"], red["stddev"]) == pytest.approx((0.485 * 255, 0.229 * 255))
    assert CodeDescription.from_json(properties[STAC_FIELD]) == model.codes
    assert model.codes.bits == 20
    numbers = stac_item(trained(tmp_path, **MODELS["radar"]), Statements())["properties"]["mlm:input"][0]
    assert (numbers["value_scaling"][0]["mean"], numbers["description"]) == (0.1, "numbers: decibel")


def test_statements_become_common_metadata(tmp_path):
    stated = Statements(
        "My model", Licence("MIT"), provider="Lab", bbox=(170, -10, -170, 10), dates="2020-01-01/2021-06-30"
    )
    item = stac_item(trained(tmp_path), stated)
    check(item)
    assert item["id"] == "My-model"
    assert item["bbox"] == [170, -10, -170, 10]
    assert item["geometry"]["type"] == "MultiPolygon"
    properties = item["properties"]
    assert (properties["license"], properties["providers"]) == ("MIT", [{"name": "Lab", "roles": ["producer"]}])
    assert (properties["start_datetime"], properties["end_datetime"]) == (
        "2020-01-01T00:00:00Z",
        "2021-06-30T00:00:00Z",
    )
    plain = stac_item(trained(tmp_path), Statements(bbox=(0, 0, 1, 2)))
    check(plain)
    assert plain["geometry"]["type"] == "Polygon"
    nothing = stac_item(trained(tmp_path), Statements())
    assert (nothing["geometry"], nothing["properties"]["license"], "bbox" in nothing) == (None, "other", False)


def test_the_models_of_the_extensions_own_package_accept_it(tmp_path):
    """`stac-model` is the package of the authors of the extension."""
    package = pytest.importorskip("stac_model.schema", reason="needs the package stac-model")
    for changes in MODELS.values():
        properties = stac_item(trained(tmp_path, **changes), Statements())["properties"]
        fields = {name.removeprefix("mlm:"): value for name, value in properties.items() if name.startswith("mlm:")}
        package.MLModelProperties.model_validate(fields)
