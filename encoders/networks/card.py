"""The description of a model in `model.json`, readable without torch."""

import dataclasses
import hashlib
import json
import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

from orbithash.encoders.codes import check_bits
from orbithash.encoders.errors import InputError
from orbithash.encoders.files import recover_folder
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.networks.label_codes import label_table
from orbithash.encoders.vectors import VectorSpec

__all__ = [
    "PRECISIONS",
    "RANDOM_WEIGHTS",
    "BackboneSpec",
    "HeadSpec",
    "ModelCard",
    "NetworkSpec",
    "ProjectionSpec",
    "TextSpec",
    "read_model_folder",
    "write_card",
]

FORMAT_VERSION = 5

# Activation of the outputs of a head: threshold of its bits.
ACTIVATIONS = {"tanh": 0.0, "sigmoid": 0.5, "none": 0.0}

# The fields that decide codes and stored vectors. Their hash, with that of the weights, is the `model_id`. Other
# fields, such as a metric, can be corrected, and the model still belongs to the archives that it encoded.
_DECIDING = (
    "bits",
    "network",
    "thresholds",
    "label_code",
    "label_weight",
    "preprocessing",
    "text_encoder",
    "projection",
    "precision",
)
# Fields of the backbone that do not.
_NOT_DECIDING = ("origin", "licence")

# The origin of weights before training that come from nowhere.
RANDOM_WEIGHTS = "random weights"

PRECISIONS = ("float32", "bfloat16")

HEAD_NORMS = ("none", "layer", "standardise", "unit")
HIDDEN_ACTIVATIONS = ("relu", "leaky-relu")


