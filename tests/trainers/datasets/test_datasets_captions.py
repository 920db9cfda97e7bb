"""Sentences about images: UCM-captions, RSICD, any folder, and damaged files."""

import json

import pytest

from orbithash.encoders.errors import InputError
from orbithash.trainers.datasets import make_manifest
from orbithash.trainers.datasets.class_lists import CLASS_LISTS

UCMD = CLASS_LISTS["ucmd"]


def caption(number, filename, **changes):
    sentences = [
        {"raw": f"{filename} says {j} .", "imgid": number, "sentid": 5 * number + j, "tokens": ["x"]} for j in range(5)
    ]
    ids = [sentence["sentid"] for sentence in sentences]
    return {"filename": filename, "imgid": number, "sentids": ids, "split": "train", "sentences": sentences} | changes


def write(path, images):
    path.write_text(json.dumps({"dataset": "x", "images": images}))
    return path


def problems_of(*args, **kwargs):
    with pytest.raises(InputError) as caught:
        make_manifest(*args, **kwargs)
    return str(caught.value)


# UCM-captions.


@pytest.mark.parametrize("given", [None, "ucmd", "ucm-captions"])
def test_numbered_captions_of_class_folders(tmp_path, given):
    images = []
    for label, name in enumerate(UCMD):
        (tmp_path / "Images" / name).mkdir(parents=True)
        for i in range(5):
            (tmp_path / "Images" / name / f"{name}{i:02d}.jpg").write_text(f"{name} {i}")
            images.append(caption(len(images), f"{100 * label + i + 1}.tif"))
    # The order of the file does not matter.
    file = write(tmp_path / "ucm.json", images[::-1])
    manifest = make_manifest(tmp_path, given, captions=file)
    assert (manifest.dataset, manifest.protocol, len(manifest.images)) == ("ucm-captions", "duch", 105)
    found = {image.path: image for image in manifest.images}
    assert found["Images/airplane/airplane03.jpg"].captions == tuple(f"104.tif says {j} ." for j in range(5))
    assert make_manifest(tmp_path).dataset == "ucmd"


@pytest.mark.parametrize("inside", ["", "imgs"])
def test_numbered_captions_of_numbered_images(tmp_path, inside):
    (tmp_path / inside).mkdir(exist_ok=True)
    numbers = [1, 2, 3, 100, 101, 102, 200, 201, 2099, 2100]
    for number in numbers:
        (tmp_path / inside / f"{number}.tif").write_text(f"{number}")
    file = write(tmp_path / "ucm.json", [caption(number - 1, f"{number}.tif") for number in numbers])
    manifest = make_manifest(tmp_path, captions=file)
    assert (manifest.dataset, list(manifest.classes)) == ("ucm-captions", UCMD)
    labels = [0, 0, 0, 0, 1, 1, 1, 2, 20, 20]
    assert [(int(image.path.removeprefix("imgs/")[:-4]), image.label) for image in manifest.images] == list(
        zip(numbers, labels, strict=True)
    )
    (tmp_path / inside / "0.tif").write_text("")
    (tmp_path / inside / "2101.tif").write_text("")
    message = problems_of(tmp_path, captions=file)
    assert "0.tif is not the name of an image of this dataset" in message
    assert "2101.tif is not the name of an image of this dataset" in message


def test_the_real_ucm_captions(shared):
    data = shared / "data"
    manifest = make_manifest(data / "ucmd", captions=data / "ucm_captions.json")
    assert (manifest.dataset, manifest.protocol, len(manifest.images)) == ("ucm-captions", "duch", 2100)
    parts = ("train", "validation", "test", "database")
    assert [len(manifest.part(part)) for part in parts] == [945, 105, 210, 840]
    told = {one["filename"]: one["sentences"] for one in json.loads((data / "ucm_captions.json").read_text())["images"]}
    found = {image.path: image for image in manifest.images}
    assert found["Images/airplane/airplane00.jpg"].captions == tuple(one["raw"] for one in told["101.tif"])
    assert found["Images/tenniscourt/tenniscourt99.jpg"].captions == tuple(one["raw"] for one in told["2100.tif"])
    # The only pair of equal files.
    assert found["Images/airplane/airplane01.jpg"].split == found["Images/airplane/airplane02.jpg"].split


