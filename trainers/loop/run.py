"""A run (method, settings, data), and the checks before it starts."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from orbithash.encoders.errors import InputError, listed
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.networks.backbones.embedding import embedding_backbone
from orbithash.encoders.sources.embeddings.tables import EmbeddingTable
from orbithash.encoders.sources.image_roots import ImageRoot, image_root, local_folder
from orbithash.trainers.config import TrainConfig, load_config
from orbithash.trainers.data.labels import label_arrays
from orbithash.trainers.data.statistics import band_statistics
from orbithash.trainers.datasets import Images, Manifest, make_manifest
from orbithash.trainers.datasets.embeddings import EMBEDDINGS
from orbithash.trainers.loop.tables import check_sources
from orbithash.trainers.methods import METHODS, Fitted, Method, get_method
from orbithash.trainers.methods.base import Supervision
from orbithash.trainers.methods.fine_tuning import FineTuningConfig
from orbithash.trainers.metrics.retrieval import Labels
from orbithash.trainers.recipe import find_recipe

__all__ = ["Run", "check_batch", "check_labels", "check_run", "make_run", "with_statistics"]

# Names of methods that an error message lists.
MAX_NAMES = 10

# The maximum of the setting batch_size.
MAX_BATCH = 65_536


@dataclass(frozen=True)
class Run:
    """A method, its settings and its data; the paths of the manifest are relative to `root`."""

    method: str
    config: TrainConfig
    manifest: Manifest
    root: ImageRoot

    def preprocessing(self) -> Preprocessing:
        """Return how an image becomes the network's input, in validation and in the model."""
        return self.config.preprocessing()

    def images(self, split: str) -> Images:
        """Return the images of a part; of the training part a sample, if the method takes at most `max_rows`."""
        images = self.manifest.part(split)
        if split != "train" or not self.config.samples_images or len(images) <= self.config.max_rows:
            return images
        chosen = np.random.default_rng(self.config.seed).choice(len(images), self.config.max_rows, replace=False)
        return images[np.sort(chosen)]

    def build(self) -> Method:
        """Return the method with its initial weights, the same on every rank."""
        torch.manual_seed(self.config.seed)
        return get_method(self.method)(self.config, len(self.manifest.classes), len(self.images("train")))

    def labels(self) -> dict[str, Labels]:
        """Return the labels of the training and the validation part, both of one kind; see `label_arrays`."""
        splits = ("train", "validation")
        parts = (self.images(split) for split in splits)
        return dict(zip(splits, label_arrays(len(self.manifest.classes), *parts), strict=True))


def make_run(
    method: str,
    data: Path | str | ImageRoot,
    config: Path | str | None = None,
    settings: Sequence[str] = (),
    *,
    dataset: str | None = None,
    protocol: str | None = None,
    split_seed: int | None = None,
    validation: float | None = None,
    captions: Path | None = None,
    **given: Any,
) -> Run:
    """Return a run on a data folder.

    Args:
        method: name of the method.
        data: folder of images, also in an object store, or the path or URI of a packed data set.
        config: YAML file of settings, or the name of a shipped recipe; see `recipe.py`.
        settings: `key=value` texts; they override `config`.
        dataset: name of the dataset; None: recognised.
        protocol: rule that splits the images; None: that of `config`, else the dataset's.
        split_seed: seed of the split; None: that of `config`, else 0.
        validation: fraction of the training images held out for validation; None: that of `config`, else 0.1.
        captions: JSON file of captions.
        given: settings by name; they override all others unless they are None.

    Raises:
        InputError: with all problems of the settings, or all problems of the data.
    """
    kind = get_method(method)
    split: dict[str, Any] = {}
    file = None
    if config is not None:
        recipe = find_recipe(config)
        recipe.check_method(method)
        file = recipe.file
        split = {"protocol": recipe.protocol, "seed": recipe.split_seed, "validation": recipe.validation}
    resolved = load_config(kind.Config, file, settings, **given)
    asked = {"protocol": protocol, "seed": split_seed, "validation": validation}
    split |= {key: value for key, value in asked.items() if value is not None}
    root = image_root(data)
    chosen = {key: value for key, value in split.items() if value is not None}
    manifest = make_manifest(
        root,
        dataset,
        captions=captions,
        table=resolved.table,
        max_rows=resolved.max_rows,
        needs_classes=kind.supervision != "none",
        **chosen,
    )
    if manifest.dataset == EMBEDDINGS:
        resolved = of_embeddings(resolved, local_folder(root, "tables of embeddings"))
    elif resolved.is_of_embeddings:
        raise InputError(f"backbone is {resolved.backbone}, which a table of embeddings sets; {root} has images")
    return with_statistics(Run(method, resolved, manifest, root))


def with_statistics(run: Run) -> Run:
    """Return the run with mean and standard deviation of numbers in its settings; default: of the training part.

    Raises:
        InputError: images of the sample are refused.
    """
    train = run.manifest.part("train")
    update: dict[str, tuple[float, ...]] = {}
    for (source, prefix), preprocessing in run.config.preprocessings().items():
        if preprocessing.mean:
            continue
        images = train if source == "image" else train[train.has_second]
        names = images.paths if source == "image" else [name for name in images.seconds if name is not None]
        hashes = images.sha256s if source == "image" else images.second_sha256s
        moments = band_statistics(names, [sha256.hex() for sha256 in hashes.tolist()], preprocessing, run.root)
        update |= {f"{prefix}band_mean": moments.mean, f"{prefix}band_std": moments.std}
    return replace(run, config=run.config.model_copy(update=update)) if update else run


