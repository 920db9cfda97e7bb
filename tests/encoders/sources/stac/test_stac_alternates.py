"""Assets with several addresses: a file of this machine before an object of an object store, never http."""

import pytest

from orbithash.encoders.sources.sources import list_source
from tests.encoders.sources.stac.stac_files import feature, write

HTTP, S3 = "https://example.org/v.tif", "s3://bucket/v.tif"


def read(tmp_path, **assets):
    (item,) = list_source(
        write(
            tmp_path / "item.json",
            {
                "type": "FeatureCollection",
                "features": [
                    feature("a", {key.replace("_", "-"): asset for key, asset in assets.items()}),
                    feature("other"),
                ],
            },
        )
    )[:1]
    return item


def asset(href, *alternates, **fields):
    named = {f"place{number}": {"href": other} for number, other in enumerate(alternates)}
    return {"href": href, "type": "image/tiff", "roles": ["visual"], "alternate": named, **fields}


@pytest.mark.parametrize(
    ("hrefs", "expected"),
    [
        ((HTTP, S3), S3),
        ((HTTP, S3, "here.tif"), "here.tif"),
        ((S3, HTTP, "here.tif"), "here.tif"),
        (("here.tif", S3), "here.tif"),
        (("absent.tif", S3), S3),
        ((HTTP, "absent.tif"), "absent.tif"),
        (("absent.tif", "here.tif"), "here.tif"),
        ((HTTP, "s3://key:secret@bucket/v.tif", S3), S3),
    ],
)
def test_the_nearest_address_is_read(tmp_path, hrefs, expected):
    (tmp_path / "here.tif").touch()
    item = read(tmp_path, visual=asset(*hrefs))
    assert item.path == (expected if "://" in expected else str(tmp_path / expected))


def test_an_asset_with_http_addresses_only_is_refused_with_its_own(tmp_path):
    item = read(tmp_path, visual=asset(HTTP, "https://mirror.example.org/v.tif"))
    assert item.problem.startswith(f"{HTTP} is remote; of remote images only s3:// and gs://")


def test_an_alternate_of_another_format_is_passed_over(tmp_path):
    zarr = {"zarr": {"href": "v.zarr", "type": "application/vnd+zarr"}, "bad": 1, "none": {"href": None}}
    item = read(tmp_path, visual={**asset(S3), "alternate": zarr})
    assert item.path == S3
    item = read(
        tmp_path,
        visual={
            "href": "v.zarr",
            "type": "application/vnd+zarr",
            "alternate": {"tif": {"href": "v.tif", "type": "image/tiff"}},
        },
    )
    assert item.path == str(tmp_path / "v.tif")


def test_the_nearest_address_does_not_change_which_asset_is_read(tmp_path):
    (tmp_path / "t.tif").touch()
    item = read(tmp_path, thumbnail=asset("t.tif", roles=["thumbnail"]), visual=asset(HTTP, S3))
    assert item.path == S3
