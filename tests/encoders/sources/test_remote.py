"""Object stores: listing, reading, and errors."""

from io import BytesIO

import numpy as np
import pytest
from object_store import ENVIRONMENT, no_permission, s3_client, s3_server
from PIL import Image

from orbithash.encoders.errors import ImageError, InputError
from orbithash.encoders.imagery.images import Limits, Rendering
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.sources import remote
from orbithash.encoders.sources.records import read_record
from orbithash.encoders.sources.remote import read_object
from orbithash.encoders.sources.sources import Item, count_source, iter_source, list_source

PREPROCESSING = Preprocessing(Rendering(), resize=32, crop=32)


@pytest.fixture(scope="module")
def endpoint():
    with s3_server() as address:
        yield address


@pytest.fixture(scope="module")
def store(endpoint):
    """Create the bucket `tiles` and return a client."""
    client = s3_client(endpoint, "tiles")
    buffer = BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)).save(buffer, "PNG")
    client.png = buffer.getvalue()
    for key in ("in/river/a2.png", "in/river/a10.png", "in/my beach/b#1?.png", "in/top.png", "in/.hidden/c.png"):
        client.put_object(Bucket="tiles", Key=key, Body=client.png)
    client.put_object(Bucket="tiles", Key="in/notes.txt", Body=b"no image")
    client.put_object(Bucket="tiles", Key="in/river/broken.png", Body=b"broken")
    client.put_object(Bucket="tiles", Key="empty/notes.txt", Body=b"no image")
    return client


