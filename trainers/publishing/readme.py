"""The model card: README.md of a model folder, in Markdown after the front matter."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import yaml

from orbithash.trainers.metrics.retrieval import VALIDATION_SIZES
from orbithash.trainers.publishing.failures import failure_blocks
from orbithash.trainers.publishing.front_matter import CARD_METRICS, base_model, front_matter
from orbithash.trainers.publishing.markdown import code, table, text
from orbithash.trainers.publishing.statements import NOT_STATED, Statements
from orbithash.trainers.publishing.trained_model import Direction, StoredEvaluation, TrainedModel
from orbithash.trainers.publishing.wording import (
    band_names,
    known_dataset,
    model_name,
    public_settings,
    slug,
    summary,
    training_strategy,
)

__all__ = ["readme"]

# Extras that install the library of a backbone.
_EXTRAS = {"timm": "timm", "open_clip": "open-clip", "torchgeo": "torchgeo"}

NUM_HARDEST = 5


def readme(model: TrainedModel, statements: Statements) -> str:
    """Return the text of the model card."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=False,  # Markdown; the filters escape it
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    templates.filters.update(text=text)
    card, name = model.card, model_name(model, statements)
    return templates.get_template("readme.md.jinja").render(
        front_matter=front_matter(model, statements).to_yaml() + "\n",
        name=name,
        slug=slug(name),
        repository=f"ORG/{slug(name)}",
        summary=summary(model),
        overview=list(_overview(model, statements)),
        is_of_embeddings=model.is_of_embeddings,
        has_text=card.text is not None,
        num_features=card.network.backbone.num_features,
        bits=card.bits,
        num_bytes=model.codes.num_bytes,
        library_extra=_EXTRAS.get(card.network.backbone.source),
        inputs=list(_inputs(model)),
        intended_use=list(_intended_use(model)),
        limits=list(_limits(model)),
        relevance="shares a class with" if _is_multi_label(model) else "has the class of",
        results=[
            _result(evaluation, direction) for evaluation in model.evaluations for direction in evaluation.directions
        ],
        failures=list(failure_blocks(model, statements.has_examples)),
        training_data=list(_training_data(model, statements)),
        training=list(_training(model)),
        settings=yaml.safe_dump(_settings(model), sort_keys=False, allow_unicode=True),
        provenance=list(_provenance(model, statements)),
    )


def _overview(model: TrainedModel, statements: Statements) -> Iterator[tuple[str, str]]:
    card = model.card
    backbone = card.network.backbone
    yield "Code", f"{card.bits} bits, {model.codes.num_bytes} bytes"
    if card.vector is not None:
        yield "Stored vector", f"int8, {card.vector.dims} dimensions, for ranking a shortlist again"
    yield "Method", f"{code(card.method)}: {text(_paper(model))}"
    if model.is_of_embeddings:
        yield "Embedding", f"{text(backbone.name or 'without a name')}, {backbone.num_features} dimensions"
    else:
        yield "Backbone", f"{code(backbone.name)} of {backbone.source}, {backbone.num_features} features"
        yield "Input", f"{card.preprocessing.crop} x {card.preprocessing.crop} pixels, {backbone.channels} bands"
    yield "Sentences as queries", "yes" if card.text is not None else "no"
    yield (
        "Licence",
        f"{text(statements.licence.shown)}" + (" (stated by the publisher)" if statements.licence.text else ""),
    )
    yield "Provider", text(statements.provider or NOT_STATED)
    yield "model_id", code(model.model_id)


def _inputs(model: TrainedModel) -> Iterator[str]:
    card = model.card
    backbone, preprocessing = card.network.backbone, card.preprocessing
    if model.is_of_embeddings:
        name = text(backbone.name) if backbone.name else "an embedding without a name"
        yield f"Vectors of {name}, {backbone.num_features} dimensions" + (
            f", published at {text(backbone.origin)}." if backbone.origin else "."
        )
        return
    rendering = preprocessing.rendering
    yield f"Bands, in this order: {', '.join(code(name) for name in band_names(rendering))}."
    if rendering.is_picture:
        yield f"Values: 8-bit pictures; images of other types are stretched one by one, by {code(rendering.stretch)}."
    else:
        yield f"Values: numbers, {code(rendering.values)}" + _scaling(rendering.band_scale, rendering.band_offset)
    numbers = table(
        ["band", "mean", "standard deviation"],
        [
            [code(name), f"{mean:.6g}", f"{std:.6g}"]
            for name, mean, std in zip(band_names(rendering), preprocessing.mean, preprocessing.std, strict=False)
        ],
    ).replace("\n", "\n  ")
    unit = "of values in 0 to 1" if rendering.is_picture else "in the unit of the values"
    yield f"Standardised by these numbers, {unit}:\n\n  {numbers}\n"
    yield (
        f"Size: the shorter side becomes {preprocessing.resize} pixels ({preprocessing.interpolation}, antialiased), "
        f"and the central {preprocessing.crop} x {preprocessing.crop} pixels are taken."
    )
    if preprocessing.orientations > 1:
        yield f"Features are averaged over {preprocessing.orientations} orientations of the image."
    if card.text is not None:
        yield "Sentences: English, read by the text encoder in `text_encoder/`."


