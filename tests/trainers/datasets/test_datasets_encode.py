"""Labels and captions of items to encode are those that training finds in the same folder."""

import json

import pytest
from test_datasets_layouts import S2, write_folders, write_patch

from orbithash.encoders.errors import InputError
from orbithash.encoders.sources.sources import list_source
from orbithash.trainers.datasets import find_items, make_manifest
from orbithash.trainers.datasets.class_lists import CLASS_LISTS


def labels_for_encode(root, captions=None):
    return {item.key: item.label for item in list_source(root, captions=captions, find_items=find_items)}


def captions_for_encode(root, captions=None):
    found = {item.key: item.caption for item in list_source(root, captions=captions, find_items=find_items)}
    return {key: text for key, text in found.items() if text}


def labels_for_training(root, **options):
    manifest = make_manifest(root, **options)
    return {
        image.path: "; ".join(manifest.classes[label] for label in image.labels) or None for image in manifest.images
    }


def write_captions(path, names, count=5):
    images = [
        {
            "filename": name,
            "imgid": i,
            "sentences": [{"raw": f"{name} {n}", "sentid": count * i + n} for n in range(count)],
        }
        for i, name in enumerate(names)
    ]
    path.write_text(json.dumps({"images": images}))


@pytest.mark.parametrize("inside", ["", "Images", "EuroSAT/2750", "__zip/a/b"])
def test_class_folders(tmp_path, inside):
    write_folders(tmp_path / inside, ["lake", "river"], 6)
    (tmp_path / "__MACOSX").mkdir()
    assert labels_for_encode(tmp_path) == labels_for_training(tmp_path)
    assert set(labels_for_encode(tmp_path).values()) == {"lake", "river"}


def test_images_deeper_in_a_class(tmp_path):
    write_folders(tmp_path, ["lake", "river/2019", "river/2020", "forest"], 6, "{number}.jpg")
    assert labels_for_encode(tmp_path) == labels_for_training(tmp_path)
    assert len(labels_for_training(tmp_path)) == 24


def test_parts_of_a_split_are_refused(tmp_path):
    write_folders(tmp_path, ["train", "test"], 12)
    with pytest.raises(InputError, match="look like the parts of a split"):
        make_manifest(tmp_path)


def test_a_band_per_file_without_labels_is_refused(tmp_path):
    for i in range(6):
        write_patch(tmp_path / "BigEarthNet-S2" / "S2A_T33UUP", f"S2A_T33UUP_{i}", S2)
    for path in tmp_path.rglob("*.json"):
        path.unlink()
    for find in (make_manifest, labels_for_encode):
        with pytest.raises(InputError, match=r"one TIFF per band .* give the folder that holds metadata.parquet and"):
            find(tmp_path / "BigEarthNet-S2")


def test_bigearthnet_is_encoded_by_patches(tmp_path):
    for i in range(6):
        classes = ["Pastures", "Sea and ocean"][: i % 2 + 1]
        write_patch(tmp_path / "two", f"S2A_{i}", S2, labels=classes)
        write_patch(tmp_path / "one", f"S1A_{i}", ("VH", "VV"), labels=classes, corresponding_s2_patch=f"S2A_{i}")
    found = labels_for_encode(tmp_path)
    trained = labels_for_training(tmp_path)
    assert {key: label for key, label in found.items() if key.startswith("two")} == trained
    assert found["one/S1A_1"] == found["two/S2A_1"] == "Pastures; Sea and ocean"
    assert len(found) == 12


def test_pairs(tmp_path):
    for source in ("first", "second"):
        write_folders(tmp_path / source, ["beach", "river"], 6, "{class_}{number}.png")
    found = labels_for_encode(tmp_path)
    assert {key: label for key, label in found.items() if key.startswith("first")} == labels_for_training(tmp_path)
    assert found["second/river/river2.png"] == "river"


def test_captions_of_a_folder_by_bare_names(tmp_path):
    write_folders(tmp_path / "data", ["airport", "beach"], 6)
    images = sorted((tmp_path / "data").rglob("*.jpg"))
    captions = tmp_path / "data" / "captions.json"
    write_captions(captions, [path.name for path in images])
    trained = {image.path: image.captions[0] for image in make_manifest(tmp_path / "data", captions=captions).images}
    assert captions_for_encode(tmp_path / "data") == trained
    assert len(trained) == 12


def test_rsicd_with_its_lists(tmp_path):
    (tmp_path / "RSICD_images").mkdir()
    (tmp_path / "txtclasses_rsicd").mkdir()
    names = [f"{name}_{i}.jpg" for name in ("airport", "park") for i in range(6)]
    for name in names:
        (tmp_path / "RSICD_images" / name).write_text(name)
    for label in ("airport", "park"):
        lines = "\r\n".join(name for name in names if name.startswith(label))
        (tmp_path / "txtclasses_rsicd" / f"{label}.txt").write_text(f"\ufeff{lines}\r\n")
    captions = tmp_path / "dataset_rsicd.json"
    write_captions(captions, names)
    assert labels_for_encode(tmp_path, captions) == labels_for_training(tmp_path, captions=captions)
    assert captions_for_encode(tmp_path, captions)["RSICD_images/park_3.jpg"] == "park_3.jpg 0"


def test_numbered_captions_of_ucm(tmp_path):
    for name in CLASS_LISTS["ucmd"]:
        (tmp_path / "Images" / name).mkdir(parents=True)
        for i in range(100):
            (tmp_path / "Images" / name / f"{name}{i:02d}.tif").write_text(f"{name} {i}")
    captions = tmp_path / "dataset.json"
    write_captions(captions, [f"{i + 1}.tif" for i in range(2100)])
    trained = make_manifest(tmp_path, captions=captions)
    assert captions_for_encode(tmp_path, captions) == {image.path: image.captions[0] for image in trained.images}
    assert captions_for_encode(tmp_path, captions)["Images/airplane/airplane07.tif"] == "108.tif 0"