@pytest.fixture
def s3(store, endpoint, monkeypatch):
    """Return a function from a path to its URI; the environment has credentials."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    return lambda path: f"s3://{path}?endpoint_override={endpoint}&scheme=http"


def test_a_prefix_is_a_source(s3, store, tmp_path):
    source = s3("tiles/in")
    items = list_source(source)
    assert {item.key: item.label for item in items} == {
        "river/a2.png": "river",
        "river/a10.png": "river",
        "river/broken.png": "river",
        "my beach/b#1?.png": "my beach",
        "top.png": None,
    }
    assert count_source(source) == 5
    (tmp_path / "a.png").write_bytes(store.png)
    local = read_record(Item("a.png", str(tmp_path / "a.png")), PREPROCESSING)
    for item in items:
        if item.key == "river/broken.png":
            with pytest.raises(ImageError, match="not a JPEG, PNG"):
                read_record(item, PREPROCESSING)
        else:
            record = read_record(item, PREPROCESSING)
            assert np.array_equal(record.pixels, local.pixels), item.key
            assert record.uri == item.path
            assert record.uri.startswith("s3://tiles/in/")
    assert [item.key for item in iter_source(s3("tiles/in/top.png"))] == ["top.png"]


def test_layouts_of_a_prefix_are_those_of_a_folder(s3, store):
    for key in (
        "zip/a/2750/River/1.png",
        "zip/a/2750/Lake/2024/2.png",
        "zip/a/2750/Lake/1.png",
        "zip/__MACOSX/._1.png",
    ):
        store.put_object(Bucket="tiles", Key=key, Body=store.png)
    assert {item.key: item.label for item in list_source(s3("tiles/zip"))} == {
        "a/2750/River/1.png": "River",
        "a/2750/Lake/1.png": "Lake",
        "a/2750/Lake/2024/2.png": "Lake",
    }
    for part in ("train", "test"):
        store.put_object(Bucket="tiles", Key=f"split/{part}/1.png", Body=store.png)
    assert {item.label for item in list_source(s3("tiles/split"))} == {None}
    for band in ("B02", "B03"):
        store.put_object(Bucket="tiles", Key=f"patches/S2A_1/S2A_1_{band}.tif", Body=b"")
    with pytest.raises(InputError, match=r"s3://tiles/patches.* holds patches of one TIFF per band"):
        list_source(s3("tiles/patches"))


def test_versions_of_objects_change_with_their_content(s3, store):
    def version():
        store.put_object(Bucket="tiles", Key="changing/1.png", Body=content)
        (item,) = list_source(s3("tiles/changing"))
        return item.version

    content = b"one"
    before = version()
    content = b"three"
    assert version() != before


@pytest.mark.parametrize("known", [True, False], ids=["a user who may not", "nobody the store knows"])
def test_a_bucket_without_permission(s3, endpoint, monkeypatch, known):
    image = list_source(s3("tiles/in/river"))[0].path
    with no_permission(endpoint) as credentials:
        for name, value in credentials.items() if known else ():
            monkeypatch.setenv(name, value)
        # A file system keeps the credentials it was created with.
        remote._system.cache_clear()
        with pytest.raises(
            InputError, match=r"cannot be listed: .*(Access Denied|ACCESS_DENIED|INVALID_ACCESS_KEY)"
        ) as one:
            list_source(s3("tiles/in"))
        # The image is not refused, because it may be sound.
        with pytest.raises(InputError, match=r"cannot be read: .*; run the command again to resume") as other:
            read_object(image, Limits())
    remote._system.cache_clear()
    assert not isinstance(other.value, ImageError)
    assert "\n" not in f"{one.value}{other.value}"
    assert len(read_object(image, Limits())) > 100


def test_the_endpoint_of_the_environment(s3, endpoint, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{endpoint}")
    items = list_source("s3://tiles/in/river")
    assert [item.path for item in items] == [f"s3://tiles/in/river/{name}.png" for name in ("a2", "a10", "broken")]
    assert len(read_object(items[0].path, Limits())) > 100


def test_an_object_that_is_too_long_is_not_read(s3, store):
    with pytest.raises(ImageError, match=r"more than 10 bytes"):
        read_object(s3("tiles/in/top.png"), Limits(max_bytes=10))
    with pytest.raises(ImageError, match="no such object"):
        read_object(s3("tiles/in/gone.png"), Limits())


def test_stores_that_cannot_be_listed(s3):
    for path, words in {
        "nowhere/in": "nowhere",
        "tiles/gone": "does not exist, or nothing is there",
        "tiles/empty": "lists no image",
    }.items():
        with pytest.raises(InputError, match=words) as error:
            list_source(s3(path))
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="only scenes in folders of this machine are cut"):
        list_source(s3("tiles/in"), 64)


@pytest.mark.slow
def test_a_store_that_does_not_answer(monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="cannot be listed") as error:
        list_source("s3://tiles/in?endpoint_override=127.0.0.1:1&scheme=http")
    assert "\n" not in str(error.value)
    # The image is not refused, because it may be sound.
    with pytest.raises(InputError, match="cannot be read") as error:
        read_object("s3://tiles/in/a.png?endpoint_override=127.0.0.1:1&scheme=http", Limits())
    assert not isinstance(error.value, ImageError)


def test_uris_with_secrets_are_refused():
    for source in ("s3://key:secret@tiles/in", "s3://tiles/in?access_key=key&secret_key=secret"):
        with pytest.raises(InputError, match="set it in the environment") as error:
            list_source(source)
        assert "secret@" not in str(error.value)
        assert "=secret" not in str(error.value)


def test_references_inside_files_are_not_followed(s3, store, endpoint):
    """A VRT refers to other files and addresses; it is not read as an image, whatever its name."""
    vrt = f"""<VRTDataset rasterXSize="40" rasterYSize="40"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>
        <SourceFilename>/vsicurl/http://{endpoint}/tiles/in/top.png</SourceFilename></SimpleSource></VRTRasterBand>
        </VRTDataset>"""
    store.put_object(Bucket="tiles", Key="vrt/a.tif", Body=vrt.encode())
    (item,) = list_source(s3("tiles/vrt"))
    with pytest.raises(ImageError, match="not a JPEG, PNG"):
        read_record(item, PREPROCESSING)
