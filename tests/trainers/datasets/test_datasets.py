"""Manifests: the same split every time, each image in one part, and all problems of a folder in one error."""

import shutil
from collections import Counter

import pytest

from orbithash.encoders.errors import InputError
from orbithash.trainers.datasets import DATASETS, PROTOCOLS, Image, make_manifest, resplit
from orbithash.trainers.datasets.class_lists import CLASS_LISTS

# Protocols that draw the parts of any dataset.
DRAWN = [name for name, rule in PROTOCOLS.items() if rule.split is not None]


def write_images(root, counts):
    """Write files of distinct content, named `class7.png`: their order by name is not that by number."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"{name}{i}.png").write_text(f"{name} {i}")
    return root


@pytest.fixture
def root(tmp_path):
    return write_images(tmp_path / "data", {"beach": 20, "river": 15, "forest": 5})


def splits_of(manifest, label):
    return Counter(image.split for image in manifest.images if image.label == label)


def numbers_of(manifest, name, split):
    return sorted(
        int(image.path.removeprefix(f"{name}/{name}").removesuffix(".png"))
        for image in manifest.part(split)
        if image.path.startswith(f"{name}/")
    )


@pytest.mark.parametrize("protocol", DRAWN)
def test_every_image_is_in_one_part(root, protocol):
    manifest = make_manifest(root, protocol=protocol)
    assert (manifest.dataset, manifest.protocol, manifest.classes) == ("folder", protocol, ("beach", "forest", "river"))
    files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.png"))
    assert sorted(image.path for image in manifest.images) == files
    parts = {"train", "validation", "test", *PROTOCOLS[protocol].database}
    assert {image.split for image in manifest.images} == parts
    assert sorted(manifest.part(*parts), key=[*manifest.images].index) == list(manifest.images)
    for image in manifest.images:
        assert manifest.classes[image.label] == image.path.split("/")[0]
        assert image.id == image.path
    assert PROTOCOLS[protocol].leave_one_out == ("test" in PROTOCOLS[protocol].database)


@pytest.mark.parametrize(
    ("protocol", "expected"),
    [
        # 80 % training, a tenth of which is held out; at least one.
        ("dhcl", {"beach": (14, 2, 4), "forest": (3, 1, 1), "river": (11, 1, 3)}),
        # A fifth is test, a tenth is validation; at least one each.
        ("random", {"beach": (14, 2, 4), "forest": (3, 1, 1), "river": (10, 2, 3)}),
        ("cdne", {"beach": (14, 2, 4), "forest": (3, 1, 1), "river": (10, 2, 3)}),
        # 60 % training, a tenth of which is held out.
        ("mhcln", {"beach": (11, 1, 8), "forest": (2, 1, 2), "river": (8, 1, 6)}),
        # A fifth is test.
        ("mrhash", {"beach": (14, 2, 4), "forest": (3, 1, 1), "river": (11, 1, 3)}),
    ],
)
def test_the_shares_of_each_class(root, protocol, expected):
    manifest = make_manifest(root, protocol=protocol)
    for label, name in enumerate(manifest.classes):
        counts = splits_of(manifest, label)
        assert (counts["train"], counts["validation"], counts["test"]) == expected[name], name


def test_dhcl_takes_the_last_files_by_number(root):
    manifest = make_manifest(root, protocol="dhcl")
    assert numbers_of(manifest, "beach", "test") == [16, 17, 18, 19]
    assert numbers_of(manifest, "river", "test") == [12, 13, 14]


def test_random_does_not_split_by_number(root):
    manifest = make_manifest(root, protocol="random")
    assert numbers_of(manifest, "beach", "test") != [16, 17, 18, 19]


@pytest.mark.parametrize("protocol", DRAWN)
def test_a_manifest_is_the_same_wherever_the_files_lie(root, tmp_path, monkeypatch, protocol):
    before = make_manifest(root, protocol=protocol)
    moved = root.rename(tmp_path / "elsewhere")
    assert make_manifest(moved, protocol=protocol) == before
    assert make_manifest(moved, protocol=protocol).sha256 == before.sha256
    (tmp_path / "link").symlink_to(moved)
    assert make_manifest(tmp_path / "link", protocol=protocol) == before
    monkeypatch.chdir(tmp_path)
    relative = moved.relative_to(tmp_path)
    assert make_manifest(relative, protocol=protocol) == before
    monkeypatch.chdir(moved)
    assert make_manifest(type(root)("."), protocol=protocol) == before


@pytest.mark.parametrize("protocol", [name for name, rule in PROTOCOLS.items() if rule.by_class])
def test_another_class_does_not_move_this_ones_split(root, protocol):
    before = make_manifest(root, protocol=protocol)
    write_images(root, {"airplane": 9})
    after = make_manifest(root, protocol=protocol)
    assert after.classes == ("airplane", "beach", "forest", "river")
    kept = {image.path: image.split for image in after.images if image.label > 0}
    assert kept == {image.path: image.split for image in before.images}


def test_the_hash_is_of_contents_names_and_split(root):
    before = make_manifest(root)
    assert len(before.sha256) == 64
    (root / "beach" / "beach3.png").write_text("changed")
    assert make_manifest(root).sha256 != before.sha256
    (root / "beach" / "beach3.png").write_text("beach 3")
    assert make_manifest(root).sha256 == before.sha256
    assert make_manifest(root, protocol="dhcl").sha256 != before.sha256


def test_the_label_is_the_first_or_none():
    assert Image("x", "x", (3, 5), "train", "").label == 3
    assert Image("x", "x", (), "train", "").label == -1


# The files behind a manifest.


def test_changed_and_missing_files_are_found(root):
    manifest = make_manifest(root)
    manifest.check_files(root)
    (root / "beach" / "beach3.png").write_text("beach 4")
    (root / "river" / "river0.png").unlink()
    with pytest.raises(InputError) as caught:
        manifest.check_files(root)
    assert "found 2 problems" in str(caught.value)
    assert "beach/beach3.png: another file than at the time of the split" in str(caught.value)
    assert "river/river0.png: absent" in str(caught.value)


def test_a_long_list_of_missing_files_is_cut(root):
    manifest = make_manifest(root)
    shutil.rmtree(root)
    with pytest.raises(InputError) as caught:
        manifest.check_files(root)
    assert str(caught.value).count("absent") == 10
    assert str(caught.value).endswith("and 30 more")


# Folders that cannot be split.


def test_all_problems_of_a_folder_at_once(tmp_path):
    root = write_images(tmp_path / "data", {"beach": 4, "river": 1, "Forest": 7, "forest": 7})
    with pytest.raises(InputError) as caught:
        make_manifest(root, dataset="ucmd")
    message = str(caught.value)
    assert "found 4 problems" in message
    assert "class 'beach' has 4 images; at least 5 are needed" in message
    assert "class 'river' has 1 image; at least 5 are needed" in message
    assert "classes that differ only in case: 'forest'" in message
    assert "these are not the 21 classes of ucmd" in message


def test_one_class_is_not_enough(tmp_path):
    root = write_images(tmp_path / "data", {"beach": 4})
    with pytest.raises(InputError, match=r"(?s)'beach' has 4 images.*only the class 'beach'; at least 2"):
        make_manifest(root)


@pytest.mark.parametrize("validation", [0, 0.1, 0.5])
@pytest.mark.parametrize("protocol", DRAWN)
def test_five_images_a_class_are_enough(tmp_path, protocol, validation):
    root = write_images(tmp_path / "data", {"a": 5, "b": 5})
    manifest = make_manifest(root, protocol=protocol, validation=validation)
    assert manifest.validation == validation
    assert manifest.part("train")
    assert manifest.part("test")
    assert bool(manifest.part("validation")) == (validation > 0)
    assert manifest.part(*PROTOCOLS[protocol].database)


def test_nine_images_in_all_are_too_few_for_duch(tmp_path):
    root = write_images(tmp_path / "data", {"a": 5, "b": 4})
    with pytest.raises(InputError, match="only 9 images; protocol duch needs at least 10"):
        make_manifest(root, protocol="duch")


def test_settings_out_of_range(root):
    with pytest.raises(InputError, match="the seed of the split is -1; it must be 0 or more"):
        make_manifest(root, seed=-1)
    for share in (-0.1, 0.6, float("nan")):
        with pytest.raises(InputError, match=r"it must lie between 0 \(none\) and 0\.5"):
            make_manifest(root, validation=share)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="absent does not exist"):
        make_manifest(tmp_path / "absent")


def test_unknown_names_list_the_known_ones(root):
    with pytest.raises(InputError, match="'ucm'; there are ucmd, aid, nwpu-resisc45, eurosat, eurosat-ms, dsrsid"):
        make_manifest(root, dataset="ucm")
    with pytest.raises(InputError, match="'dhlc'; there are dhcl, dhcl-released, mhcln, cdne, duch, mrhash, random"):
        make_manifest(root, protocol="dhlc")
    assert {dataset.protocol for dataset in DATASETS.values()} <= set(PROTOCOLS)


def test_scenes_without_their_last_file_are_not_complete(root):
    with pytest.raises(InputError, match=r"no scenes\.json"):
        make_manifest(root, dataset="scenes")


# Images without classes.


@pytest.fixture
def flat(tmp_path):
    (tmp_path / "flat").mkdir()
    for i in range(20):
        (tmp_path / "flat" / f"{i}.png").write_text(f"{i}")
    return tmp_path / "flat"


@pytest.mark.parametrize("protocol", DRAWN)
def test_images_side_by_side_have_no_class_and_are_split_as_a_whole(flat, protocol):
    manifest = make_manifest(flat, protocol=protocol)
    assert (manifest.dataset, manifest.classes) == ("folder", ())
    assert [image.path for image in manifest.images] == [f"{i}.png" for i in range(20)]
    assert {image.labels for image in manifest.images} == {()}
    assert {image.split for image in manifest.images} == {"train", "validation", "test", *PROTOCOLS[protocol].database}
    assert resplit(manifest, "random") == make_manifest(flat, protocol="random")


def test_side_by_side_in_a_folder_named_images(flat):
    flat.rename(flat.parent / "Images")
    manifest = make_manifest(flat.parent)
    assert (manifest.classes, manifest.images[3].path) == ((), "Images/3.png")


def test_images_in_no_layout_are_refused(flat):
    """They are not treated as images without classes, which would omit some."""
    for name in ("a", "b"):
        (flat / name / "inner").mkdir(parents=True)
        (flat / name / "inner" / "20.png").write_text("20")
    with pytest.raises(InputError, match="holds 22 images but no class folders"):
        make_manifest(flat)


def test_few_images_side_by_side(flat):
    for i in range(4, 20):
        (flat / f"{i}.png").unlink()
    with pytest.raises(InputError, match="only 4 images; protocol random needs at least 5"):
        make_manifest(flat)


@pytest.mark.parametrize("dataset", ["ucmd", "eurosat", "eurosat-ms"])
def test_images_side_by_side_are_no_dataset_of_classes(flat, dataset):
    with pytest.raises(InputError, match=r"these are not the \d+ classes of (ucmd|eurosat) \(absent: "):
        make_manifest(flat, dataset)


# Known datasets.


def test_another_protocol_splits_the_same_images(root):
    manifest = make_manifest(root, protocol="random", seed=3)
    for protocol in DRAWN:
        assert resplit(manifest, protocol) == make_manifest(root, protocol=protocol, seed=3)
    assert resplit(manifest, "mhcln", 4, 0) == make_manifest(root, protocol="mhcln", seed=4, validation=0)
    assert resplit(manifest, "mhcln", 4, 0).sha256 == resplit(manifest, "mhcln", 4, 0.0).sha256
    with pytest.raises(InputError, match="unknown protocol 'nope'"):
        resplit(manifest, "nope")


def test_ucmd_is_recognised_by_its_classes(tmp_path):
    root = write_images(tmp_path / "Images", dict.fromkeys(CLASS_LISTS["ucmd"], 5))
    assert (make_manifest(tmp_path).dataset, make_manifest(root).protocol) == ("ucmd", "dhcl")
    shutil.rmtree(root / "river")
    assert make_manifest(tmp_path).dataset == "folder"


def test_the_real_ucmd_is_split_as_in_the_paper(shared):
    manifest = make_manifest(shared / "data" / "ucmd")
    assert (manifest.dataset, manifest.protocol, len(manifest.classes)) == ("ucmd", "dhcl", 21)
    assert [len(manifest.part(split)) for split in ("train", "validation", "test")] == [1512, 168, 420]
    for image in manifest.images:
        file_number = int(image.path.removesuffix(".jpg")[-2:])
        assert (image.split == "test") == (file_number >= 80)
    for label in range(21):
        assert splits_of(manifest, label) == {"train": 72, "validation": 8, "test": 20}
