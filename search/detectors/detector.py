"""A detector, and its JSON file."""

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from orbithash.encoders.ranges import is_integer
from orbithash.encoders.vectors import VectorSpec
from orbithash.search.protocol.description import Description
from orbithash.search.protocol.errors import InvalidQuery
from orbithash.search.protocol.rankings import Linear

__all__ = ["MAX_JSON_CHARS", "Detector"]

MAX_JSON_CHARS = 2**18

_FORMAT = "orbithash.detector"
_VERSION = 1
_MAX_COUNT = 2**31 - 1
_MAX_NAME_CHARS = 200


@dataclass(frozen=True, kw_only=True)
class Detector:
    """A linear function of stored vectors: the score of a row is `offset + scale * sum(weight * component)`.

    The score is the log-odds of a logistic regression, moved so that 0 is the cut-off: rows with a score of at least 0
    are found. Weights are integers, so a row has the same score in every process.

    Attributes:
        weights: one for each component, from -32,768 to 32,767; the sum of their magnitudes is below 2^24.
        scale: above 0.
        offset: see above.
        model_id: the model of the archive whose rows were marked.
        vector: the stored vectors of that archive: their dimensions and scale.
        num_good, num_bad: number of marked rows.
        num_background: number of rows drawn at random that served as weak negatives.
        precision: cross-validated over the marked rows: the fraction of good rows among those found; None: too few
            marks for an estimate.
        recall: likewise, the fraction of the good rows that are found.
        folds: number of parts of the cross-validation; 0: none.
    """

    weights: tuple[int, ...]
    scale: float
    offset: float
    model_id: str
    vector: VectorSpec
    num_good: int
    num_bad: int
    num_background: int = 0
    precision: float | None = None
    recall: float | None = None
    folds: int = 0

    def linear(self, least_certain: bool = False) -> Linear:
        """Return the order of a ranking: the highest score first, or the score nearest to 0."""
        return Linear(self.weights, self.scale, self.offset, least_certain)

    def check(self, description: Description) -> None:
        """Raise `InvalidQuery` if the served archive has no vectors, or vectors of another model."""
        self.check_archive(
            description.model_id,
            VectorSpec(description.vector_dims, description.vector_scale) if description.vector_dims else None,
        )

    def check_archive(self, model_id: str, vector: VectorSpec | None) -> None:
        """Raise `InvalidQuery` if an archive of this model and with these stored vectors cannot be scored."""
        if vector is None:
            raise _invalid(
                "the archive has no stored vectors; encode it again with a model that stores vectors (vector_dims)"
            )
        if model_id != self.model_id:
            raise _invalid(
                f"it was made for another model ({self.model_id}); the archive is of model {model_id}. Mark rows of "
                "this archive to make a detector for it"
            )
        if vector.dims != self.vector.dims or not math.isclose(vector.scale, self.vector.scale, rel_tol=1e-6):
            raise _invalid(
                f"it is for vectors of {self.vector.dims} dimensions and scale {self.vector.scale:g}; those of the "
                f"archive have {vector.dims} dimensions and scale {vector.scale:g}"
            )

    def to_json(self) -> str:
        """Return the content of the file of the detector."""
        fields = asdict(self) | {"vector": self.vector._asdict()}
        return json.dumps({"format": _FORMAT, "version": _VERSION, **fields}, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> "Detector":
        """Return the detector of a file; raise `InvalidQuery` with the first thing that is wrong."""
        if len(text) > MAX_JSON_CHARS:
            raise _invalid(f"the file is larger than {MAX_JSON_CHARS:,} characters, the limit for detectors")
        try:
            values = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_without_repetition)
        except (ValueError, RecursionError):
            raise _invalid("the file is not JSON; it may be cut off or damaged") from None
        if not isinstance(values, dict) or values.get("format") != _FORMAT:
            raise _invalid("the file is not a detector of orbithash")
        if values.get("version") != _VERSION:
            raise _invalid(f"the file has another version than {_VERSION}; fit the detector again")
        found = {name: values[name] for name in _FIELDS if name in values}
        if missing := [name for name in _FIELDS if name not in values]:
            raise _invalid(f"the file is damaged: {missing[0]} is missing")
        if unknown := values.keys() - {*_FIELDS, "format", "version"}:
            raise _invalid(f"the file is damaged: {min(unknown)[:40]!r} is not a field of a detector")
        detector = cls(**found | {"vector": _vector(found["vector"]), "weights": _weights(found["weights"])})
        detector._check_values()
        return detector

    def _check_values(self) -> None:
        if not isinstance(self.model_id, str) or not 0 < len(self.model_id) <= _MAX_NAME_CHARS:
            raise _invalid("the file is damaged: model_id is the id of a model")
        for name in ("scale", "offset"):
            if not _is_number(getattr(self, name)):
                raise _invalid(f"the file is damaged: {name} is a finite number")
        if problems := self.linear().problems():
            raise _invalid(f"the file is damaged: {problems[0][0]}: {problems[0][1]}")
        if len(self.weights) != self.vector.dims:
            raise _invalid(f"the file is damaged: {len(self.weights)} weights for {self.vector.dims} dimensions")
        for name in ("num_good", "num_bad", "num_background", "folds"):
            if not is_integer(getattr(self, name), 0, _MAX_COUNT):
                raise _invalid(f"the file is damaged: {name} is a whole number from 0")
        for name in ("precision", "recall"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 <= value <= 1):
                raise _invalid(f"the file is damaged: {name} is null or a number from 0 to 1")


_FIELDS = tuple(Detector.__dataclass_fields__)


def _vector(value: Any) -> VectorSpec:
    if isinstance(value, dict) and value.keys() == set(VectorSpec._fields):
        dims, scale = value["dims"], value["scale"]
        if is_integer(dims, 1, 2**16) and _is_number(scale) and scale > 0:
            return VectorSpec(dims, float(scale))
    raise _invalid("the file is damaged: vector has dims, a whole number, and scale, a number above 0")


def _weights(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise _invalid("the file is damaged: weights is a list of whole numbers")
    return tuple(value)


def _is_number(value: Any) -> bool:
    # An integer may be too large for a float.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _refuse_constant(name: str) -> Any:
    raise ValueError(name)


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name occurs twice")
    return values


def _invalid(problem: str) -> InvalidQuery:
    return InvalidQuery(("detector", problem))
