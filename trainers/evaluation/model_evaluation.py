"""Evaluation of a trained model on the test part of a manifest."""

from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import numpy.typing as npt

from orbithash.encoders.errors import InputError
from orbithash.encoders.networks.model import HashModel
from orbithash.trainers.captions.choice import drawn_caption
from orbithash.trainers.datasets import PROTOCOLS, Image, Manifest
from orbithash.trainers.evaluation.baselines import evaluate_baselines
from orbithash.trainers.evaluation.evaluation import EncodedPart, Evaluation, evaluate, own_positions, with_baselines
from orbithash.trainers.features.features import FeatureExtractor
from orbithash.trainers.metrics.retrieval import Labels, label_arrays, labelled

__all__ = ["FeaturesOf", "check_untrained", "draw_caption", "evaluate_model"]

# Returns features float32 [N, D] of a manifest's images, from the backbone with its weights before training.
FeaturesOf = Callable[[Sequence[Image]], npt.NDArray[np.float32]]


def evaluate_model(
    model: HashModel,
    manifest: Manifest,
    root: Path,
    on_progress: Callable[[int], None] | None = None,
    baseline_model: FeaturesOf | None = None,
    cutoffs: Sequence[int] = (20, 100),
    vectors_of: FeaturesOf | None = None,
) -> Evaluation | dict[str, Evaluation]:
    """Encode the queries and the database of the manifest's protocol and evaluate the answers.

    A model with a text side, on a manifest with captions, is evaluated in the four directions "image->image",
    "image->text", "text->image" and "text->text". Each image is represented by one of its captions, drawn with the
    manifest's seed; images without captions are excluded where sentences are queries or database.

    Args:
        model: encodes images and sentences.
        manifest: its test part holds the queries.
        root: folder of its images.
        on_progress: called with the number of images encoded so far.
        baseline_model: makes the features of the baselines, which search images by image; None: no baselines.
        cutoffs: the k of average precision.
        vectors_of: reads the vectors of a table of embeddings, and checks them; None: the items are images.

    Raises:
        InputError: files differ from the manifest, or there are no queries.
    """
    if vectors_of is None:
        manifest.check_files(root)
    rule = PROTOCOLS[manifest.protocol]
    queries, database = manifest.part("test"), manifest.part(*rule.database)
    if not queries:
        raise InputError("the manifest has no test part, so there are no queries to evaluate")
    if not any(image.labels for image in queries):
        raise InputError(
            f"none of the {len(queries)} test images has a class, so no image is relevant to them; evaluation needs "
            "labels, such as one folder for each class"
        )
    # Each image once, even if it is both query and database item.
    images = manifest.part("test", *rule.database)
    query_labels, database_labels = label_arrays(
        len(manifest.classes), [image.labels for image in queries], [image.labels for image in database]
    )
    if vectors_of is None:
        codes = {"image": _encode_images(model, images, root, on_progress)}
    else:
        encoded = model.encode_features(vectors_of(images))
        codes = {"image": {image.id: code for image, code in zip(images, encoded, strict=True)}}
    if model.has_text and all(any(image.captions for image in part) for part in (queries, database)):
        captions = {image.id: draw_caption(image, manifest.seed) for image in images if image.captions}
        codes["text"] = dict(zip(captions, model.encode_texts(list(captions.values())), strict=True))
    else:
        captions = {}

    def part(kind: str, members: Sequence[Image], labels: Labels) -> EncodedPart:
        rows = [row for row, image in enumerate(members) if image.id in codes[kind]]
        return EncodedPart(
            ids=[members[row].id for row in rows],
            codes=np.stack([codes[kind][members[row].id] for row in rows]),
            labels=labels[rows],
            paths=[str(root / members[row].path) for row in rows],
            sentences=[captions[members[row].id] for row in rows] if kind == "text" else None,
        )

    def evaluate_direction(query_kind: str, database_kind: str) -> Evaluation:
        query = part(query_kind, queries, query_labels)
        searched = part(database_kind, database, database_labels)
        is_cross_modal = query_kind != database_kind
        evaluation = evaluate(
            query,
            searched,
            dataset=manifest.dataset,
            protocol=manifest.protocol,
            method=model.card.method,
            bits=model.bits,
            # In a cross-modal search, the item with the query's id is its pair: the item to be found.
            exclude_self=rule.leave_one_out and not is_cross_modal,
            classes=manifest.classes,
            cutoffs=cutoffs,
            pairs=is_cross_modal and "test" in rule.database,
        )
        if baseline_model is None or query_kind == "text" or is_cross_modal:
            return evaluation
        return with_baselines(evaluation, _baselines(baseline_model, manifest, query, searched, evaluation, cutoffs))

    if "text" not in codes:
        return evaluate_direction("image", "image")
    return {f"{a}->{b}": evaluate_direction(a, b) for a, b in product(("image", "text"), repeat=2)}


