"""Folders without classes, for methods that need no labels."""

import json
import logging

import pytest

from orbithash.encoders.errors import InputError
from orbithash.trainers.datasets import make_manifest


def write(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


def numbered(folder, count=6):
    return [f"{folder}tile{i}.png" for i in range(count)]


LAYOUTS = {
    "flat": numbered(""),
    "one subfolder": numbered("tiles/"),
    "dates": [*numbered("2024/01/03/", 4), *numbered("2024/02/07/", 3), *numbered("2025/01/01/", 2)],
    "parts of a split": [*numbered("train/"), *numbered("test/")],
    "images beside folders": [*numbered(""), *numbered("more/", 3)],
    "small folders": [*numbered("a/", 2), *numbered("b/", 6)],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_in_any_folders_have_no_label(tmp_path, layout, caplog):
    root = write(tmp_path / "data", *LAYOUTS[layout])
    with caplog.at_level(logging.WARNING):
        manifest = make_manifest(root, needs_classes=False)
    assert (manifest.dataset, manifest.classes) == ("folder", ())
    assert sorted(image.path for image in manifest.images) == sorted(LAYOUTS[layout])
    assert all(image.labels == () for image in manifest.images)
    assert manifest.part("train")
    assert manifest.sha256 == make_manifest(root, needs_classes=False).sha256
    # Alone in one folder, images have no class in any case.
    assert ("used without labels" in caplog.text) == (layout != "flat")
    if layout != "flat":
        with pytest.raises(InputError):
            make_manifest(root)


def test_folders_that_are_classes_stay_labels(tmp_path):
    root = write(tmp_path / "data", *numbered("beach/"), *numbered("river/"))
    assert make_manifest(root, needs_classes=False) == make_manifest(root)


def test_sentences_of_images_without_classes(tmp_path):
    root = write(tmp_path / "data", *LAYOUTS["dates"])
    images = [
        {"filename": name, "imgid": i, "sentids": [i], "sentences": [{"raw": f"scene {i}", "sentid": i, "imgid": i}]}
        for i, name in enumerate(LAYOUTS["dates"])
    ]
    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps({"images": images}))
    manifest = make_manifest(root, captions=captions, needs_classes=False)
    assert {image.path: image.captions for image in manifest.images} == {
        name: (f"scene {i}",) for i, name in enumerate(LAYOUTS["dates"])
    }


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["notes.txt"], "holds no image"),
        (numbered("tiles/", 4), "only 4 images; protocol random needs at least 5"),
        (["patch/patch_B02.tif", "patch/patch_B03.tif"], "patches of one TIFF per band"),
    ],
)
def test_folders_of_no_use_are_refused(tmp_path, names, message):
    root = write(tmp_path / "data", *names)
    with pytest.raises(InputError, match=message):
        make_manifest(root, needs_classes=False)


def test_another_dataset_keeps_its_own_errors(tmp_path):
    root = write(tmp_path / "data", *numbered("tiles/"))
    with pytest.raises(InputError, match="these are not the 21 classes of ucmd"):
        make_manifest(root, dataset="ucmd", needs_classes=False)
