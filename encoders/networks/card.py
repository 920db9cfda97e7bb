"""`model.json`: what a model is, readable without torch."""

import dataclasses
import hashlib
import json
import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

from orbithash.encoders.codes import check_bits
from orbithash.encoders.errors import InputError
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.networks.label_codes import label_table

__all__ = ["POOLINGS", "HeadSpec", "ModelCard", "NetworkSpec", "TextSpec", "read_model_folder", "write_card"]

FORMAT_VERSION = 3

POOLINGS = ("avg", "max", "avg+max")

# Activation of a head's outputs -> the threshold of its bits.
ACTIVATIONS = {"tanh": 0.0, "sigmoid": 0.5, "none": 0.0}
HEAD_NORMS = ("none", "layer", "standardise")
HIDDEN_ACTIVATIONS = ("relu", "leaky-relu")


@dataclasses.dataclass(frozen=True)
class HeadSpec:
    """What turns features into `bits` outputs, without its weights.

    A normalisation of the features, hidden layers of these widths (with batch norm where asked for), a linear layer,
    an activation.
    """

    bits: int
    norm: str = "layer"
    hidden: tuple[int, ...] = ()
    hidden_activation: str = "relu"
    batch_norm: bool = False
    activation: str = "tanh"

    def __post_init__(self) -> None:
        check_bits(self.bits)
        for what, value, known in (
            ("norm", self.norm, HEAD_NORMS),
            ("hidden activation", self.hidden_activation, HIDDEN_ACTIVATIONS),
            ("activation", self.activation, tuple(ACTIVATIONS)),
        ):
            if value not in known:
                raise InputError(f"unknown {what} {value!r} of a head; there are {', '.join(known)}")
        if not all(width > 0 for width in self.hidden):
            raise InputError(f"hidden layers of widths {list(self.hidden)}; each must be above 0")

    @property
    def threshold(self) -> float:
        """A bit is 1 where its output is at least this."""
        return ACTIVATIONS[self.activation]

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "HeadSpec":
        """The inverse of `dataclasses.asdict` through JSON, which knows no tuples."""
        return cls(**{**_all_of(cls, fields), "hidden": tuple(fields["hidden"])})


@dataclasses.dataclass(frozen=True)
class NetworkSpec:
    """What a `HashNetwork` is made of, without its weights.

    `num_classes` is the width of the classifier that reads the head's outputs, or 0; `channels` the bands of an image.
    """

    backbone: str
    norm: str
    pooling: str
    head: HeadSpec
    num_classes: int = 0
    channels: int = 3

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise InputError(f"unknown pooling {self.pooling!r}; there are {', '.join(POOLINGS)}")
        if self.num_classes < 0:
            raise InputError(f"num_classes is {self.num_classes}; 0 (no classifier) or more is allowed")
        if self.channels < 2:
            raise InputError(f"channels is {self.channels}; 2 or more is allowed (one band becomes three equal ones)")

    @property
    def bits(self) -> int:
        """Outputs of the head."""
        return self.head.bits

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "NetworkSpec":
        """The inverse of `dataclasses.asdict` through JSON."""
        return cls(**{**_all_of(cls, fields), "head": HeadSpec.from_json(fields["head"])})


@dataclasses.dataclass(frozen=True)
class TextSpec:
    """The text side: which frozen encoder (the hash of its files, the width of its features) and the head after it."""

    encoder_sha256: str
    num_features: int
    head: HeadSpec

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "TextSpec":
        """The inverse of `dataclasses.asdict` through JSON."""
        return cls(**{**_all_of(cls, fields), "head": HeadSpec.from_json(fields["head"])})