def _scaling(scale: tuple[float, ...], offset: tuple[float, ...]) -> str:
    if not scale and not offset:
        return "; scale and offset are those that the metadata of an image state."
    return f", as number x {list(scale) or 1} + {list(offset) or 0}."


def _intended_use(model: TrainedModel) -> Iterator[str]:
    yield "Search for similar scenes in an archive of imagery like the training data."
    if model.card.text is not None:
        yield "Search for scenes by a short English sentence."
    yield "Choice of candidates for labelling, and search for duplicates and near duplicates."
    yield "First stage of a search whose hits a person or a more precise model checks."


def _limits(model: TrainedModel) -> Iterator[str]:
    card = model.card
    if model.evaluations:
        data = text(known_dataset(model) or "the publisher's own data")
        yield f"Evaluated on {data} only. Quality on other sensors, resolutions, regions and seasons is unknown."
    else:
        yield "Not evaluated: its quality is unknown."
    if beaten := {name for one in model.evaluations for way in one.directions for name in _beaten_by(way)}:
        yield f"Simple methods with no more bytes an item find more here: {', '.join(map(code, sorted(beaten)))}."
    if not card.classes:
        yield "Trained without labels: nearest means similar to the network, not of the same class."
    if not model.is_of_embeddings and card.preprocessing.rendering.is_picture:
        yield "Images become 8-bit pictures: absolute radiometry is lost, and so are bands that are not listed above."
    yield "A Hamming distance is not a probability, and has no unit that other models share."
    yield "Not for decisions about people or property without a person who checks each hit."


def _result(evaluation: StoredEvaluation, direction: Direction) -> dict[str, Any]:
    metrics = direction.metrics
    name = direction.name.replace("->", " to ")
    rows = [
        [code(metric)]
        + [f"{metrics['metrics'][metric][order]:.4f}" for order in ("expected", "pessimistic", "optimistic")]
        + [f"{metrics['chance'][metric]:.4f}"]
        for metric in CARD_METRICS
        if metric in metrics["metrics"]
    ]
    notes = [
        "A query is not in its own answer." if metrics["exclude_self"] else "",
        f"{metrics['queries_in_database']:,} queries are also in the database."
        if metrics["queries_in_database"] and not metrics["exclude_self"]
        else "",
        f"{metrics['queries_without_relevant']:,} queries have no relevant item and count as 0."
        if metrics["queries_without_relevant"]
        else "",
    ]
    return {
        "title": f"{text(evaluation.dataset)}, protocol {text(evaluation.protocol)}" + (f", {name}" if name else ""),
        "protocol": " ".join(
            [
                f"{metrics['queries']:,} queries of the test part in {metrics['database']:,} items: "
                f"{evaluation.database}.",
                *filter(None, notes),
            ]
        ),
        "rows": rows,
        "paragraphs": list(_comparisons(metrics)),
    }


def _beaten_by(direction: Direction) -> list[str]:
    """Return the names of the simple methods of at most the code's bytes an item that are better."""
    return direction.metrics.get("beaten_by") or []


