"""Tables of codes made elsewhere: their description, bit orders, and codes that do not fit it."""

import json

import numpy as np
import pyarrow as pa
import pytest
import shapely

from orbithash.encoders.errors import InputError
from orbithash.encoders.places.code_description import FOOTER_KEY, CodeDescription
from orbithash.encoders.sources.codes.code_tables import CodeTable
from orbithash.encoders.sources.sources import list_source
from orbithash.encoders.vectors import VectorSpec
from tests.encoders.sources.codes.code_files import BITS, MODEL, code_column, codes_of, write_codes
from tests.encoders.sources.stac.stac_files import catalog, feature, write


def only(table):
    (rows,) = [rows for chunk in table.chunks() for rows in table.read(chunk)]
    return rows


def test_a_described_table_needs_no_options(tmp_path):
    table = CodeTable.open(write_codes(tmp_path / "a.parquet", label=["a", None, "b", None, "c"]))
    assert (table.description, table.vector, table.check()) == (CodeDescription(BITS, MODEL), None, 5)
    rows = only(table)
    assert rows.keys.to_pylist() == [f"row{n}" for n in range(5)]
    assert (rows.codes == codes_of(5)).all()
    assert rows.columns["label"].to_pylist() == ["a", None, "b", None, "c"]


@pytest.mark.parametrize(
    "column",
    [
        lambda codes: code_column(codes),
        lambda codes: pa.array(codes.tolist(), pa.list_(pa.uint8())),
        lambda codes: pa.array([row.tobytes() for row in codes], pa.binary()),
        lambda codes: pa.array([row.tobytes() for row in codes], pa.binary(2)),
        lambda codes: pa.array([row.tobytes() for row in codes], pa.large_binary()),
    ],
)
def test_codes_are_read_from_every_type_of_bytes(tmp_path, column):
    path = write_codes(tmp_path / "a.parquet", description=False, code=None, hashes=column(codes_of(5)))
    rows = only(CodeTable.open(path, ["column=hashes,bits=12", "order=msb,model=theirs"]))
    assert (rows.codes == codes_of(5)).all()


def test_the_other_bit_order_is_turned_around(tmp_path):
    bits = np.random.default_rng(1).integers(0, 2, (5, BITS), np.uint8)
    other = np.packbits(bits, axis=1, bitorder="little")
    path = write_codes(tmp_path / "a.parquet", description=False, code=code_column(other))
    table = CodeTable.open(path, ["bits=12,order=lsb,model=theirs"])
    assert table.check() == 5
    assert (only(table).codes == np.packbits(bits, axis=1)).all()
    with pytest.raises(InputError, match="ends in 4 pad bits, which must be zero; one is set; bits or order"):
        CodeTable.open(path, ["bits=12,order=msb,model=theirs"]).check()


def test_stored_vectors_need_their_scale(tmp_path):
    vectors = pa.array([[1, -128, 127], None, [0, 0, 0], [1, 2, 3], [4, 5, 6]], pa.list_(pa.int8(), 3))
    described = CodeDescription(BITS, MODEL, vector_dims=3, vector_scale=0.25)
    table = CodeTable.open(write_codes(tmp_path / "a.parquet", description=described, vector=vectors))
    assert table.vector == VectorSpec(3, 0.25)
    assert only(table).columns["vector"].equals(vectors)
    path = write_codes(tmp_path / "b.parquet", description=False, vector=vectors)
    assert CodeTable.open(path, ["bits=12,order=msb,model=m"]).vector is None
    assert CodeTable.open(path, ["bits=12,order=msb,model=m,scale=0.5"]).vector == VectorSpec(3, 0.5)
    path = write_codes(tmp_path / "c.parquet", description=described)
    with pytest.raises(InputError, match="described as having vectors of 3 dimensions, and there is no column vector"):
        CodeTable.open(path)


def test_rows_without_a_code_or_with_another_vector_have_a_problem(tmp_path):
    codes = pa.array([[1, 16], None, [3, 0], [4, 0], [5, 0]], pa.list_(pa.uint8(), 2))
    vectors = pa.array([[1, 2], [1, 2], [1], None, [1, 2]], pa.list_(pa.int8()))
    described = CodeDescription(BITS, MODEL, vector_dims=2, vector_scale=1.0)
    rows = only(CodeTable.open(write_codes(tmp_path / "a.parquet", description=described, code=codes, vector=vectors)))
    assert rows.problems == {1: "its code is null", 2: "its vector has 1 dimensions; 2 are described"}
    assert rows.codes[1].tolist() == [0, 0]


