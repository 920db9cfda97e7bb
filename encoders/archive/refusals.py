"""The side table of refused items: images that could not be read, each with the reason."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from orbithash.encoders.archive.storage import holds_dataset, key_filter
from orbithash.encoders.archive.upkeep import commit_compaction, prepare_compaction
from orbithash.encoders.lance_errors import one_line_errors

__all__ = ["RefusedTable"]

_SCHEMA = pa.schema(
    [pa.field("key", pa.string(), False), pa.field("reason", pa.string(), False), pa.field("stamp", pa.string())]
)


class RefusedTable:
    """The Lance dataset of the refused items of an archive, with one row per key. It exists from the first item on."""

    def __init__(self, archive: str) -> None:
        """Take the folder or URI of the archive."""
        self._location = f"{archive}/_refused.lance"

    def put(self, items: Sequence[tuple[str, str]], stamps: Mapping[str, str | None]) -> None:
        """Write (key, reason) of items, each in the place of an older item with its key, and stamps by key."""
        import lance

        if not items:
            return
        rows = [(key, reason, stamps.get(key)) for key, reason in dict(items).items()]
        table = pa.table([list(column) for column in zip(*rows, strict=True)], schema=_SCHEMA)
        if not holds_dataset(self._location):
            lance.write_dataset(table, self._location, mode="create")
            return
        merge = lance.dataset(self._location).merge_insert("key")
        merge.when_matched_update_all().when_not_matched_insert_all().execute(table)

    def remove(self, keys: Sequence[str]) -> None:
        """Remove the items with these keys, as far as they exist."""
        import lance

        if keys and holds_dataset(self._location):
            lance.dataset(self._location).delete(key_filter(keys))

    def reasons(self) -> dict[str, str]:
        """Return the reason of each item by its key."""
        return dict(self._read(["key", "reason"], None))

    def stamps(self, keys: Sequence[str]) -> dict[str, str | None]:
        """Return the stamps of the items with these keys; a stamp is None when it is not known."""
        return dict(self._read(["key", "stamp"], key_filter(keys))) if keys else {}

    def all_stamps(self) -> dict[str, str | None]:
        """Return the stamp of each item by its key."""
        return dict(self._read(["key", "stamp"], None))

    def optimize(self) -> None:
        """Join small fragments where that is worthwhile."""
        import lance

        if holds_dataset(self._location):
            dataset = lance.dataset(self._location)
            if compaction := prepare_compaction(dataset):
                commit_compaction(dataset, compaction)

    def _read(self, columns: list[str], row_filter: str | None) -> list[tuple[Any, ...]]:
        import lance

        if not holds_dataset(self._location):
            return []
        with one_line_errors(self._location):
            table = lance.dataset(self._location).to_table(columns=columns, filter=row_filter)
        return list(zip(*(table[name].to_pylist() for name in columns), strict=True))
