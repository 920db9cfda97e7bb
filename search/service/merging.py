"""Changes of rows that several callers want at once, merged into one state per key."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.archive.tables import fixed_size_rows
from orbithash.search.protocol.rows import PreparedRow, RowUpdate

__all__ = ["Counts", "RowChange", "merged", "updated_rows"]

# A row with its code to write, new values of some columns, or None: remove the row.
RowChange = PreparedRow | RowUpdate | None

# Of each caller: the rows that its deletions removed, and the rows that its updates changed.
Counts = list[tuple[int, int]]

_COLUMNS = ["key", "code", "uri", "label", "caption", "datetime", "lon", "lat", "footprint", "thumbnail"]


def merged(
    changes: Sequence[Mapping[str, RowChange]], existing: Mapping[str, int]
) -> tuple[dict[str, RowChange], Counts]:
    """Merge changes by key, later ones over earlier ones.

    Args:
        changes: the changes of each caller, in order.
        existing: keys of the archive before the changes, with at least those that are updated or removed.

    Returns:
        One change per key, without updates and removals of rows that do not exist, and the counts of each caller.
    """
    states: dict[str, RowChange] = {}
    counts: Counts = []
    for mapping in changes:
        removed = updated = 0
        for key, change in mapping.items():
            if isinstance(change, PreparedRow):
                states[key] = change
                continue
            exists = states[key] is not None if key in states else key in existing
            if not exists:
                continue
            if change is None:
                removed += 1
                states[key] = None
            else:
                updated += 1
                states[key] = _applied(states.get(key), change)
        counts.append((removed, updated))
    return states, counts


def updated_rows(archive: Archive, updates: Sequence[RowUpdate], existing: Mapping[str, int]) -> list[PreparedRow]:
    """Return the archive's rows with these updates applied."""
    if not updates:
        return []
    ids = np.array([existing[update.key] for update in updates], np.uint64)
    has_vectors = archive.vector is not None
    table = archive.take(ids, [*_COLUMNS, "vector"] if has_vectors else _COLUMNS)
    vectors: list[bytes | None] = [None] * len(ids)
    if has_vectors:
        values, is_known = fixed_size_rows(table["vector"])
        vectors = [value.tobytes() if known else None for value, known in zip(values, is_known.tolist(), strict=True)]
    rows: list[dict[str, Any]] = table.select(_COLUMNS).to_pylist()
    return [
        _updated(PreparedRow(**{**row, "code": bytes(row["code"])}, stored_vector=vector), update)
        for row, vector, update in zip(rows, vectors, updates, strict=True)
    ]


def _applied(before: RowChange, update: RowUpdate) -> PreparedRow | RowUpdate:
    if isinstance(before, PreparedRow):
        return _updated(before, update)
    return update if before is None else RowUpdate(update.key, {**before.columns, **update.columns})


def _updated(row: PreparedRow, update: RowUpdate) -> PreparedRow:
    columns: dict[str, Any] = {**update.columns}
    if "uri" in columns:
        columns["uri"] = columns["uri"] or ""
    return replace(row, **columns)