# RSICD.


@pytest.fixture
def rsicd(tmp_path):
    lists = {"airport": 6, "beach": 5}
    images = []
    (tmp_path / "RSICD_images").mkdir()
    (tmp_path / "txtclasses_rsicd").mkdir()
    for name, count in lists.items():
        names = [f"{name}_{i}.jpg" for i in range(1, count + 1)]
        (tmp_path / "txtclasses_rsicd" / f"{name}.txt").write_text("\r\n".join(names) + "\r\n\n")
        images += names
    images += ["00001.jpg", "00002.jpg"]
    for name in images:
        (tmp_path / "RSICD_images" / name).write_text(name)
    write(tmp_path / "dataset_rsicd.json", [caption(i, name) for i, name in enumerate(images)])
    return tmp_path


def test_rsicd_takes_classes_from_its_lists(rsicd, tmp_path_factory):
    file = rsicd / "dataset_rsicd.json"
    manifest = make_manifest(rsicd, captions=file)
    assert (manifest.dataset, manifest.protocol, manifest.classes) == ("rsicd", "duch", ("airport", "beach"))
    labels = {image.path.removeprefix("RSICD_images/"): image.labels for image in manifest.images}
    assert (labels["airport_6.jpg"], labels["beach_1.jpg"], labels["00002.jpg"]) == ((0,), (1,), ())
    assert make_manifest(rsicd / "RSICD_images", captions=file).classes == ("airport", "beach")
    # Two images without a class do not prevent a split by class.
    assert len(make_manifest(rsicd, protocol="random", captions=file).part("test")) == 2


@pytest.mark.parametrize("with_lists", [False, True])
def test_rsicd_in_aids_folders(tmp_path, caplog, with_lists):
    images = []
    for name in CLASS_LISTS["aid"]:
        (tmp_path / name).mkdir()
        for i in range(1, 6):
            images.append(f"{name.lower()}_{i}.jpg")
            (tmp_path / name / images[-1]).write_text(images[-1])
    # Images of RSICD that are not in AID.
    numbered = [f"{i:05d}.jpg" for i in range(1, 31)]
    all_images = [caption(i, name) for i, name in enumerate(images + numbered)]
    file = write(tmp_path / "rsicd.json", all_images)
    if with_lists:
        (tmp_path / "txtclasses_rsicd").mkdir()
        (tmp_path / "txtclasses_rsicd" / "playfields.txt").write_text("00001.jpg\n00002.jpg\n")
    manifest = make_manifest(tmp_path, captions=file)
    assert (manifest.dataset, list(manifest.classes)) == ("rsicd", CLASS_LISTS["aid"])
    assert [image.path.rpartition("/")[2] for image in manifest.images] == images
    for image in manifest.images:
        assert image.path.startswith(f"{manifest.classes[image.label]}/")
        assert image.captions[0] == f"{image.path.rpartition('/')[2]} says 0 ."
    assert [record.getMessage() for record in caplog.records] == [
        f"{file}: left out the captions of 30 images that are missing"
    ]
    # All images of one class and a few of another have no captions.
    caplog.clear()
    write(file, [image for image in all_images if image["filename"] not in [*images[:5], *images[10:12]]])
    manifest = make_manifest(tmp_path, captions=file, protocol="duch")
    assert list(manifest.classes) == [name for name in CLASS_LISTS["aid"] if name != "Airport"]
    assert [image.path.rpartition("/")[2] for image in manifest.images] == [*images[5:10], *images[12:]]
    assert f"{file}: left out 7 of 150 images, which have no captions" in caplog.messages
    write(file, all_images[:75] + all_images[150:])
    assert len(make_manifest(tmp_path, captions=file, protocol="duch").images) == 75
    write(file, all_images[:74] + all_images[150:])
    words = "only 74 of the 150 images have captions in rsicd.json (not "
    assert words in problems_of(tmp_path, captions=file, protocol="duch")