def test_footprints_are_kept_byte_for_byte(tmp_path):
    box = shapely.box(4, 50, 5, 51)
    clockwise = shapely.reverse(box).wkb
    geo = {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": {"encoding": "WKB"}}}
    columns = {
        "lon": [4.5, 4.5, None, 180.0, -0.0],
        "lat": [50.5, 50.5, None, 0.0, 1.0],
        "geometry": pa.array([clockwise, shapely.Point(4.5, 50.5).wkb, clockwise, None, box.wkb], pa.binary()),
        "has_footprint": [True, False, True, False, True],
        "footprint": pa.array([None, None, None, None, b"not WKB"], pa.binary()),
    }
    path = write_codes(tmp_path / "a.parquet", metadata={"geo": json.dumps(geo)}, **columns)
    found = only(CodeTable.open(path)).columns
    assert found["footprint"].to_pylist() == [clockwise, None, clockwise, None, b"not WKB"]
    assert found["lon"].to_pylist() == [4.5, 4.5, None, 180.0, 0.0]
    # A file of another program: the rules of GeoParquet.
    del columns["has_footprint"], columns["footprint"]
    path = write_codes(tmp_path / "b.parquet", metadata={"geo": json.dumps(geo)}, **columns)
    found = only(CodeTable.open(path)).columns
    assert shapely.from_wkb(found["footprint"][0].as_py()).exterior.is_ccw
    assert found["lon"][2].as_py() == 4.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], r"its footer does not describe its codes .*, and bits, order, model of the codes is not stated: give"),
        (["bits=12"], "and order, model of the codes is not stated"),
        (["bits=16,order=msb,model=m,scale=1"], "a scale is stated, and there is no column vector"),
        (["bits=4,order=msb,model=m"], "bits is 4; an integer from 8 to 512"),
        (["bits=x"], "code option bits=x: a number of bits is needed"),
        (["order=big"], "code option order=big: msb or lsb is allowed"),
        (["size=3"], "code option 'size=3': NAME=VALUE is needed, where NAME is bits, order, model, scale, column"),
        (["bits=8,bits=9"], "code option bits is given twice"),
        (["column=hash,bits=12,order=msb,model=m"], "there is no column hash of codes; the columns are id, code"),
    ],
)
def test_options_that_do_not_describe_the_codes(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        CodeTable.open(write_codes(tmp_path / "a.parquet", description=False), options)


def test_footprints_that_no_program_can_read_refuse_their_row(tmp_path):
    nested = b"\x01\x07\x00\x00\x00\x01\x00\x00\x00" * 1000 + shapely.Point(1, 2).wkb
    path = write_codes(tmp_path / "a.parquet", footprint=pa.array([nested, None, b"", None, None], pa.binary()))
    assert only(CodeTable.open(path)).problems == {0: "its footprint has collections that are nested too deeply"}


def test_options_that_contradict_the_footer(tmp_path):
    path = write_codes(tmp_path / "a.parquet")
    assert CodeTable.open(path, ["bits=12,order=msb"]).num_rows == 5
    for option, found in (("bits=16", "bits 12"), ("order=lsb", "order msb-first"), ("model=x", f"model {MODEL}")):
        with pytest.raises(InputError, match=f"its footer states {found} of its codes, the option states"):
            CodeTable.open(path, [option])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"code": pa.array([[1]] * 5, pa.list_(pa.uint8(), 1))},
            "the code of row 0 has 1 bytes; as described it has 2",
        ),
        ({"code": pa.array([b"ab", None, b"a", b"a", b"a"])}, "the code of row 2 has 1 bytes"),
        ({"code": pa.array([1] * 5)}, "its codes are of type int64; lists of uint8 and binary are allowed"),
        ({"code": pa.array([[1, None]] * 5, pa.list_(pa.uint8()))}, "a byte of a code is null"),
        ({"id": ["a", "b", "a", "c", "d"]}, "1 ids occur more than once"),
    ],
)
def test_a_table_that_does_not_fit_is_refused_as_a_whole(tmp_path, columns, message):
    with pytest.raises(InputError, match=message):
        CodeTable.open(write_codes(tmp_path / "a.parquet", **columns)).check()


def test_a_folder_is_one_table_of_one_description(tmp_path):
    for number in range(3):
        write_codes(tmp_path / f"t/part-{number}.parquet", id=[f"{number}-{row}" for row in range(5)])
    assert CodeTable.open(tmp_path / "t").check() == 15
    write_codes(tmp_path / "t/part-3.parquet", description=CodeDescription(BITS, "other"))
    with pytest.raises(InputError, match="are not parts of one table: they differ in what their codes are"):
        CodeTable.open(tmp_path / "t")


def test_an_empty_table_is_a_table(tmp_path):
    table = CodeTable.open(write_codes(tmp_path / "a.parquet", 0, id=pa.array([], pa.string())))
    assert (table.check(), list(table.chunks())) == (0, [])


def test_a_damaged_description_is_named_with_its_file(tmp_path):
    path = write_codes(tmp_path / "a.parquet", description=False, metadata={FOOTER_KEY: "{"})
    with pytest.raises(InputError, match=rf"{path}: the description of the codes is not JSON"):
        CodeTable.open(path)


def test_images_of_exported_rows_are_listed_by_their_ids(tmp_path):
    """For another model, which encodes the images again."""
    path = write_codes(tmp_path / "a.parquet", 2, uri=["x.tif#0,0,64,64", "y.tif"], label=["a", None])
    first, second = list_source(path)
    assert (first.key, first.path, first.window, first.label) == ("row0", str(tmp_path / "x.tif"), (0, 0, 64, 64), "a")
    assert (second.key, second.path, second.window) == ("row1", str(tmp_path / "y.tif"), None)


def test_files_that_a_stac_collection_names_are_one_table(tmp_path):
    for number in range(2):
        write_codes(tmp_path / f"data/{number}.parquet", id=[f"{number}-{row}" for row in range(5)])
        assets = {"embeddings": {"href": f"../data/{number}.parquet"}, "preview": {"href": "a.png"}}
        write(tmp_path / f"items/{number}.json", feature(str(number), assets))
    root = write(tmp_path / "collection.json", catalog("c", ("item", "items/0.json"), ("item", "items/1.json")))
    assert CodeTable.open(root).check() == 10
    assert CodeTable.open(tmp_path / "items/1.json").check() == 5
    write(tmp_path / "items/1.json", feature("1", {"embeddings": {"href": "https://example.org/a.parquet"}}))
    with pytest.raises(InputError, match=r"1.json names https://example.org/a.parquet, which is remote: copy it"):
        CodeTable.open(root)
    with pytest.raises(InputError, match="has no item with a Parquet file of codes"):
        CodeTable.open(write(tmp_path / "x.json", feature("x")))
