"""The front matter of a model card: metadata of the Hugging Face hub, and the fields of geoembeddings.org."""

import re
from collections.abc import Iterator
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from orbithash.trainers.publishing.statements import NOT_STATED, Statements
from orbithash.trainers.publishing.trained_model import Direction, StoredEvaluation, TrainedModel
from orbithash.trainers.publishing.wording import data_types, known_dataset, model_name, summary, training_strategy

__all__ = ["CARD_METRICS", "TIES", "base_model", "front_matter"]

# The hub's task for models that turn images into vectors.
TASK = "image-feature-extraction"

# Metrics of the card, in this order; an evaluation has those that its labels allow.
CARD_METRICS = (
    "ap_min@20",
    "ap_hits@20",
    "ap_first_k@20",
    "ap_min@100",
    "ap_min@all",
    "precision@1",
    "precision@20",
    "recall@100",
    "ndcg@20",
    "precision_radius@2",
)

TIES = "expected value over all orders of items at equal distance"

_CONTEXT = "spatial context determined by embedding spatial type"
_TEMPORAL_CONTEXT = "temporal context determined by embedding temporal type"

# "org/name", or "org/name@revision".
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def front_matter(model: TrainedModel, statements: Statements) -> ModelCardData:
    """Return the metadata of the model card."""
    card, name = model.card, model_name(model, statements)
    licence, dataset, base = statements.licence, known_dataset(model), base_model(model)
    is_other = licence.hub_id == "other"
    return ModelCardData(
        model_name=name,
        language="en" if card.text is not None else None,
        license=licence.hub_id,
        license_name=licence.short_name if is_other else None,
        license_link=licence.text if is_other and licence.text.startswith("https://") else None,
        library_name="orbithash",
        pipeline_tag=TASK,
        tags=_tags(model),
        base_model=base,
        datasets=None if dataset is None else [dataset],
        metrics=list(dict.fromkeys(metric for _, one in _directions(model) for metric in _metrics(one))) or None,
        eval_results=list(_eval_results(model)) or None,
        **_geo_embedding_fields(model, statements),
    )


def base_model(model: TrainedModel) -> str | None:
    """Return the hub name of the pretrained backbone, without its revision; None if it is not from the hub."""
    backbone = model.card.network.backbone
    if backbone.source not in ("hf", "timm", "open_clip") or not _HUB_NAME.fullmatch(backbone.origin):
        return None
    return backbone.origin.partition("@")[0]


def _tags(model: TrainedModel) -> list[str]:
    card = model.card
    tags = ["remote-sensing", "earth-observation", "image-retrieval", "similarity-search", "hashing", "binary-codes"]
    return [*tags, card.method, *(["text-to-image-retrieval"] if card.text is not None else [])]


def _geo_embedding_fields(model: TrainedModel, statements: Statements) -> dict[str, Any]:
    """Return the fields of the model card of geoembeddings.org that the hub does not define."""
    card, config = model.card, model.run.config
    vector = f"; int8 vector of {card.vector.dims} dimensions" if card.vector is not None else ""
    training = {
        **_inputs(model),
        "training_strategy": training_strategy(model),
        "batch_size": config.batch_size,
    }
    if statements.bbox is not None:
        training["spatial_extent"] = list(statements.bbox)
    if statements.dates:
        training["temporal_extent"] = statements.dates
    return {
        "provider": statements.provider or NOT_STATED,
        # Embeddings are of pixels, patches or scenes; a table does not say.
        "embedding_spatial_types": [NOT_STATED if model.is_of_embeddings else "scene"],
        "embedding_temporal_type": ["single-date"],
        "embedding_spatial_context": _CONTEXT,
        "embedding_temporal_context": _TEMPORAL_CONTEXT,
        "embedding_dimension": card.bits,
        "description": summary(model),
        "compression": f"binary code of {card.bits} bits, packed into {model.codes.num_bytes} bytes{vector}",
        "intention": "retrieval of similar scenes in archives of imagery like the training data",
        "cautions": "codes of models with different model_id are not comparable; see Limits",
        "precomputed_embeddings": "no",
        "model_architecture": f"{card.network.backbone.source} {card.network.backbone.name}, hash head".strip(),
        "pretraining": training,
        "inference": _inputs(model),
        "orbithash": {**model.codes.to_json(), "weights_sha256": model.weights_sha256},
    }


def _inputs(model: TrainedModel) -> dict[str, Any]:
    """Return what goes into the model, in the words of geoembeddings.org."""
    if model.is_of_embeddings:
        backbone = model.card.network.backbone
        return {"product_names": [backbone.name or f"embedding of {backbone.num_features} dimensions"]}
    return {
        "data_types": data_types(model),
        "patch_size": model.card.preprocessing.crop,
        "temporal_context": "single-date",
    }


def _directions(model: TrainedModel) -> Iterator[tuple[StoredEvaluation, Direction]]:
    for evaluation in model.evaluations:
        for direction in evaluation.directions:
            yield evaluation, direction


def _metrics(direction: Direction) -> list[str]:
    return [metric for metric in CARD_METRICS if metric in direction.metrics["metrics"]]


def _eval_results(model: TrainedModel) -> Iterator[EvalResult]:
    for evaluation, direction in _directions(model):
        metrics, chance = direction.metrics["metrics"], direction.metrics["chance"]
        for metric in _metrics(direction):
            values = metrics[metric]
            yield EvalResult(
                task_type=TASK,
                task_name=f"Retrieval by binary codes{f', {direction.name}' if direction.name else ''}",
                dataset_type=evaluation.dataset,
                dataset_name=evaluation.dataset,
                dataset_config=", ".join(filter(None, (evaluation.protocol, direction.name))),
                dataset_split="test",
                dataset_args={
                    "protocol": evaluation.protocol,
                    "database": evaluation.database,
                    "queries": direction.metrics["queries"],
                    "database_items": direction.metrics["database"],
                    "queries_in_database": direction.metrics["queries_in_database"],
                    "query_excluded": direction.metrics["exclude_self"],
                },
                metric_type=metric,
                metric_name=metric,
                metric_value=round(values["expected"], 4),
                metric_args={
                    "ties": TIES,
                    "worst_order_of_ties": round(values["pessimistic"], 4),
                    "best_order_of_ties": round(values["optimistic"], 4),
                    "chance": round(chance[metric], 4),
                },
            )
