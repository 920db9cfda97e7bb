"""Wald's protocol: pixels compared with slow means, pairs that become a manifest, no partial output."""

import numpy as np
import pytest
from PIL import Image

from orbithash.encoders.errors import InputError
from orbithash.encoders.imagery.images import read_image
from orbithash.trainers.datasets import make_manifest
from orbithash.trainers.datasets.wald import count_images, write_wald_pairs


@pytest.fixture
def source(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("beach", "river"):
        (tmp_path / "source" / name).mkdir(parents=True)
        for i in range(5):
            pixels = rng.integers(0, 256, (67, 64 + i, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "source" / name / f"{i}.png")
    return tmp_path / "source"


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_both_sources_against_slow_means(source, tmp_path, factor):
    told = []
    done = write_wald_pairs(source, tmp_path / "out", factor, told.append)
    assert (done.count, done.refused, told) == (10, [], list(range(1, 11)))
    assert count_images(source) == 10
    for path in source.rglob("*.png"):
        whole = read_image(path).astype(float)
        height, width = whole.shape[0] // factor, whole.shape[1] // factor
        first = read_image(tmp_path / "out" / "first" / path.relative_to(source))
        with Image.open(tmp_path / "out" / "second" / path.relative_to(source)) as image:
            assert image.mode == "L"
            second = np.asarray(image)
        assert first.shape == (height, width, 3)
        assert second.shape == (height * factor, width * factor)
        for row in range(height):
            for column in range(width):
                block = whole[row * factor : (row + 1) * factor, column * factor : (column + 1) * factor]
                assert np.abs(first[row, column] - block.mean(axis=(0, 1))).max() <= 0.5001
        assert np.abs(second - whole[: height * factor, : width * factor].mean(axis=2)).max() <= 0.5001


def test_a_manifest_of_the_pairs(source, tmp_path):
    write_wald_pairs(source, tmp_path / "out")
    manifest = make_manifest(tmp_path / "out")
    assert (manifest.dataset, len(manifest.images)) == ("pairs", 10)
    assert all(image.second for image in manifest.images)


def test_pairs_of_images_without_classes(source, tmp_path):
    (tmp_path / "flat").mkdir()
    for path in source.rglob("*.png"):
        path.rename(tmp_path / "flat" / f"{path.parent.name}{path.name}")
    assert count_images(tmp_path / "flat") == 10
    done = write_wald_pairs(tmp_path / "flat", tmp_path / "out")
    assert (done.count, done.refused) == (10, [])
    names = sorted(path.name for path in (tmp_path / "flat").iterdir())
    assert sorted(contents(tmp_path / "out")) == [f"{part}/{name}" for part in ("first", "second") for name in names]
    manifest = make_manifest(tmp_path / "out")
    assert (manifest.dataset, manifest.protocol, manifest.classes) == ("pairs", "mrhash", ())
    assert [(image.path, image.second) for image in manifest.images] == [
        (f"first/{name}", f"second/{name}") for name in names
    ]
    assert len(manifest.part("test")) == 2


def test_the_same_bytes_again_and_an_empty_folder_is_taken(source, tmp_path):
    (tmp_path / "b").mkdir()
    write_wald_pairs(source, tmp_path / "a")
    write_wald_pairs(source, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_images_that_cannot_be_read_are_left_out(source, tmp_path):
    (source / "beach" / "2.png").write_text("no image")
    Image.new("RGB", (63, 90)).save(source / "river" / "small.png")
    done = write_wald_pairs(source, tmp_path / "out")
    assert done.count == 9
    assert [line.split(":")[0] for line in done.refused] == ["beach/2.png", "river/small.png"]
    assert "63 x 90 pixels; at least 64 x 64 for a factor of 4" in done.refused[1]
    names = {name.removeprefix("first/") for name in contents(tmp_path / "out") if name.startswith("first/")}
    assert names == {name for name in contents(source) if name not in ("beach/2.png", "river/small.png")}


def test_no_output_remains_after_an_error(source, tmp_path):
    def fail(done):
        if done == 4:
            raise KeyboardInterrupt

    (tmp_path / "out").mkdir()
    with pytest.raises(KeyboardInterrupt):
        write_wald_pairs(source, tmp_path / "out", on_progress=fail)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    assert not contents(tmp_path / "out")


def test_no_image_that_can_be_read(source, tmp_path):
    for path in source.rglob("*.png"):
        path.write_text("no image")
    with pytest.raises(InputError, match="found 10 problems"):
        write_wald_pairs(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_refused(source, tmp_path):
    for factor in (1, 0, 65):
        with pytest.raises(InputError, match=f"the factor is {factor}; it must lie between 2 and 64"):
            write_wald_pairs(source, tmp_path / "out", factor)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with pytest.raises(InputError, match="full is not an empty folder"):
        write_wald_pairs(source, tmp_path / "full")
    with pytest.raises(InputError, match=r"notes\.txt is not an empty folder"):
        write_wald_pairs(source, tmp_path / "full" / "notes.txt")
    with pytest.raises(InputError, match="lies inside"):
        write_wald_pairs(source, source / "pairs")
    with pytest.raises(InputError, match="absent does not exist"):
        write_wald_pairs(tmp_path / "absent", tmp_path / "out")
    with pytest.raises(InputError, match=r"1\.png is not a folder"):
        write_wald_pairs(source / "beach" / "1.png", tmp_path / "out")
    (source / "beach" / "2.jpg").write_bytes((source / "beach" / "2.png").read_bytes())
    with pytest.raises(InputError, match=r"beach/2\.png and beach/2\.jpg differ only in case or ending"):
        write_wald_pairs(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
