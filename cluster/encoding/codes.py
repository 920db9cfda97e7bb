"""Import of codes that were made elsewhere: rows of a table of codes become rows of an archive; no model is needed.

The rows are written by this process in portions of some megabytes and committed every few seconds. A job that dies at
any moment and is run again skips the rows that the archive has already.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from orbithash.cluster.encoding.commits import Commits
from orbithash.cluster.encoding.encode import writing
from orbithash.cluster.encoding.stages import Written, as_stream
from orbithash.cluster.encoding.summary import EncodeSummary, Tally
from orbithash.cluster.encoding.vector_stages import conflict, find_origins
from orbithash.cluster.output import say, track
from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.archive.stamps import file_version
from orbithash.encoders.errors import InputError
from orbithash.encoders.networks.card import read_model_folder
from orbithash.encoders.sources.codes.code_tables import CodeRows, CodeTable
from orbithash.encoders.sources.embeddings.rows import Chunk

__all__ = ["import_codes"]

# Bytes of rows that are written together.
_PORTION_BYTES = 64 * 2**20


def import_codes(
    source: str | Path,
    archive: str,
    codes: Sequence[str] = (),
    columns: Sequence[str] = (),
    *,
    model: Path | None = None,
    prefix: str = "",
) -> EncodeSummary:
    """Write the rows of a table of codes that the archive does not have, or has with other content.

    A row that cannot be used is not an error; it goes to the side table. Row ids are those of the archive, not those of
    the table. The whole table is checked before the first row is written.

    Args:
        source: a Parquet file, a folder of them, or a STAC collection of them (see `CodeTable`).
        archive: archive to create or to extend.
        codes: what the codes are, where the table does not say (see `CodeOptions`).
        columns: columns of the table by role (see `TableOptions`).
        model: folder of the model that made the codes; None: not checked.
        prefix: put before all keys.

    Raises:
        InputError: a table, model or archive that do not fit, a code that does not fit its description, an id that
            occurs twice, or one that a row of another source has.
    """
    try:
        table = CodeTable.open(source, codes, columns, prefix)
    except InputError as error:
        hint = "; only a table of codes is imported without a model, images and vectors need --model"
        raise InputError(f"{error}{'' if model or codes else hint}") from error
    described = table.description
    if model is not None:
        card, model_id, _ = read_model_folder(model)
        if (described.model_id, described.bits) != (model_id, card.bits):
            raise InputError(
                f"{table.root} has {described.bits}-bit codes of the model {described.model_id}; {model} holds the "
                f"model {model_id} of {card.bits} bits: omit --model, or give the model that made the codes"
            )
    num_listed = table.check()
    target = Archive.open_or_create(archive, described.bits, described.model_id, table.vector)
    tally = Tally(unit="codes")
    with ExitStack() as stack:
        stack.enter_context(writing(target))
        target.update_index()
        before = Archive.open(target.path)
        if before.num_rows:
            _check_conflicts(table, before)
        say(str(table))
        began = time.time()
        advance_to = stack.enter_context(track("importing", num_listed, "codes"))
        accepted: list[str] = []
        with Commits(target) as commits:
            for chunk in table.chunks():
                for written in _written(table, chunk, before, tally, accepted):
                    commits.add(written)
                    tally.add(written)
                    advance_to(tally.num_read + tally.num_done_before, "")
        target.unrefuse(accepted)
        tally.encode_s += time.time() - began
        target.optimize()
        target.clean_up()
        return tally.summary(num_listed, target.num_rows)


def _check_conflicts(table: CodeTable, before: Archive) -> None:
    """Raise `InputError` if a row of another source has the key of a row of the table."""
    for chunk in table.chunks():
        for keys, uris in table.uris(chunk):
            origins = find_origins(before, keys)
            for key, uri in zip(keys.to_pylist(), uris.to_pylist(), strict=True) if origins else ():
                if key in origins and origins[key][0] != (uri or chunk.path):
                    raise InputError(conflict(key, origins[key][0]))


def _written(table: CodeTable, chunk: Chunk, before: Archive, tally: Tally, accepted: list[str]) -> Iterator[Written]:
    """Write the rows of a chunk as fragments that are not committed yet.

    Rows that the archive has are counted in `tally`; keys of good rows that were refused before go to `accepted`.
    """
    new: list[pa.Table] = []
    version, began = file_version(chunk.path), time.time()
    for rows in table.read(chunk):
        is_good = np.ones(len(rows.keys), np.bool_)
        is_good[list(rows.problems)] = False
        found = _row_table(before.schema, rows, is_good, chunk.path)
        is_new, is_changed = _compared(found, before)
        tally.num_done_before += len(found) - int(is_new.sum() + is_changed.sum())
        accepted += before.refused_stamps(found["key"].to_pylist())
        new.append(found.filter(pa.array(is_new)))
        changed = found.filter(pa.array(is_changed))
        refused = {rows.keys[row].as_py(): problem for row, problem in rows.problems.items()}
        if refused or len(changed):
            yield _result([], changed, refused, version, began)
        if sum(part.nbytes for part in new) >= _PORTION_BYTES:
            yield _fragment(new, before, began)
            new = []
    yield _fragment(new, before, began)


def _fragment(parts: list[pa.Table], before: Archive, began: float) -> Written:
    rows = pa.concat_tables([before.schema.empty_table(), *parts])
    fragments = Archive.write_fragments(before.path, rows) if len(rows) else []
    written = _result(fragments, before.schema.empty_table(), {}, None, began)
    return Written(**{**vars(written), "num_rows": len(rows)})


def _result(
    fragments: list[str], changed: pa.Table, refused: dict[str, str], version: str | None, began: float
) -> Written:
    return Written(
        fragments=fragments,
        replacing=as_stream(changed),
        num_rows=len(changed),
        num_replaced=len(changed),
        refused=list(refused),
        reasons=list(refused.values()),
        stamps=[version] * len(refused),
        began=began,
        decode_s=0.0,
        encode_s=0.0,
        write_s=0.0,
    )


def _compared(rows: pa.Table, before: Archive) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Return which rows have keys that the archive lacks, and which it has with other content; bool [N] each."""
    keys = rows["key"].to_pylist()
    ids = before.find(keys) if before.num_rows else {}
    is_known = np.array([key in ids for key in keys], np.bool_)
    is_changed = np.zeros(len(keys), np.bool_)
    known = rows.filter(pa.array(is_known))
    stored = before.take([ids[key] for key in known["key"].to_pylist()], rows.schema.names) if ids else known
    if not all(known[name].equals(stored[name]) for name in rows.schema.names):
        pairs = zip(known.to_pylist(), stored.to_pylist(), strict=True)
        is_changed[is_known] = [one != other for one, other in pairs]
    return ~is_known, is_changed


def _row_table(schema: pa.Schema, rows: CodeRows, is_good: npt.NDArray[np.bool_], path: str) -> pa.Table:
    """Return the good rows as a table with the columns of the archive."""
    given = {"key": rows.keys, **rows.columns}
    codes = pa.array(np.ascontiguousarray(rows.codes[is_good]).reshape(-1))
    mask, num = pa.array(is_good), int(is_good.sum())
    arrays = []
    for field in schema:
        if field.name == "code":
            array = pa.FixedSizeListArray.from_arrays(codes, type=field.type)
        elif field.name in given:
            array = given[field.name].filter(mask).cast(field.type)
        else:
            array = pa.nulls(num, field.type)
        arrays.append(array.fill_null(path) if field.name == "uri" else array)
    return pa.table(arrays, schema=schema)