def test_some_of_aids_folders(tmp_path, caplog):
    for name in ("Airport", "Beach"):
        (tmp_path / name).mkdir()
        for i in range(1, 6):
            (tmp_path / name / f"{name.lower()}_{i}.jpg").write_text(f"{name} {i}")
    names = [f"{name}_{i}.jpg" for name in ("airport", "beach", "bridge") for i in range(1, 6)]
    file = write(tmp_path / "rsicd.json", [caption(i, name) for i, name in enumerate(names)])
    assert make_manifest(tmp_path, "rsicd", captions=file).classes == ("Airport", "Beach")
    assert caplog.messages == [f"{file}: left out the captions of 5 images that are missing"]


@pytest.mark.parametrize("count", [1, 6])
def test_ucm_captions_and_rsicd_have_five_sentences(rsicd, tmp_path_factory, count):
    words = f"has {count} sentence{'s' * (count > 1)}, not 5"
    sentences = [{"raw": f"{j} .", "sentid": 1000 + j} for j in range(count)]
    odd = {"sentences": sentences, "sentids": [sentence["sentid"] for sentence in sentences]}
    file = rsicd / "dataset_rsicd.json"
    images = json.loads(file.read_text())["images"]
    write(file, [images[0] | odd, *images[1:]])
    assert f"airport_1.jpg: {words}" in problems_of(rsicd, captions=file)
    ucm = tmp_path_factory.mktemp("ucm")
    for number in range(1, 11):
        (ucm / f"{number}.tif").write_text(f"{number}")
    numbered = [caption(number - 1, f"{number}.tif") for number in range(1, 11)]
    file = write(ucm / "ucm.json", [numbered[0] | odd, *numbered[1:]])
    assert f"1.tif: {words}" in problems_of(ucm, "ucm-captions", captions=file)


def test_all_problems_of_rsicd_at_once(rsicd):
    with (rsicd / "txtclasses_rsicd" / "beach.txt").open("a") as file:
        file.write("beach_99.jpg\n")
    (rsicd / "txtclasses_rsicd" / "pond.txt").write_bytes(b"\xff\xfe")
    (rsicd / "RSICD_images" / "00002.jpg").unlink()
    (rsicd / "RSICD_images" / "new.jpg").write_text("new")
    message = problems_of(rsicd, captions=rsicd / "dataset_rsicd.json")
    assert "found 4 problems" in message
    assert "pond.txt is not UTF-8 text" in message
    assert "beach.txt lists beach_99.jpg, which is missing" in message
    assert "captions for 00002.jpg, which is missing" in message
    assert "new.jpg has no captions" in message


# Any folder, and damaged files.


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "data"
    for name in ("beach", "river"):
        (root / name).mkdir(parents=True)
        for i in range(6):
            (root / name / f"{i}.png").write_text(f"{name} {i}")
    return root


def good(folder):
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    return [caption(number, name) for number, name in enumerate(files)]


def test_a_folder_with_captions(folder, tmp_path):
    images = good(folder)
    for image in images:
        # Both are optional.
        del image["split"], image["sentences"][0]["tokens"]
    manifest = make_manifest(folder, captions=write(tmp_path / "c.json", images))
    assert (manifest.dataset, manifest.protocol) == ("folder", "random")
    assert [image.captions[4] for image in manifest.images] == [f"{image.path} says 4 ." for image in manifest.images]


def test_any_number_of_sentences_of_images_of_ones_own(folder, tmp_path):
    images = good(folder)
    for number, image in enumerate(images):
        image["sentences"], image["sentids"] = (image[key][: 1 + number % 5] for key in ("sentences", "sentids"))
    manifest = make_manifest(folder, captions=write(tmp_path / "c.json", images))
    assert [len(image.captions) for image in manifest.images] == [1 + number % 5 for number in range(12)]


def test_captions_of_images_side_by_side(tmp_path):
    """Numbered from 1, but fewer than UCM-captions."""
    root = tmp_path / "data"
    root.mkdir()
    for i in range(1, 11):
        (root / f"{i}.png").write_text(f"{i}")
    file = write(tmp_path / "c.json", [caption(i, f"{i}.png") for i in range(1, 11)])
    manifest = make_manifest(root, captions=file)
    assert (manifest.dataset, manifest.classes) == ("folder", ())
    assert [image.captions[1] for image in manifest.images] == [f"{i}.png says 1 ." for i in range(1, 11)]


