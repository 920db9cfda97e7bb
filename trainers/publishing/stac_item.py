"""The STAC item of a model, with the Machine Learning Model (MLM) extension 1.4.0.

https://github.com/stac-extensions/mlm. pystac writes the item; the fields of the extension are written here, because
pystac 1.15 knows neither a list of scalings, one for each band, nor the extension's names of interpolations.
"""

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pystac

from orbithash.encoders.places.code_description import STAC_FIELD
from orbithash.trainers.publishing.front_matter import base_model
from orbithash.trainers.publishing.statements import Statements
from orbithash.trainers.publishing.trained_model import TrainedModel
from orbithash.trainers.publishing.wording import band_names, model_name, public_settings, slug, summary

__all__ = ["MLM_SCHEMA", "stac_item"]

MLM_SCHEMA = "https://stac-extensions.github.io/mlm/v1.4.0/schema.json"
FILE_SCHEMA = "https://stac-extensions.github.io/file/v2.1.0/schema.json"

TASK = "similarity-search"

_INTERPOLATIONS = {"bilinear": "interpolation-linear", "bicubic": "interpolation-cubic"}

# The interval that the extension recommends for a model without dates of its own.
_ANY_TIME = (datetime(1900, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC))

# Start of a multihash of SHA-256: code and number of bytes.
_MULTIHASH_SHA256 = "1220"


def stac_item(model: TrainedModel, statements: Statements) -> dict[str, Any]:
    """Return the item as JSON values; links to files are relative to the model folder."""
    start, end = statements.interval() or _ANY_TIME
    bbox = statements.bbox
    item = pystac.Item(
        id=slug(model_name(model, statements)),
        geometry=None if bbox is None else _outline(*bbox),
        bbox=None if bbox is None else list(bbox),
        datetime=None,
        start_datetime=start,
        end_datetime=end,
        properties=_properties(model, statements),
        stac_extensions=[MLM_SCHEMA, FILE_SCHEMA],
    )
    item.add_asset("model", _weights(model))
    item.add_asset(
        "description",
        pystac.Asset(
            "./model.json", "Layers, preprocessing and thresholds", media_type="application/json", roles=["metadata"]
        ),
    )
    item.add_asset("card", pystac.Asset("./README.md", "Model card", media_type="text/markdown", roles=["metadata"]))
    return item.to_dict(include_self_link=False, transform_hrefs=False)


def _weights(model: TrainedModel) -> pystac.Asset:
    # STAC 1.1 allows bands in the properties of an item only if an asset has some; MLM requires them in the properties.
    bands = {} if model.is_of_embeddings else {"bands": _bands(model)}
    return pystac.Asset(
        "./model.safetensors",
        title="Weights",
        media_type="application/octet-stream; framework=safetensors",
        roles=["mlm:model", "mlm:weights", "weights"],
        extra_fields={
            "mlm:artifact_type": "safetensors",
            "file:size": model.weights_bytes,
            "file:checksum": f"{_MULTIHASH_SHA256}{model.weights_sha256}",
            **bands,
        },
    )


def _properties(model: TrainedModel, statements: Statements) -> dict[str, Any]:
    card = model.card
    backbone = card.network.backbone
    properties: dict[str, Any] = {
        "title": model_name(model, statements),
        "description": summary(model),
        "license": statements.licence.spdx_id,
        "mlm:name": model_name(model, statements),
        "mlm:architecture": backbone.name or "embedding",
        "mlm:tasks": [TASK],
        "mlm:framework": "PyTorch",
        **_framework_version(card.versions.get("torch", "")),
        "mlm:memory_size": model.weights_bytes,
        "mlm:total_parameters": model.num_parameters,
        "mlm:pretrained": not backbone.has_random_weights,
        "mlm:pretrained_source": None
        if backbone.has_random_weights
        else base_model(model) or backbone.origin or "not stated",
        "mlm:accelerator": None,
        "mlm:input": list(_inputs(model)),
        "mlm:output": list(_outputs(model)),
        "mlm:hyperparameters": public_settings(model.run.config.model_dump(mode="json", exclude_none=True)),
        STAC_FIELD: model.codes.to_json(),
    }
    if statements.provider:
        properties["providers"] = [{"name": statements.provider, "roles": ["producer"]}]
    if not model.is_of_embeddings:
        properties["bands"] = _bands(model)
    return properties


