"""Every layout: small folders like the real ones, how they are recognised, and the problems of others."""

import json
import shutil

import numpy as np
import pytest
import rasterio

from orbithash.encoders.errors import InputError
from orbithash.trainers.datasets import DATASETS, make_manifest
from orbithash.trainers.datasets.class_lists import CLASS_LISTS, DSRSID_CLASSES
from orbithash.trainers.scenes import write_scenes

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


def write_folders(base, classes, count=5, name="{class_}_{number}.jpg"):
    for class_ in classes:
        (base / class_).mkdir(parents=True)
        for number in range(1, count + 1):
            file = base / class_ / name.format(class_=class_, lower=class_.lower(), number=number)
            file.write_text(f"{base.name} {class_} {number}")
    return base


def write_tiff(path, bands):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(list(str(path).encode())).integers(0, 9000, (bands, 2, 2), np.uint16)
    with rasterio.open(path, "w", driver="GTiff", width=2, height=2, count=bands, dtype="uint16") as image:
        image.write(pixels)


def problems_of(*args, **kwargs):
    with pytest.raises(InputError) as caught:
        make_manifest(*args, **kwargs)
    return str(caught.value)


# One folder per class.


@pytest.mark.parametrize(
    ("dataset", "inside", "name", "protocol"),
    [
        ("ucmd", "UCMerced_LandUse/Images", "{class_}{number:02d}.tif", "dhcl"),
        ("ucmd", "", "{class_}{number:02d}.jpg", "dhcl"),
        ("aid", "AID", "{lower}_{number}.jpg", "dhcl"),
        ("nwpu-resisc45", "NWPU-RESISC45", "{class_}_{number:03d}.jpg", "cdne"),
        ("eurosat", "2750", "{class_}_{number}.jpg", "cdne"),
        ("eurosat", "EuroSAT/2750", "{class_}_{number}.jpg", "cdne"),
        ("eurosat", "", "{class_}_{number}.jpg", "cdne"),
    ],
)
def test_a_dataset_known_by_its_classes(tmp_path, dataset, inside, name, protocol):
    root = tmp_path / "data"
    write_folders(root / inside, CLASS_LISTS[dataset], name=name)
    manifest = make_manifest(root)
    assert (manifest.dataset, manifest.protocol) == (dataset, protocol)
    assert list(manifest.classes) == CLASS_LISTS[dataset]
    assert manifest == make_manifest(root, dataset)
    assert len(manifest.images) == 5 * len(CLASS_LISTS[dataset])
    assert all(f"/{manifest.classes[image.label]}/" in f"/{image.path}" for image in manifest.images)
    manifest.check_files(root)
    (class_, *_) = CLASS_LISTS[dataset]
    (root / inside / class_).rename(root / inside / "another")
    assert make_manifest(root).dataset == "folder"
    message = problems_of(root, dataset)
    assert f"these are not the {len(CLASS_LISTS[dataset])} classes of {dataset}" in message
    assert f"absent: {class_}; unknown: another" in message


def test_aid_is_split_at_the_half_by_number(tmp_path):
    write_folders(tmp_path, CLASS_LISTS["aid"], 12, "{lower}_{number}.jpg")
    for image in make_manifest(tmp_path).images:
        number = int(image.path.removesuffix(".jpg").rpartition("_")[2])
        assert (image.split == "test") == (number > 6)


def test_eurosat_of_thirteen_bands(tmp_path):
    for class_ in CLASS_LISTS["eurosat"]:
        for number in range(1, 6):
            write_tiff(tmp_path / "tif" / class_ / f"{class_}_{number}.tif", 13)
    manifest = make_manifest(tmp_path)
    assert (manifest.dataset, manifest.protocol) == ("eurosat-ms", "mrhash")
    assert "its images have 13 bands; that set is eurosat-ms" in problems_of(tmp_path, "eurosat")
    write_tiff(tmp_path / "tif" / "River" / "River_1.tif", 3)
    (tmp_path / "tif" / "Forest" / "Forest_1.tif").write_text("no TIFF")
    message = problems_of(tmp_path, "eurosat-ms")
    assert "found 2 problems" in message
    assert "tif/River/River_1.tif has 3 bands" in message
    assert "tif/Forest/Forest_1.tif is not a readable TIFF" in message


def test_a_folder_of_one_class_is_not_gone_into(tmp_path):
    write_folders(tmp_path / "Images", ["beach"])
    assert "only the class 'beach'" in problems_of(tmp_path)


# Two sources.


