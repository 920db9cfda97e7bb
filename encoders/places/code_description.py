"""Description of the codes of a file, for programs that know nothing of orbithash.

Its JSON has one place in each format: the key `orbithash` in the footer of a Parquet file, and the field
`orbithash:codes` of a STAC collection or of an item collection. It states what the embedding extension of STAC cannot:
the number of bits, their order within a byte, the distance, and the model.
"""

import dataclasses
import json
import math
from typing import Any

from orbithash.encoders.codes import check_bits, num_bytes
from orbithash.encoders.errors import InputError
from orbithash.encoders.ranges import check_integer

__all__ = ["BIT_ORDERS", "DISTANCES", "FOOTER_KEY", "STAC_FIELD", "CodeDescription"]

FOOTER_KEY = "orbithash"
STAC_FIELD = "orbithash:codes"

# Version of this JSON. A reader refuses a higher one.
_FORMAT_VERSION = 1

# The first bit of a code is the most significant one of its first byte, or the least significant one.
BIT_ORDERS = ("msb-first", "lsb-first")
DISTANCES = ("hamming",)


@dataclasses.dataclass(frozen=True)
class CodeDescription:
    """What the column `code` of a file, and its column `vector` if there is one, contain.

    Attributes:
        bits: bits of a code. A code has `ceil(bits / 8)` bytes; the pad bits after the last bit are zero.
        model_id: content hash of the model that made the codes.
        model: name of the model; "" if unknown.
        vector_dims: dimensions of the stored vectors, int8; None for a file without them.
        vector_scale: a component of 1 stands for this length; None for a file without vectors.
        bit_order: one of `BIT_ORDERS`. orbithash itself writes "msb-first", the order of `numpy.packbits`.
        distance: the distance between codes, one of `DISTANCES`.
        embedding: name of the embedding that the codes were made from; "" if they were made from images or text.
        method: name of the method that trained the model; "" if unknown.
        thresholds: lowest output of the head whose bit is 1, for each bit; empty if unknown.
    """

    bits: int
    model_id: str
    model: str = ""
    vector_dims: int | None = None
    vector_scale: float | None = None
    bit_order: str = "msb-first"
    distance: str = "hamming"
    embedding: str = ""
    method: str = ""
    thresholds: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_bits(self.bits)
        for name in ("model_id", "model", "embedding", "method"):
            if not isinstance(value := getattr(self, name), str):
                raise InputError(f"the {name} of the codes is {value!r}; a text is required")
        for name, allowed in (("bit_order", BIT_ORDERS), ("distance", DISTANCES)):
            if (value := getattr(self, name)) not in allowed:
                raise InputError(f"the {name} of the codes is {value!r}; {' or '.join(allowed)} is allowed")
        if (self.vector_dims is None) != (self.vector_scale is None):
            raise InputError("the description of the codes needs both vector_dims and vector_scale, or neither")
        if self.vector_dims is not None:
            check_integer(self.vector_dims, "vector_dims of the codes", 1)
            if self.vector_scale is None or not (_is_number(self.vector_scale) and self.vector_scale > 0):
                raise InputError(
                    f"the vector_scale of the codes is {self.vector_scale!r}; a number above 0 is required"
                )
        if not all(_is_number(one) for one in self.thresholds) or len(self.thresholds) not in (0, self.bits):
            raise InputError(f"the thresholds of the codes must be {self.bits} numbers, one for each bit, or none")

    @property
    def num_bytes(self) -> int:
        """Bytes of a code."""
        return num_bytes(self.bits)

    def to_json(self) -> dict[str, Any]:
        """Return the description as a JSON object; fields that are unknown are omitted."""
        fields = {
            "version": _FORMAT_VERSION,
            **dataclasses.asdict(self),
            "bytes": self.num_bytes,
            "pad_bits": -self.bits % 8,
        }
        fields["thresholds"] = list(self.thresholds)
        return {name: value for name, value in fields.items() if value not in (None, "", []) or name == "model_id"}

    @classmethod
    def from_json(cls, content: object) -> "CodeDescription":
        """Return the description in a JSON object, or in its text (str or bytes); unknown fields are ignored.

        Raises:
            InputError: not such an object, a higher version, or a field whose value is not allowed.
        """
        if isinstance(content, str | bytes):
            try:
                content = json.loads(content)
            except (ValueError, RecursionError) as error:
                raise InputError("the description of the codes is not JSON") from error
        if not isinstance(content, dict):
            raise InputError(f"the description of the codes is {type(content).__name__}; a JSON object is required")
        if (version := content.get("version", _FORMAT_VERSION)) != _FORMAT_VERSION:
            raise InputError(
                f"the description of the codes has version {version!r}; this orbithash reads version {_FORMAT_VERSION}"
            )
        if absent := [name for name in ("bits", "model_id") if name not in content]:
            raise InputError(f"the description of the codes has no {' and no '.join(absent)}")
        fields = {each.name: content[each.name] for each in dataclasses.fields(cls) if each.name in content}
        if not isinstance(thresholds := fields.get("thresholds", ()), list | tuple):
            raise InputError(f"the thresholds of the codes are {thresholds!r}; a list of numbers is required")
        description = cls(**{**fields, "thresholds": tuple(thresholds)})
        for name, expected in (("bytes", description.num_bytes), ("pad_bits", -description.bits % 8)):
            if (stated := content.get(name, expected)) != expected:
                raise InputError(
                    f"the description of the codes states {name} = {stated!r}; {description.bits} bits have {expected}"
                )
        return description


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
