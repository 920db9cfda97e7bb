"""Encoding of many vectors while the driver is killed: every vector becomes exactly one row."""

import json

import numpy as np
import pyarrow as pa
import pytest
from cluster_parts import family, kill, save_vector_model, wait_for

from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.networks.model import HashModel
from orbithash.encoders.sources.embeddings.key_hashes import hash_keys, repeated
from tests.encoders.sources.embedding_tables import vector_column, vectors, write_table

pytestmark = pytest.mark.slow

NUM_ROWS = 500_000
BROKEN = 270_000


def num_rows(archive):
    has_commits = len(list((archive / "_versions").glob("*.manifest"))) > 1 if archive.exists() else False
    return Archive.open(archive).num_rows if has_commits else 0


def test_a_killed_job_continues_and_each_vector_is_one_row(start, tmp_path):
    values = vectors(NUM_ROWS)
    values[BROKEN] = np.nan
    ids = pa.array(np.arange(NUM_ROWS)).cast(pa.string())
    path = write_table(tmp_path / "t.parquet", {"id": ids, "embedding": vector_column(values)}, rows_per_group=20_000)
    model, archive = save_vector_model(tmp_path / "model"), tmp_path / "archive"
    command = ("encode", path, "--model", model, "--archive", archive, "--workers", "2", "--json")
    process = start(*command)
    wait_for(lambda: num_rows(archive), process)
    kill(process, *family(process.pid))
    done = num_rows(archive)
    assert 0 < done < NUM_ROWS - 1, "the kill met the job in the middle"

    process = start(*command)
    assert process.wait(300) == 0, process.err.read_text()
    summary = json.loads(process.out.read_text())
    assert summary["num_encoded"] == NUM_ROWS - 1 - done
    assert summary["num_done_before"] + summary["num_refused_before"] + summary["num_refused"] == done + 1
    opened = Archive.open(archive)
    assert opened.num_rows == NUM_ROWS - 1
    assert list(opened.refused()) == [str(BROKEN)]
    hashes = [hash_keys(table["key"].combine_chunks()) for _, table in opened.scan_batches(["key"])]
    _, twice = repeated(hashes)
    assert not len(twice)
    some = np.arange(0, NUM_ROWS, 19_999)
    found = opened.find([str(number) for number in some])
    codes = opened.take([found[str(number)] for number in some], ["code"])["code"].to_pylist()
    assert codes == HashModel.load(model).encode_items("vector", values[some]).codes.tolist()