@pytest.fixture
def pairs(tmp_path):
    write_folders(tmp_path / "first", ["beach", "river"], 6, "{class_}{number}.png")
    write_folders(tmp_path / "second", ["beach", "river"], 6, "{class_}{number}.png")
    return tmp_path


def test_pairs(pairs):
    manifest = make_manifest(pairs)
    assert (manifest.dataset, manifest.protocol, manifest.classes) == ("pairs", "mrhash", ("beach", "river"))
    assert len(manifest.images) == 12
    for image in manifest.images:
        assert image.second == image.path.replace("first", "second", 1)
    manifest.check_files(pairs)


def test_second_sources_that_are_other_files_by_now(pairs):
    manifest = make_manifest(pairs)
    second = pairs / "second" / "river"
    (second / "river3.png").unlink()
    (second / "river1.png").rename(second / "swap.png")
    (second / "river2.png").rename(second / "river1.png")
    (second / "swap.png").rename(second / "river2.png")
    with pytest.raises(InputError) as caught:
        manifest.check_files(pairs)
    message = str(caught.value)
    assert "found 3 problems" in message
    assert "second/river/river3.png: absent, the second source of first/river/river3.png" in message
    for i in (1, 2):
        words = f"second/river/river{i}.png: another file than at the time of the split, the second source of first/ri"
        assert words in message
    (second / "river3.png").write_text("second river 3")
    # The images of the first source have not changed.
    assert make_manifest(pairs).sha256 != manifest.sha256


def test_files_that_cannot_be_read_are_all_named(pairs):
    for name in ("first/beach/beach1.png", "second/river/river2.png"):
        (pairs / name).unlink()
        (pairs / name).symlink_to("nowhere")
    message = problems_of(pairs)
    assert "found 2 problems" in message
    assert "first/beach/beach1.png cannot be read (No such file or directory)" in message
    assert "second/river/river2.png cannot be read (No such file or directory)" in message


def test_pairs_of_other_endings(pairs):
    """For example EuroSAT's .tif with pictures of the same places as .jpg."""
    for path in (pairs / "second").rglob("*.png"):
        path.rename(path.with_suffix(".jpg"))
    for image in make_manifest(pairs).images:
        assert image.second == image.path.replace("first", "second", 1).replace(".png", ".jpg")
    for name in ("first/beach/beach3.tif", "second/river/river2.tif"):
        (pairs / name).write_text("which?")
    message = problems_of(pairs)
    assert "found 2 problems" in message
    assert "first/beach/beach3.png and first/beach/beach3.tif differ only in their ending" in message
    assert "second/river/river2.jpg and second/river/river2.tif differ only in their ending" in message


def test_pairs_of_two_folders_elsewhere(pairs, tmp_path_factory):
    expected = make_manifest(pairs)
    linked = tmp_path_factory.mktemp("linked")
    for name in ("first", "second"):
        (linked / name).symlink_to(pairs / name)
    assert make_manifest(linked) == expected
    expected.check_files(linked)


@pytest.fixture
def flat_pairs(tmp_path):
    for source in ("first", "second"):
        (tmp_path / source).mkdir()
        for i in range(12):
            (tmp_path / source / f"{i}.png").write_text(f"{source} {i}")
    return tmp_path


def test_pairs_without_classes(flat_pairs):
    manifest = make_manifest(flat_pairs)
    assert (manifest.dataset, manifest.protocol, manifest.classes) == ("pairs", "mrhash", ())
    assert [(image.path, image.second) for image in manifest.images] == [
        (f"first/{i}.png", f"second/{i}.png") for i in range(12)
    ]
    assert {image.labels for image in manifest.images} == {()}
    (flat_pairs / "first" / "3.png").unlink()
    (flat_pairs / "second" / "5.png").unlink()
    message = problems_of(flat_pairs)
    assert "found 2 problems" in message
    assert "second/3.png is not the second source of an image" in message
    assert "first/5.png has no second source second/5.png" in message
    # Beside a third folder of images, they are classes.
    write_folders(flat_pairs, ["third"])
    assert make_manifest(flat_pairs).classes == ("first", "second", "third")


def test_only_one_source_has_classes(flat_pairs):
    write_folders(flat_pairs / "first", ["beach", "river"], 6, "{number}.png")
    for path in (flat_pairs / "first").glob("*.png"):
        path.unlink()
    assert "first/beach/1.png: its second source has no class" in problems_of(flat_pairs, "pairs")


