"""The words for the parts of a model that both of its descriptions use: name, data, architecture, settings."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orbithash.encoders.imagery.rendering import Rendering
from orbithash.trainers.datasets import DATASETS
from orbithash.trainers.publishing.statements import Statements
from orbithash.trainers.publishing.trained_model import TrainedModel

__all__ = [
    "band_names",
    "data_types",
    "known_dataset",
    "model_name",
    "public_settings",
    "slug",
    "summary",
    "training_strategy",
]

# Datasets that are layouts of users' folders, and not data that somebody published.
_OF_USERS = ("folder", "pairs", "scenes", "embeddings")


def model_name(model: TrainedModel, statements: Statements) -> str:
    """Return the stated name, else one made of dataset, method and bits, such as "ucmd-dhcl-64"."""
    return statements.name or f"{model.run.manifest.dataset}-{model.card.method}-{model.card.bits}"


def slug(name: str) -> str:
    """Return a name in the characters of file names and of repositories of the hub."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:96]


def known_dataset(model: TrainedModel) -> str | None:
    """Return the name of the dataset if it is a published one; None for a user's own folder or table."""
    name = model.run.manifest.dataset
    return name if name in DATASETS and name not in _OF_USERS else None


def summary(model: TrainedModel) -> str:
    """Return one sentence that says what the model does."""
    card = model.card
    if model.is_of_embeddings:
        what = f"embeddings of {card.network.backbone.num_features} dimensions"
    elif card.text is not None:
        what = "Earth-observation images and sentences"
    else:
        what = "Earth-observation images"
    vector = f" and int8 vectors of {card.vector.dims} dimensions" if card.vector is not None else ""
    return (
        f"Turns {what} into binary codes of {card.bits} bits{vector}, whose nearest ones are found by Hamming distance."
    )


def training_strategy(model: TrainedModel) -> str:
    """Return how the model was trained: the method, and what it learns from."""
    from orbithash.trainers.methods import get_method

    method = get_method(model.card.method)
    return f"{model.card.method}, learns from {method.learns_from}"


def band_names(rendering: Rendering) -> list[str]:
    """Return the names of the bands of the network's input, in order; a number is the position in the file."""
    if rendering.bands is None:
        return ["red", "green", "blue"]
    return [band if isinstance(band, str) else f"band-{band}" for band in rendering.bands]


def data_types(model: TrainedModel) -> list[str]:
    """Return the types of the images that the model takes, and text, in the words of geoembeddings.org."""
    card = model.card
    rendering = card.preprocessing.rendering
    if rendering.values in ("decibel", "power") or {"VV", "VH"} & set(band_names(rendering)):
        types = ["SAR"]
    elif rendering.bands is None or len(rendering.bands) <= 3:
        types = ["RGB"]
    else:
        types = ["multispectral"]
    return [*types, *(["text"] if card.text is not None else [])]


def public_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without the folders of this machine: of an absolute path, only the name is kept."""
    return {name: _without_folders(value) for name, value in settings.items()}


def _without_folders(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_without_folders(one) for one in value]
    if not isinstance(value, str):
        return value
    # A path may be the value, or stand after a colon or an equals sign, as in hf:/models/vit.
    return re.sub(r"(?:(?<=[:=])|^)(?!//)(?:[A-Za-z]:[\\/]|/|~|file://)\S*", lambda found: Path(found[0]).name, value)
