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
from orbithash.trainers.loop.run import Run
from orbithash.trainers.loop.tables import load_tables
from orbithash.trainers.methods import Method

__all__ = ["load_training_part", "load_validation_parts"]

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


def load_validation_parts(
    run: Run, method: Method, features: dict[str, FeatureRows], device: str | torch.device, loading: str
) -> tuple[Part, Part]:
    """Return this rank's shares of the training part and of the validation part, as they are encoded.

    `features` are the feature tables of the training part; `loading` as in `train`.
    """
    preprocessing = run.preprocessing()
    labels = run.labels()

    def share(split: str, features: dict[str, FeatureRows]) -> Part:
        mine = slice(rank(), None, world_size())
        images = run.images(split)[mine]
        return Part(
            images=_images(run, images, preprocessing, loading, method),
            labels=labels[split][mine],
            ids=images.ids,
            features={name: selected(table, mine) for name, table in features.items()},
            drawn_captions=_drawn_captions(images, run.manifest.seed),
        )

    validation = run.manifest.part("validation")
    if not validation:
        nothing = Part(None, np.empty(0, np.int64), [])
        return nothing, nothing
    tables = load_tables(run.root, validation, method, preprocessing, device, training=False)
    return share("train", features), share("validation", tables)