def test_all_problems_of_pairs_at_once(pairs):
    (pairs / "second" / "beach" / "beach1.png").unlink()
    (pairs / "second" / "beach" / "beach2.png").rename(pairs / "second" / "river" / "beach2.png")
    (pairs / "second" / "river" / "lone.png").write_text("")
    for number in (1, 2):
        (pairs / "first" / "river" / f"river{number}.png").unlink()
    message = problems_of(pairs)
    assert "class 'river' has 4 images; at least 5 are needed" in message
    assert "first/beach/beach1.png has no second source second/beach/beach1.png" in message
    assert "first/beach/beach2.png: its second source has the class river" in message
    assert "second/river/lone.png is not the second source of an image" in message
    assert "second/river/river1.png is not the second source of an image" in message
    assert "found 6 problems" in message


def test_a_long_list_is_cut_for_each_kind_of_problem(tmp_path):
    write_folders(tmp_path / "first", ["beach", "river"], 10)
    write_folders(tmp_path / "second", ["lake", "sea"], 15, "x{class_}{number}.jpg")
    message = problems_of(tmp_path, "pairs")
    assert message.count("has no second source") == message.count("is not the second source of an image") == 10
    assert "and 10 more" in message
    assert "and 20 more" in message


def test_classes_named_first_and_second_are_no_pairs(tmp_path):
    write_folders(tmp_path, ["first", "second"])
    assert make_manifest(tmp_path).dataset == "folder"


def test_scenes_have_captions_and_a_second_source(tmp_path):
    root = tmp_path / "scenes"
    write_scenes(root, 90, size_px=64)
    manifest = make_manifest(root)
    assert (manifest.dataset, manifest.protocol, len(manifest.images)) == ("scenes", "random", 90)
    told = {one["filename"]: one["sentences"] for one in json.loads((root / "captions.json").read_text())["images"]}
    for image in manifest.images:
        assert image.second == image.path.replace("images/", "second/", 1)
        assert list(image.captions) == [sentence["raw"] for sentence in told[image.path]]
    manifest.check_files(root)
    assert "scenes takes no file of captions" in problems_of(root, captions=root / "captions.json")
    (root / "captions.json").write_text("{")
    (root / manifest.images[0].second).unlink()
    message = problems_of(root)
    assert "found 2 problems" in message
    assert "captions.json is damaged, or not JSON" in message
    assert f"{manifest.images[0].path} has no second source" in message


@pytest.fixture
def dsrsid(tmp_path):
    lines = []
    for row in range(40):
        name = f"{row % 8}_{row}.tif"
        for source in ("multispectral", "panchromatic"):
            (tmp_path / source).mkdir(exist_ok=True)
            (tmp_path / source / name).write_text(f"{source} {row}")
        columns = ["0"] * 8
        columns[row % 8] = "1"
        lines.append(f"data/DSRSID/multispectral/{name} {' '.join(columns)}\n")
    (tmp_path / "train.txt").write_text("".join(lines[:30]))
    (tmp_path / "test.txt").write_text("".join(lines[30:]))
    (tmp_path / "database.txt").write_text("".join(lines[:30]))
    return tmp_path


def test_dsrsid(dsrsid):
    manifest = make_manifest(dsrsid)
    assert (manifest.dataset, manifest.protocol, manifest.classes) == ("dsrsid", "mrhash", DSRSID_CLASSES)
    assert len(manifest.images) == 40
    for image in manifest.images:
        name = image.path.removeprefix("multispectral/")
        assert image.label == int(name[0])
        assert image.second == f"panchromatic/{name}"


def test_all_problems_of_dsrsid_at_once(dsrsid):
    (dsrsid / "multispectral" / "0_0.tif").unlink()
    (dsrsid / "panchromatic" / "1_1.tif").unlink()
    with (dsrsid / "test.txt").open("a") as file:
        file.write(
            "multispectral/2_2.tif 1 0 0 0 0 0 0 0\nmultispectral/3_3.tif 1 0 0\nmultispectral/../../x 1" + " 0" * 7
        )
    message = problems_of(dsrsid)
    assert "found 5 problems" in message
    assert "multispectral/0_0.tif is listed and missing" in message
    assert "multispectral/1_1.tif has no second source panchromatic/1_1.tif" in message
    assert "multispectral/2_2.tif is listed as forest and as aquafarm" in message
    assert "test.txt, line 12: not a path and eight numbers with a single 1" in message
    assert "leads out of the folder" in message
    for name in ("train.txt", "test.txt", "database.txt"):
        (dsrsid / name).unlink()
    assert "has none of the lists" in problems_of(dsrsid, "dsrsid")


