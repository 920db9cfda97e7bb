"""Rows of an archive as Arrow tables."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from orbithash.encoders.archive.storage import schema_of
from orbithash.encoders.codes import Codes, check_codes, num_bytes
from orbithash.encoders.errors import InputError
from orbithash.encoders.keys import key_problem

__all__ = ["fixed_size_rows", "make_table"]


def make_table(
    codes: Codes,
    bits: int,
    key: Sequence[str],
    uri: Sequence[str],
    vector: Sequence[bytes | None] | npt.NDArray[np.int8] | None = None,
    **columns: Sequence[Any] | None,
) -> pa.Table:
    """Return rows for `write_fragments` and `upsert`.

    Args:
        codes: uint8 [N, ceil(bits/8)], packed.
        bits: bits of a code.
        key: N unique keys.
        uri: N URIs or paths to open.
        vector: stored vectors int8 [N, d], or a list of N vectors as bytes, None for an unknown one; None: all are
            unknown.
        **columns: any of `label`, `caption`, `datetime` (UTC), `lon`, `lat`, `footprint`, `thumbnail`, `stamp`,
            each N values where None (and NaN) means unknown; an omitted column is unknown for all rows.

    Raises:
        InputError: codes that do not fit `bits`, invalid keys, a column of another length or of an unknown name.
    """
    schema = schema_of(bits, "").remove_metadata()
    if codes.ndim != 2:
        raise InputError(f"codes are [N, {num_bytes(bits)}], got shape {codes.shape}")
    values: dict[str, Sequence[Any] | None] = {"key": key, "uri": uri, **columns}
    unknown = values.keys() - set(schema.names)
    if unknown:
        raise InputError(f"no column {', '.join(sorted(unknown))}; the archive has {', '.join(schema.names)}")
    for one in key:
        if one is not None and (problem := key_problem(one)):
            raise InputError(problem)
    vectors = None if vector is None else _vector_array(vector)
    if vectors is not None:
        schema = schema.append(pa.field("vector", vectors.type))
    arrays = []
    for field in schema:
        column = values.get(field.name)
        if field.name == "code":
            flat = pa.array(np.ascontiguousarray(check_codes(codes, bits)).reshape(-1))
            array = pa.FixedSizeListArray.from_arrays(flat, type=field.type)
        elif field.name == "vector":
            array = vectors
        elif column is None:
            array = pa.nulls(len(codes), field.type)
        else:
            array = pa.array(column, field.type, from_pandas=True)
        if len(array) != len(codes):
            raise InputError(f"{len(codes)} codes with {len(array)} values of {field.name}")
        if array.null_count and not field.nullable:
            raise InputError(f"{field.name} is unknown for {array.null_count} rows; every row needs one")
        arrays.append(array)
    return pa.table(arrays, schema=schema)


def _vector_array(vectors: Sequence[bytes | None] | npt.NDArray[np.int8]) -> pa.FixedSizeListArray | None:
    """Return stored vectors as a column; None if all are unknown. `InputError` for vectors of several lengths."""
    if isinstance(vectors, np.ndarray):
        if vectors.dtype != np.int8 or vectors.ndim != 2:
            raise InputError(f"stored vectors are int8 [N, d], got {vectors.dtype} {vectors.shape}")
        flat, dims, mask = vectors, vectors.shape[1], None
    else:
        lengths = {len(one) for one in vectors if one is not None}
        if not lengths:
            return None
        if len(lengths) > 1:
            raise InputError(f"stored vectors of {len(lengths)} lengths: {sorted(lengths)}")
        (dims,) = lengths
        flat = np.frombuffer(b"".join(one if one is not None else bytes(dims) for one in vectors), np.int8)
        mask = pa.array([one is None for one in vectors])
    values = pa.array(np.ascontiguousarray(flat).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(values, type=pa.list_(pa.int8(), dims), mask=mask)


def fixed_size_rows(column: pa.ChunkedArray) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """Return a column of lists of one size as [N, size], with zeros where unknown, and which are known, bool [N]."""
    array = column.combine_chunks()
    is_known = array.is_valid().to_numpy(zero_copy_only=False)
    # flatten() leaves unknown lists out, and honours slices.
    values = array.flatten().to_numpy(zero_copy_only=False).reshape(-1, array.type.list_size)
    if is_known.all():
        return values, is_known
    rows = np.zeros((len(array), values.shape[1]), values.dtype)
    rows[is_known] = values
    return rows, is_known
