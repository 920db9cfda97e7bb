"""The feature tables that a method trains on."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from orbithash.encoders.card import HeadSpec, NetworkSpec
from orbithash.encoders.codes import MIN_BITS
from orbithash.encoders.errors import InputError
from orbithash.encoders.networks import HashNetwork
from orbithash.encoders.preprocessing import Preprocessing
from orbithash.trainers.config import TrainConfig
from orbithash.trainers.datasets import Image
from orbithash.trainers.features import FeatureExtractor, Table, cache_folder, caption_features
from orbithash.trainers.methods import Method

__all__ = ["check_sources", "load_tables"]


def load_tables(
    root: Path, images: list[Image], method: Method, preprocessing: Preprocessing, device: str = "cpu"
) -> dict[str, npt.NDArray[np.float32]]:
    """Each of the method's tables for these images, float32 [N, ...].

    `InputError` when images lack the captions or the second source that the method needs.
    """
    config: TrainConfig = method.config  # type: ignore[assignment]
    extractors: dict[tuple[str | None, str | None], FeatureExtractor] = {}
    tables = {}
    check_sources(images, method)
    for name, table in method.tables.items():
        if table.source == "caption":
            tables[name] = _captions(images, table, method, device)
            continue
        which = (table.backbone, table.weights)
        if which not in extractors:
            extractors[which] = FeatureExtractor(_network(table, method, preprocessing), preprocessing, device)
        tables[name] = extractors[which](root, images, table.source, table.augmentation, config.seed)
    return tables


def _network(table: Table, method: Method, preprocessing: Preprocessing) -> HashNetwork:
    if table.backbone is None:
        return method.network
    norm = "group" if table.weights is None else "frozen-batch"
    # Its head is never used.
    spec = NetworkSpec(table.backbone, norm, "avg", HeadSpec(bits=MIN_BITS), channels=preprocessing.channels)
    return HashNetwork(spec, table.weights)


def _captions(images: list[Image], table: Table, method: Method, device: str) -> npt.NDArray[np.float32]:
    encoder = method.text_encoder(device)
    assert encoder is not None, "a method with a table of captions has a text encoder"
    captions = [list(image.captions) for image in images]
    if table.augmentation is not None:
        from orbithash.trainers.captions import augment_captions

        config: TrainConfig = method.config  # type: ignore[assignment]
        captions = augment_captions(
            captions,
            table.augmentation,
            seed=config.seed,
            encoder=encoder,
            device=device,
            cache=cache_folder() / "captions",
        )
    return caption_features(encoder, captions)


def check_sources(images: list[Image], method: Method) -> None:
    """`InputError` when images lack the captions or the second source that the method trains on."""
    for table in method.tables.values():
        _check(images, table)


def _check(images: list[Image], table: Table) -> None:
    if table.source == "caption":
        lacking = [image.path for image in images if not image.captions]
        what, remedy = "captions", "give --captions FILE, or a data set that has them"
    elif table.source == "second":
        lacking = [image.path for image in images if image.second is None]
        what, remedy = "a second source", "use a data set of pairs; `orbithash wald` makes one of any RGB images"
    else:
        return
    if lacking:
        raise InputError(f"{len(lacking)} of {len(images)} images have no {what} (first: {lacking[0]}); {remedy}")
