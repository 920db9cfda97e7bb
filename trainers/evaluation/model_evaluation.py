"""Evaluation of a trained model on the test part of a manifest."""

from collections.abc import Callable, Collection, Sequence
from itertools import product

import numpy as np
import numpy.typing as npt

from orbithash.encoders.codes import Encoded
from orbithash.encoders.errors import InputError
from orbithash.encoders.networks.model import HashModel
from orbithash.encoders.sources.image_roots import ImageRoot
from orbithash.trainers.captions.choice import drawn_caption
from orbithash.trainers.data.feature_table import FeatureRows
from orbithash.trainers.data.labels import label_arrays
from orbithash.trainers.datasets import PROTOCOLS, Image, Images, Manifest
from orbithash.trainers.evaluation.baselines import evaluate_baselines
from orbithash.trainers.evaluation.comparison import BaselineResult
from orbithash.trainers.evaluation.evaluation import Evaluation, evaluate, with_baselines
from orbithash.trainers.evaluation.parts import EncodedPart, own_positions
from orbithash.trainers.features.features import FeatureExtractor, Wanted
from orbithash.trainers.metrics.retrieval import Labels, labelled

__all__ = [
    "FeaturesOf",
    "check_untrained",
    "draw_caption",
    "evaluate_model",
    "wanted_features",
    "wanted_if_unsure",
]

# Rows of features that are encoded at a time.
BLOCK_SIZE = 4096

# Returns features float32 [N, D] of a manifest's images, from the backbone with its weights before training.
FeaturesOf = Callable[[Images], FeatureRows]


