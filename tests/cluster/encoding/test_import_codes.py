"""Codes made elsewhere become rows of an archive: new, repeated, changed and refused rows; no model is needed."""

import json

import numpy as np
import pyarrow as pa
import pytest

from orbithash.cluster.encoding.codes import import_codes
from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.errors import InputError
from orbithash.encoders.networks.card import read_model_folder
from orbithash.encoders.places.code_description import CodeDescription
from tests.encoders.sources.codes.code_files import BITS, MODEL, code_column, codes_of, write_codes


def rows_of(path):
    archive = Archive.open(path)
    return archive.scan(archive.schema.names)[1].sort_by("key").to_pylist()


def test_codes_become_rows_of_a_new_archive(tmp_path):
    path = write_codes(tmp_path / "a.parquet", 30, rows_per_group=7, uri=["u"] * 29 + [None])
    summary = import_codes(path, str(tmp_path / "archive"))
    archive = Archive.open(tmp_path / "archive")
    assert (archive.bits, archive.model_id, archive.vector, archive.num_rows) == (BITS, MODEL, None, 30)
    assert (summary.num_listed, summary.num_encoded, summary.num_refused) == (30, 30, 0)
    assert str(summary).startswith("imported 30 of 30 codes at ")
    rows = {row["key"]: row for row in rows_of(tmp_path / "archive")}
    assert rows["row7"]["code"] == codes_of(30)[7].tolist()
    assert (rows["row7"]["uri"], rows["row29"]["uri"]) == ("u", str(path))


def test_a_second_run_writes_what_has_changed_only(tmp_path):
    uris = ["u"] * 5
    write_codes(tmp_path / "a.parquet", uri=uris, label=["a"] * 5)
    import_codes(tmp_path / "a.parquet", str(tmp_path / "archive"))
    ids = Archive.open(tmp_path / "archive").find(["row1", "row2"])
    again = import_codes(tmp_path / "a.parquet", str(tmp_path / "archive"))
    assert (again.num_done_before, again.num_encoded) == (5, 0)
    write_codes(tmp_path / "a.parquet", 6, uri=[*uris, "u"], label=["a", "b", "a", "a", "a", "a"])
    more = import_codes(tmp_path / "a.parquet", str(tmp_path / "archive"))
    assert (more.num_done_before, more.num_encoded, more.num_replaced) == (4, 2, 1)
    assert rows_of(tmp_path / "archive")[1]["label"] == "b"
    assert Archive.open(tmp_path / "archive").find(["row1", "row2"]) == ids, "replaced rows keep their ids"


def test_refused_rows_go_to_the_side_table_until_they_are_mended(tmp_path):
    codes = pa.array([[1, 16], None, [3, 0], [4, 0], [5, 0]], pa.list_(pa.uint8(), 2))
    summary = import_codes(write_codes(tmp_path / "a.parquet", code=codes), str(tmp_path / "archive"))
    assert (summary.num_encoded, summary.num_refused) == (4, 1)
    assert Archive.open(tmp_path / "archive").refused() == {"row1": "its code is null"}
    import_codes(write_codes(tmp_path / "a.parquet"), str(tmp_path / "archive"))
    assert Archive.open(tmp_path / "archive").refused() == {}
    assert Archive.open(tmp_path / "archive").num_rows == 5


def test_nothing_is_written_of_a_table_that_does_not_fit(tmp_path):
    codes = codes_of(20)
    codes[19] |= 1
    path = write_codes(tmp_path / "a.parquet", 20, code=code_column(codes), rows_per_group=2)
    with pytest.raises(InputError, match="pad bits"):
        import_codes(path, str(tmp_path / "archive"))
    assert not (tmp_path / "archive").exists()


def test_codes_of_another_model_are_never_mixed(tmp_path):
    import_codes(write_codes(tmp_path / "a.parquet"), str(tmp_path / "archive"))
    for description in (CodeDescription(BITS, "other"), CodeDescription(BITS + 1, MODEL)):
        path = write_codes(tmp_path / "b.parquet", description=description)
        with pytest.raises(InputError, match="Codes of another model are refused, never mixed"):
            import_codes(path, str(tmp_path / "archive"))
    assert Archive.open(tmp_path / "archive").num_rows == 5


def test_a_row_of_another_source_is_not_replaced(tmp_path):
    import_codes(write_codes(tmp_path / "a.parquet"), str(tmp_path / "archive"))
    other = write_codes(tmp_path / "b.parquet", seed=1)
    with pytest.raises(InputError, match=r"the archive has a row 'row0' of another source, .*a.parquet. Give --prefix"):
        import_codes(other, str(tmp_path / "archive"))
    assert import_codes(other, str(tmp_path / "archive"), prefix="b").num_encoded == 5
    assert [row["key"] for row in rows_of(tmp_path / "archive")][:2] == ["b/row0", "b/row1"]


def test_an_empty_table_makes_an_empty_archive(tmp_path):
    path = write_codes(tmp_path / "a.parquet", 0, id=pa.array([], pa.string()))
    import_codes(path, str(tmp_path / "archive"))
    assert Archive.open(tmp_path / "archive").num_rows == 0


def test_a_source_that_needs_a_model_says_so(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(InputError, match=r"has no Parquet file .*; only a table of codes is imported without a model"):
        import_codes(tmp_path / "images", str(tmp_path / "archive"))


def test_encode_without_a_model_imports_codes(cli, tmp_path):
    path = write_codes(tmp_path / "a.parquet", description=False)
    options = ("--codes", "bits=12", "--codes", "order=msb,model=theirs")
    done = json.loads(cli("encode", path, "--archive", tmp_path / "archive", *options, "--json").out)
    assert (done["num_encoded"], done["rows_in_archive"]) == (5, 5)
    assert Archive.open(tmp_path / "archive").model_id == "theirs"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), ["its footer does not describe its codes", "give --codes bits=64"]),
        (("--tile", "64"), ["--tile is for what a model encodes, and no --model is given"]),
        (("--watch",), ["--watch is for what a model encodes"]),
        (("--codes", "bits=12,order=msb,model=m", "--asset", "x"), ["--asset is for what a model encodes"]),
        (("--codes", "bits=12,order=msb,model=m", "--model", "absent"), ["absent", "not a model folder"]),
    ],
)
def test_options_that_do_not_belong_to_codes(refused, tmp_path, options, words):
    path = write_codes(tmp_path / "a.parquet", description=False)
    refused("encode", path, "--archive", tmp_path / "archive", *options, words=words)


def test_codes_of_a_model_folder_are_those_of_that_model(cli, refused, tmp_path, model):
    card, model_id, _ = read_model_folder(model)
    bits = card.bits
    codes = np.zeros((5, -(-bits // 8)), np.uint8)
    path = write_codes(tmp_path / "a.parquet", description=CodeDescription(bits, model_id), code=code_column(codes))
    options = ("--model", model, "--codes", f"bits={bits}")
    assert cli("encode", path, "--archive", tmp_path / "archive", *options).code == 0
    path = write_codes(tmp_path / "b.parquet", description=CodeDescription(bits, "other"), code=code_column(codes))
    refused("encode", path, "--archive", tmp_path / "new", *options, words=["codes of the model other", model_id])
