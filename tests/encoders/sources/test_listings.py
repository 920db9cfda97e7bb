"""Lists of paths: items, problems, and the files that names refer to."""

import unicodedata

import pytest

from orbithash.encoders.errors import ImageError, InputError
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.imagery.rendering import Rendering
from orbithash.encoders.sources.listings import locate, parse_time
from orbithash.encoders.sources.records import read_record
from orbithash.encoders.sources.sources import list_source, natural


def keys(items):
    return [item.key for item in items]


def test_a_list_of_paths(tmp_path):
    text = "# my images\n\n./sub//b10.tif\n  b9.jpg  \nmissing.jpg\n/abs/olute.png\n../up.tif\nsub/a#1.tif\n"
    (tmp_path / "list.TXT").write_text("\ufeff" + text, "utf-8")
    items = list_source(tmp_path / "list.TXT")
    assert {item.key: item.path for item in items} == {
        "sub/b10.tif": str(tmp_path / "sub/b10.tif"),
        "b9.jpg": str(tmp_path / "b9.jpg"),
        "missing.jpg": str(tmp_path / "missing.jpg"),
        "/abs/olute.png": "/abs/olute.png",
        "../up.tif": str(tmp_path.parent / "up.tif"),
        "sub/a#1.tif": str(tmp_path / "sub/a#1.tif"),
    }
    assert keys(items) == sorted(keys(items), key=natural)


def test_lists_that_are_refused(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("# nothing\n\n")
    with pytest.raises(InputError, match="lists no image"):
        list_source(path)
    path.write_text("a.jpg\n./a.jpg\nb.jpg\nb.jpg\nc.jpg\n")
    with pytest.raises(InputError, match="found 2 problems") as error:
        list_source(path)
    assert "'a.jpg' is there more than once" in str(error.value)
    assert "'c.jpg'" not in str(error.value)
    path.write_text("".join(f"http://x/{i}.jpg\n" for i in range(30)))
    with pytest.raises(
        InputError, match=r"http://x/0.jpg is remote; of remote images only s3:// and gs:// are read"
    ) as error:
        list_source(path)
    assert "and 20 more" in str(error.value)
    path.write_bytes(b"caf\xe9.jpg\n")
    with pytest.raises(InputError, match=r"list.txt is not UTF-8 text"):
        list_source(path)


def test_a_line_that_cannot_be_read_is_refused_alone(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("a.jpg\nhttps://x.org/b.jpg\ns3://bucket/c.jpg\nfile:///abs/d.jpg\n")
    items = {item.key: item for item in list_source(path)}
    assert items["a.jpg"].path == str(tmp_path / "a.jpg")
    assert items["s3://bucket/c.jpg"].path == "s3://bucket/c.jpg"
    assert items["file:///abs/d.jpg"].path == "/abs/d.jpg"
    refused = items["https://x.org/b.jpg"]
    assert refused.path == str(path), "the list: when it changes, the item may have been corrected"
    with pytest.raises(ImageError, match=r"https://x.org/b.jpg is remote; of remote images only s3:// and gs://"):
        read_record(refused, Preprocessing(Rendering(), 224, 224))


@pytest.mark.parametrize("uri", ["s3://key:secret@bucket/a.jpg", "s3://bucket/a.jpg?secret_key=x"])
def test_a_secret_in_a_list_is_refused(tmp_path, uri):
    (tmp_path / "list.txt").write_text(f"{uri}\n")
    with pytest.raises(InputError, match="is given with a secret"):
        list_source(tmp_path / "list.txt")


@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
@pytest.mark.parametrize("in_list", ["NFC", "NFD"])
def test_names_are_found_in_every_unicode_form(tmp_path, on_disk, in_list):
    folder, name = "Île_de_Ré", "São_Tomé.png"
    real = tmp_path / unicodedata.normalize(on_disk, folder) / unicodedata.normalize(in_list, name)
    real.parent.mkdir()
    real.write_bytes(b"")
    listed = f"{unicodedata.normalize(in_list, folder)}/{unicodedata.normalize(on_disk, name)}"
    assert locate(listed, tmp_path) == str(real)
    # A file that comes into the folder later is found too.
    later = real.with_name(unicodedata.normalize(on_disk, "Zürich.png"))
    locate(f"{folder}/Zürich.png", tmp_path)
    later.write_bytes(b"")
    assert locate(unicodedata.normalize(in_list, f"{folder}/Zürich.png"), tmp_path) == str(later)


def test_two_files_that_differ_in_their_unicode_form_alone_stay_two(tmp_path):
    forms = [unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD")]
    for form in forms:
        (tmp_path / form).write_bytes(b"")
    assert [locate(form, tmp_path) for form in forms] == [str(tmp_path / form) for form in forms]


def test_links_may_be_percent_encoded(tmp_path):
    for name in ("a b.tif", "c%20d.tif", "São.tif"):
        (tmp_path / name).write_bytes(b"")
    assert locate("./a%20b.tif", tmp_path) == str(tmp_path / "a b.tif")
    assert locate("c%20d.tif", tmp_path) == str(tmp_path / "c%20d.tif"), "a file of that very name goes first"
    assert locate("Sa%CC%83o.tif".replace("a%CC%83", "%C3%A3"), tmp_path) == str(tmp_path / "São.tif")
    assert locate("Sa%CC%83o.tif", tmp_path) == str(tmp_path / "São.tif")
    assert locate(f"file://{tmp_path}/a%20b.tif", tmp_path) == str(tmp_path / "a b.tif")
    assert locate("missing%20.tif", tmp_path) == str(tmp_path / "missing%20.tif")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2020-06-01T12:00:00Z", "2020-06-01T12:00:00+00:00"),
        ("2020-06-01t12:00:00z", "2020-06-01T12:00:00+00:00"),
        ("2020-06-01T14:00:00+02:00", "2020-06-01T12:00:00+00:00"),
        ("2020-06-01 12:00", "2020-06-01T12:00:00+00:00"),
        (" 2020-06-01 ", "2020-06-01T00:00:00+00:00"),
        ("2020-06-01T12:00:00.123456789Z", "2020-06-01T12:00:00.123456+00:00"),
    ],
)
def test_times_in_text_become_utc(text, expected):
    assert parse_time(text).isoformat() == expected


@pytest.mark.parametrize(
    "text", ["yesterday", "", 2015, None, "1714564800", "1714564800000", "0001-01-01T00:00:00+14:00"]
)
def test_invalid_times_are_refused(text):
    with pytest.raises(ValueError, match="a time such as 2015-05-02T01:31:00Z is needed"):
        parse_time(text)