def check_run(run: Run, num_workers: int | tuple[int, int]) -> None:
    """Raise one `InputError` with all reasons why `run` cannot be trained, except for unreadable images.

    `num_workers` is a number, or the minimum and maximum of a number that changes during the run.
    """
    images = run.images("train") + run.images("validation")
    problems: list[str] = []

    def check_order() -> None:
        method = run.build()
        if not problems:
            # Drawing batches needs labels that passed the checks before.
            method.order(run.labels()["train"], 0)

    checks: list[Callable[[], None]] = [
        lambda: check_batch(run, num_workers),
        lambda: check_labels(run),
        lambda: check_sources(images, get_method(run.method), run.config),
        lambda: check_embeddings(run),
        check_order,
    ]
    for check in checks:
        try:
            check()
        except InputError as err:
            problems.append(str(err))
    if problems:
        raise listed(problems, f"{run.method} cannot train on {run.root}")


def of_embeddings(config: TrainConfig, root: Path) -> TrainConfig:
    """Return the settings for the table of embeddings at `root`, whose vectors take the place of a backbone.

    Raises:
        InputError: weights or a backbone are given, or the backbone is to be trained.
    """
    if config.weights is not None or ("backbone" in config.model_fields_set and not config.is_of_embeddings):
        raise InputError(f"{root} is a table of embeddings, which need no backbone; omit --weights and backbone")
    table = EmbeddingTable.open(root, config.table)
    backbone = embedding_backbone(table.embedding, table.dims, table.origin)
    update: dict[str, Any] = {"backbone": backbone}
    if isinstance(config, FineTuningConfig):
        if "tune" in config.model_fields_set and config.tune != "none":
            raise InputError(f"tune is {config.tune}, and {root} has vectors without a backbone; omit tune or set none")
        if config.compile:
            raise InputError(f"compile is true, and {root} has vectors without a backbone; omit compile")
        if config.shard:
            raise InputError(f"shard is true, and {root} has vectors without a backbone; omit shard")
        if config.augment_on == "device":
            raise InputError(f"augment_on is device, and {root} has vectors without views; omit augment_on")
        update["tune"] = "none"
    return config.model_copy(update=update)


def check_embeddings(run: Run) -> None:
    """Raise `InputError` if the data are vectors and the method trains on images."""
    if run.config.is_of_embeddings and run.build().trains_on_images:
        raise InputError(
            f"{run.method} trains on images, and {run.root} has vectors; choose a method that trains on features, such "
            "as mhcln"
        )


def check_batch(run: Run, num_workers: int | tuple[int, int]) -> None:
    """Raise `InputError` if the batch is too small for the workers, or exceeds the images; see `check_run`."""
    if issubclass(get_method(run.method), Fitted):
        return
    batch_size, num_images = run.config.batch_size, len(run.manifest.part("train"))
    micro_batches, group_size = run.config.accumulate, get_method(run.method).group_size
    most = num_workers if isinstance(num_workers, int) else num_workers[1]
    if batch_size % group_size:
        raise InputError(f"batch_size is {batch_size}: {run.method} needs a multiple of {group_size}")
    # Batch norm needs two images; a worker without images would have no gradients.
    least = micro_batches * max(group_size * most, 2)
    smallest = -(-least // group_size) * group_size
    if batch_size < least:
        pieces = f" in {micro_batches} micro-batches" if micro_batches > 1 else ""
        remedies = []
        if allowed := _allowed_batch(run, range(smallest, min(num_images, MAX_BATCH) + 1, group_size)):
            remedies.append(f"--set batch_size={allowed} or more")
        if micro_batches * max(group_size, 2) <= batch_size <= num_images:
            remedies.append(f"at most {batch_size // (group_size * micro_batches)} workers")
        too_few = f"{num_images} training images are too few for that: add images"
        raise InputError(
            f"batch_size {batch_size} over {most} workers{pieces}: each worker needs images of each batch; "
            + (f"give {', or '.join(remedies)}" if remedies else too_few)
        )
    if num_images < batch_size:
        largest = num_images // group_size * group_size
        allowed = _allowed_batch(run, range(largest, smallest - 1, -group_size))
        remedy = f"give --set batch_size={allowed} or less" if allowed else "add images"
        raise InputError(f"batch_size {batch_size} is more than the {num_images} training images; {remedy}")


def _allowed_batch(run: Run, sizes: range) -> int | None:
    """Return the first of these batch sizes that the method's settings allow; None: none of them."""
    for size in sizes:
        with suppress(ValidationError):
            type(run.config).model_validate({**dict(run.config), "batch_size": size})
            return size
    return None


def _some(names: list[str]) -> str:
    """Return names as a list in words, the middle of a long one left out."""
    if len(names) > MAX_NAMES:
        names = [*names[: MAX_NAMES - 2], "…", *names[-2:]]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def check_labels(run: Run) -> None:
    """Raise `InputError` if the images lack the classes that the method learns from, or have more than it can use."""
    supervision = get_method(run.method).supervision
    if supervision == "none":
        return
    images = run.manifest.part("train", "validation")
    counts = images.labels.counts
    faults = {"no class": images[counts == 0]}
    if supervision == "one class":
        faults["several classes"] = images[counts > 1]
    problems = [
        f"{len(faulty)} of {len(images)} training images have {fault} (first: {faulty[0].path})"
        for fault, faulty in faults.items()
        if faulty
    ]
    if problems:
        needs = {"one class": "exactly one class", "classes": "one or more classes"}[supervision]
        others = [f"{_methods('none')} need none"]
        if "several classes" in faults:
            others.insert(0, f"{_methods('classes')} train on several")
        raise InputError(f"{' and '.join(problems)}; {run.method} needs {needs} per image; {'; '.join(others)}")


def _methods(supervision: Supervision) -> str:
    """Return the names of the methods with this supervision, as a list in words."""
    return _some([name for name, kind in METHODS.items() if kind.supervision == supervision])
