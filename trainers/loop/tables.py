"""Feature tables that a method trains on."""

from collections.abc import Collection
from pathlib import Path

import torch

from orbithash.encoders.errors import InputError
from orbithash.encoders.files import cache_folder
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.networks.backbones.build import build_backbone
from orbithash.encoders.networks.backbones.rgb import rgb_channels
from orbithash.encoders.networks.hash_network import HashNetwork
from orbithash.encoders.sources.image_roots import ImageRoot, local_folder
from orbithash.trainers.config import TrainConfig
from orbithash.trainers.data.feature_table import FeatureRows
from orbithash.trainers.datasets import Images
from orbithash.trainers.datasets.embeddings import read_vectors
from orbithash.trainers.features.features import FeatureExtractor, Table, Wanted, caption_features
from orbithash.trainers.methods import Method

__all__ = ["check_sources", "load_tables", "wanted_tables"]


def load_tables(
    root: ImageRoot,
    images: Images,
    method: Method,
    preprocessing: Preprocessing,
    device: str | torch.device = "cpu",
    training: bool = True,
    names: Collection[str] | None = None,
) -> dict[str, FeatureRows]:
    """Return the method's feature tables for these images, float32 [N, ...] by name.

    Tables with `training_only` are left out unless `training`. `names`: only these tables; None: all. `InputError` if
    images lack the captions or the second source that the method needs.
    """
    config: TrainConfig = method.config  # type: ignore[assignment]
    extractors = _Extractors(method, preprocessing, device)
    tables: dict[str, FeatureRows] = {}
    for name, table in _chosen(images, method, training, names).items():
        if table.source == "caption":
            tables[name] = _captions(images, table, method, device)
        elif config.is_of_embeddings:
            tables[name] = read_vectors(local_folder(root, "tables of embeddings"), config.table, images)
        else:
            tables[name] = extractors.wanted(root, images, table).table()
    return tables


def wanted_tables(
    root: ImageRoot,
    images: Images,
    method: Method,
    preprocessing: Preprocessing,
    device: str | torch.device = "cpu",
    training: bool = True,
) -> dict[str, Wanted]:
    """Return, by table, what `load_tables` computes of images or reads from the store; the errors are the same."""
    extractors = _Extractors(method, preprocessing, device)
    return {
        name: extractors.wanted(root, images, table)
        for name, table in _chosen(images, method, training, None).items()
        if table.source != "caption"
    }


def _chosen(images: Images, method: Method, training: bool, names: Collection[str] | None) -> dict[str, Table]:
    """Return the tables that `load_tables` loads; `InputError` if images lack what they need."""
    chosen = {
        name: table
        for name, table in method.tables.items()
        if (training or not table.training_only) and (names is None or name in names)
        # Captions that are not needed.
        if not table.optional or images.has_captions.all()
    }
    for table in chosen.values():
        _check(images, table)
    return chosen


class _Extractors:
    """The extractors of a method's tables, each made once."""

    def __init__(self, method: Method, preprocessing: Preprocessing, device: str | torch.device) -> None:
        self._method, self._preprocessing, self._device = method, preprocessing, device
        self._made: dict[tuple[str | None, str | None, Preprocessing], FeatureExtractor] = {}

    def wanted(self, root: ImageRoot, images: Images, table: Table) -> Wanted:
        """Return the features of images for a table of images."""
        assert table.source != "caption", "captions have no images"
        config: TrainConfig = self._method.config  # type: ignore[assignment]
        own = table.preprocessing or self._preprocessing
        which = (table.backbone, table.weights, own)
        if which not in self._made:
            network = _network(table, self._method, own)
            self._made[which] = FeatureExtractor(network, own, self._device, config.encoding_precision)
        return self._made[which].wanted(root, images, table.source, table.augmentation, _seed(table, config))


def _network(table: Table, method: Method, preprocessing: Preprocessing) -> HashNetwork:
    """Return the method's network, or a new one if the table has another backbone or number of bands."""
    spec, config = method.network.spec, method.config
    assert isinstance(config, TrainConfig)
    if table.backbone is None and preprocessing.channels == spec.channels:
        return method.network
    name, weights, norm = config.backbone, config.weights, str(config.norm)
    if table.backbone is not None:
        name, weights, norm = table.backbone, table.weights, "auto"
    # Random weights must be the same on every rank and at every call.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        backbone = build_backbone(
            name,
            weights,
            norm=norm,
            pooling=config.pooling,
            channels=preprocessing.channels,
            rgb=rgb_channels(preprocessing.rendering.bands),
        )
        return HashNetwork(backbone, spec.head)


def _seed(table: Table, config: TrainConfig) -> int:
    """Return the seed of a table's augmentation; seeds of settings are below 2^31."""
    return config.seed + table.draw * 2**31


def _captions(images: Images, table: Table, method: Method, device: str | torch.device) -> FeatureRows:
    encoder = method.text_encoder(str(device))
    assert encoder is not None, "a method with a table of captions has a text encoder"
    captions = images.captions
    if table.augmentation is not None:
        from orbithash.trainers.captions import augment_captions

        config: TrainConfig = method.config  # type: ignore[assignment]
        captions = augment_captions(
            captions,
            table.augmentation,
            seed=config.seed,
            encoder=encoder,
            glove=None if table.glove is None else Path(table.glove),
            translators=table.translators,
            device=str(device),
            cache=cache_folder() / "captions",
        )
    return caption_features(encoder, captions)


def check_sources(images: Images, kind: type[Method], config: TrainConfig) -> None:
    """Raise `InputError` if images lack what the method trains on, or if weights of its tables cannot be read."""
    for table in kind.tables_of(config).values():
        _check(images, table)
        if config.is_of_embeddings and (table.augmentation or table.backbone):
            raise InputError(f"{kind.name} needs features of changed images, and the data are embeddings")
        if table.backbone is not None:
            build_backbone(table.backbone, table.weights)


def _check(images: Images, table: Table) -> None:
    if table.source == "caption":
        lacking = images[~images.has_captions]
        what, remedy = "captions", "give --captions FILE, or a data set that has them"
    elif table.source == "second":
        lacking = images[~images.has_second]
        what, remedy = "second source", "use a data set of pairs; `orbithash wald` makes one from RGB images"
    else:
        return
    if lacking:
        raise InputError(f"{len(lacking)} of {len(images)} images have no {what} (first: {lacking[0].path}); {remedy}")
