"""The archive of codes: one Lance dataset with a row per image or tile.

Rows have stable ids (the column `_rowid`) that survive compaction. Every change is one atomic commit: a reader sees the
version before it or the version after it. Items that could not be read are in a side table inside the folder, so that
they are neither lost silently nor searched.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from orbithash.encoders.archive import upkeep
from orbithash.encoders.archive.refusals import RefusedTable
from orbithash.encoders.archive.storage import (
    check_free,
    holds_dataset,
    key_filter,
    normalise_location,
    open_dataset,
    read_metadata,
    schema_of,
    upkeep_lock,
    write_lock,
)
from orbithash.encoders.archive.tables import make_table
from orbithash.encoders.codes import Codes, check_bits, num_bytes
from orbithash.encoders.errors import InputError
from orbithash.encoders.lance_errors import error_line, one_line_errors
from orbithash.encoders.vectors import VectorSpec

__all__ = ["Archive"]

Ids = npt.NDArray[np.uint64]


class Archive:
    """One version of an archive; `refresh` and the changes made through it move it to the newest one.

    Concurrent calls may read; nothing may be read while a change is made through the same object.

    Attributes:
        path: the absolute folder, or the URI of an object store.
        bits: bits of a code.
        model_id: content hash of the model that made the codes.
        vector: dimensions and scale of the stored vectors; None: the archive has none.
        schema: the columns, with the metadata `orbithash.format_version`, `orbithash.bits`, `orbithash.model_id` and,
            with stored vectors, `orbithash.vector_scale`.
    """

    def __init__(self, path: str, dataset: Any) -> None:
        """Take an open dataset; use `create`, `open` or `open_or_create` instead."""
        self.path = path
        self.bits, self.model_id, self.vector = read_metadata(path, dataset)
        self.schema: pa.Schema = dataset.schema
        self._dataset = dataset
        self._watched: Any = None
        self._refused = RefusedTable(path)

    @classmethod
    def create(cls, path: str | Path, bits: int, model_id: str, vector: VectorSpec | None = None) -> "Archive":
        """Create an archive without rows; `vector` is that of the model's projection, None for a model without one.

        Raises:
            InputError: `path` is a file, or a folder that is not empty; it is left as it was.
        """
        import lance

        location = normalise_location(path)
        schema = schema_of(check_bits(bits), model_id, vector)
        check_free(location)
        try:
            dataset = lance.write_dataset(schema.empty_table(), location, schema=schema, enable_stable_row_ids=True)
        except OSError as error:
            raise InputError(f"{location}: no archive can be made there: {error_line(error)}") from error
        return cls(location, dataset)

    @classmethod
    def open(cls, path: str | Path, version: int | None = None) -> "Archive":
        """Open the archive at `path` in its newest or in one given version.

        Raises:
            InputError: missing, not an archive, of another format version, or damaged.
        """
        location = normalise_location(path)
        return cls(location, open_dataset(location, version))

    @classmethod
    def open_or_create(cls, path: str | Path, bits: int, model_id: str, vector: VectorSpec | None = None) -> "Archive":
        """Open the archive at `path`, or create it.

        Raises:
            InputError: it holds codes of another model or length, or other vectors, or `create` or `open` refuses
                `path`.
        """
        location = normalise_location(path)
        if not holds_dataset(location):
            return cls.create(location, bits, model_id, vector)
        archive = cls.open(location)
        if (archive.bits, archive.model_id) != (bits, model_id):
            raise InputError(
                f"{location} holds {archive.bits}-bit codes of model {archive.model_id}, these are {bits}-bit codes of "
                f"model {model_id}. Codes of another model are refused, never mixed: give the archive of that model "
                "or a new folder"
            )
        if archive.vector != vector:
            raise InputError(
                f"{location} holds {_vectors(archive.vector)}, the model makes {_vectors(vector)}; give a new folder"
            )
        return archive

    def __repr__(self) -> str:
        return f"Archive({self.path!r}, version={self.version}, rows={self.num_rows}, bits={self.bits})"

    def __len__(self) -> int:
        return self.num_rows

    def __bool__(self) -> bool:
        # An archive without rows is an archive.
        return True

    @property
    def version(self) -> int:
        """Number of the version that is read."""
        return int(self._dataset.version)

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        with one_line_errors(self.path):
            return int(self._dataset.count_rows())

    def newest_version(self) -> int:
        """Return the number of the newest version, which may not be the one that is read. Safe during a change."""
        if self._watched is None:
            # A dataset cannot be asked while it is being written to, hence another one.
            self._watched = open_dataset(self.path, None)
        with one_line_errors(self.path):
            return int(self._watched.latest_version)

    def refresh(self) -> None:
        """Move to the newest version.

        Raises:
            InputError: as `open`, or an archive of another model is there now.
        """
        dataset = open_dataset(self.path, None)
        if read_metadata(self.path, dataset) != (self.bits, self.model_id, self.vector):
            raise InputError(f"{self.path} was replaced by an archive of another model; open it anew")
        self._dataset = dataset

    # Reading

    def keys(self) -> set[str]:
        """Return the keys of all rows."""
        with one_line_errors(self.path):
            return set(self._dataset.to_table(columns=["key"])["key"].to_pylist())

    def codes(self) -> tuple[Ids, Codes]:
        """Return the ids uint64 [N], ascending, and the codes uint8 [N, ceil(bits/8)] of all rows."""
        parts = [(np.empty(0, np.uint64), np.empty((0, num_bytes(self.bits)), np.uint8)), *self.code_batches()]
        ids, codes = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.argsort(ids, kind="stable")
        return ids[order], codes[order]

    def code_batches(self) -> Iterator[tuple[Ids, Codes]]:
        """Yield ids and codes as `codes`, in batches of rows in any order, for callers that keep a part of them."""
        with one_line_errors(self.path):
            # One fragment ahead: the memory that this takes is what is read ahead.
            for batch in self._dataset.to_batches(columns=["code"], with_row_id=True, fragment_readahead=1):
                # flatten() honours slices.
                codes = batch["code"].flatten().to_numpy().reshape(-1, num_bytes(self.bits))
                yield batch["_rowid"].to_numpy(), codes

    def take(self, ids: Sequence[int] | Ids, columns: Sequence[str]) -> pa.Table:
        """Return `columns` of the rows with these ids, in the order of `ids`, which may repeat.

        Raises:
            InputError: an id or a column that does not exist.
        """
        unknown = [name for name in columns if name not in self.schema.names]
        if unknown:
            raise InputError(f"no column {', '.join(unknown)}; the archive has {', '.join(self.schema.names)}")
        asked = [int(row) for row in ids]
        if not asked:
            return pa.schema([self.schema.field(name) for name in columns]).empty_table()
        listed_ids = ", ".join(str(row) for row in {*asked} if 0 <= row < 2**63)
        with one_line_errors(self.path):
            found = self._dataset.to_table(
                columns=list(columns), filter=f"_rowid IN ({listed_ids or 'NULL'})", with_row_id=True
            ).combine_chunks()
        place = {row: i for i, row in enumerate(found["_rowid"].to_pylist())}
        missing = sorted(set(asked) - place.keys())
        if missing:
            raise InputError(f"no row with id {missing[0]} in version {self.version} of {self.path}")
        return found.select(list(columns)).take([place[row] for row in asked])

    def exist(self, ids: Ids) -> npt.NDArray[np.bool_]:
        """Return whether a row has each of these ids, bool [N]."""
        among = np.unique(ids[ids < 2**63])
        return np.isin(ids, self.scan([], among)[0] if len(among) else among)

    def scan(self, columns: Sequence[str], among: Ids | None = None) -> tuple[Ids, pa.Table]:
        """Return ids uint64 [N] and `columns` of all rows, or of the rows with the ids `among`, in any order."""
        parts = list(self.scan_batches(columns, among))
        if not parts:
            return np.empty(0, np.uint64), pa.schema([self.schema.field(name) for name in columns]).empty_table()
        return np.concatenate([ids for ids, _ in parts]), pa.concat_tables([table for _, table in parts])

    def scan_batches(self, columns: Sequence[str], among: Ids | None = None) -> Iterator[tuple[Ids, pa.Table]]:
        """Yield the result of `scan` in batches, so that a caller can stop early and need not hold all rows."""
        id_filter = None if among is None else f"_rowid IN ({', '.join(map(str, among.tolist())) or 'NULL'})"
        with one_line_errors(self.path):
            for batch in self._dataset.to_batches(columns=list(columns), filter=id_filter, with_row_id=True):
                yield batch["_rowid"].to_numpy(), pa.Table.from_batches([batch.select(list(columns))])

    def find(self, keys: Sequence[str]) -> dict[str, int]:
        """Return the ids of the rows with these keys; keys without a row are omitted."""
        if not keys:
            return {}
        with one_line_errors(self.path):
            found = self._dataset.to_table(columns=["key"], filter=key_filter(keys), with_row_id=True)
        return dict(zip(found["key"].to_pylist(), found["_rowid"].to_pylist(), strict=True))

    def origins(self, keys: Sequence[str]) -> dict[str, tuple[str, str | None]]:
        """Return the URI and the stamp of the rows with these keys; keys without a row are omitted."""
        if not keys:
            return {}
        with one_line_errors(self.path):
            found = self._dataset.to_table(columns=["key", "uri", "stamp"], filter=key_filter(keys))
        return {row["key"]: (row["uri"], row["stamp"]) for row in found.to_pylist()}

    def refused(self) -> dict[str, str]:
        """Return the reason of each refused item by its key."""
        return self._refused.reasons()

    def refused_stamps(self, keys: Sequence[str]) -> dict[str, str | None]:
        """Return the stamps of the refused items with these keys; a stamp is None when it is not known."""
        return self._refused.stamps(keys)

    # Writing

    table = staticmethod(make_table)

    @staticmethod
    def write_fragments(path: str | Path, table: pa.Table) -> list[str]:
        """Write rows that stay invisible until `commit`, from any process; return their description as JSON.

        The caller ensures that no key occurs twice in what is committed, and none is in the archive already.
        """
        import json

        from lance.fragment import write_fragments

        archive = Archive.open(path)
        rows = archive._checked(table)
        fragments = write_fragments(rows, archive.path, schema=archive.schema, mode="append")
        return [json.dumps(fragment.to_json()) for fragment in fragments]

    def commit(self, fragments: Sequence[str]) -> None:
        """Make the rows of `write_fragments` visible in one atomic step."""
        import lance
        from lance.fragment import FragmentMetadata

        if fragments:
            operation = lance.LanceOperation.Append([FragmentMetadata.from_json(fragment) for fragment in fragments])
            self._dataset = lance.LanceDataset.commit(self._dataset, operation, read_version=self.version)

    def upsert(self, table: pa.Table) -> Ids:
        """Write rows as `write`; return their ids in order."""
        self.write(table)
        keys = table["key"].to_pylist()
        rows = self.find(keys)
        return np.array([rows[key] for key in keys], np.uint64)

    def write(self, table: pa.Table) -> None:
        """Add rows in one commit, each in the place of the row with its key, whose id it keeps, if there is one.

        Raises:
            InputError: a key that occurs twice, or rows of other columns.
        """
        keys = table["key"].to_pylist()
        if len(set(keys)) != len(keys):
            raise InputError("a key occurs twice among the rows to write; give each row once")
        if keys:
            merge = self._dataset.merge_insert("key").when_matched_update_all().when_not_matched_insert_all()
            # The dataset has moved to the new version afterwards: nothing that could fail follows the commit.
            merge.execute(self._checked(table.replace_schema_metadata(self.schema.metadata)))

    def delete(self, keys: Sequence[str]) -> Ids:
        """Remove the rows with these keys in one commit; return the ids of the rows that existed."""
        rows = self.find(keys)
        if rows:
            self._dataset.delete(key_filter(list(rows)))
        return np.array(list(rows.values()), np.uint64)

    def refuse(self, items: Sequence[tuple[str, str]], stamps: Mapping[str, str | None] | None = None) -> None:
        """Write (key, reason) of items into the side table, each in the place of an older item with its key.

        `stamps` identify by key the content that was refused.
        """
        self._refused.put(items, stamps or {})

    def unrefuse(self, keys: Sequence[str]) -> None:
        """Remove items that could be read after all from the side table; other keys are ignored."""
        self._refused.remove(keys)

    @contextmanager
    def writing(self, timeout_s: float = 0.0) -> Iterator[None]:
        """Hold the right to write, and start from the newest version; wait up to `timeout_s` s for another process.

        The kernel releases the lock when its holder dies. An object store has no lock; there, Lance alone keeps
        concurrent commits apart.

        Raises:
            ArchiveBusy: another process is writing.
        """
        with write_lock(self.path, timeout_s):
            self.refresh()
            yield

    def _checked(self, table: pa.Table) -> pa.Table:
        """Return the table, with unknown vectors where it has none, if its columns are those of the archive."""
        if self.vector is not None and "vector" not in table.schema.names:
            field = self.schema.field("vector")
            table = table.append_column(field, pa.nulls(len(table), field.type))
        if not table.schema.equals(self.schema):
            raise InputError(f"rows of other columns than those of {self.path} ({self.bits} bits); use Archive.table")
        return table

    # Upkeep. What takes long works on a dataset of its own and needs no right to write.

    def prepare_compaction(self) -> upkeep.Compaction | None:
        """Rewrite small fragments of the newest version beside the archive; None when that is not worthwhile.

        Takes long when much is rewritten. Safe from any thread, without the right to write, while changes are made.
        """
        return upkeep.prepare_compaction(open_dataset(self.path, None))

    def commit_compaction(self, compaction: upkeep.Compaction) -> bool:
        """Put rewritten fragments in the place of the old ones; quick. Row ids stay.

        The caller has the right to write. Returns False when rows of the old fragments were changed since
        `prepare_compaction`: they stay where they are. The version may advance in both cases; no row changes.
        """
        done = upkeep.commit_compaction(self._dataset, compaction)
        self.refresh()
        return done

    def update_index(self) -> bool:
        """Index the keys of new rows if there are many; return whether a version was made.

        Safe from any thread, without the right to write, while changes are made.
        """
        return upkeep.update_index(open_dataset(self.path, None))

    def clean_up(self) -> bool:
        """Remove old versions and the files that only they use, if they are many; return whether they were.

        The last 1000 versions and all of the last 10 minutes stay. Safe from any thread, without the right to write,
        while changes are made.
        """
        return upkeep.clean_up(open_dataset(self.path, None))

    def maintain(self, timeout_s: float = 0.0) -> None:
        """Join fragments, index keys and remove old versions where that is worthwhile, beside writers and readers.

        Only one process at a time does so. The right to write is held for a short commit only, and waited for up to
        `timeout_s` seconds; this object moves to the newest version.

        Raises:
            ArchiveBusy: another process is writing or maintaining the archive.
        """
        with upkeep_lock(self.path):
            with self.writing(timeout_s):
                # A fragment that is rewritten for a commit that must wait would be rewritten for nothing.
                pass
            if compaction := self.prepare_compaction():
                with self.writing(timeout_s):
                    self.commit_compaction(compaction)
            self.update_index()
            self.clean_up()

    def optimize(self) -> None:
        """Join fragments and index keys where that is worthwhile. The caller has the right to write."""
        self._refused.optimize()
        while (compaction := self.prepare_compaction()) and self.commit_compaction(compaction):
            # A full tier may have filled the next one.
            pass
        if self.update_index():
            self.refresh()


def _vectors(vector: VectorSpec | None) -> str:
    return "no stored vectors" if vector is None else f"stored vectors of {vector.dims} dimensions"