def _framework_version(version: str) -> dict[str, str]:
    """Return the field of the version in the form that the extension allows, without the letters of a nightly build."""
    found = re.match(r"\d+\.\d+\.\d+", version)
    return {"mlm:framework_version": found[0]} if found else {}


def _bands(model: TrainedModel) -> list[dict[str, Any]]:
    return [{"name": name} for name in band_names(model.card.preprocessing.rendering)]


def _inputs(model: TrainedModel) -> Iterator[dict[str, Any]]:
    """Yield the model's inputs: images or vectors, then sentences."""
    card = model.card
    preprocessing, backbone = card.preprocessing, card.network.backbone
    if model.is_of_embeddings:
        yield {
            "name": "vector",
            "description": f"vectors of the embedding {backbone.name or 'that the model was trained on'}",
            "bands": [],
            "input": _array(["batch", "embedding"], [-1, backbone.num_features], "float32"),
            "value_scaling": None,
            "resize_type": None,
        }
        return
    rendering = preprocessing.rendering
    # Of a picture, the statistics are those of values in 0 to 1, and the picture has 0 to 255.
    unit = 255 if rendering.is_picture else 1
    names = band_names(rendering)
    names = names * (backbone.channels // len(names))
    yield {
        "name": "image",
        "description": "8-bit picture" if rendering.is_picture else f"numbers: {rendering.values}",
        "bands": names,
        "input": _array(
            ["batch", "channel", "height", "width"],
            [-1, backbone.channels, preprocessing.crop, preprocessing.crop],
            "float32",
        ),
        "value_scaling": [
            {"type": "z-score", "mean": mean * unit, "stddev": std * unit}
            for mean, std in zip(preprocessing.mean, preprocessing.std, strict=True)
        ],
        "resize_type": _INTERPOLATIONS[preprocessing.interpolation],
        "pre_processing_function": {"format": "python", "expression": "orbithash.encoders:HashModel.encode_files"},
    }
    if card.text is not None:
        yield {
            "name": "text",
            "description": "English sentence, as tokens of the text encoder in text_encoder/",
            "bands": [],
            "input": _array(["batch", "token"], [-1, -1], "int64"),
            "value_scaling": None,
            "resize_type": None,
            "pre_processing_function": {"format": "python", "expression": "orbithash.encoders:HashModel.encode_texts"},
        }


def _outputs(model: TrainedModel) -> Iterator[dict[str, Any]]:
    """Yield the model's outputs: packed codes, then stored vectors."""
    card = model.card
    yield {
        "name": "code",
        "description": f"binary code of {card.bits} bits, the first in the most significant bit of the first byte",
        "tasks": [TASK],
        "result": _array(["batch", "byte"], [-1, model.codes.num_bytes], "uint8"),
    }
    if card.vector is not None:
        yield {
            "name": "vector",
            "description": "projected features, for ranking a shortlist by cosine",
            "tasks": [TASK],
            "result": _array(["batch", "embedding"], [-1, card.vector.dims], "int8"),
        }


def _array(dimensions: list[str], shape: list[int], data_type: str) -> dict[str, Any]:
    return {"shape": shape, "dim_order": dimensions, "data_type": data_type}


def _outline(west: float, south: float, east: float, north: float) -> dict[str, Any]:
    """Return a rectangle as GeoJSON: two parts across 180 degrees."""
    spans = [(west, east)] if west <= east else [(west, 180.0), (-180.0, east)]
    parts = [[[[w, south], [e, south], [e, north], [w, north], [w, south]]] for w, e in spans]
    if len(parts) == 1:
        return {"type": "Polygon", "coordinates": parts[0]}
    return {"type": "MultiPolygon", "coordinates": parts}
