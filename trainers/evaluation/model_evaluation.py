"""A trained model against the test part of a manifest."""

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import numpy.typing as npt

from orbithash.encoders.errors import ImageError, InputError
from orbithash.encoders.imagery.images import read_image
from orbithash.encoders.networks.model import HashModel
from orbithash.trainers.datasets import PROTOCOLS, Image, Manifest
from orbithash.trainers.evaluation.baselines import evaluate_baselines
from orbithash.trainers.evaluation.evaluation import EncodedPart, Evaluation, evaluate, own_positions, with_baselines
from orbithash.trainers.metrics.retrieval import Labels, label_arrays, labelled

__all__ = ["FeaturesOf", "check_untrained", "draw_caption", "evaluate_model"]

# Images decoded and encoded at a time.
CHUNK = 64

# Features float32 [N, D] of images of a manifest, from a backbone as it was before the method trained it.
FeaturesOf = Callable[[Sequence[Image]], npt.NDArray[np.float32]]


def evaluate_model(
    model: HashModel,
    manifest: Manifest,
    root: Path,
    on_progress: Callable[[int], None] | None = None,
    baseline_model: FeaturesOf | None = None,
    cutoffs: Sequence[int] = (20, 100),
) -> Evaluation | dict[str, Evaluation]:
    """Encodes the queries and the database of the manifest's protocol and evaluates the answers.

    A model with a text side, on a manifest with captions, is evaluated in the four directions "image->image",
    "image->text", "text->image" and "text->text". Every image has one of its captions, drawn once by the manifest's
    seed as DUCH does it; images without captions are left out wherever sentences are asked or searched.

    Args:
        model: what encodes.
        manifest: its test part is asked.
        root: the folder of its images.
        on_progress: is told how many images are encoded.
        baseline_model: makes the features of the baselines, which rank images for images; None: no baselines.
        cutoffs: the k of average precision.

    Raises:
        InputError: files that are not those of the manifest, or no queries.
    """
    manifest.check_files(root)
    rule = PROTOCOLS[manifest.protocol]
    queries, database = manifest.part("test"), manifest.part(*rule.database)
    if not queries:
        raise InputError("the manifest has no test part; there is nothing to evaluate on")
    if not any(image.labels for image in queries):
        raise InputError(f"none of the {len(queries)} test images has a class, so nothing is relevant to them")
    # A test part that is the database too is encoded once.
    images = manifest.part("test", *rule.database)
    query_labels, database_labels = label_arrays(
        len(manifest.classes), [image.labels for image in queries], [image.labels for image in database]
    )
    codes = {"image": _encode_images(model, images, root, on_progress)}
    if model.text_head is not None and all(any(image.captions for image in part) for part in (queries, database)):
        captions = {image.id: draw_caption(image, manifest.seed) for image in images if image.captions}
        codes["text"] = dict(zip(captions, model.encode_texts(list(captions.values())), strict=True))
    else:
        captions = {}

    def part(kind: str, of: Sequence[Image], labels: Labels) -> EncodedPart:
        rows = [row for row, image in enumerate(of) if image.id in codes[kind]]
        return EncodedPart(
            ids=[of[row].id for row in rows],
            codes=np.stack([codes[kind][of[row].id] for row in rows]),
            labels=labels[rows],
            paths=[str(root / of[row].path) for row in rows],
            sentences=[captions[of[row].id] for row in rows] if kind == "text" else None,
        )

    def evaluate_direction(asked: str, searched: str) -> Evaluation:
        query, found = part(asked, queries, query_labels), part(searched, database, database_labels)
        crossing = asked != searched
        evaluation = evaluate(
            query,
            found,
            dataset=manifest.dataset,
            protocol=manifest.protocol,
            method=model.card.method,
            bits=model.bits,
            # Across, the own pair is another item: the very one to be found.
            exclude_self=rule.leave_one_out and not crossing,
            classes=manifest.classes,
            cutoffs=cutoffs,
            pairs=crossing and "test" in rule.database,
        )
        if baseline_model is None or asked == "text" or crossing:
            return evaluation
        return with_baselines(evaluation, _baselines(baseline_model, manifest, query, found, evaluation, cutoffs))

    if "text" not in codes:
        return evaluate_direction("image", "image")
    return {f"{a}->{b}": evaluate_direction(a, b) for a, b in product(("image", "text"), repeat=2)}


def draw_caption(image: Image, seed: int) -> str:
    """One of the image's captions, drawn by the seed and the image's id: another image more or less changes nothing."""
    return image.captions[int(np.random.default_rng([seed, *image.id.encode()]).integers(len(image.captions)))]


def check_untrained(asked: Manifest, trained: Manifest) -> None:
    """`InputError` when queries of `asked` were seen in training or chose the model, whatever their path now is."""
    seen = {image.sha256 for image in trained.part("train", "validation")}
    leaked = [image.path for image in asked.part("test") if image.sha256 in seen]
    if leaked:
        raise InputError(
            f"{len(leaked)} of the {len(asked.part('test'))} queries of protocol {asked.protocol} were training or "
            f"validation images of this run (first: {leaked[0]}); train a run by that protocol instead"
        )


def _encode_images(
    model: HashModel, images: Sequence[Image], root: Path, on_progress: Callable[[int], None] | None
) -> Mapping[str, npt.NDArray[np.uint8]]:
    """The code of each image by its id."""
    codes: dict[str, npt.NDArray[np.uint8]] = {}
    for start in range(0, len(images), CHUNK):
        chunk = images[start : start + CHUNK]
        encoded = model.encode([_read(root / image.path, model) for image in chunk])
        codes.update(zip((image.id for image in chunk), encoded, strict=True))
        if on_progress:
            on_progress(len(codes))
    return codes


def _baselines(
    features_of: FeaturesOf,
    manifest: Manifest,
    query: EncodedPart,
    database: EncodedPart,
    evaluation: Evaluation,
    cutoffs: Sequence[int],
) -> dict[str, dict[str, object]]:
    """Every baseline on the queries and the database of `evaluation`, fitted on the training part."""
    query = query.rows(np.flatnonzero(labelled(query.labels)))
    train = {image.id for image in manifest.part("train")}
    wanted = train.union(query.ids, database.ids)
    images = [image for image in manifest.images if image.id in wanted]
    features = features_of(images)
    row_of = {image.id: row for row, image in enumerate(images)}
    rows = {"train": [row_of[image.id] for image in images if image.id in train]}
    rows |= {name: [row_of[id] for id in part.ids] for name, part in (("query", query), ("database", database))}
    return evaluate_baselines(
        {name: features[of_part] for name, of_part in rows.items()},
        {"query": query.labels, "database": database.labels},
        evaluation.metrics["bits"],
        own_positions(query, database) if evaluation.metrics["exclude_self"] else None,
        seed=manifest.seed,
        cutoffs=(20, *cutoffs),
    )


def _read(path: Path, model: HashModel) -> np.ndarray:
    try:
        return read_image(path, model.preprocessing.rendering)
    except ImageError as err:
        raise ImageError(f"{path}: {err}") from err