@dataclasses.dataclass(frozen=True)
class ModelCard:
    """All of `model.json` but the format version and the two hashes.

    `label_code` and `label_weight`: the predicted class's label bits, that many times, follow the hash bits.
    `thresholds` has one number for each hash bit: the bit is 1 where the output is at least its threshold.
    `dataset` names the training data and the hash of their manifest; `metrics` are those of the validation part. A
    model that encodes sentences has a `text` side, whose head has as many outputs and no label bits.
    """

    method: str
    network: NetworkSpec
    thresholds: tuple[float, ...]
    label_code: str
    label_weight: int
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    dataset: dict[str, Any]
    metrics: dict[str, Any]
    text: TextSpec | None = None
    versions: dict[str, str] = dataclasses.field(
        default_factory=lambda: {"orbithash": version("orbithash"), "torch": version("torch")}
    )

    def __post_init__(self) -> None:
        if len(self.thresholds) != self.network.bits or not all(map(math.isfinite, self.thresholds)):
            raise InputError(f"thresholds: one finite number for each of the {self.network.bits} hash bits is needed")
        if self.label_code != "none" and not 2 <= len(self.classes) == self.network.num_classes:
            raise InputError(
                f"label code {self.label_code!r} needs a classifier of 2 or more classes and the names of all of them; "
                f"it has {self.network.num_classes} outputs for {len(self.classes)} names"
            )
        if self.network.channels != self.preprocessing.channels:
            raise InputError(
                f"a network for images of {self.network.channels} bands after preprocessing to "
                f"{self.preprocessing.channels}; both need as many"
            )
        if self.text is not None and (self.text.head.bits != self.network.bits or self.label_code != "none"):
            raise InputError(
                f"a text side of {self.text.head.bits} bits beside an image side of {self.bits}; both need as many"
            )
        check_bits(self.bits)

    @property
    def bits(self) -> int:
        """Bits of a whole code, label bits included."""
        num_label_bits: int = label_table(self.label_code, len(self.classes)).shape[1]
        return self.network.bits + self.label_weight * num_label_bits

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values, with `bits`."""
        return {
            "method": self.method,
            "bits": self.bits,
            "network": dataclasses.asdict(self.network),
            "thresholds": list(self.thresholds),
            "label_code": self.label_code,
            "label_weight": self.label_weight,
            "preprocessing": self.preprocessing.to_json(),
            "text_encoder": None if self.text is None else dataclasses.asdict(self.text),
            "classes": list(self.classes),
            "dataset": self.dataset,
            "metrics": self.metrics,
            "versions": self.versions,
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "ModelCard":
        """The inverse of `to_json`; `KeyError`, `TypeError` or `ValueError` for anything else."""
        return cls(
            method=str(fields["method"]),
            network=NetworkSpec.from_json(fields["network"]),
            thresholds=tuple(float(t) for t in fields["thresholds"]),
            label_code=fields["label_code"],
            label_weight=int(fields["label_weight"]),
            preprocessing=Preprocessing.from_json(fields["preprocessing"]),
            classes=tuple(fields["classes"]),
            dataset=dict(fields["dataset"]),
            metrics=dict(fields["metrics"]),
            text=None if fields["text_encoder"] is None else TextSpec.from_json(fields["text_encoder"]),
            versions=dict(fields["versions"]),
        )


def read_model_folder(folder: Path) -> tuple[ModelCard, str, bytes]:
    """The card, the `model_id` and the content of `model.safetensors`, whose hash the card states.

    `InputError` when either file is absent or damaged, or `model.json` is short of a key or of an unknown version.
    """
    path = folder / "model.json"
    if not path.is_file():
        raise InputError(f"{folder}: not a model folder (it has no model.json); training leaves one in RUN/model")
    try:
        fields = json.loads(path.read_bytes())
    except OSError as err:
        raise InputError(f"{path}: cannot be read ({err.strerror})") from err
    except (ValueError, RecursionError) as err:
        raise InputError(f"{path}: damaged (not JSON: {err})") from err
    found = fields.get("format_version") if isinstance(fields, dict) else None
    if found != FORMAT_VERSION:
        raise InputError(f"{path}: format version {found!r}; this orbithash reads version {FORMAT_VERSION}")
    try:
        model_id, weights_sha256 = fields["model_id"], fields["weights_sha256"]
        card = ModelCard.from_json(fields)
    except KeyError as err:
        raise InputError(f"{path}: the key {err} is missing") from err
    except (TypeError, ValueError) as err:
        problems = " ".join(str(err).split())
        raise InputError(f"{path}: a value is wrong ({problems})") from err
    known = _fields(card, weights_sha256)
    if {**known, "model_id": _content_hash(known)} != fields:
        raise InputError(f"{path}: damaged (its content does not give its model_id {model_id!r})")
    try:
        weights = (folder / "model.safetensors").read_bytes()
    except OSError as err:
        raise InputError(f"{folder}: model.safetensors cannot be read ({err.strerror})") from err
    if hashlib.sha256(weights).hexdigest() != weights_sha256:
        raise InputError(f"{folder}: model.safetensors is damaged (its hash is not the one in model.json)")
    return card, model_id, weights


def write_card(card: ModelCard, weights_sha256: str, folder: Path) -> str:
    """Writes `model.json` into `folder` and returns the `model_id`: a hash over all of it and over the weights."""
    fields = _fields(card, weights_sha256)
    fields["model_id"] = _content_hash(fields)
    (folder / "model.json").write_text(json.dumps(fields, indent=1) + "\n")
    return str(fields["model_id"])


def _all_of(cls: type[Any], fields: dict[str, Any]) -> dict[str, Any]:
    """`fields`, none of which may be left to its default; `KeyError` names the first that is missing."""
    return {field.name: fields[field.name] for field in dataclasses.fields(cls)}


def _fields(card: ModelCard, weights_sha256: str) -> dict[str, Any]:
    # Through JSON, so that what was written and what was read compare equal.
    fields: dict[str, Any] = json.loads(
        json.dumps({"format_version": FORMAT_VERSION, **card.to_json(), "weights_sha256": weights_sha256})
    )
    return fields


def _content_hash(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:32]
