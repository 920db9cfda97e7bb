"""What a user states about codes that were made elsewhere, and what their file states."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orbithash.encoders.errors import InputError
from orbithash.encoders.places.code_description import BIT_ORDERS, FOOTER_KEY, CodeDescription
from orbithash.encoders.ranges import check_integer

__all__ = ["CodeOptions"]

_ORDERS = {name.removesuffix("-first"): name for name in BIT_ORDERS}


@dataclass(frozen=True)
class CodeOptions:
    """Options of a table of codes; None: not stated.

    Attributes:
        bits: bits of a code.
        order: the first bit within a byte, one of `BIT_ORDERS`.
        model: the `model_id` of the archive's model, or a name for a model of another program.
        scale: length of one unit of a component of the stored vectors (`VectorSpec`).
        column: the column of codes.
    """

    bits: int | None = None
    order: str | None = None
    model: str | None = None
    scale: float | None = None
    column: str = "code"

    @classmethod
    def parse(cls, texts: Sequence[str]) -> "CodeOptions":
        """Parse texts `NAME=VALUE`, or several with commas between them; `InputError` for anything else."""
        allowed = ("bits", "order", "model", "scale", "column")
        given: dict[str, str] = {}
        for text in [part.strip() for one in texts for part in one.split(",")]:
            name, _, value = text.partition("=")
            if name not in allowed or not value:
                raise InputError(f"code option {text!r}: NAME=VALUE is needed, where NAME is {', '.join(allowed)}")
            if name in given:
                raise InputError(f"code option {name} is given twice: {given[name]!r} and {value!r}")
            given[name] = value
        return cls(
            bits=_bits(given["bits"]) if "bits" in given else None,
            order=_order(given["order"]) if "order" in given else None,
            model=given.get("model"),
            scale=_scale(given["scale"]) if "scale" in given else None,
            column=given.get("column", "code"),
        )

    def describe(self, schema: Any) -> CodeDescription:
        """Return the description of a file's codes, from the footer of its Arrow schema or from the options.

        Raises:
            InputError: the footer and the options differ, or neither states all that is needed. The message begins with
                the fault and does not name the file.
        """
        footer = (schema.metadata or {}).get(FOOTER_KEY.encode())
        if footer is not None:
            described = CodeDescription.from_json(footer)
            self._check(described)
            return described
        absent = [name for name in ("bits", "order", "model") if getattr(self, name) is None]
        if absent or self.bits is None or self.model is None:
            raise InputError(
                f"its footer does not describe its codes (no key {FOOTER_KEY}), and {', '.join(absent)} of the codes "
                "is not stated: give --codes bits=64,order=msb,model=NAME"
            )
        dims = getattr(schema.field("vector").type, "list_size", None) if "vector" in schema.names else None
        has_vectors = self.scale is not None
        if has_vectors and dims is None:
            raise InputError("a scale is stated, and there is no column vector of type fixed_size_list<int8>")
        return CodeDescription(
            self.bits,
            self.model,
            vector_dims=dims if has_vectors else None,
            vector_scale=self.scale,
            bit_order=self.order or BIT_ORDERS[0],
        )

    def _check(self, described: CodeDescription) -> None:
        """Raise `InputError` where an option contradicts the description of a footer."""
        pairs = (
            ("bits", self.bits, described.bits),
            ("order", self.order, described.bit_order),
            ("model", self.model, described.model_id),
            ("scale", self.scale, described.vector_scale),
        )
        for name, stated, found in pairs:
            if stated is not None and stated != found:
                raise InputError(f"its footer states {name} {found} of its codes, the option states {stated}: omit it")


def _bits(text: str) -> int:
    if not text.isdecimal():
        raise InputError(f"code option bits={text}: a number of bits is needed")
    return check_integer(int(text), "code option bits", 1)


def _order(text: str) -> str:
    order = _ORDERS.get(text, text)
    if order not in BIT_ORDERS:
        raise InputError(f"code option order={text}: {' or '.join(_ORDERS)} is allowed, the first bit within a byte")
    return order


def _scale(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise InputError(f"code option scale={text}: a number above 0 is needed") from error
