"""Drawn scenes: files, georeference, captions against the drawing, invalid arguments and interruptions."""

import json
import math
import re
import subprocess
import sys
import time
from collections import Counter
from datetime import datetime
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.warp import transform

from orbithash.encoders.errors import InputError
from orbithash.trainers.scenes import write_scenes
from orbithash.trainers.scenes.captions import counted, sentences, tokens
from orbithash.trainers.scenes.classes import CLASSES, WITHOUT_SNOW
from orbithash.trainers.scenes.facts import compass, course, joined, place
from orbithash.trainers.scenes.georeference import CRS, PLACE_LAT, PLACE_LON, upper_left
from orbithash.trainers.scenes.landuse import built, fields, harbor, leisure
from orbithash.trainers.scenes.moment import SEASONS, light_at
from orbithash.trainers.scenes.scene import Scene, draw_scene
from orbithash.trainers.scenes.sentences import SENTENCES

NUMBERS = (
    *("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
SMALL = 64


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with two scenes of every class, at the default size."""
    directory = tmp_path_factory.mktemp("scenes") / "made"
    write_scenes(directory, 2 * len(CLASSES), seed=7)
    return directory


@pytest.fixture(scope="module")
def drawn() -> list[Scene]:
    """Six scenes of every class, at the smallest size."""
    return [draw_scene(index, 3, SMALL) for index in range(6 * len(CLASSES))]


class TestFiles:
    def test_layout(self, folder):
        names = {
            f"{kind}/{label}/{label}_{number:04d}.tif"
            for kind in ("images", "second")
            for label in CLASSES
            for number in range(2)
        }
        assert set(contents(folder)) == names | {"captions.json", "scenes.json"}

    def test_description(self, folder):
        page = json.loads((folder / "scenes.json").read_text(encoding="utf-8"))
        assert page["seed"] == 7
        assert page["count"] == 2 * len(CLASSES)
        assert page["size_px"] == 128
        assert page["gsd_m"] == 1.5
        assert page["crs"] == "EPSG:32630"
        assert page["classes"] == list(CLASSES)
        assert len(CLASSES) >= 12

    def test_same_arguments_same_bytes(self, folder, tmp_path):
        write_scenes(tmp_path / "again", 2 * len(CLASSES), seed=7)
        assert contents(tmp_path / "again") == contents(folder)

    def test_two_processes_write_the_same_bytes(self, tmp_path):
        write_scenes(tmp_path / "one", 20, size_px=SMALL)
        write_scenes(tmp_path / "two", 20, size_px=SMALL, processes=2)
        assert contents(tmp_path / "two") == contents(tmp_path / "one")

    def test_another_seed_or_number_gives_other_images(self):
        cycle = len(CLASSES)
        first, again = draw_scene(0, 7, SMALL), draw_scene(0, 7, SMALL)
        assert np.array_equal(first.color, again.color)
        for other in (draw_scene(0, 8, SMALL), draw_scene(cycle, 7, SMALL), draw_scene(0, 7 + cycle, SMALL)):
            assert other.label == first.label
            assert not np.array_equal(other.color, first.color)
        assert not np.array_equal(draw_scene(cycle, 7, SMALL).color, draw_scene(0, 7 + cycle, SMALL).color)

    def test_a_smaller_folder_is_a_prefix_of_a_larger_one(self, folder, tmp_path):
        count = len(CLASSES) + 1
        write_scenes(tmp_path / "few", count, seed=7)
        few, more = contents(tmp_path / "few"), contents(folder)
        images = [name for name in few if name.endswith(".tif")]
        assert len(images) == 2 * count
        assert all(few[name] == more[name] for name in images)
        first = json.loads(few["captions.json"])["images"]
        assert first == json.loads(more["captions.json"])["images"][:count]

    @pytest.mark.parametrize("size_px", [64, 101, 512])
    def test_sizes(self, size_px, tmp_path):
        write_scenes(tmp_path / "sized", 1, size_px=size_px)
        with rasterio.open(tmp_path / "sized/images/airport/airport_0000.tif") as color:
            assert color.shape == (size_px, size_px)
            assert color.res[0] == pytest.approx(192 / size_px)
        with rasterio.open(tmp_path / "sized/second/airport/airport_0000.tif") as second:
            assert second.shape == (2 * size_px, 2 * size_px)

    def test_progress_counts_the_scenes(self, tmp_path):
        counts: list[int] = []
        write_scenes(tmp_path / "made", 3, size_px=SMALL, on_progress=counts.append)
        assert counts == [1, 2, 3]
        write_scenes(tmp_path / "made", 3, size_px=SMALL, on_progress=counts.append)
        assert counts == [1, 2, 3, 3]


class TestGeoreference:
    def test_both_images_cover_the_same_area_near_the_place(self, folder):
        for path in (folder / "images").rglob("*.tif"):
            second = folder / "second" / path.relative_to(folder / "images")
            with rasterio.open(path) as color, rasterio.open(second) as pan:
                assert color.bounds == pan.bounds
                assert color.crs == pan.crs == rasterio.crs.CRS.from_string(CRS)
                assert (color.count, pan.count) == (3, 1)
                assert color.dtypes[0] == pan.dtypes[0] == "uint8"
                assert color.res == (1.5, 1.5)
                assert pan.res == (0.75, 0.75)
                (lon,), (lat,) = transform(color.crs, "EPSG:4326", [color.bounds.left], [color.bounds.top])
            assert math.hypot(lon - PLACE_LON, lat - PLACE_LAT) < 0.05

    def test_the_utm_zone_contains_the_longitude(self):
        assert f"EPSG:326{math.floor((PLACE_LON + 180) / 6) + 1}" == CRS

    def test_a_million_scenes_lie_in_the_utm_zone(self):
        corners = [upper_left(index) for index in (0, 999_999, 998_000, 997_000, 996_001)]
        lons, _ = transform(CRS, "EPSG:4326", *zip(*corners, strict=True))
        assert -6 < min(lons) < max(lons) < 0

    def test_no_two_scenes_overlap(self):
        corners = [upper_left(index) for index in range(300)]
        assert all(max(abs(a[0] - b[0]), abs(a[1] - b[1])) >= 192 for a, b in combinations(corners, 2))

    def test_the_date_lies_in_the_season(self, folder):
        for index in range(2 * len(CLASSES)):
            scene = draw_scene(index, 7, SMALL)
            name = f"images/{scene.label}/{scene.label}_{index // len(CLASSES):04d}.tif"
            with rasterio.open(folder / name) as image:
                written = datetime.strptime(image.tags()["TIFFTAG_DATETIME"], "%Y:%m:%d %H:%M:%S")
            assert written == scene.taken
            assert written.month in scene.season.months

    def test_the_sun_at_noon_is_in_the_south_at_the_elevation_of_the_almanac(self):
        summer = light_at(datetime(2024, 6, 21, 12), 0.0, 40.0)
        winter = light_at(datetime(2024, 12, 21, 12), 0.0, 40.0)
        assert (summer.azimuth, winter.azimuth) == pytest.approx((180, 180), abs=0.5)
        assert (summer.elevation, winter.elevation) == pytest.approx((73.4, 26.6), abs=0.5)
        assert summer.shadow[1] < 0
        assert light_at(datetime(2024, 6, 21, 9), 0.0, 40.0).azimuth < 150


class TestCaptions:
    def test_follow_the_karpathy_layout(self, folder):
        page = json.loads((folder / "captions.json").read_text(encoding="utf-8"))
        assert page["dataset"] == "scenes"
        assert [image["imgid"] for image in page["images"]] == list(range(2 * len(CLASSES)))
        written = [sentence for image in page["images"] for sentence in image["sentences"]]
        assert [sentence["sentid"] for sentence in written] == list(range(10 * len(CLASSES)))
        assert all(sentence["tokens"] == tokens(sentence["raw"]) for sentence in written)
        for image in page["images"]:
            assert (folder / image["filename"]).is_file()
            assert image["sentids"] == [5 * image["imgid"] + j for j in range(5)]
            assert all(sentence["imgid"] == image["imgid"] for sentence in image["sentences"])

    def test_seven_scenes_of_each_class_fill_every_part_of_the_split(self, tmp_path):
        write_scenes(tmp_path / "split", 7 * len(CLASSES), size_px=SMALL)
        images = json.loads((tmp_path / "split/captions.json").read_text(encoding="utf-8"))["images"]
        assert Counter(image["split"] for image in images) == {
            "train": 5 * len(CLASSES),
            "test": len(CLASSES),
            "val": len(CLASSES),
        }

    def test_five_different_complete_sentences(self, drawn):
        for scene in drawn:
            texts = sentences(scene, 3)
            assert len(set(texts)) == 5
            for text in texts:
                assert re.fullmatch(r"[A-Z0-9][^{}.]*\.", text), text
                assert not re.search(r"\b[Aa] [aeiou]|  |\bone \w+s\b(?<!grass)", text), text

    def test_every_number_is_a_count_of_the_scene(self, drawn):
        for scene in drawn:
            for text in sentences(scene, 3):
                for number, noun in re.findall(rf"\b(\d+|{'|'.join(NUMBERS)}) ([a-z]+)", text.lower()):
                    value = int(number) if number.isdigit() else NUMBERS.index(number)
                    counts = scene.facts.counts
                    known = counts.get(noun, counts.get(noun.removesuffix("s")))
                    if known is None:
                        assert f"{number} {noun}" in " ".join(scene.facts.words.values()), text
                    else:
                        assert value == known, text

    @pytest.mark.parametrize(
        ("label", "module", "draw_function", "noun"),
        [
            ("harbor", harbor, "_boat", "boat"),
            ("storage_tanks", built, "_tank", "tank"),
            ("tennis_courts", leisure, "_court", "court"),
            ("circular_farmland", fields, "_pivot", "circle"),
        ],
    )
    def test_counts_are_those_of_the_drawn_objects(self, label, module, draw_function, noun, monkeypatch):
        real, calls = getattr(module, draw_function), []
        monkeypatch.setattr(module, draw_function, lambda *args: calls.append(args) or real(*args))
        for number in range(4):
            calls.clear()
            scene = draw_scene(list(CLASSES).index(label) + number * len(CLASSES), 5, SMALL)
            assert scene.facts.counts[noun] == len(calls) > 0

    def test_the_sea_is_where_the_captions_say(self):
        steps = np.linspace(-1, 1, SMALL)
        east, south = np.meshgrid(steps, steps)
        for number in range(12):
            scene = draw_scene(list(CLASSES).index("beach") + number * len(CLASSES), 5, SMALL)
            side = scene.facts.words["sea"]
            toward = ("east" in side) * east - ("west" in side) * east + ("south" in side) * south
            toward -= ("north" in side) * south
            blueness = scene.color[..., 2].astype(float) - scene.color[..., 0]
            assert blueness[toward > 0.5].mean() > 20 > blueness[toward < -0.5].mean()

    def test_captions_name_no_other_season(self, drawn):
        phrases = {season.phrase for season in SEASONS.values()}
        for scene in drawn:
            text = " ".join(sentences(scene, 3)).lower()
            assert not any(phrase in text for phrase in phrases - {scene.season.phrase})

    def test_every_class_has_at_least_five_sentences(self):
        assert set(SENTENCES) == set(CLASSES)
        assert all(len(set(choice)) >= 5 for choice in SENTENCES.values())

    def test_facts_differ_between_scenes_of_a_class(self, drawn):
        for label in CLASSES:
            assert len({str(scene.facts) for scene in drawn if scene.label == label}) > 1

    def test_counts_and_lists_in_words(self):
        assert counted(0, "boat") == "no boats"
        assert counted(1, "boat") == "one boat"
        assert counted(20, "boat") == "twenty boats"
        assert counted(21, "boat") == "21 boats"
        assert counted(1, "aircraft") == "one aircraft"
        assert joined(["red"]) == "red"
        assert joined(["red", "green", "blue"]) == "red, green and blue"
        assert tokens("A half-full lot, 21 cars.") == ["a", "half-full", "lot", "21", "cars"]

    def test_directions(self):
        assert [compass(turn * math.pi / 2) for turn in range(-1, 4)] == ["north", "east", "south", "west", "north"]
        assert course(0) == course(math.pi) == "from west to east"
        assert course(math.pi / 4) == "from north-west to south-east"
        assert [place(p) for p in ((5, 5), (96, 96), (190, 96), (96, 190))] == [
            "upper left",
            "centre",
            "right",
            "bottom",
        ]


class TestDrawings:
    def test_contrast_and_variation_in_every_class(self, drawn):
        for label in CLASSES:
            scenes = [scene for scene in drawn if scene.label == label]
            for scene in scenes:
                assert scene.color.dtype == scene.panchromatic.dtype == np.uint8
                assert scene.color.shape == (SMALL, SMALL, 3)
                assert scene.panchromatic.shape == (2 * SMALL, 2 * SMALL)
                assert scene.color.std(axis=(0, 1)).mean() > 6, label
                assert scene.panchromatic.std() > 6, label
            for first, second in combinations(scenes, 2):
                assert np.abs(first.color.astype(int) - second.color).mean() > 8, label

    def test_panchromatic_shows_the_same_scene_but_not_the_same_values(self, drawn):
        for scene in drawn:
            gray = scene.color.astype(float).mean(axis=2)
            coarse = scene.panchromatic.astype(float).reshape(SMALL, 2, SMALL, 2).mean(axis=(1, 3))
            assert np.corrcoef(gray.ravel(), coarse.ravel())[0, 1] > 0.75, scene.label
            assert np.abs(gray - coarse).mean() > 0.5

    def test_classes_without_snow(self, drawn):
        assert not [scene.label for scene in drawn if scene.season.snow and scene.label in WITHOUT_SNOW]
        assert [scene for scene in drawn if scene.season.snow]


class TestRefusals:
    @pytest.mark.parametrize(
        ("count", "seed", "size_px", "word"),
        [
            (0, 0, 128, "number"),
            (1_000_001, 0, 128, "number"),
            (1, 0, 63, "size"),
            (1, 0, 513, "size"),
            (1, -1, 128, "seed"),
        ],
    )
    def test_numbers_out_of_range(self, count, seed, size_px, word, tmp_path):
        with pytest.raises(InputError, match=word):
            write_scenes(tmp_path / "none", count, seed=seed, size_px=size_px)
        assert not (tmp_path / "none").exists()

    def test_a_folder_with_other_files_is_refused_and_unchanged(self, tmp_path):
        (tmp_path / "thesis.txt").write_text("years of work")
        with pytest.raises(InputError, match="other files"):
            write_scenes(tmp_path, 1)
        assert contents(tmp_path) == {"thesis.txt": b"years of work"}

    @pytest.mark.parametrize("page", ["{", "[]", '{"seed": 0}'])
    def test_another_scenes_json_is_refused_and_unchanged(self, page, tmp_path):
        (tmp_path / "scenes.json").write_text(page)
        with pytest.raises(InputError):
            write_scenes(tmp_path, 1)
        assert contents(tmp_path) == {"scenes.json": page.encode()}

    def test_a_file_in_place_of_the_folder(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError, match="is a file"):
            write_scenes(tmp_path / "file", 1)

    @pytest.mark.parametrize("other", [{"seed": 1}, {"size_px": 65}, {"count": 1}])
    def test_scenes_of_another_request_are_refused(self, other, tmp_path):
        write_scenes(tmp_path / "made", 2, size_px=SMALL)
        before = contents(tmp_path / "made")
        with pytest.raises(InputError, match="another folder"):
            write_scenes(tmp_path / "made", **{"count": 2, "size_px": SMALL, **other})
        assert contents(tmp_path / "made") == before


def _children(pid: str) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


class Stopped(Exception):
    pass


class TestInterruption:
    def test_an_interrupted_folder_is_incomplete_and_can_be_completed(self, tmp_path):
        def stop(done: int) -> None:
            if done == 2:
                raise Stopped

        with pytest.raises(Stopped):
            write_scenes(tmp_path / "cut", 4, size_px=SMALL, on_progress=stop)
        assert not (tmp_path / "cut/scenes.json").exists()
        assert not (tmp_path / "cut/captions.json").exists()
        (tmp_path / "cut/images/airport/airport_0000.tif").write_bytes(b"half")
        write_scenes(tmp_path / "cut", 4, size_px=SMALL)
        write_scenes(tmp_path / "whole", 4, size_px=SMALL)
        assert contents(tmp_path / "cut") == contents(tmp_path / "whole")

    def test_a_killed_pool_leaves_no_process(self, tmp_path):
        program = (
            "import sys\nfrom pathlib import Path\nfrom orbithash.trainers.scenes import write_scenes\n"
            "if __name__ == '__main__':\n"
            f"    write_scenes(Path(sys.argv[1]), 100_000, size_px={SMALL}, processes=2)\n"
        )
        (tmp_path / "draw.py").write_text(program)
        process = subprocess.Popen([sys.executable, tmp_path / "draw.py", tmp_path / "many"])
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        deadline = time.monotonic() + 120
        # Not the folder, which is there before the pool.
        while not any((tmp_path / "many" / "images").rglob("*.tif")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        pool = [pid for child in children.read_text().split() for pid in [child, *_children(child)]]
        assert len(pool) >= 2
        process.kill()
        process.wait()
        while any(Path(f"/proc/{pid}").exists() for pid in pool):
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def test_a_complete_folder_grows(self, tmp_path):
        write_scenes(tmp_path / "grown", 2, size_px=SMALL)
        write_scenes(tmp_path / "grown", 4, size_px=SMALL)
        write_scenes(tmp_path / "whole", 4, size_px=SMALL)
        assert contents(tmp_path / "grown") == contents(tmp_path / "whole")

    def test_a_complete_folder_is_not_written_again(self, tmp_path):
        write_scenes(tmp_path / "made", 1, size_px=SMALL)
        (tmp_path / "made/images/airport/airport_0000.tif").unlink()
        write_scenes(tmp_path / "made", 1, size_px=SMALL)
        assert not (tmp_path / "made/images/airport/airport_0000.tif").exists()

    def test_a_folder_is_usable_after_a_kill_during_the_first_write(self, tmp_path):
        (tmp_path / ".scenes.partial.json.tmp").write_text("{")
        write_scenes(tmp_path, 1, size_px=SMALL)
        assert (tmp_path / "scenes.json").exists()
