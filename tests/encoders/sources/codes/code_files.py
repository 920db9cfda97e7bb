"""Small files of codes for tests."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from orbithash.encoders.places.code_description import FOOTER_KEY, CodeDescription

BITS, MODEL = 12, "m" * 32


def codes_of(count, seed=0):
    """Return codes of 12 bits, uint8 [count, 2], with pad bits of zero."""
    return np.packbits(np.random.default_rng(seed).integers(0, 2, (count, BITS), np.uint8), axis=1)


def code_column(codes):
    """Return codes as lists of one size."""
    return pa.FixedSizeListArray.from_arrays(pa.array(codes.reshape(-1)), codes.shape[1])


def write_codes(path, count=5, description=None, rows_per_group=None, metadata=None, seed=0, **columns):
    """Write a file of codes with ids `row0`, ...; `description` False: without a footer. A column of None is absent."""
    given = {"id": [f"row{number}" for number in range(count)], "code": code_column(codes_of(count, seed)), **columns}
    table = pa.table({name: column for name, column in given.items() if column is not None})
    footer = (
        {}
        if description is False
        else {FOOTER_KEY: json.dumps((description or CodeDescription(BITS, MODEL)).to_json())}
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata({**footer, **(metadata or {})}), path, row_group_size=rows_per_group)
    return path
