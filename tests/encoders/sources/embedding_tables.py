"""Small tables of embeddings for tests."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

DIMS = 16


def vectors(count, dims=DIMS, seed=0):
    """Return vectors float32 [count, dims] that differ from each other."""
    return np.random.default_rng(seed).normal(size=(count, dims)).astype(np.float32)


def vector_column(values, kind=None, fixed=True):
    """Return an Arrow column of vectors of the type `kind`."""
    flat = pa.array(values.reshape(-1)).cast(kind or pa.float32())
    if fixed:
        return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    return pa.ListArray.from_arrays(np.arange(0, values.size + 1, values.shape[1], dtype=np.int32), flat)


def geo_metadata(column="geometry"):
    described = {"version": "1.1.0", "primary_column": column, "columns": {column: {"encoding": "WKB"}}}
    return {"geo": json.dumps(described)}


def write_table(path, columns, metadata=None, rows_per_group=None):
    """Write a Parquet file and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns).replace_schema_metadata(metadata)
    pq.write_table(table, path, row_group_size=rows_per_group)
    return path


def write_vectors(path, count=20, dims=DIMS, seed=0, start=0, rows_per_group=None, **columns):
    """Write a table with the columns `id` (`row0`, `row1`, ...) and `embedding`, and others."""
    ids = [f"row{number}" for number in range(start, start + count)]
    given = {"id": ids, "embedding": vector_column(vectors(count, dims, seed)), **columns}
    return write_table(path, given, rows_per_group=rows_per_group)
