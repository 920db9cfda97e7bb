"""Compute what a query searches for: the code, outputs and stored vector of one example, or of several by a vote."""

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from orbithash.encoders.archive.tables import fixed_size_rows
from orbithash.encoders.codes import Codes, Encoded, Kind, check_codes, outputs_of
from orbithash.encoders.errors import InputError
from orbithash.search.engine.composition import compose
from orbithash.search.engine.protocols import ArchiveReader
from orbithash.search.engine.snapshot import Snapshot
from orbithash.search.protocol.errors import InvalidQuery, KeyNotFound, SearchError
from orbithash.search.protocol.queries import Content, Query

__all__ = ["check_code", "check_vector", "encode_query"]

_ENCODED_KINDS: tuple[Kind, ...] = ("image", "text", "vector")


async def encode_query(query: Query, snapshot: Snapshot, with_outputs: bool = False) -> Encoded:
    """Return what a query searches for, with arrays of one row; see `compose` for several examples.

    Outputs are None for a single example unless they are requested.

    Raises:
        InvalidQuery: an example has no code.
        KeyNotFound: no row has the key of an example.
    """
    if query.code is not None and not with_outputs:
        return Encoded(check_code(query.code, snapshot.archive.bits)[None], None, None)
    if not query.positives:
        (encoded,) = await _encode_examples([query], snapshot, with_outputs)
        return encoded
    examples = (*query.positives, *query.negatives)
    parts = await _encode_examples(examples, snapshot, with_outputs=True)
    num_positives, weights = len(query.positives), [example.weight for example in examples]
    return compose(parts[:num_positives], parts[num_positives:], weights, snapshot.archive.bits)


def check_code(code: bytes, bits: int) -> Codes:
    """Return a packed code as uint8 [B]; raise `InvalidQuery` if it does not have `bits` bits."""
    try:
        return check_codes(np.frombuffer(code, np.uint8), bits)
    except InputError as error:
        raise InvalidQuery(("code", str(error))) from error


def check_vector(vector: bytes, dims: int) -> npt.NDArray[np.float32]:
    """Return a vector that has no `vector_problem` as float32 [dims]; raise `InvalidQuery` for another length."""
    numbers = np.frombuffer(vector, "<f4").astype(np.float32)
    if len(numbers) != dims:
        raise InvalidQuery(("vector", f"this model takes vectors of {dims:,} dimensions, got {len(numbers):,}"))
    return numbers


async def _encode_examples(examples: Sequence[Content], snapshot: Snapshot, with_outputs: bool) -> list[Encoded]:
    """Return one row per example; those of one kind are encoded together."""
    encoded: dict[int, Encoded] = {}
    for kind in (*_ENCODED_KINDS, "key", "code"):
        places = [place for place, example in enumerate(examples) if getattr(example, kind) is not None]
        if places:
            try:
                rows = await _encode(snapshot, kind, [getattr(examples[place], kind) for place in places], with_outputs)
            except SearchError:
                raise
            except InputError as error:
                raise InvalidQuery((kind, str(error))) from error
            encoded |= zip(places, rows.split(), strict=True)
    return [encoded[place] for place in range(len(examples))]


async def _encode(snapshot: Snapshot, kind: str, values: list[Any], with_outputs: bool) -> Encoded:
    if kind == "vector":
        values = [check_vector(vector, snapshot.encoder.num_features) for vector in values]
    for encoded_kind in _ENCODED_KINDS:
        if kind == encoded_kind:
            return await snapshot.encoder.encode(encoded_kind, values, with_outputs)
    archive = snapshot.archive
    if kind == "key":
        codes, vectors = await asyncio.to_thread(_rows_of_keys, archive, values)
    else:
        codes, vectors = np.stack([check_code(code, archive.bits) for code in values]), None
    return Encoded(codes, outputs_of(codes, archive.bits) if with_outputs else None, vectors)


def _rows_of_keys(archive: ArchiveReader, keys: Sequence[str]) -> tuple[Codes, npt.NDArray[np.int8] | None]:
    """Return codes uint8 [N, B] and stored vectors int8 [N, d] of rows; vectors are None if a row has none."""
    ids = archive.find(keys)
    if absent := [key for key in keys if key not in ids]:
        raise KeyNotFound(f"no row of the archive has the key {absent[0]!r}")
    rows = np.array([ids[key] for key in keys], np.uint64)
    table = archive.take(rows, ["code"] if archive.vector is None else ["code", "vector"])
    codes, _ = fixed_size_rows(table["code"])
    if archive.vector is None:
        return codes, None
    vectors, is_known = fixed_size_rows(table["vector"])
    return codes, vectors if is_known.all() else None
