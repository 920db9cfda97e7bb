"""Encoding of tables of embeddings on Ray Data: rows of Parquet files become rows of an archive.

    chunks (driver) -> read, encode, write fragments (actor pool) -> commit (driver)

A chunk is some row groups of one file. An actor does all the work of a chunk, so that no vector passes through the
object store or the driver. The stamp of a row names its file, the version of the file and its chunk: the driver counts
stamps to find the chunks that are complete, without looking up keys. A chunk is committed as a whole, so a job that
dies at any moment and is run again continues with the chunks that are not in the archive. A few rows are encoded in
this process.
"""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from orbithash.cluster.encoding.commits import Commits
from orbithash.cluster.encoding.encode import Workers, data_results, quiet_data, writing
from orbithash.cluster.encoding.stages import Written
from orbithash.cluster.encoding.summary import EncodeSummary, Tally
from orbithash.cluster.encoding.vector_stages import ChunkEncoder, ChunkStamp, chunk_table, conflict, find_origins
from orbithash.cluster.output import say, track
from orbithash.cluster.runtime import connected
from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.archive.refusals import RefusedTable
from orbithash.encoders.errors import InputError
from orbithash.encoders.networks.card import read_model_folder
from orbithash.encoders.sources.embeddings.key_hashes import Hashes, hash_keys
from orbithash.encoders.sources.embeddings.rows import Chunk
from orbithash.encoders.sources.embeddings.tables import EmbeddingTable

__all__ = ["MAX_ENCODED_HERE", "encode_vectors", "takes_vectors"]

# More rows than this are encoded by Ray Data; fewer take less time than its start.
MAX_ENCODED_HERE = 2**15

# Blocks of the list of chunks.
_MAX_BLOCKS = 4096


def takes_vectors(model: Path) -> bool:
    """Return whether a model takes vectors instead of images; `InputError` for an invalid model folder."""
    return read_model_folder(model)[0].network.backbone.source == "embedding"


def encode_vectors(
    source: str,
    model: Path,
    archive: str,
    workers: Workers | None = None,
    options: Sequence[str] = (),
    *,
    prefix: str = "",
    retry_refused: bool = False,
) -> EncodeSummary:
    """Encode the rows of a table of embeddings that the archive does not have, or has of an older file.

    A row that cannot be used is not an error; it goes to the side table. Rows of a file that has changed are replaced.

    Args:
        source: a Parquet file, or a folder of them (see `EmbeddingTable`).
        model: folder of a model that was trained on vectors.
        archive: archive to create or to extend.
        workers: actors that encode.
        options: columns and layout of the table.
        prefix: put before all keys.
        retry_refused: read refused rows again although their files have not changed.

    Raises:
        InputError: a table, model or archive that do not fit, an id that occurs twice, or one that a row of another
            source has.
    """
    card, model_id, _ = read_model_folder(model)
    backbone = card.network.backbone
    table = EmbeddingTable.open(source, options, prefix)
    table.check_embedding(backbone.name, backbone.num_features, backbone.origin)
    num_listed = table.check_keys()
    target = Archive.open_or_create(archive, card.bits, model_id, card.vector)
    tally = Tally(unit="vectors")
    with ExitStack() as stack:
        stack.enter_context(writing(target))
        target.update_index()
        plan = _Plan.of(table, target, retry_refused)
        tally.num_done_before, tally.num_refused_before = plan.num_done, plan.num_refused
        say(f"{table}: {plan.num_done + plan.num_refused:,} of {num_listed:,} rows were done before")
        if plan.chunks:
            _check_conflicts(table, plan, target)
            _run(table, plan, target, model.absolute(), workers or Workers(), tally)
        _unrefuse(table, target)
        # Rows of incomplete chunks that were there already.
        tally.num_done_before = num_listed - tally.num_refused_before - tally.num_read
        return tally.summary(num_listed, target.num_rows)


