"""Evaluation of a trained model on the test part of a manifest."""

from collections.abc import Callable, Collection, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import numpy.typing as npt

from orbithash.encoders.codes import Encoded
from orbithash.encoders.errors import InputError
from orbithash.encoders.networks.model import HashModel
from orbithash.encoders.networks.reading import READ_BATCH_SIZE, read_batches
from orbithash.trainers.captions.choice import drawn_caption
from orbithash.trainers.datasets import PROTOCOLS, Image, Manifest
from orbithash.trainers.evaluation.baselines import evaluate_baselines
from orbithash.trainers.evaluation.comparison import BaselineResult
from orbithash.trainers.evaluation.evaluation import Evaluation, evaluate, with_baselines
from orbithash.trainers.evaluation.parts import EncodedPart, own_positions
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
        query_ids = {image.id for image in queries}
        encoded = {"image": _encode_images(model, images, query_ids, root, on_progress)}
    else:
        items = model.encode_items("vector", vectors_of(images), with_outputs=True).split()
        encoded = {"image": {image.id: item for image, item in zip(images, items, strict=True)}}
    if model.has_text and all(any(image.captions for image in part) for part in (queries, database)):
        captions = {image.id: draw_caption(image, manifest.seed) for image in images if image.captions}
        items = model.encode_items("text", list(captions.values()), with_outputs=True).split()
        encoded["text"] = dict(zip(captions, items, strict=True))
    else:
        captions = {}

    def part(kind: str, members: Sequence[Image], labels: Labels) -> EncodedPart:
        rows = [row for row, image in enumerate(members) if image.id in encoded[kind]]
        joined = Encoded.joined([encoded[kind][members[row].id] for row in rows])
        return EncodedPart(
            ids=[members[row].id for row in rows],
            codes=joined.codes,
            outputs=joined.outputs,
            vectors=joined.vectors,
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
            model_id=model.model_id,
        )
        if baseline_model is None or query_kind == "text" or is_cross_modal:
            return evaluation
        return with_baselines(evaluation, _baselines(baseline_model, manifest, query, searched, evaluation, cutoffs))

    if "text" not in encoded:
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
    model: HashModel,
    images: Sequence[Image],
    query_ids: Collection[str],
    root: Path,
    on_progress: Callable[[int], None] | None,
) -> dict[str, Encoded]:
    """Return the code, the stored vector and, for queries, the outputs of each image by its id, one row each.

    Database images whose features training left in the cache are not read, unless rounding could change a bit or a
    component. Queries are always read: rounding could change one of the outputs of most of them.
    """
    encoded: dict[str, Encoded] = {}
    extractor = FeatureExtractor(model.network, model.preprocessing, model.device, model.card.precision)
    searched = [image for image in images if image.id not in query_ids]
    cached, features = extractor.cached(searched)
    if cached:
        is_certain = model.is_certain(features)
        certain = [searched[row].id for row in np.array(cached)[is_certain]]
        encoded.update(zip(certain, model.encode_items("vector", features[is_certain]).split(), strict=True))
    if encoded and on_progress is not None:
        on_progress(len(encoded))
    # Queries first, so that few batches have both.
    remaining = sorted(
        (image for image in images if image.id not in encoded), key=lambda image: image.id not in query_ids
    )
    paths = [root / image.path for image in remaining]
    done = 0
    for batch in read_batches(paths, model.preprocessing, root=root, batch_size=READ_BATCH_SIZE):
        members = remaining[done : done + len(batch)]
        items = model.encode_items("image", batch, with_outputs=members[0].id in query_ids)
        encoded.update(zip((image.id for image in members), items.split(), strict=True))
        done += len(batch)
        if on_progress is not None:
            on_progress(len(encoded))
    return encoded


def _baselines(
    features_of: FeaturesOf,
    manifest: Manifest,
    query: EncodedPart,
    database: EncodedPart,
    evaluation: Evaluation,
    cutoffs: Sequence[int],
) -> dict[str, BaselineResult | str]:
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
