"""The parts of a data set as training and validation read them."""

import dataclasses

import numpy as np
import numpy.typing as npt
import torch

from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.trainers.captions.choice import drawn_caption
from orbithash.trainers.data.feature_table import FeatureRows, selected
from orbithash.trainers.data.loading import LoadedImages, Part, StreamedImages, fits_in_memory, load_images
from orbithash.trainers.datasets import Images
from orbithash.trainers.distributed import on_every_rank, rank, world_size
from orbithash.trainers.features.features import Wanted
from orbithash.trainers.loop.run import Run
from orbithash.trainers.loop.tables import load_tables, wanted_tables
from orbithash.trainers.methods import Method, get_method

__all__ = ["load_training_part", "load_validation_parts", "validation_rows", "wanted_features"]

# Training images are stored this much larger than the network's input, so that random crops need little upsampling.
STORED_MARGIN = 1.2


def load_training_part(run: Run, method: Method, device: str | torch.device = "cpu", loading: str = "auto") -> Part:
    """Return the training part, from which the batches of the method are drawn; `loading` as in `train`."""
    preprocessing = run.preprocessing()
    stored = round(preprocessing.crop * STORED_MARGIN)
    larger = dataclasses.replace(preprocessing, resize=stored, crop=stored)
    images, labels = run.images("train"), run.labels()["train"]
    return Part(
        images=_images(run, images, larger, loading, method),
        labels=labels,
        ids=images.ids,
        features=load_tables(run.root, images, method, preprocessing, device),
    )


def _images(
    run: Run, images: Images, preprocessing: Preprocessing, loading: str, method: Method
) -> LoadedImages | None:
    if not method.trains_on_images:
        return None
    fits = loading == "memory" or (loading == "auto" and fits_in_memory(len(images), preprocessing))
    return on_every_rank(lambda: (load_images if fits else StreamedImages)(run.root, images, preprocessing))


def _drawn_captions(images: Images, seed: int) -> npt.NDArray[np.int64]:
    """Return the index of the caption that stands for each image, 0 for one without captions."""
    drawn = np.zeros(len(images), np.int64)
    rows = np.flatnonzero(images.has_captions)
    captioned = images[rows]
    pairs = zip(captioned.ids, captioned.captions, strict=True)
    drawn[rows] = [drawn_caption(id, len(captions), seed) for id, captions in pairs]
    return drawn


def validation_rows(run: Run) -> dict[str, npt.NDArray[np.int64]]:
    """Return the rows of the training and of the validation part that validation uses, ascending.

    A part larger than its limit is sampled with the seed of the split; of the validation part only images with labels
    are drawn if the method validates by labels.
    """
    limits = {"train": run.config.validation_database, "validation": run.config.validation_queries}
    rows = {}
    for number, (split, limit) in enumerate(limits.items()):
        images = run.images(split)
        rows[split] = np.arange(len(images))
        if limit is None or len(images) <= limit:
            continue
        if split == "validation" and get_method(run.method).validates_by_labels:
            rows[split] = np.flatnonzero(images.is_labelled)
        rng = np.random.default_rng([run.manifest.seed, number])
        rows[split] = np.sort(rng.choice(rows[split], min(limit, len(rows[split])), replace=False))
    return rows


def load_validation_parts(
    run: Run,
    method: Method,
    features: dict[str, FeatureRows] | None,
    device: str | torch.device,
    loading: str,
) -> tuple[Part, Part]:
    """Return this rank's shares of the images of the training and of the validation part that validation uses.

    Args:
        run: method, settings and data.
        method: the method in training.
        features: feature tables of the training part; None: they are loaded, for the images that validation uses.
        device: `cpu`, `cuda` or `cuda:N`.
        loading: as in `train`.
    """
    preprocessing, labels = run.preprocessing(), run.labels()
    rows = validation_rows(run)
    used = {split: run.images(split)[rows[split]] for split in rows}

    def tables(split: str) -> dict[str, FeatureRows]:
        return load_tables(run.root, used[split], method, preprocessing, device, training=False)

    def share(split: str, features: dict[str, FeatureRows]) -> Part:
        mine = slice(rank(), None, world_size())
        images = used[split][mine]
        return Part(
            images=_images(run, images, preprocessing, loading, method),
            labels=labels[split][rows[split]][mine],
            ids=images.ids,
            features={name: selected(table, mine) for name, table in features.items()},
            drawn_captions=_drawn_captions(images, run.manifest.seed),
        )

    if not used["validation"]:
        nothing = Part(None, np.empty(0, np.int64), [])
        return nothing, nothing
    if features is None:
        features = tables("train")
    elif len(used["train"]) < len(labels["train"]):
        # Of the whole part, arrays are not copied.
        features = {name: selected(table, rows["train"]) for name, table in features.items()}
    return share("train", features), share("validation", tables("validation"))


def wanted_features(run: Run, device: str | torch.device = "cpu") -> dict[str, Wanted]:
    """Return the features of images that training of the run asks for, by part and table, such as "train/image".

    Raises:
        InputError: images lack the captions or the second source that the method needs, or weights cannot be read.
    """
    method = run.build().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    train, validation = run.images("train"), run.images("validation")[validation_rows(run)["validation"]]
    wanted: dict[str, Wanted] = {}
    # Validation searches training images, whose features the training part has.
    for split, images in (("train", train), ("validation", validation)):
        tables = wanted_tables(run.root, images, method, run.preprocessing(), device, training=split == "train")
        wanted |= {f"{split}/{name}": rows for name, rows in tables.items()}
    return wanted
