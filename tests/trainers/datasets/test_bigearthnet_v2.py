"""BigEarthNet version 2: a small dataset in its layout is found, split as stated, encoded, and its faults are named."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio
from test_datasets_encode import labels_for_encode, labels_for_training
from test_datasets_layouts import problems_of

from orbithash.encoders.errors import InputError
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.imagery.rendering import Rendering
from orbithash.encoders.sources.records import read_record
from orbithash.encoders.sources.sources import list_source
from orbithash.trainers.datasets import PROTOCOLS, find_items, make_manifest, resplit
from orbithash.trainers.datasets.bigearthnet import BANDS
from orbithash.trainers.datasets.bigearthnet_v2 import CLASSES
from orbithash.trainers.datasets.protocols import split_images

TILE = "S2A_MSIL2A_20170613T101031_N9999_R022_T33UUP"
SCENE = "S1A_IW_GRDH_1SDV_20170613T165043"
NAMES = [f"{TILE}_{i}_57" for i in range(6)]
SPLITS = ("train", "train", "validation", "test", "train", "test")
SIDES = {"B02": 24, "B03": 24, "B04": 24, "B08": 24, "B01": 4, "B09": 4}


def write_band(path, side, seed):
    """Write a band of 120 m x 120 m in UTM zone 33."""
    path.parent.mkdir(parents=True, exist_ok=True)
    transform = rasterio.Affine(120 / side, 0, 300000, 0, -120 / side, 5900040)
    values = np.random.default_rng(seed).integers(100, 3000, (1, side, side), dtype=np.uint16)
    options = {"driver": "GTiff", "count": 1, "dtype": "uint16", "crs": "EPSG:32633", "transform": transform}
    with rasterio.open(path, "w", height=side, width=side, **options) as file:
        file.write(values)


def write_table(root, **columns):
    count = len(SPLITS)
    given = {
        "patch_id": NAMES,
        "labels": [[CLASSES[4], CLASSES[18]][: i % 2 + 1][::-1] for i in range(count)],
        "split": list(SPLITS),
        "country": ["Austria"] * count,
        "s1_name": [f"{SCENE}_33UUP_{i}_57" for i in range(count)],
        "s2v1_name": [f"S2A_MSIL2A_20170613T101031_{i}_57" for i in range(count)],
        "contains_seasonal_snow": [False] * count,
        "contains_cloud_or_shadow": [False] * count,
        **columns,
    }
    pq.write_table(
        pa.table({name: values for name, values in given.items() if values is not None}), root / "metadata.parquet"
    )


@pytest.fixture
def root(tmp_path):
    for i in range(len(SPLITS)):
        for number, band in enumerate(BANDS["S2"]):
            name = f"{TILE}_{i}_57"
            path = tmp_path / "BigEarthNet-S2" / TILE / name / f"{name}_{band}.tif"
            write_band(path, SIDES.get(band, 12), 100 * i + number)
        for number, band in enumerate(BANDS["S1"]):
            name = f"{SCENE}_33UUP_{i}_57"
            write_band(tmp_path / "BigEarthNet-S1" / SCENE / name / f"{name}_{band}.tif", 24, 100 * i + 50 + number)
    (tmp_path / "Reference_Maps").mkdir()
    write_table(tmp_path)
    return tmp_path


def test_patches_are_split_as_the_table_states(root):
    manifest = make_manifest(root)
    assert (manifest.dataset, manifest.protocol) == ("bigearthnet-v2", "official")
    assert manifest.classes == ("Pastures", "Marine waters")
    assert [image.path for image in manifest.images] == [f"BigEarthNet-S2/{TILE}/{TILE}_{i}_57" for i in range(6)]
    assert tuple(image.split for image in manifest.images) == SPLITS
    assert [image.labels for image in manifest.images] == [(0,), (0, 1)] * 3
    assert manifest.images[3].second == f"BigEarthNet-S1/{SCENE}/{SCENE}_33UUP_3_57"
    manifest.check_files(root)
    # The seed and the share of validation images change nothing.
    other = make_manifest(root, seed=5, validation=0.5)
    assert other.images == manifest.images
    drawn = make_manifest(root, protocol="random")
    assert tuple(image.split for image in drawn.images) != SPLITS
    assert resplit(manifest, "random") == drawn
    assert resplit(manifest, "official") == manifest
    with pytest.raises(
        InputError, match=r"protocol official is the split that a dataset states, .* were split by random"
    ):
        resplit(drawn, "official")


def test_duplicates_follow_the_first_of_them():
    stated = ["train", "test", "test", "validation"]
    parts = split_images(PROTOCOLS["official"], "bigearthnet-v2", [""] * 4, list("abaa"), 0, 0.1, stated)
    assert parts == ["train", "test", "train", "train"]


def test_patches_that_are_not_in_the_table_are_left_out(root):
    table = pq.read_table(root / "metadata.parquet")
    pq.write_table(table.slice(1), root / "metadata.parquet")
    assert len(make_manifest(root).images) == 5
    shutil.rmtree(root / "BigEarthNet-S1")
    pq.write_table(table.drop_columns(["s1_name"]), root / "metadata.parquet")
    assert {image.second for image in make_manifest(root).images} == {None}


def test_labels_and_places_of_encoded_patches_are_those_of_training(root):
    found = labels_for_encode(root)
    assert {key: label for key, label in found.items() if "-S2/" in key} == labels_for_training(root)
    assert len(found) == 12
    assert found[f"BigEarthNet-S1/{SCENE}/{SCENE}_33UUP_1_57"] == "Pastures; Marine waters"
    item = next(item for item in list_source(root, find_items=find_items) if "-S2/" in item.key)
    record = read_record(item, Preprocessing(Rendering(), 16, 16))
    assert record.lon == pytest.approx(12.0, abs=1)
    assert record.lat == pytest.approx(53.2, abs=1)


def test_real_patches_in_the_layout_of_version_2(shared, tmp_path):
    """The patches of version 1 differ from those of version 2 in their names and in their processing only."""
    sample = shared / "data" / "bigearthnet_sample"
    seconds = {}
    for patch in sample.glob("BigEarthNet-S1-Example/*"):
        described = json.loads((patch / f"{patch.name}_labels_metadata.json").read_text())
        seconds[described["corresponding_s2_patch"]] = patch
    names = sorted(seconds)
    for kind, patches, depth in (
        ("S2", [sample / "BigEarthNet-S2-Example" / name for name in names], 2),
        ("S1", [seconds[name] for name in names], 3),
    ):
        for patch in patches:
            folder = tmp_path / f"BigEarthNet-{kind}" / patch.name.rsplit("_", depth)[0]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / patch.name).symlink_to(patch)
    write_table(tmp_path, patch_id=names, s1_name=[seconds[name].name for name in names])
    manifest = make_manifest(tmp_path)
    assert sorted(image.id.rpartition("/")[2] for image in manifest.images) == names
    assert all(image.second.endswith(seconds[image.id.rpartition("/")[2]].name) for image in manifest.images)
    preprocessing = Preprocessing(Rendering(), 120, 120)
    for item in list_source(tmp_path, find_items=find_items):
        if "-S2/" in item.key:
            assert read_record(item, preprocessing).lat > 30
    assert sum(1 for _ in list_source(tmp_path, find_items=find_items)) == 12


def test_missing_patches_are_counted_with_the_first(root):
    for i in (2, 4):
        shutil.rmtree(root / "BigEarthNet-S2" / TILE / f"{TILE}_{i}_57")
    (root / "BigEarthNet-S1" / SCENE / f"{SCENE}_33UUP_5_57" / f"{SCENE}_33UUP_5_57_VV.tif").unlink()
    message = problems_of(root)
    assert (
        "2 of the 6 Sentinel-2 patches that metadata.parquet names are missing or lack bands (first: "
        f"BigEarthNet-S2/{TILE}/{TILE}_2_57); complete the download, or remove their rows"
    ) in message
    assert "1 of the 6 Sentinel-1 patches that metadata.parquet names are missing" in message
    assert f"lack bands (first: BigEarthNet-S1/{SCENE}/{SCENE}_33UUP_5_57)" in message
    assert len(labels_for_encode(root)) == 6


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"labels": None, "split": None}, "no column labels, split; the table of BigEarthNet version 2"),
        ({"s1_name": None}, "no column s1_name"),
        ({"labels": ["Pastures"] * 6}, r"column labels \(string\): labels must be lists of text, the others text"),
        ({"patch_id": list(range(6))}, r"column patch_id \(int64\)"),
        ({"split": ["train", "val", None, "test", "test", "test"]}, r"2 values of split are not .* \(first: 'val'\)"),
        ({"labels": [["Pastures"]] * 4 + [[], None]}, rf"2 patches have no labels \(first: {TILE}_4_57\)"),
        ({"labels": [["Pastures", "Sea and ocean"]] * 6}, r"1 labels are not of the 19 classes \(first: 'Sea and"),
        ({"patch_id": ["../../etc/a_b_c", *NAMES[1:]]}, "1 values of patch_id are not names of"),
        ({"patch_id": [None, "a_b", *NAMES[2:]]}, "2 values of patch_id are not names of"),
        ({"s1_name": [f"{SCENE}_33UUP_1_57"] * 6}, "1 values of s1_name are repeated"),
        ({"split": ["train"] * 6}, "states no images for test, which protocol official needs; give another --protocol"),
    ],
)
def test_faults_of_the_table_are_named(root, columns, message):
    write_table(root, **columns)
    with pytest.raises(InputError, match=message):
        make_manifest(root)


def test_a_damaged_table_is_refused(root):
    (root / "metadata.parquet").write_bytes(b"PAR1")
    for find in (make_manifest, labels_for_encode):
        with pytest.raises(InputError, match=r"metadata\.parquet: not a readable Parquet file"):
            find(root)
    pq.write_table(pa.table({name: pa.array([], kind) for name, kind in {
        "patch_id": pa.string(), "labels": pa.list_(pa.string()), "split": pa.string(), "s1_name": pa.string(),
    }.items()}), root / "metadata.parquet")  # fmt: skip
    with pytest.raises(InputError, match="it has no rows"):
        make_manifest(root)


def test_other_datasets_state_no_split(tmp_path):
    for name in ("beach", "river"):
        (tmp_path / name).mkdir()
        for i in range(5):
            (tmp_path / name / f"{i}.png").write_text(f"{name} {i}")
    with pytest.raises(
        InputError, match="the dataset folder states no images for test and train, which protocol official"
    ):
        make_manifest(tmp_path, protocol="official")
