"""A trained model against the test part of a manifest."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from orbithash.encoders.errors import ImageError, InputError
from orbithash.encoders.images import read_image
from orbithash.encoders.model import HashModel
from orbithash.trainers.datasets import PROTOCOLS, Image, Manifest
from orbithash.trainers.evaluation import EncodedPart, Evaluation, evaluate

__all__ = ["check_untrained", "evaluate_model"]

# Images decoded and encoded at a time.
CHUNK = 64


def evaluate_model(
    model: HashModel, manifest: Manifest, root: Path, on_progress: Callable[[int], None] | None = None
) -> Evaluation:
    """Encodes the queries and the database of the manifest's protocol and evaluates the answers.

    `on_progress` is told how many images are encoded. Raises `InputError` when files are not those of the manifest.
    """
    manifest.check_files(root)
    queries, database = manifest.part("test"), manifest.part(*PROTOCOLS[manifest.protocol].database)
    if not queries:
        raise InputError("the manifest has no test part; there is nothing to evaluate on")
    num_done = 0

    def encode(images: list[Image]) -> EncodedPart:
        nonlocal num_done
        codes = []
        for start in range(0, len(images), CHUNK):
            chunk = images[start : start + CHUNK]
            codes.append(model.encode([_read(root / image.path, model) for image in chunk]))
            num_done += len(chunk)
            if on_progress:
                on_progress(num_done)
        return EncodedPart(
            ids=[image.id for image in images],
            codes=np.concatenate(codes),
            labels=np.array([image.label for image in images], np.int64),
            paths=[str(root / image.path) for image in images],
        )

    return evaluate(
        encode(queries),
        encode(database),
        dataset=manifest.dataset,
        protocol=manifest.protocol,
        method=model.card.method,
        bits=model.bits,
        exclude_self=False,
        classes=manifest.classes,
    )


def check_untrained(asked: Manifest, trained: Manifest) -> None:
    """`InputError` when queries of `asked` were seen in training or chose the model, whatever their path now is."""
    seen = {image.sha256 for image in trained.part("train", "validation")}
    leaked = [image.path for image in asked.part("test") if image.sha256 in seen]
    if leaked:
        raise InputError(
            f"{len(leaked)} of the {len(asked.part('test'))} queries of protocol {asked.protocol} were training or "
            f"validation images of this run (first: {leaked[0]}); train a run by that protocol instead"
        )


def _read(path: Path, model: HashModel) -> np.ndarray:
    try:
        return read_image(path, model.preprocessing.rendering)
    except ImageError as err:
        raise ImageError(f"{path}: {err}") from err
