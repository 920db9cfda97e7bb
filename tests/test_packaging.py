"""A wheel built from the tree works in an environment that has never seen the checkout."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of what git tracks, so that nothing untracked can be what makes it work."""
    folder = tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if tracked.returncode:
        pytest.skip("needs a git checkout")
    for name in filter(None, tracked.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            target = folder / "tree" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, "."]
    subprocess.run([str(part) for part in build], cwd=folder / "tree", check=True, capture_output=True, timeout=120)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """A virtual environment with the wheel, and our dependencies but not our checkout on its path."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", site, wheel]
    subprocess.run([str(part) for part in install], check=True, capture_output=True, timeout=120)
    # As a path and not as a site folder: the .pth file of an editable checkout is not read from it.
    dependencies = sysconfig.get_path("purelib")
    (site / "dependencies.pth").write_text(f"{dependencies}\n")
    return folder


def run(environment, *words, **options):
    python = environment / "bin" / "python"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        [python, *words], capture_output=True, text=True, timeout=120, cwd=environment, env=clean, **options
    )


def test_the_wheel_holds_what_is_not_python(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for wanted in (
        "orbithash/v1/search.proto",
        "orbithash/v1/search_pb2.pyi",
        "orbithash/trainers/templates/report.html.jinja",
        "orbithash/trainers/templates/report.css",
        "orbithash/trainers/recipes/from_scratch.yaml",
    ):
        assert wanted in names
    assert all(name.startswith(("orbithash/", "orbithash-")) for name in names), "nothing generic in site-packages"
    assert "orbithash/__init__.py" not in names, "a namespace package has no file of its own"


def test_every_room_is_imported_from_the_wheel(environment):
    program = (
        "import orbithash.v1.search_pb2 as a, orbithash.encoders.networks.model as b\n"
        "import orbithash.trainers.loop.loop as c\n"
        "import orbithash.search.gateway.gateway as d, orbithash.cluster.cli.main as e\n"
        "import orbithash.trainers.scenes as f\n"
        "print(*(m.__file__ for m in (a, b, c, d, e, f)), sep='\\n')"
    )
    done = run(environment, "-c", program)
    assert done.returncode == 0, done.stderr
    assert all(line.startswith(str(environment)) for line in done.stdout.splitlines()), done.stdout


def test_its_command_line_works(environment):
    start = "import sys; from orbithash.cluster.cli.main import main; sys.argv[0] = 'orbithash'; main()"
    done = run(environment, "-c", start, "--help")
    assert done.returncode == 0, done.stderr
    assert "encode" in done.stdout
    done = run(environment, "-c", start, "scenes", "drawn", "--count", "3", "--size", "64")
    assert done.returncode == 0, done.stderr
    assert len(list((environment / "drawn").rglob("*.tif"))) == 6