def test_names_without_a_folder_where_they_are_unique(folder, tmp_path):
    for i in range(6):
        (folder / "beach" / f"{i}.png").rename(folder / "beach" / f"b{i}.png")
    file = write(tmp_path / "c.json", [caption(n, image["filename"][6:]) for n, image in enumerate(good(folder))])
    assert all(len(image.captions) == 5 for image in make_manifest(folder, captions=file).images)


def test_numbers_of_captions_are_all_there_or_none(folder, tmp_path):
    images = [{"filename": one["filename"], "sentences": [{"raw": "a sea ."}]} for one in good(folder)]
    manifest = make_manifest(folder, captions=write(tmp_path / "c.json", images))
    assert all(image.captions == ("a sea .",) for image in manifest.images)
    images[3]["sentences"][0]["sentid"] = 7
    message = problems_of(folder, captions=write(tmp_path / "c.json", images))
    assert "beach/0.png: its imgid is None, not a number" in message
    assert "beach/0.png: has a sentence whose sentid is not a number" in message


def test_all_problems_of_captions_at_once(folder, tmp_path):
    images = good(folder)
    (folder / "river" / "9.png").write_text("new")
    images[0]["sentences"], images[0]["sentids"] = [], []
    images[1]["sentences"][2]["raw"] = "  "
    images[2]["imgid"] = 3
    for sentence in images[2]["sentences"]:
        sentence["imgid"] = 3
    images[4]["sentences"][0]["sentid"] = images[4]["sentids"][0] = 29
    images[6]["filename"] = images[7]["filename"]
    images[8]["sentids"] = [1]
    images[9]["sentences"][0]["imgid"] = 100
    images.append(caption(50, "lake/0.png"))
    message = problems_of(folder, captions=write(tmp_path / "c.json", images))
    for words in (
        "beach/0.png: has no sentence",
        "beach/1.png: has an empty sentence",
        "c.json: imgid 3 occurs 2 times",
        "c.json: sentid 29 occurs 2 times",
        "c.json: filename river/1.png occurs 2 times",
        "river/2.png: its sentids are not those of its sentences",
        "river/3.png: has a sentence of another imgid",
        "captions for lake/0.png, which is missing",
        "river/0.png has no captions",
        "river/9.png has no captions",
    ):
        assert words in message
    assert "found 10 problems" in message


def test_a_long_list_is_cut(folder, tmp_path):
    images = [caption(i, f"sea/{i}.png") for i in range(40)]
    message = problems_of(folder, captions=write(tmp_path / "c.json", images))
    assert message.count("which is missing") == message.count("has no captions") == 10
    assert "and 30 more" in message
    assert "and 2 more" in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "c.json is damaged, or not JSON"),
        ("[" * 100_000, "c.json is damaged, or not JSON"),
        (b"\xff\xfe\x00", "c.json is damaged, or not JSON"),
        ("[]", 'c.json has no list "images"'),
        ('{"images": {}}', 'c.json has no list "images"'),
        ('{"images": []}', "c.json has no captions"),
        ('{"images": [5]}', "c.json: image 0 has no filename"),
        ('{"images": [{"filename": "x"}]}', "x: has no list of sentences"),
        ('{"images": [{"filename": "x", "imgid": true, "sentences": []}]}', "x: its imgid is True, not a number"),
        ('{"images": [{"filename": "x", "sentences": [{"raw": 5}]}]}', "x: has an empty sentence"),
        ('{"images": [{"filename": "x", "sentences": [{"sentid": [1]}]}]}', "x: has a sentence whose sentid is no"),
    ],
)
def test_a_damaged_file(folder, tmp_path, content, words):
    file = tmp_path / "c.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert words in problems_of(folder, captions=file)


def test_captions_that_are_needed_absent_or_not_wanted(folder, tmp_path):
    assert "ucm-captions needs its sentences; give their JSON file as --captions" in problems_of(folder, "ucm-captions")
    assert "rsicd needs its sentences" in problems_of(folder, "rsicd")
    assert "no such file of captions" in problems_of(folder, captions=tmp_path / "absent.json")
    file = write(tmp_path / "c.json", good(folder))
    assert "dataset pairs takes no file of captions" in problems_of(folder, "pairs", captions=file)