def _comparisons(metrics: Any) -> Iterator[str]:
    """Yield paragraphs: recall of the own pair, baselines, the hardest classes."""
    if recall := metrics.get("pair_recall"):
        yield "Own pair among the first k: " + ", ".join(f"{k} {share:.3f}" for k, share in recall.items()) + "."
    baselines = {name: one for name, one in metrics.get("baselines", {}).items() if "metrics" in one}
    if baselines:
        size = metrics["codes"]["bytes_per_code"]
        rows = [["this model", f"{size:,}", f"{metrics['metrics']['ap_min@20']['expected']:.4f}"]]
        rows += [
            [code(name), f"{one['bytes']:,}", f"{one['metrics']['ap_min@20']:.4f}"] for name, one in baselines.items()
        ]
        beaten = metrics.get("beaten_by") or []
        verdict = (
            f"With no more bytes an item, {', '.join(code(name) for name in beaten)} is better."
            if beaten
            else "No simple method of at most as many bytes an item is better."
        )
        yield "Simple methods on the features of the same backbone before this training:\n\n" + table(
            ["method", "bytes an item", "ap_min@20"], rows
        )
        yield verdict
    elif reason := metrics.get("baselines_left_out"):
        yield f"There are no simple methods to compare with: {text(reason)}."
    if len(by_class := metrics["per_class"]) > 1:
        hardest = sorted(by_class.items(), key=lambda pair: pair[1])[:NUM_HARDEST]
        yield (
            "Hardest classes by `ap_min@20`: " + ", ".join(f"{text(name)} {score:.3f}" for name, score in hardest) + "."
        )


def _training_data(model: TrainedModel, statements: Statements) -> Iterator[str]:
    manifest = model.run.manifest
    dataset = known_dataset(model)
    yield f"Dataset: {text(dataset)}" if dataset else f"Dataset: the publisher's own ({text(manifest.dataset)})"
    kinds = "rows" if model.is_of_embeddings else "images"
    parts = [(part, len(manifest.part(part))) for part in ("train", "validation", "test", "database")]
    counts = ", ".join(f"{part} {count:,}" for part, count in parts if count)
    yield f"Split: protocol {code(manifest.protocol)}, seed {manifest.seed}; {kinds}: {counts}"
    yield f"Classes: {', '.join(map(text, manifest.classes)) or 'none'}"
    if captioned := int(manifest.images.has_captions.sum()):
        yield f"Captions: {captioned:,} images have some"
    yield f"Licence of the data, as the publisher states it: {text(statements.data_licence.shown)}"
    west_to_north = ", ".join(f"{number:g}" for number in statements.bbox or ())
    yield f"Extent (west, south, east, north): {west_to_north or NOT_STATED}"
    yield f"Dates: {text(statements.dates or NOT_STATED)}"
    yield f"SHA-256 of the manifest, which holds the hash of every file: {code(manifest.sha256)}"


def _training(model: TrainedModel) -> Iterator[str]:
    card, config = model.card, model.run.config
    backbone = card.network.backbone
    yield f"Method: {text(training_strategy(model))}. {text(_paper(model))}"
    if not model.is_of_embeddings:
        base = base_model(model)
        origin = f"[{text(base)}](https://huggingface.co/{base})" if base else text(backbone.origin or NOT_STATED)
        licence = text(backbone.licence or NOT_STATED)
        yield f"Weights of the backbone before training: {origin}; their licence: {licence}"
    selected = (
        f"Epoch {card.metrics['epoch']} of {model.epochs}" if "epoch" in card.metrics else f"{model.epochs} epochs"
    )
    yield f"{selected}, batches of {config.batch_size}, seed {config.seed}"
    validation = {name: value for name, value in card.metrics.items() if name.startswith("validation/")}
    if validation:
        values = ", ".join(
            f"{text(name.partition('/')[2])} {f'{value:,}' if name in VALIDATION_SIZES else f'{value:.4f}'}"
            for name, value in validation.items()
        )
        yield f"On the validation part, which chose the epoch: {values}"
    else:
        yield "No validation part chose the epoch"


def _settings(model: TrainedModel) -> dict[str, Any]:
    return public_settings({"method": model.card.method, **model.run.config.model_dump(mode="json")})


def _provenance(model: TrainedModel, statements: Statements) -> Iterator[str]:
    yield f"model_id: {code(model.model_id)}, the hash of all that decides codes"
    yield f"SHA-256 of `model.safetensors`: {code(model.weights_sha256)} ({model.weights_bytes:,} bytes)"
    yield f"Values in `model.safetensors`: {model.num_parameters:,}"
    if model.card.text is not None:
        yield f"Hash of the text encoder: {code(model.card.text.encoder_sha256)}"
    yield "Trained with " + ", ".join(f"{text(name)} {text(version)}" for name, version in model.card.versions.items())
    yield "Files: safetensors and JSON, no pickle"


def _paper(model: TrainedModel) -> str:
    from orbithash.trainers.methods import get_method

    return get_method(model.card.method).paper


def _is_multi_label(model: TrainedModel) -> bool:
    return any("ndcg@20" in direction.metrics["metrics"] for one in model.evaluations for direction in one.directions)