def draw_caption(image: Image, seed: int) -> str:
    """Return one of the image's captions, drawn with the seed and the image's id, independent of other images."""
    return image.captions[drawn_caption(image.id, len(image.captions), seed)]


def check_untrained(evaluated: Manifest, trained: Manifest) -> None:
    """Raise `InputError` if test images of `evaluated` are training or validation images of `trained`, by content."""
    seen = {image.sha256 for image in trained.part("train", "validation")}
    leaked = [image.path for image in evaluated.part("test") if image.sha256 in seen]
    if leaked:
        raise InputError(
            f"{len(leaked)} of the {len(evaluated.part('test'))} queries of protocol {evaluated.protocol} were "
            f"training or validation images of this run (first: {leaked[0]}); train a run by that protocol instead"
        )


def _encode_images(
    model: HashModel, images: Sequence[Image], root: Path, on_progress: Callable[[int], None] | None
) -> dict[str, npt.NDArray[np.uint8]]:
    """Return the code of each image by its id.

    Images whose features training left in the cache are not read, unless rounding could change one of their bits.
    """
    codes: dict[str, npt.NDArray[np.uint8]] = {}
    extractor = FeatureExtractor(model.network, model.preprocessing, model.device)
    cached, features = extractor.cached(images)
    if cached:
        is_certain = model.is_certain(features)
        certain = [images[row].id for row in np.array(cached)[is_certain]]
        codes.update(zip(certain, model.encode_features(features[is_certain]), strict=True))
    num_cached = len(codes)
    if num_cached and on_progress is not None:
        on_progress(num_cached)
    remaining = [image for image in images if image.id not in codes]
    encoded = model.encode_files(
        [root / image.path for image in remaining],
        root=root,
        on_progress=None if on_progress is None else lambda done: on_progress(num_cached + done),
    )
    codes.update(zip((image.id for image in remaining), encoded, strict=True))
    return codes


def _baselines(
    features_of: FeaturesOf,
    manifest: Manifest,
    query: EncodedPart,
    database: EncodedPart,
    evaluation: Evaluation,
    cutoffs: Sequence[int],
) -> dict[str, dict[str, object]]:
    """Return the result of every baseline on the queries and database of `evaluation`, fitted on the training part."""
    query = query.select(np.flatnonzero(labelled(query.labels)))
    train = {image.id for image in manifest.part("train")}
    needed = train.union(query.ids, database.ids)
    images = [image for image in manifest.images if image.id in needed]
    features = features_of(images)
    row_of = {image.id: row for row, image in enumerate(images)}
    rows = {"train": [row_of[image.id] for image in images if image.id in train]}
    rows |= {name: [row_of[id] for id in part.ids] for name, part in (("query", query), ("database", database))}
    return evaluate_baselines(
        {name: features[part_rows] for name, part_rows in rows.items()},
        {"query": query.labels, "database": database.labels},
        evaluation.metrics["bits"],
        own_positions(query, database) if evaluation.metrics["exclude_self"] else None,
        seed=manifest.seed,
        cutoffs=(20, *cutoffs),
    )