@dataclass(frozen=True)
class _Plan:
    """What is to be done.

    Attributes:
        chunks: chunks that are not complete.
        known: hashes of the keys of the archive's rows outside of complete chunks, uint64, ascending.
        num_done: rows of complete chunks.
        num_refused: refused rows of complete chunks.
    """

    chunks: list[Chunk]
    known: Hashes
    num_done: int
    num_refused: int

    @classmethod
    def of(cls, table: EmbeddingTable, target: Archive, retry_refused: bool) -> "_Plan":
        """Compare the chunks of a table with the stamps in an archive; needs 8 bytes for each row of other stamps."""
        encoded: Counter[str | None] = Counter()
        for _, batch in target.scan_batches(["stamp"]):
            encoded.update({one["values"]: one["counts"] for one in pc.value_counts(batch["stamp"]).to_pylist()})
        refused = Counter[str | None]() if retry_refused else Counter(RefusedTable(target.path).all_stamps().values())
        chunks, done = [], []
        for chunk in table.chunks():
            stamp = str(ChunkStamp.of(chunk, table.reader))
            if encoded[stamp] + refused[stamp] == chunk.num_rows:
                done.append(stamp)
            else:
                chunks.append(chunk)
        num_done = sum(encoded[stamp] for stamp in done)
        known = [np.empty(0, np.uint64)]
        if chunks and num_done < target.num_rows:
            complete = pa.array(done, pa.string())
            for _, batch in target.scan_batches(["key", "stamp"]):
                keys = batch["key"].filter(pc.invert(pc.is_in(batch["stamp"], complete))).combine_chunks()
                known.append(hash_keys(keys))
        return cls(chunks, np.sort(np.concatenate(known)), num_done, sum(refused[stamp] for stamp in done))


def _check_conflicts(table: EmbeddingTable, plan: _Plan, target: Archive) -> None:
    """Raise `InputError` if a row of another source has the key of a row to encode."""
    if not len(plan.known):
        return
    for chunk in plan.chunks:
        stamp = ChunkStamp.of(chunk, table.reader)
        for rows in table.reader.read(chunk, vectors=False, places=False):
            hashes = hash_keys(rows.keys)
            candidates = rows.keys.filter(pa.array(np.isin(hashes, plan.known)))
            for key, (uri, other) in find_origins(target, candidates).items():
                if stamp.relation(other) == "other":
                    raise InputError(conflict(key, uri))


def _run(table: EmbeddingTable, plan: _Plan, target: Archive, model: Path, workers: Workers, tally: Tally) -> None:
    """Encode chunks, commit as results arrive, and optimize the archive; this process is the writer."""
    num_rows = sum(chunk.num_rows for chunk in plan.chunks)
    begun = first = time.time()
    with ExitStack() as stack:
        if num_rows <= MAX_ENCODED_HERE:
            results = _encoded_here(table, plan, target, model, workers)
        else:
            stack.enter_context(connected())
            stack.enter_context(quiet_data())
            results = _encoded_on_ray(table, plan, target, model, workers)
        advance_to = stack.enter_context(track("encoding", num_rows, "vectors"))
        commits = stack.enter_context(Commits(target))
        for number, written in enumerate(results):
            commits.add(written)
            tally.add(written)
            first = min(first, written.began) if number else written.began
            advance_to(tally.num_read, f"{tally.num_refused} refused" if tally.num_refused else "")
    tally.start_s += first - begun
    tally.encode_s += time.time() - first
    target.optimize()
    target.clean_up()


def _encoded_here(
    table: EmbeddingTable, plan: _Plan, target: Archive, model: Path, workers: Workers
) -> Iterator[Written]:
    """Yield the result for each chunk of a few rows, encoded in this process."""
    import torch

    device = "cuda" if workers.gpus != 0 and torch.cuda.is_available() else "cpu"
    encoder = ChunkEncoder(model, device, table.reader, target.path, plan.known)
    yield from map(encoder.write, plan.chunks)


def _encoded_on_ray(
    table: EmbeddingTable, plan: _Plan, target: Archive, model: Path, workers: Workers
) -> Iterator[Written]:
    """Yield the result for each chunk, encoded by actors of Ray Data."""
    import ray.data

    low, high, gpus = workers.on_cluster()
    high = max(low, min(high, len(plan.chunks)))
    per_block = -(-len(plan.chunks) // _MAX_BLOCKS)
    blocks = [chunk_table(plan.chunks[start : start + per_block]) for start in range(0, len(plan.chunks), per_block)]
    arguments = {
        "model": model,
        "device": "cuda" if gpus else "cpu",
        "reader": table.reader,
        "archive": target.path,
        "known": plan.known,
    }
    results = ray.data.from_arrow(blocks).map_batches(
        ChunkEncoder,
        fn_constructor_kwargs=arguments,
        compute=ray.data.ActorPoolStrategy(min_size=low, max_size=high, initial_size=high),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=1,
        num_gpus=gpus,
    )
    yield from data_results(results)


def _unrefuse(table: EmbeddingTable, target: Archive) -> None:
    """Remove rows from the side table that were refused in an older version of their file and are not any more."""
    current = {str(ChunkStamp.of(chunk, table.reader)) for chunk in table.chunks()}
    sources = {stamp.partition("-")[0] for stamp in current}
    stamps = RefusedTable(target.path).all_stamps()
    target.unrefuse(
        [
            key
            for key, stamp in stamps.items()
            if stamp is not None and stamp not in current and stamp.partition("-")[0] in sources
        ]
    )