@dataclasses.dataclass(frozen=True)
class HeadSpec:
    """The layers of a `HashHead`, without weights: features to `bits` outputs.

    In order: a normalisation of the features (`norm`: none, layer norm, standardisation by training moments, or scaling
    to unit length), hidden layers of the widths `hidden`, each with an optional
    batch norm and `hidden_activation`, a linear layer, and `activation`.
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
                raise InputError(f"the {what} of the head is {value!r}; {', '.join(known)} are allowed")
        if not all(width > 0 for width in self.hidden):
            raise InputError(f"the widths of the hidden layers are {list(self.hidden)}; each must be above 0")

    @property
    def threshold(self) -> float:
        """The lowest output whose bit is 1."""
        return ACTIVATIONS[self.activation]

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "HeadSpec":
        """Build from the output of `dataclasses.asdict` after a round trip through JSON."""
        return cls(**{**_all_of(cls, fields), "hidden": tuple(fields["hidden"])})


@dataclasses.dataclass(frozen=True)
class BackboneSpec:
    """The layers of a backbone, without weights.

    Attributes:
        source: the library that defines the layers: torchvision, timm, hf, open_clip, torchgeo; embedding if the
            features are the data.
        name: name of the network in this library.
        config: what else the library needs to build the layers.
        pooling: how a feature map or the features of tokens become the features of an image.
        norm: normalisation layers, for a network with batch norm.
        channels: number of bands of an image.
        num_features: number of features of an image.
        origin: where the weights come from.
        licence: licence of the weights as their source states it; empty: not stated.
    """

    source: str
    name: str
    config: dict[str, Any]
    pooling: str
    norm: str
    channels: int
    num_features: int
    origin: str = ""
    licence: str = ""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            # The annotations are classes: str, int, or a dict of strings.
            kind = dict if field.name == "config" else field.type
            if not isinstance(value := getattr(self, field.name), kind):  # type: ignore[arg-type]
                raise InputError(f"the {field.name} of a backbone is {value!r}; it must be of another type")
        if self.channels < 2:
            raise InputError(f"channels is {self.channels}; 2 or more is allowed (one band becomes three equal ones)")
        if self.num_features < 1:
            raise InputError(f"num_features is {self.num_features}; 1 or more is allowed")

    @property
    def has_random_weights(self) -> bool:
        """Whether training began with random weights."""
        return self.origin == RANDOM_WEIGHTS

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "BackboneSpec":
        """Build from the output of `dataclasses.asdict` after a round trip through JSON."""
        return cls(**_all_of(cls, fields))


@dataclasses.dataclass(frozen=True)
class NetworkSpec:
    """The layers of a `HashNetwork`, without weights.

    `num_classes` is the number of outputs of the classifier on the hashes, 0 for no classifier.
    """

    backbone: BackboneSpec
    head: HeadSpec
    num_classes: int = 0

    def __post_init__(self) -> None:
        if self.num_classes < 0:
            raise InputError(f"num_classes is {self.num_classes}; 0 (no classifier) or more is allowed")

    @property
    def channels(self) -> int:
        """Number of bands of an image."""
        return self.backbone.channels

    @property
    def bits(self) -> int:
        """Number of outputs of the head."""
        return self.head.bits

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "NetworkSpec":
        """Build from the output of `dataclasses.asdict` after a round trip through JSON."""
        parts = {"backbone": BackboneSpec.from_json(fields["backbone"]), "head": HeadSpec.from_json(fields["head"])}
        return cls(**{**_all_of(cls, fields), **parts})


@dataclasses.dataclass(frozen=True)
class TextSpec:
    """The text side of a model: the hash and the feature width of its frozen text encoder, and the head after it.

    With `is_joint`, features of sentences and of images are in one space: those of the towers of a dual encoder.
    """

    encoder_sha256: str
    num_features: int
    head: HeadSpec
    is_joint: bool = False

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "TextSpec":
        """Build from the output of `dataclasses.asdict` after a round trip through JSON."""
        return cls(**{**_all_of(cls, fields), "head": HeadSpec.from_json(fields["head"])})


@dataclasses.dataclass(frozen=True)
class ProjectionSpec:
    """How the input of the head becomes a stored vector: `num_features` dimensions to `dims` of int8.

    `scale` is the length of one unit of a component, where the projected features have unit length.
    """

    num_features: int
    dims: int
    scale: float

    def __post_init__(self) -> None:
        if not 1 <= self.dims <= self.num_features:
            raise InputError(f"a projection of {self.num_features} dimensions to {self.dims}; 1 or more, not above")
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise InputError(f"the scale of the projection is {self.scale}; a finite number above 0 is needed")

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "ProjectionSpec":
        """Build from the output of `dataclasses.asdict` after a round trip through JSON."""
        return cls(**_all_of(cls, fields))


@dataclasses.dataclass(frozen=True)
class ModelCard:
    """The content of `model.json` without the format version and the hashes.

    Attributes:
        method: name of the training method.
        network: layers of the image network.
        thresholds: one number per hash bit; a bit is 1 if its output is at least its threshold.
        label_code: code of the predicted class, appended to the hash bits; one of `LABEL_CODES`.
        label_weight: number of times that the label bits are appended.
        preprocessing: how an image becomes the input of the network.
        classes: names of the classes.
        dataset: name, protocol and manifest hash of the training data.
        metrics: metrics on the validation part.
        text: text side of a model that encodes sentences; its head has `network.bits` outputs and no label bits.
        projection: how stored vectors are made; None: the model makes none.
        precision: precision in which the backbone of images runs, one of `PRECISIONS`; the heads run in float32.
        versions: versions of orbithash and torch that trained the model.
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
    projection: ProjectionSpec | None = None
    precision: str = "float32"
    versions: dict[str, str] = dataclasses.field(
        default_factory=lambda: {"orbithash": version("orbithash"), "torch": version("torch")}
    )

    def __post_init__(self) -> None:
        if len(self.thresholds) != self.network.bits or not all(map(math.isfinite, self.thresholds)):
            raise InputError(f"thresholds: one finite number for each of the {self.network.bits} hash bits is needed")
        if self.label_code != "none" and not 2 <= len(self.classes) == self.network.num_classes:
            raise InputError(
                f"label code {self.label_code!r} needs a classifier with one output per class, and 2 or more classes; "
                f"it has {self.network.num_classes} outputs for {len(self.classes)} names"
            )
        if self.network.channels != self.preprocessing.channels:
            raise InputError(
                f"the network takes {self.network.channels} bands, but preprocessing returns "
                f"{self.preprocessing.channels}; both numbers must be equal"
            )
        if self.text is not None and (self.text.head.bits != self.network.bits or self.label_code != "none"):
            raise InputError(
                f"the text side has {self.text.head.bits} bits and the image side {self.bits}; they must be equal"
            )
        if self.precision not in PRECISIONS:
            raise InputError(f"precision is {self.precision!r}; {', '.join(PRECISIONS)} are allowed")
        check_bits(self.bits)

    @property
    def bits(self) -> int:
        """Number of bits of a code, with label bits."""
        num_label_bits: int = label_table(self.label_code, len(self.classes)).shape[1]
        return self.network.bits + self.label_weight * num_label_bits

    @property
    def vector(self) -> VectorSpec | None:
        """The stored vectors that the model makes; None without a projection."""
        return None if self.projection is None else VectorSpec(self.projection.dims, self.projection.scale)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values, and `bits`."""
        return {
            "method": self.method,
            "bits": self.bits,
            "network": dataclasses.asdict(self.network),
            "thresholds": list(self.thresholds),
            "label_code": self.label_code,
            "label_weight": self.label_weight,
            "preprocessing": self.preprocessing.to_json(),
            "text_encoder": None if self.text is None else dataclasses.asdict(self.text),
            "projection": None if self.projection is None else dataclasses.asdict(self.projection),
            "classes": list(self.classes),
            "dataset": self.dataset,
            "metrics": self.metrics,
            "precision": self.precision,
            "versions": self.versions,
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "ModelCard":
        """Build from the output of `to_json`; `KeyError`, `TypeError` or `ValueError` for anything else."""
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
            projection=None if fields["projection"] is None else ProjectionSpec.from_json(fields["projection"]),
            precision=fields["precision"],
            versions=dict(fields["versions"]),
        )


def read_model_folder(folder: Path) -> tuple[ModelCard, str, bytes]:
    """Return the card, the `model_id` and the content of `model.safetensors`.

    `InputError` if a file is missing or damaged, if `model.json` lacks a key or if its format version is unknown.
    """
    recover_folder(folder)
    path = folder / "model.json"
    if not path.is_file():
        raise InputError(f"{folder}: not a model folder (it has no model.json); training writes one to RUN/model")
    try:
        fields = json.loads(path.read_bytes())
    except OSError as err:
        raise InputError(f"{path}: cannot be read ({err.strerror})") from err
    except (ValueError, RecursionError) as err:
        raise InputError(f"{path}: damaged (not JSON: {err}); restore it from a backup or train again") from err
    found = fields.get("format_version") if isinstance(fields, dict) else None
    if found != FORMAT_VERSION:
        raise InputError(
            f"{path}: format version {found!r}; this orbithash reads version {FORMAT_VERSION}; train again, or use "
            "the orbithash that wrote it"
        )
    try:
        model_id, weights_sha256 = fields["model_id"], fields["weights_sha256"]
        card = ModelCard.from_json(fields)
    except KeyError as err:
        raise InputError(f"{path}: the key {err} is missing") from err
    except (TypeError, ValueError) as err:
        problems = " ".join(str(err).split())
        raise InputError(f"{path}: a value is wrong ({problems})") from err
    if _fields(card, weights_sha256) != fields:
        raise InputError(f"{path}: damaged or edited (its content does not give its card_sha256); use HashModel.save")
    try:
        weights = (folder / "model.safetensors").read_bytes()
    except OSError as err:
        raise InputError(f"{folder}: model.safetensors cannot be read ({err.strerror})") from err
    if hashlib.sha256(weights).hexdigest() != weights_sha256:
        raise InputError(f"{folder}: model.safetensors is damaged (its hash is not the one in model.json)")
    return card, model_id, weights


def write_card(card: ModelCard, weights_sha256: str, folder: Path) -> str:
    """Write `model.json` into `folder` and return the `model_id`."""
    fields = _fields(card, weights_sha256)
    (folder / "model.json").write_text(json.dumps(fields, indent=1) + "\n")
    return str(fields["model_id"])


def _all_of(cls: type[Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Return the values of all fields of `cls`, including those with a default; `KeyError` names a missing one."""
    return {field.name: fields[field.name] for field in dataclasses.fields(cls)}


def _fields(card: ModelCard, weights_sha256: str) -> dict[str, Any]:
    """Return the content of `model.json`, with `model_id` and `card_sha256`, the hash of all other fields."""
    fields = {"format_version": FORMAT_VERSION, **card.to_json(), "weights_sha256": weights_sha256}
    deciding = {name: fields[name] for name in (*_DECIDING, "weights_sha256")}
    backbone = {name: value for name, value in fields["network"]["backbone"].items() if name not in _NOT_DECIDING}
    deciding["network"] = {**fields["network"], "backbone": backbone}
    fields["model_id"] = _hash(deciding)[:32]
    fields["card_sha256"] = _hash(fields)
    # Through JSON, so that written and read fields compare equal.
    read: dict[str, Any] = json.loads(json.dumps(fields))
    return read


def _hash(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