def evaluate_model(
    model: HashModel,
    manifest: Manifest,
    root: ImageRoot,
    on_progress: Callable[[int], None] | None = None,
    baseline_model: FeaturesOf | None = None,
    cutoffs: Sequence[int] = (20, 100),
    vectors_of: Callable[[Images], npt.NDArray[np.float32]] | None = None,
) -> Evaluation | dict[str, Evaluation]:
    """Encode the queries and the database of the manifest's protocol and evaluate the answers.

    A model with a text side, on a manifest with captions, is evaluated in the four directions "image->image",
    "image->text", "text->image" and "text->text". Each image is represented by one of its captions, drawn with the
    manifest's seed; images without captions are excluded where sentences are queries or database.

    Args:
        model: encodes images and sentences.
        manifest: its test part holds the queries.
        root: where its images are.
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
    if not queries.is_labelled.any():
        raise InputError(
            f"none of the {len(queries)} test images has a class, so no image is relevant to them; evaluation needs "
            "labels, such as one folder for each class"
        )
    images = manifest.part("test", *rule.database)
    query_labels, database_labels = label_arrays(len(manifest.classes), queries, database)
    if vectors_of is None:
        encoded = {"image": _encode_images(model, *_queries_and_others(manifest), root, on_progress)}
    else:
        items = model.encode_items("vector", vectors_of(images), with_outputs=True).split()
        encoded = {"image": dict(zip(images.ids, items, strict=True))}
    if model.has_text and all(part.has_captions.any() for part in (queries, database)):
        captions = {image.id: draw_caption(image, manifest.seed) for image in images[images.has_captions]}
        items = model.encode_items("text", list(captions.values()), with_outputs=True).split()
        encoded["text"] = dict(zip(captions, items, strict=True))
    else:
        captions = {}

    def part(kind: str, members: Images, labels: Labels) -> EncodedPart:
        is_encoded = np.array([id in encoded[kind] for id in members.ids])
        members, labels = members[is_encoded], labels[is_encoded]
        ids = members.ids
        joined = Encoded.joined([encoded[kind][id] for id in ids])
        return EncodedPart(
            ids=ids,
            codes=joined.codes,
            outputs=joined.outputs,
            vectors=joined.vectors,
            labels=labels,
            paths=members.paths,
            sentences=[captions[id] for id in ids] if kind == "text" else None,
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
    queries, seen = evaluated.part("test"), trained.part("train", "validation")
    leaked = queries[np.isin(queries.sha256s, seen.sha256s)]
    if leaked:
        raise InputError(
            f"{len(leaked)} of the {len(queries)} queries of protocol {evaluated.protocol} were "
            f"training or validation images of this run (first: {leaked[0].path}); train a run by that protocol instead"
        )


def wanted_features(
    model: HashModel, manifest: Manifest, root: ImageRoot, baselines: FeatureExtractor | None = None
) -> dict[str, Wanted]:
    """Return the features that `evaluate_model` looks up first: "queries", "others", and "baselines" if there are any.

    Those of the other images decide for which of them it looks up "unsure", see `wanted_if_unsure`. `baselines`
    computes the features of the baselines.
    """
    wanted = _wanted(model, *_queries_and_others(manifest), root)
    if baselines is not None:
        test, rule = manifest.part("test"), PROTOCOLS[manifest.protocol]
        ids = {*test[test.is_labelled].ids, *manifest.part("train", *rule.database).ids}
        wanted["baselines"] = baselines.wanted(root, _with_ids(manifest, ids))
    return wanted


def wanted_if_unsure(
    model: HashModel, manifest: Manifest, root: ImageRoot, rows: npt.NDArray[np.int64]
) -> dict[str, Wanted]:
    """Return the features of images in a pass of their own that `evaluate_model` looks up after "others".

    `rows` int64 [n] numbers the other images of which rounding could change the code, see `HashModel.is_certain`.
    """
    _, others = _queries_and_others(manifest)
    return {"unsure": _extractor(model).wanted(root, others[rows], alone=True)}


def _wanted(model: HashModel, queries: Images, others: Images, root: ImageRoot) -> dict[str, Wanted]:
    extractor = _extractor(model)
    wanted = {"queries": extractor.wanted(root, queries, alone=True)}
    return {**wanted, "others": extractor.wanted(root, others)} if others else wanted


def _queries_and_others(manifest: Manifest) -> tuple[Images, Images]:
    """Return the queries, and the images that are only in the database."""
    images = manifest.part("test", *PROTOCOLS[manifest.protocol].database)
    query_ids = set(manifest.part("test").ids)
    is_query = np.array([id in query_ids for id in images.ids])
    return images[is_query], images[~is_query]


def _extractor(model: HashModel) -> FeatureExtractor:
    return FeatureExtractor(model.network, model.preprocessing, model.device, model.card.precision)


def _with_ids(manifest: Manifest, ids: Collection[str]) -> Images:
    return manifest.images[np.array([id in ids for id in manifest.images.ids])]


def _encode_images(
    model: HashModel, queries: Images, others: Images, root: ImageRoot, on_progress: Callable[[int], None] | None
) -> dict[str, Encoded]:
    """Return the code, the stored vector and, for queries, the outputs of each image by its id, one row each.

    Only images whose features are not kept are read; their features are kept for the next evaluation. Rounding could
    change one of the outputs of most queries, so they are computed alone, as are other images of which it could change
    a bit or a component: all results are those of `encode_items`.
    """
    wanted = _wanted(model, queries, others, root)

    def progress(before: int) -> Callable[[int], None] | None:
        return None if on_progress is None else lambda done: on_progress(before + done)

    encoded: dict[str, Encoded] = {}

    def encode(members: Images, features: FeatureRows, with_outputs: bool) -> None:
        ids = members.ids
        for start in range(0, len(ids), BLOCK_SIZE):
            rows = slice(start, start + BLOCK_SIZE)
            items = model.encode_items("vector", features[rows], with_outputs=with_outputs)
            encoded.update(zip(ids[rows], items.split(), strict=True))

    encode(queries, wanted["queries"].table(progress(0)), True)
    if others:
        features = wanted["others"].table(progress(len(queries)))
        encode(others, features, False)
        unsure = others[~model.is_certain(features)]
        encode(unsure, _extractor(model).wanted(root, unsure, alone=True).table(), False)
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
    train = set(manifest.part("train").ids)
    needed = train.union(query.ids, database.ids)
    images = _with_ids(manifest, needed)
    features = features_of(images)
    row_of = {id: row for row, id in enumerate(images.ids)}
    rows = {"train": [row for id, row in row_of.items() if id in train]}
    rows |= {name: [row_of[id] for id in part.ids] for name, part in (("query", query), ("database", database))}
    return evaluate_baselines(
        {name: features[part_rows] for name, part_rows in rows.items()},
        {"query": query.labels, "database": database.labels},
        evaluation.metrics["bits"],
        own_positions(query, database) if evaluation.metrics["exclude_self"] else None,
        seed=manifest.seed,
        cutoffs=(20, *cutoffs),
    )
