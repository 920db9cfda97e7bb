"""The archive of codes: one Lance dataset, one row an image or tile.

Rows have stable ids (the column `_rowid`) that survive compaction. Every change is one atomic commit:
a reader sees the version before it or the version after it. Images that could not be read are rows of a second
dataset inside the folder, so that they are neither lost silently nor searched.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from orbithash.encoders.archive.storage import (
    check_free,
    described,
    holds_dataset,
    load,
    location_of,
    quoted,
    reading,
    reason,
    schema_of,
    write_lock,
)
from orbithash.encoders.codes import Codes, check_bits, check_codes, num_bytes
from orbithash.encoders.errors import InputError

__all__ = ["Archive"]

# Versions that `clean_up` leaves, and those that are younger.
_KEPT_VERSIONS, _KEPT_FOR = 1000, timedelta(minutes=10)

# Rows without an entry in the index, which a look-up reads one by one.
_MAX_UNINDEXED = 2**16

_REFUSED = "_refused.lance"
_REFUSED_SCHEMA = pa.schema([pa.field("key", pa.string(), False), pa.field("reason", pa.string(), False)])


class Archive:
    """One version of an archive; `refresh` and the changes made through it move it to the newest one.

    Reading is safe for concurrent calls; nothing may be read while a change is made through the same object.

    Attributes:
        path: the absolute folder, or the URI of an object store.
        bits: bits of a code.
        model_id: content hash of the model the codes come from.
        schema: the columns, with the metadata `orbithash.format_version`, `orbithash.bits` and `orbithash.model_id`.
    """

    def __init__(self, path: str, dataset: Any) -> None:
        """Takes what `create`, `open` and `open_or_create` found."""
        self.path = path
        self.bits, self.model_id = described(path, dataset)
        self.schema: pa.Schema = dataset.schema
        self._dataset = dataset

    @classmethod
    def create(cls, path: str | Path, bits: int, model_id: str) -> "Archive":
        """A new archive without rows.

        Raises:
            InputError: `path` is a file, or a folder that holds anything; it is left as it was.
        """
        import lance

        location = location_of(path)
        schema = schema_of(check_bits(bits), model_id)
        check_free(location)
        try:
            dataset = lance.write_dataset(schema.empty_table(), location, schema=schema, enable_stable_row_ids=True)
        except OSError as error:
            raise InputError(f"{location}: no archive can be made there: {reason(error)}") from error
        return cls(location, dataset)

    @classmethod
    def open(cls, path: str | Path, version: int | None = None) -> "Archive":
        """The archive at `path` in its newest or in one given version.

        Raises:
            InputError: nothing there, not an archive, of another format version, or damaged.
        """
        location = location_of(path)
        return cls(location, load(location, version))

    @classmethod
    def open_or_create(cls, path: str | Path, bits: int, model_id: str) -> "Archive":
        """The archive at `path`, made where there is none.

        Raises:
            InputError: it holds codes of another model or another length, or `create` or `open` refuses `path`.
        """
        location = location_of(path)
        if not holds_dataset(location):
            return cls.create(location, bits, model_id)
        archive = cls.open(location)
        if (archive.bits, archive.model_id) != (bits, model_id):
            raise InputError(
                f"{location} holds {archive.bits}-bit codes of model {archive.model_id}, these are {bits}-bit codes of "
                f"model {model_id}. Codes of another model are refused, never mixed: give the archive of that model "
                "or a new folder"
            )
        return archive

    @property
    def version(self) -> int:
        """Number of the version that is read."""
        return int(self._dataset.version)

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        with reading(self.path):
            return int(self._dataset.count_rows())

    def newest_version(self) -> int:
        """Number of the newest version, which may not be the one that is read. Safe while a change is made."""
        # A dataset that is being written to refuses to be asked at the same time, and the other way round.
        return int(load(self.path, None).version)

    def refresh(self) -> None:
        """Moves to the newest version.

        Raises:
            InputError: as `open`, or another model's archive has taken its place.
        """
        dataset = load(self.path, None)
        if described(self.path, dataset) != (self.bits, self.model_id):
            raise InputError(f"{self.path} was replaced by an archive of another model; open it anew")
        self._dataset = dataset

    def keys(self) -> set[str]:
        """The keys of all rows."""
        with reading(self.path):
            return set(self._dataset.to_table(columns=["key"])["key"].to_pylist())

    def codes(self) -> tuple[npt.NDArray[np.uint64], Codes]:
        """The ids uint64 [N], ascending, and the codes uint8 [N, ceil(bits/8)] of all rows."""
        parts = [(np.empty(0, np.uint64), np.empty((0, num_bytes(self.bits)), np.uint8)), *self.code_batches()]
        ids, codes = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.argsort(ids, kind="stable")
        return ids[order], codes[order]

    def code_batches(self) -> Iterator[tuple[npt.NDArray[np.uint64], Codes]]:
        """As `codes`, a batch of rows at a time in any order, for those who keep a part of them."""
        with reading(self.path):
            # One fragment ahead: what is read before it is asked for is all the memory that this takes.
            for batch in self._dataset.to_batches(columns=["code"], with_row_id=True, fragment_readahead=1):
                # flatten() honours slices.
                codes = batch["code"].flatten().to_numpy().reshape(-1, num_bytes(self.bits))
                yield batch["_rowid"].to_numpy(), codes

    def take(self, ids: Sequence[int] | npt.NDArray[np.uint64], columns: Sequence[str]) -> pa.Table:
        """`columns` of the rows `ids`, in the order of `ids`, which may repeat.

        Raises:
            InputError: an id or a column that does not exist.
        """
        unknown = [name for name in columns if name not in self.schema.names]
        if unknown:
            raise InputError(f"no column {', '.join(unknown)}; the archive has {', '.join(self.schema.names)}")
        wanted = [int(row) for row in ids]
        if not wanted:
            return pa.schema([self.schema.field(name) for name in columns]).empty_table()
        listed_ids = ", ".join(str(row) for row in {*wanted} if 0 <= row < 2**63)
        with reading(self.path):
            found = self._dataset.to_table(
                columns=list(columns), filter=f"_rowid IN ({listed_ids or 'NULL'})", with_row_id=True
            ).combine_chunks()
        place = {row: i for i, row in enumerate(found["_rowid"].to_pylist())}
        missing = sorted(set(wanted) - place.keys())
        if missing:
            raise InputError(f"no row with id {missing[0]} in version {self.version} of {self.path}")
        return found.select(list(columns)).take([place[row] for row in wanted])

    def scan(
        self, columns: Sequence[str], among: npt.NDArray[np.uint64] | None = None
    ) -> tuple[npt.NDArray[np.uint64], pa.Table]:
        """The ids uint64 [N] of all rows, or of those there are `among` some ids, in any order; `columns` of them."""
        if among is not None and not len(among):
            return np.empty(0, np.uint64), pa.schema([self.schema.field(name) for name in columns]).empty_table()
        wanted = None if among is None else f"_rowid IN ({', '.join(map(str, among.tolist()))})"
        with reading(self.path):
            table = self._dataset.to_table(columns=list(columns), filter=wanted, with_row_id=True)
        return table["_rowid"].to_numpy(), table.select(list(columns))

    def find(self, keys: Sequence[str]) -> dict[str, int]:
        """The ids of the rows with these keys; a key of which there is no row is left out."""
        if not keys:
            return {}
        wanted = ", ".join(map(quoted, keys))
        with reading(self.path):
            found = self._dataset.to_table(columns=["key"], filter=f"key IN ({wanted})", with_row_id=True)
        return dict(zip(found["key"].to_pylist(), found["_rowid"].to_pylist(), strict=True))

    def known(self, keys: Sequence[str]) -> set[str]:
        """Those of `keys` that have a row, or a reason why they have none."""
        import lance

        found, location = set(self.find(keys)), f"{self.path}/{_REFUSED}"
        if keys and holds_dataset(location):
            wanted = ", ".join(map(quoted, keys))
            with reading(location):
                refused = lance.dataset(location).to_table(columns=["key"], filter=f"key IN ({wanted})")
            found |= set(refused["key"].to_pylist())
        return found

    @staticmethod
    def table(
        codes: Codes, bits: int, key: Sequence[str], uri: Sequence[str], **columns: Sequence[Any] | None
    ) -> pa.Table:
        """Rows for `write_fragments`.

        Args:
            codes: uint8 [N, ceil(bits/8)], packed.
            bits: bits of a code.
            key: N unique keys.
            uri: N places to open.
            **columns: any of `label`, `caption`, `datetime` (UTC), `lon`, `lat`, `footprint`, `thumbnail`, each N
                values where None (and NaN) means unknown; a column left out is unknown everywhere.

        Raises:
            InputError: codes that do not fit `bits`, a column of another length or of an unknown name.
        """
        schema = schema_of(bits, "").remove_metadata()
        if codes.ndim != 2:
            raise InputError(f"codes are [N, {num_bytes(bits)}], got shape {codes.shape}")
        values: dict[str, Sequence[Any] | None] = {"key": key, "uri": uri, **columns}
        unknown = values.keys() - set(schema.names)
        if unknown:
            raise InputError(f"no column {', '.join(sorted(unknown))}; the archive has {', '.join(schema.names)}")
        arrays = []
        for field in schema:
            column = values.get(field.name)
            if field.name == "code":
                flat = pa.array(np.ascontiguousarray(check_codes(codes, bits)).reshape(-1))
                array = pa.FixedSizeListArray.from_arrays(flat, type=field.type)
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

    @staticmethod
    def write_fragments(path: str | Path, table: pa.Table) -> list[str]:
        """Writes rows that stay invisible until `commit`, from any process; returns their description as JSON.

        The caller sees to it that no key is twice in what is committed, nor in the archive already.
        """
        import json

        from lance.fragment import write_fragments

        archive = Archive.open(path)
        rows = archive._checked(table)
        fragments = write_fragments(rows, archive.path, schema=archive.schema, mode="append")
        return [json.dumps(fragment.to_json()) for fragment in fragments]

    def commit(self, fragments: Sequence[str]) -> None:
        """Makes the rows of `write_fragments` visible in one atomic step."""
        import lance
        from lance.fragment import FragmentMetadata

        if fragments:
            operation = lance.LanceOperation.Append([FragmentMetadata.from_json(fragment) for fragment in fragments])
            self._dataset = lance.LanceDataset.commit(self._dataset, operation, read_version=self.version)

    def upsert(self, table: pa.Table) -> npt.NDArray[np.uint64]:
        """Adds rows, each in place of the row with its key where there is one, in one commit; their ids in order.

        A row that takes another's place has its id.

        Raises:
            InputError: a key that occurs twice, or rows of other columns.
        """
        keys = table["key"].to_pylist()
        if len(set(keys)) != len(keys):
            raise InputError("a key occurs twice among the rows to write; give each row once")
        if keys:
            merge = self._dataset.merge_insert("key").when_matched_update_all().when_not_matched_insert_all()
            merge.execute(self._checked(table.replace_schema_metadata(self.schema.metadata)))
            self.refresh()
        rows = self.find(keys)
        return np.array([rows[key] for key in keys], np.uint64)

    def delete(self, keys: Sequence[str]) -> npt.NDArray[np.uint64]:
        """Removes the rows with these keys in one commit; the ids of those that there were."""
        rows = self.find(keys)
        if rows:
            self._dataset.delete(f"key IN ({', '.join(map(quoted, rows))})")
            self.refresh()
        return np.array(list(rows.values()), np.uint64)

    def optimize(self) -> None:
        """Joins small fragments and brings the index on `key` up to date; ids stay."""
        self._dataset.optimize.compact_files()
        if any(index.field_names == ["key"] for index in self._dataset.describe_indices()):
            self._dataset.optimize.optimize_indices()
        else:
            self._dataset.create_scalar_index("key", "BTREE")
        self.refresh()

    def index_keys(self) -> None:
        """Makes `find` quick where many rows are not in the index on `key` yet, as after a job that was killed."""
        names = [index.name for index in self._dataset.describe_indices() if index.field_names == ["key"]]
        stats = self._dataset.stats.index_stats(names[0]) if names else {"num_unindexed_rows": self.num_rows}
        if stats["num_unindexed_rows"] > _MAX_UNINDEXED:
            self.optimize()

    def clean_up(self) -> None:
        """Removes versions, and the files only they need, that nobody can still be reading."""
        # Both have to hold. Age alone would take a version that was the newest until a moment ago.
        self._dataset.cleanup_old_versions(older_than=_KEPT_FOR, retain_versions=_KEPT_VERSIONS)

    def refuse(self, rows: Sequence[tuple[str, str]]) -> None:
        """Notes (key, reason) of images that could not be read."""
        import lance

        if not rows:
            return
        table = pa.table([list(column) for column in zip(*rows, strict=True)], schema=_REFUSED_SCHEMA)
        location = f"{self.path}/{_REFUSED}"
        lance.write_dataset(table, location, mode="append" if holds_dataset(location) else "create")

    def refused(self) -> dict[str, str]:
        """Key and latest reason of the images that could not be read."""
        import lance

        location = f"{self.path}/{_REFUSED}"
        if not holds_dataset(location):
            return {}
        with reading(location):
            table = lance.dataset(location).to_table()
        return dict(zip(table["key"].to_pylist(), table["reason"].to_pylist(), strict=True))

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Holds the only right to write, and starts from the newest version.

        The kernel gives the lock back when its holder dies. In an object store there is no lock, and Lance alone
        keeps commits apart.

        Raises:
            InputError: another process is writing.
        """
        with write_lock(self.path):
            self.refresh()
            yield

    def _checked(self, table: pa.Table) -> pa.Table:
        """`table` itself if its columns are the archive's."""
        if not table.schema.equals(self.schema):
            raise InputError(f"rows of other columns than those of {self.path} ({self.bits} bits); use Archive.table")
        return table
