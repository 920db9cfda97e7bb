"""The stage that turns chunks of a table of embeddings into rows of an archive. It does not use Ray."""

import dataclasses
import hashlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from orbithash.cluster.encoding.stages import Written, as_stream, written_table
from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.archive.stamps import file_version
from orbithash.encoders.codes import Encoded
from orbithash.encoders.errors import InputError
from orbithash.encoders.sources.embeddings.key_hashes import Hashes, hash_keys
from orbithash.encoders.sources.embeddings.rows import Chunk, EmbeddingRows, RowReader

__all__ = ["ChunkEncoder", "ChunkStamp", "chunk_table", "find_origins"]

# Keys that are looked up in the archive together.
_LOOK_UP = 10_000


@dataclasses.dataclass(frozen=True)
class ChunkStamp:
    """What identifies the content of the rows of a chunk: `SOURCE-VERSION/FIRST-STOP`.

    Attributes:
        source: hash of the file's path, of the prefix of its keys, and of the columns of ids and vectors.
        version: size and times of the file.
        rows: number of the first row in the file, and of the last one plus one.
    """

    source: str
    version: str
    rows: str

    @classmethod
    def of(cls, chunk: Chunk, reader: RowReader) -> "ChunkStamp":
        """Return the stamp of a chunk as its file is now."""
        identity = [chunk.path, reader.prefix, reader.columns.others.get("id"), reader.columns.vector]
        source = hashlib.blake2b(repr(identity).encode(errors="surrogateescape"), digest_size=8).hexdigest()
        return cls(source, file_version(chunk.path) or "", f"{chunk.first}-{chunk.stop}")

    def __str__(self) -> str:
        """Return the text of the archive's column `stamp`."""
        return f"{self.source}-{self.version}/{self.rows}"

    def relation(self, stamp: str | None) -> str:
        """Return what a row with this stamp is for the same key of this chunk: "same", "older" or "other".

        Rows without a stamp came through a gateway; they stay, and count as the same.
        """
        if stamp is None or stamp.startswith(f"{self.source}-{self.version}/"):
            return "same"
        return "older" if stamp.startswith(f"{self.source}-") else "other"


_CHUNKS = pa.schema(
    [
        ("path", pa.string()),
        ("name", pa.string()),
        ("first", pa.int64()),
        ("stop", pa.int64()),
        ("groups", pa.list_(pa.int64())),
    ]
)


def chunk_table(chunks: Sequence[Chunk]) -> pa.Table:
    """Return chunks as `ChunkEncoder` takes them."""
    return pa.Table.from_pylist([dataclasses.asdict(chunk) for chunk in chunks], schema=_CHUNKS)


def find_origins(archive: Archive, keys: pa.Array) -> dict[str, tuple[str, str | None]]:
    """Return URI and stamp of the rows with these keys, of any number; keys without a row are omitted."""
    found: dict[str, tuple[str, str | None]] = {}
    for start in range(0, len(keys), _LOOK_UP):
        found.update(archive.origins(keys[start : start + _LOOK_UP].to_pylist()))
    return found