# BigEarthNet.


def test_the_real_bigearthnet_patches(shared):
    root = shared / "data" / "bigearthnet_sample"
    manifest = make_manifest(root)
    assert (manifest.dataset, manifest.protocol, len(manifest.images)) == ("bigearthnet", "random", 6)
    manifest.check_files(root)
    for image in manifest.images:
        assert (root / image.path).is_dir()
        described = json.loads((root / image.path / f"{image.id.rpartition('/')[2]}_labels_metadata.json").read_text())
        assert {manifest.classes[label] for label in image.labels} == set(described["labels"])
        second = root / image.second
        named = json.loads((second / f"{second.name}_labels_metadata.json").read_text())
        assert named["corresponding_s2_patch"] == image.path.rpartition("/")[2]
    assert {len(image.labels) for image in manifest.images} == {1, 2, 3, 4, 5}


S2 = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")


def write_patch(root, name, bands, **described):
    (root / name).mkdir(parents=True)
    for band in bands:
        (root / name / f"{name}_{band}.tif").write_text(f"{name} {band}")
    (root / name / f"{name}_labels_metadata.json").write_text(json.dumps(described))


@pytest.fixture
def patches(tmp_path):
    for i in range(6):
        labels = ["Pastures", "Sea and ocean"][: i % 2 + 1]
        write_patch(tmp_path / "two", f"S2A_{i}", S2, labels=labels)
        write_patch(tmp_path / "one", f"S1A_{i}", ("VH", "VV"), labels=labels[::-1], corresponding_s2_patch=f"S2A_{i}")
    return tmp_path


def test_patches(patches):
    manifest = make_manifest(patches)
    assert manifest.classes == ("Pastures", "Sea and ocean")
    assert [image.path for image in manifest.images] == [f"two/S2A_{i}" for i in range(6)]
    assert [image.labels for image in manifest.images] == [(0,), (0, 1)] * 3
    assert [image.second for image in manifest.images] == [f"one/S1A_{i}" for i in range(6)]
    shutil.rmtree(patches / "one")
    assert {image.second for image in make_manifest(patches).images} == {None}
    (patches / "two" / "S2A_3" / "S2A_3_B04.tif").write_text("another")
    with pytest.raises(InputError, match="S2A_3: another file than at the time of the split") as caught:
        manifest.check_files(patches)
    assert "one/S1A_5: absent, the second source of two/S2A_5" in str(caught.value)


def test_all_problems_of_patches_at_once(patches):
    (patches / "two" / "S2A_0" / "S2A_0_B8A.tif").unlink()
    (patches / "two" / "S2A_1" / "S2A_1_labels_metadata.json").write_text("{")
    (patches / "two" / "S2A_2" / "S2A_2_labels_metadata.json").write_text('{"labels": ["Peatbogs"]}')
    shutil.rmtree(patches / "one" / "S1A_3")
    write_patch(patches / "one", "S1A_x", ("VH", "VV"), labels=["Pastures"], corresponding_s2_patch="S2A_4")
    write_patch(patches / "two", "S2A_6", S2, labels=[])
    message = problems_of(patches)
    assert "found 7 problems" in message
    assert "S2A_0 has no band B8A" in message
    assert "S2A_1_labels_metadata.json is damaged, or not JSON" in message
    assert "S2A_6_labels_metadata.json has no labels" in message
    assert "S1A_1 names the Sentinel-2 patch S2A_1, which is missing" in message
    assert "S2A_2 and its second source S1A_2 have different labels" in message
    assert "S2A_4 has two second sources, S1A_4 and S1A_x" in message
    assert "S2A_3 has no second source" in message


def test_too_few_patches(patches):
    for i in (0, 1):
        shutil.rmtree(patches / "two" / f"S2A_{i}")
        shutil.rmtree(patches / "one" / f"S1A_{i}")
    assert "only 4 images; protocol random needs at least 5" in problems_of(patches)


@pytest.mark.parametrize("dataset", [name for name, one in DATASETS.items() if one.captions != "always"])
def test_a_wrong_folder_is_refused_for_every_dataset(tmp_path, dataset):
    assert problems_of(tmp_path / "absent", dataset).endswith("absent does not exist")
    (tmp_path / "file").write_text("")
    assert problems_of(tmp_path / "file", dataset).endswith("file is not a folder")
    (tmp_path / "empty").mkdir()
    assert "empty" in problems_of(tmp_path / "empty", dataset)
