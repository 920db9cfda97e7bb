"""The model of a run: which epoch it is, and how a checkpoint becomes a model folder."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from orbithash.encoders.networks.card import ModelCard, TextSpec
from orbithash.encoders.networks.model import HashModel
from orbithash.encoders.networks.projection import Projection
from orbithash.encoders.networks.reading import read_batches
from orbithash.trainers.loop.checkpoint import load_checkpoint
from orbithash.trainers.loop.run import Run
from orbithash.trainers.loop.tables import load_tables
from orbithash.trainers.methods import Method

__all__ = ["best_epoch", "export_models", "make_card"]

# Maximum number of training images to which the projection of stored vectors is fitted.
MAX_FITTED = 10_000


def best_epoch(history: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the record of the epoch with the best score, the later one of equal scores, as Ray Train does."""
    return max(history, key=lambda record: (float(record["score"]), int(record["epoch"])))


def export_models(
    run: Run, checkpoint: Path, metrics: dict[str, Any] | None = None, device: str | torch.device = "cpu"
) -> tuple[HashModel, list[HashModel]]:
    """Return the model of a checkpoint, and the models of its nested lengths.

    `metrics` are written into the model; None: those of the checkpoint's last epoch. `device` computes the features to
    which the projection of stored vectors is fitted.
    """
    state = load_checkpoint(checkpoint)
    # The checkpoint has all weights; the file of the pretrained ones may be gone by now.
    method = dataclasses.replace(run, config=run.config.without_weights()).build()
    method.load_state_dict(state["method"])
    method.finish()
    card = make_card(run, method, state["history"][-1] if metrics is None else metrics)
    projection = _projection(run, method, card, device) if run.config.vector_dims else None
    if projection is not None:
        card = dataclasses.replace(card, projection=projection.spec)
    model = HashModel(
        card,
        method.network,
        text_head=method.text_head,
        text_encoder=method.text_encoder(),
        projection=projection,
    )
    return model, [model.shortened(bits) for bits in method.nested_bits]


def _projection(run: Run, method: Method, card: ModelCard, device: str | torch.device) -> Projection:
    """Return the projection of stored vectors, fitted to the inputs of the head for evenly spaced training images."""
    images = run.images("train")
    chosen = np.linspace(0, len(images) - 1, min(len(images), MAX_FITTED)).round().astype(int)
    images = images[chosen]
    if method.trains_on_images:
        model = HashModel(card, method.network, device=device, text_head=method.text_head)
        batches = read_batches(images.paths, model.preprocessing, root=run.root)
        features = np.concatenate([model.features(batch) for batch in batches])
    else:
        tables = load_tables(run.root, images, method, run.preprocessing(), device, names=["image"])
        features = np.asarray(tables["image"])
    return Projection.fit(torch.from_numpy(features), run.config.vector_dims)


def make_card(run: Run, method: Method, metrics: dict[str, Any]) -> ModelCard:
    """Return the description of a network of this run for the model folder."""
    label_code, label_weight = method.label_code
    head, text_encoder = method.network.spec.head, method.text_encoder()
    text = None
    if method.text_head is not None:
        assert text_encoder is not None, "a text head reads a text encoder's features"
        text = TextSpec(
            text_encoder.sha256, text_encoder.num_features, method.text_head.spec, method.has_joint_features
        )
    return ModelCard(
        method=run.method,
        network=method.network.spec,
        thresholds=(head.threshold,) * head.bits,
        label_code=label_code,
        label_weight=label_weight,
        preprocessing=run.preprocessing(),
        classes=run.manifest.classes,
        dataset={
            "name": run.manifest.dataset,
            "protocol": run.manifest.protocol,
            "seed": run.manifest.seed,
            "manifest_sha256": run.manifest.sha256,
        },
        metrics=metrics,
        precision=run.config.encoding_precision,
        text=text,
    )