class ChunkEncoder:
    """The model, loaded once, which reads chunks, encodes their vectors and writes fragments."""

    def __init__(self, model: Path, device: str, reader: RowReader, archive: str, known: Hashes) -> None:
        """Load the model folder onto `cpu` or `cuda`.

        Args:
            model: model folder.
            device: `cpu` or `cuda`.
            reader: reads rows of chunks.
            archive: path of the archive.
            known: hashes of the keys that the archive may have already, uint64 in ascending order.
        """
        from orbithash.encoders.networks.model import HashModel

        self._model = HashModel.load(model, device)
        self._reader = reader
        self._archive = archive
        self._known = known

    def __call__(self, chunks: pa.Table) -> Iterator[pa.Table]:
        """Yield one row for each chunk: the fields of `Written`."""
        for fields in chunks.to_pylist():
            yield written_table(self.write(Chunk(**fields | {"groups": tuple(fields["groups"])})))

    def write(self, chunk: Chunk) -> Written:
        """Write the rows of a chunk that the archive does not have as fragments that are not committed yet."""
        began = time.time()
        # Before the file is read: if it changes meanwhile, a later run encodes it again.
        stamp = ChunkStamp.of(chunk, self._reader)
        archive = Archive.open(self._archive)
        seconds = dict.fromkeys(("decode_s", "encode_s", "write_s"), 0.0)
        new, older = [], []
        refused: dict[str, str] = {}
        clock = _Clock(seconds)
        for rows in self._reader.read(chunk):
            relations = self._relations(rows, stamp, archive)
            clock.stop("decode_s")
            assert rows.vectors is not None, "read with vectors"
            is_new, is_older = relations == "new", relations == "older"
            refused |= {rows.keys[row].as_py(): rows.problems[row] for row in rows.problems if relations[row] != "same"}
            is_new[list(rows.problems)] = is_older[list(rows.problems)] = False
            is_used = is_new | is_older
            encoded = self._model.encode_items("vector", rows.vectors if is_used.all() else rows.vectors[is_used])
            clock.stop("encode_s")
            table = _row_table(archive.schema, rows, is_used, encoded, chunk.path, str(stamp))
            new.append(table.filter(pa.array(is_new[is_used])) if is_older.any() else table)
            if is_older.any():
                older.append(table.filter(pa.array(is_older[is_used])))
            clock.stop("write_s")
        added, replacing = (pa.concat_tables([archive.schema.empty_table(), *tables]) for tables in (new, older))
        fragments = Archive.write_fragments(self._archive, added) if len(added) else []
        clock.stop("write_s")
        return Written(
            fragments=fragments,
            replacing=as_stream(replacing),
            num_rows=len(added) + len(replacing),
            num_replaced=len(replacing),
            refused=list(refused),
            reasons=list(refused.values()),
            stamps=[str(stamp)] * len(refused),
            began=began,
            **seconds,
        )

    def _relations(self, rows: EmbeddingRows, stamp: ChunkStamp, archive: Archive) -> npt.NDArray[np.str_]:
        """Return for each row "new", "same" or "older": what the archive has under its key (`ChunkStamp.relation`)."""
        relations = np.full(len(rows.keys), "new", "<U5")
        if not len(self._known):
            return relations
        hashes = hash_keys(rows.keys)
        places = np.searchsorted(self._known, hashes).clip(max=len(self._known) - 1)
        candidates = np.flatnonzero(self._known[places] == hashes)
        origins = find_origins(archive, rows.keys.take(pa.array(candidates)))
        for row in candidates.tolist():
            key = rows.keys[row].as_py()
            if key in origins:
                relations[row] = relation = stamp.relation(origins[key][1])
                if relation == "other":
                    raise InputError(conflict(key, origins[key][0]))
        return relations


def conflict(key: str, uri: str) -> str:
    """Return the message for a key that a row of another source has."""
    return (
        f"the archive has a row {key!r} of another source, {uri}. Give --prefix NAME to store the rows of this table "
        "under keys NAME/..., or delete the row first"
    )


class _Clock:
    """Adds the time since the last call to one of several sums of seconds."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds, self._last = seconds, time.perf_counter()

    def stop(self, name: str) -> None:
        now = time.perf_counter()
        self._seconds[name] += now - self._last
        self._last = now


def _row_table(
    schema: pa.Schema, rows: EmbeddingRows, is_used: npt.NDArray[np.bool_], encoded: Encoded, path: str, stamp: str
) -> pa.Table:
    """Return the used rows with their codes as a table with the columns of the archive."""
    num, mask = len(encoded.codes), None if is_used.all() else pa.array(is_used)
    given: dict[str, Any] = {"key": rows.keys, **rows.columns}
    arrays = []
    for field in schema:
        if field.name in ("code", "vector"):
            values = encoded.codes if field.name == "code" else encoded.vectors
            assert values is not None, "an archive with stored vectors belongs to a model with a projection"
            array = pa.FixedSizeListArray.from_arrays(
                pa.array(np.ascontiguousarray(values).reshape(-1)), type=field.type
            )
        elif field.name == "stamp":
            array = pa.repeat(pa.scalar(stamp, field.type), num)
        elif field.name in given:
            array = (given[field.name] if mask is None else given[field.name].filter(mask)).cast(field.type)
        else:
            array = pa.nulls(num, field.type) if field.nullable else pa.repeat(pa.scalar(path, field.type), num)
        if field.name == "uri":
            array = array.fill_null(path)
        arrays.append(array)
    return pa.table(arrays, schema=schema)
