"""Compute the code that a query searches for: of one example, or of several by majority vote."""

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np

from orbithash.encoders.codes import Codes, check_codes, num_bytes, pack, unpack
from orbithash.encoders.errors import InputError
from orbithash.search.engine.protocols import ArchiveReader
from orbithash.search.engine.snapshot import Snapshot
from orbithash.search.protocol.errors import InvalidQuery, KeyNotFound, SearchError
from orbithash.search.protocol.queries import Example, Query

__all__ = ["check_code", "code_of"]


async def code_of(query: Query, snapshot: Snapshot) -> Codes:
    """Return the code uint8 [B] of a query.

    Each bit of the code of several examples is decided by a majority vote: positives vote for their bit, negatives
    against theirs, each group weighted equally; the first positive breaks ties.

    Raises:
        InvalidQuery: an example has no code.
        KeyNotFound: no row has the key of an example.
    """
    if not query.positives:
        codes = await _codes_of([query], snapshot)
        code: Codes = codes[0]
        return code
    codes = await _codes_of((*query.positives, *query.negatives), snapshot)
    votes = 2 * unpack(codes, snapshot.archive.bits).astype(np.int64) - 1
    num_positives, num_negatives = len(query.positives), len(query.negatives)
    # Means over a common denominator: integers, so that ties are exact.
    balance = votes[:num_positives].sum(axis=0) * max(1, num_negatives)
    balance -= votes[num_positives:].sum(axis=0) * num_positives
    return pack(np.where(balance == 0, votes[0] > 0, balance > 0))


def check_code(code: bytes, bits: int) -> Codes:
    """Return a packed code as uint8 [B]; raise `InvalidQuery` if it does not have `bits` bits."""
    try:
        return check_codes(np.frombuffer(code, np.uint8), bits)
    except InputError as error:
        raise InvalidQuery(("code", str(error))) from error


async def _codes_of(examples: Sequence[Example], snapshot: Snapshot) -> Codes:
    """Return the codes uint8 [N, B] of examples; those of one kind are encoded together."""
    codes = np.zeros((len(examples), num_bytes(snapshot.archive.bits)), np.uint8)
    for kind in ("image", "text", "key", "code"):
        places = [place for place, example in enumerate(examples) if getattr(example, kind) is not None]
        if places:
            try:
                codes[places] = await _encode(snapshot, kind, [getattr(examples[place], kind) for place in places])
            except SearchError:
                raise
            except InputError as error:
                raise InvalidQuery((kind, str(error))) from error
    return codes


async def _encode(snapshot: Snapshot, kind: str, values: list[Any]) -> Codes:
    if kind == "image":
        return await snapshot.encoder.encode_images(values)
    if kind == "text":
        return await snapshot.encoder.encode_texts(values)
    if kind == "key":
        return await asyncio.to_thread(_codes_of_keys, snapshot.archive, values)
    return np.stack([check_code(code, snapshot.archive.bits) for code in values])


def _codes_of_keys(archive: ArchiveReader, keys: Sequence[str]) -> Codes:
    ids = archive.find(keys)
    if absent := [key for key in keys if key not in ids]:
        raise KeyNotFound(f"no row of the archive has the key {absent[0]!r}")
    table = archive.take(np.array([ids[key] for key in keys], np.uint64), ["code"])
    codes: Codes = np.array(table.column("code").to_pylist(), np.uint8)
    return codes
