"""The layout of the code: rooms as docs/architecture.md draws them, small folders and small files."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("encoders", "trainers", "search", "cluster")
MAX_FILES, MAX_LINES = 15, 400

ROOMS = sorted(
    str(folder.parent.relative_to(ROOT)) for floor in FLOORS for folder in (ROOT / floor).rglob("__init__.py")
)


def test_the_picture_of_the_rooms_is_that_of_the_folders():
    (picture,) = re.findall(r"## Rooms\n.*?```text\n(.*?)```", (ROOT / "docs/architecture.md").read_text(), re.DOTALL)
    drawn, floor = [], ""
    for line in picture.splitlines():
        name = re.match(r"(  )?([\w/]+)/ ", line)
        assert name, f"not a room: {line!r}"
        if not name[1]:
            floor = name[2]
        drawn.append(f"{floor}/{name[2]}" if name[1] else floor)
    assert sorted(drawn) == ROOMS


def test_every_room_is_packaged():
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(packages) == sorted([f"orbithash.{room.replace('/', '.')}" for room in ROOMS] + ["orbithash.v1"])


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_is_small_and_says_what_belongs_there(room):
    files = [path for path in (ROOT / room).glob("*.py") if path.name != "__init__.py"]
    assert len(files) <= MAX_FILES
    assert ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text()))


def test_files_are_short():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for floor in FLOORS
        for path in (ROOT / floor).rglob("*.py")
    }
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def test_tests_mirror_the_rooms():
    folders = {str(path.parent.relative_to(ROOT / "tests")) for path in (ROOT / "tests").rglob("test_*.py")}
    assert folders - {".", "deploy"} <= set(ROOMS)


def test_documents_name_files_that_exist():
    missing = [
        f"{page.name}: {name}"
        for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))
        for name in re.findall(
            r"\b(?:tests|trainers|encoders|search|cluster|deploy)/[\w/-]+\.(?:py|yaml)\b", page.read_text()
        )
        if not (ROOT / name).exists()
    ]
    assert not missing
