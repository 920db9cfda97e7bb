"""Evaluation of a run folder's model."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from orbithash.cluster.output import say, track
from orbithash.cluster.training.run_folder import open_run, read_history
from orbithash.encoders.errors import InputError
from orbithash.encoders.imagery.images import read_image
from orbithash.encoders.networks.model import HashModel
from orbithash.trainers.datasets import PROTOCOLS, resplit
from orbithash.trainers.evaluation.evaluation import metrics_of, without_baselines
from orbithash.trainers.evaluation.model_evaluation import FeaturesOf, check_untrained, evaluate_model
from orbithash.trainers.evaluation.report import write_evaluation
from orbithash.trainers.loop.run import Run

__all__ = ["evaluate_run"]


def evaluate_run(
    folder: Path,
    data: Path,
    protocol: str | None = None,
    baselines: bool = True,
    cutoffs: Sequence[int] = (20, 100),
    bits: int | None = None,
) -> tuple[dict[str, Any], Path]:
    """Evaluates on the run's own test part, or on that of another protocol whose queries were not trained on.

    With `baselines`, simple methods on the features of the backbone that the run began with stand beside the model;
    where there is no such backbone any more, the metrics say why not. `cutoffs` are the k of average precision.

    `bits` chooses among the lengths of a run with nested ones; None: the whole code.

    Leaves `RUN/evaluation/` (`metrics.json`, plots, `report.html`), or `RUN/evaluation-PROTOCOL/`,
    `RUN/evaluation-BITS/` for another protocol or length; returns the metrics and the page's path.
    """
    run = open_run(folder)
    if not data.is_dir():
        raise InputError(f"{data} is not a folder; --data is the folder of the run's images")
    model, is_whole = _load_model(folder, bits)
    manifest, name = run.manifest, "evaluation"
    if protocol not in (None, manifest.protocol):
        manifest, name = resplit(manifest, protocol), f"{name}-{protocol}"
        check_untrained(manifest, run.manifest)
    if not is_whole:
        name = f"{name}-{bits}"
    features_of = _pretrained_features(run, model, data) if baselines else "switched off"
    num_images = len(manifest.part("test", *PROTOCOLS[manifest.protocol].database))
    with track("evaluating", num_images, "images") as advance_to:
        evaluated = evaluate_model(
            model,
            manifest,
            data,
            on_progress=lambda done: advance_to(done, ""),
            baseline_model=None if isinstance(features_of, str) else features_of,
            cutoffs=cutoffs,
        )
    if isinstance(features_of, str):
        say(f"no baselines: {features_of}")
        if isinstance(evaluated, dict):
            evaluated["image->image"] = without_baselines(evaluated["image->image"], features_of)
        else:
            evaluated = without_baselines(evaluated, features_of)
    rendering = model.preprocessing.rendering
    page = write_evaluation(
        folder / name,
        evaluated,
        read_image=lambda path: rendering.picture(read_image(Path(path), rendering)),
        history=read_history(folder),
    )
    return metrics_of(evaluated) if isinstance(evaluated, dict) else evaluated.metrics, page


def _load_model(folder: Path, bits: int | None) -> tuple[HashModel, bool]:
    """The model of this length, None: the whole one; and whether it is the whole one."""
    if not (folder / "model").is_dir():
        raise InputError(f"{folder} has no model yet; run the same train command again, it goes on where it stopped")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    whole = HashModel.load(folder / "model", device)
    if bits in (None, whole.bits):
        return whole, True
    shorter = folder / f"model-{bits}"
    if not shorter.is_dir():
        lengths = sorted(int(path.name[6:]) for path in folder.glob("model-*") if path.name[6:].isdecimal())
        there = " and ".join(map(str, [*lengths, whole.bits]))
        raise InputError(f"{folder} has no model of {bits} bits; there is {there}")
    return HashModel.load(shorter, device), False


def _pretrained_features(run: Run, model: HashModel, data: Path) -> FeaturesOf | str:
    """What makes features with the weights that the run began with, or why there is none."""
    from orbithash.encoders.networks.hash_network import HashNetwork
    from orbithash.trainers.features.features import FeatureExtractor

    if run.config.weights is None:
        return "the run began with random weights, whose features say little"
    # Pretrained weights belong to batch norm with their own statistics, whatever the run made of them.
    spec = dataclasses.replace(model.card.network, norm="frozen-batch", num_classes=0)
    try:
        extractor = FeatureExtractor(
            HashNetwork(spec, run.config.weights, run.config.rgb), model.preprocessing, str(model.device)
        )
    except InputError as err:
        return str(err)
    return lambda images: extractor(data, images)
