"""The model of a run as its card describes it: model folder, run, and the stored evaluations."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from orbithash.encoders.errors import InputError
from orbithash.encoders.networks.card import ModelCard, read_model_folder
from orbithash.encoders.places.code_description import CodeDescription
from orbithash.trainers.datasets import PROTOCOLS
from orbithash.trainers.loop.run import Run
from orbithash.trainers.loop.run_folder import open_run, read_history

__all__ = ["Direction", "StoredEvaluation", "TrainedModel", "read_trained_model"]

# Entries of metrics.json that hold for all directions.
_SHARED = ("dataset", "protocol", "method", "bits", "model_id")

FAILURES_VERSION = 1


@dataclass(frozen=True)
class Direction:
    """One direction of an evaluation: "" for the only one, else such as "image->text".

    `metrics` is the content of `metrics.json` for a single direction. `failures` is that direction's part of
    `failures.json`: worst queries, confused classes, dead and correlated bits; None: the file is absent.
    """

    name: str
    metrics: Mapping[str, Any]
    failures: Mapping[str, Any] | None


@dataclass(frozen=True)
class StoredEvaluation:
    """A folder that `orbithash evaluate` wrote."""

    folder: str
    protocol: str
    dataset: str
    directions: tuple[Direction, ...]

    @property
    def database(self) -> str:
        """The searched parts of the split, and whether a query finds itself, in words."""
        rule = PROTOCOLS.get(self.protocol)
        if rule is None:
            return "the parts that the protocol states"
        if rule.leave_one_out:
            return "the test part without the query itself"
        return f"the {' and the '.join(rule.database)} part" + ("s" if len(rule.database) > 1 else "")


@dataclass(frozen=True)
class TrainedModel:
    """A model folder with its run and its evaluations.

    Attributes:
        folder: the model folder.
        card: content of `model.json`.
        model_id: hash of all that decides codes.
        weights_sha256: hash of `model.safetensors`.
        weights_bytes: size of `model.safetensors`.
        run: method, settings and manifest.
        epochs: number of completed epochs.
        evaluations: those of this model, the run's own protocol first.
        skipped: why evaluations of the run folder are left out, one sentence each.
    """

    folder: Path
    card: ModelCard
    model_id: str
    weights_sha256: str
    weights_bytes: int
    run: Run
    epochs: int
    evaluations: tuple[StoredEvaluation, ...]
    skipped: tuple[str, ...]

    @cached_property
    def num_parameters(self) -> int:
        """Number of values in `model.safetensors`: weights, and the statistics of normalisation layers."""
        try:
            with safe_open(self.folder / "model.safetensors", "numpy") as tensors:
                shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118
        except SafetensorError as err:
            raise InputError(f"{self.folder}: model.safetensors is damaged ({err})") from err
        return sum(_product(shape) for shape in shapes)

    @property
    def is_of_embeddings(self) -> bool:
        """Whether the model takes vectors instead of images."""
        return self.card.network.backbone.source == "embedding"

    @property
    def codes(self) -> CodeDescription:
        """The codes and stored vectors that the model makes, for programs that know nothing of orbithash."""
        vector, backbone = self.card.vector, self.card.network.backbone
        return CodeDescription(
            self.card.bits,
            self.model_id,
            vector_dims=None if vector is None else vector.dims,
            vector_scale=None if vector is None else vector.scale,
            embedding=backbone.name if self.is_of_embeddings else "",
            method=self.card.method,
        )


def read_trained_model(run_folder: Path, bits: int | None = None) -> TrainedModel:
    """Return the model of a run folder.

    Args:
        run_folder: a complete run.
        bits: a shorter length of a run with nested lengths; None: the whole code.

    Raises:
        InputError: not a complete run, no model of that length, or a damaged file.
    """
    run = open_run(run_folder)
    folder = run_folder / "model"
    if not folder.is_dir():
        raise InputError(f"{run_folder}: the run is not complete (it has no model); finish it with orbithash train")
    card, model_id, weights = read_model_folder(folder)
    if bits not in (None, card.bits):
        folder = run_folder / f"model-{bits}"
        if not folder.is_dir():
            raise InputError(
                f"{run_folder} has no model of {bits} bits, but of {card.bits}; train with nested_bits=[{bits}] for "
                "several lengths"
            )
        card, model_id, weights = read_model_folder(folder)
    fields = json.loads((folder / "model.json").read_bytes())
    evaluations, skipped = _read_evaluations(run_folder, run, model_id)
    return TrainedModel(
        folder=folder,
        card=card,
        model_id=model_id,
        weights_sha256=fields["weights_sha256"],
        weights_bytes=len(weights),
        run=run,
        epochs=len(read_history(run_folder)),
        evaluations=evaluations,
        skipped=skipped,
    )


def _read_evaluations(
    run_folder: Path, run: Run, model_id: str
) -> tuple[tuple[StoredEvaluation, ...], tuple[str, ...]]:
    """Return the evaluations of the model in the run folder, and why others are left out."""
    found, skipped = [], []
    for path in sorted(run_folder.glob("evaluation*/metrics.json")):
        metrics = _read_object(path)
        if (stated := metrics.get("model_id")) != model_id:
            # Of another length, or of an earlier training into the same folder.
            skipped.append(f"{path.parent.name} {'is of another model' if stated else 'does not state its model'}")
            continue
        failures_path = path.with_name("failures.json")
        failures = _read_object(failures_path) if failures_path.is_file() else {}
        if failures.get("model_id", model_id) != model_id or failures.get("format_version", 1) != FAILURES_VERSION:
            failures = {}
        try:
            directions = tuple(_directions(metrics, failures.get("directions", {})))
            evaluation = StoredEvaluation(path.parent.name, metrics["protocol"], metrics["dataset"], directions)
        except (KeyError, TypeError, AttributeError) as err:
            raise InputError(f"{path}: damaged ({err!r}); evaluate the run again") from err
        found.append(evaluation)
    found.sort(key=lambda evaluation: evaluation.protocol != run.manifest.protocol)
    return tuple(found), tuple(skipped)


def _directions(metrics: dict[str, Any], failures: Mapping[str, Any]) -> Iterator[Direction]:
    """Yield the directions of `metrics.json`, which has an object for each of them if there are several."""
    names = [name for name in metrics["metrics"] if "->" in name]
    if not names:
        yield Direction("", metrics, failures.get(""))
        return
    for name in names:
        own = {
            key: value if key in _SHARED or not isinstance(value, dict) else value[name]
            for key, value in metrics.items()
            if key in _SHARED or not isinstance(value, dict) or name in value
        }
        yield Direction(name, own, failures.get(name))


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as err:
        raise InputError(f"{path}: cannot be read ({err.strerror})") from err
    except (ValueError, RecursionError) as err:
        raise InputError(f"{path}: damaged (not JSON); evaluate the run again") from err
    if not isinstance(content, dict):
        raise InputError(f"{path}: damaged (not an object); evaluate the run again")
    return content


def _product(shape: list[int]) -> int:
    product = 1
    for side in shape:
        product *= side
    return product
