"""A wheel built from the tree works in an environment that has never seen the checkout."""

import ast
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from orbithash.cluster.cli.extras import EXTRAS
from orbithash.search.web.assets import VENDOR_FILES

ROOT = Path(__file__).resolve().parents[1]
VENDOR = ROOT / "search/web/static/vendor"
# What is said of the scripts, beside them.
ABOUT = ("LICENSES.txt", "sbom.cdx.json")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of what git tracks and of the page's scripts: nothing else untracked can make it work."""
    folder = tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if tracked.returncode:
        pytest.skip("needs a git checkout")
    for name in filter(None, tracked.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            target = folder / "tree" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    if VENDOR.is_dir():
        shutil.copytree(VENDOR, folder / "tree" / VENDOR.relative_to(ROOT))
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, "."]
    subprocess.run([str(part) for part in build], cwd=folder / "tree", check=True, capture_output=True, timeout=600)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """A virtual environment with the wheel, and our dependencies but not our checkout on its path."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", site, wheel]
    subprocess.run([str(part) for part in install], check=True, capture_output=True, timeout=600)
    # As a path and not as a site folder: the .pth file of an editable checkout is not read from it.
    dependencies = sysconfig.get_path("purelib")
    (site / "dependencies.pth").write_text(f"{dependencies}\n")
    return folder


def run(environment, *words, **options):
    python = environment / "bin" / "python"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        [python, *words], capture_output=True, text=True, timeout=600, cwd=environment, env=clean, **options
    )


def test_the_wheel_holds_what_is_not_python(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for wanted in (
        "orbithash/v1/search.proto",
        "orbithash/v1/search_pb2.pyi",
        "orbithash/trainers/reports/templates/report.html.jinja",
        "orbithash/trainers/reports/templates/report.css",
        "orbithash/trainers/recipes/from-scratch.yaml",
        "orbithash/search/web/templates/base.html",
        "orbithash/search/web/static/base.css",
        "orbithash/search/web/static/icon.svg",
    ):
        assert wanted in names
    assert all(name.startswith(("orbithash/", "orbithash-")) for name in names), "nothing generic in site-packages"
    assert "orbithash/__init__.py" not in names, "a namespace package has no file of its own"


def test_the_wheel_holds_the_scripts_of_the_page_with_their_licences(wheel):
    if not VENDOR.is_dir():
        pytest.skip("the page's scripts are not installed; run make vendor")
    with zipfile.ZipFile(wheel) as archive:
        folder = "orbithash/search/web/static/vendor/"
        assert {*VENDOR_FILES, *ABOUT} <= {name.removeprefix(folder) for name in archive.namelist()}
        licences = archive.read(f"{folder}LICENSES.txt").decode()
        listed = {each["name"]: each for each in json.loads(archive.read(f"{folder}sbom.cdx.json"))["components"]}
    for package in json.loads((ROOT / "search/web/package.json").read_text())["dependencies"]:
        assert f"\n{package} " in licences, package
        assert listed[package]["licenses"]
        assert listed[package]["hashes"], package


@pytest.mark.parametrize("fails", [False, True])
def test_the_scripts_are_replaced_whole_or_not_at_all(tmp_path, fails):
    """A program that writes packages, and may then fail, stands for npm."""
    copied, bin_ = tmp_path / "checkout", tmp_path / "bin"
    web, vendor = copied / "search/web", copied / "search/web/static/vendor"
    vendor.mkdir(parents=True)
    (vendor / "old.js").write_text("old")
    (copied / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/vendor.py", copied / ".ci")
    for name in ("package.json", "package-lock.json"):
        shutil.copy(ROOT / "search/web" / name, web)
    bin_.mkdir()
    written = ("htmx.org/dist/htmx.min.js", "ol/dist/ol.js", "ol/ol.css", "world-atlas/land-110m.json", "ol/LICENSE.md")
    lines = [f"mkdir -p node_modules/{Path(name).parent} && echo {name} > node_modules/{name}" for name in written]
    description = '{"name": "ol", "version": "10.0.0", "license": "BSD-2-Clause"}'
    lines += [f"echo '{description}' > node_modules/ol/package.json", f"exit {int(fails)}"]
    lines = ["""if [ "$1" = sbom ]; then echo '{"serialNumber": "random", "components": []}'; exit; fi""", *lines]
    (bin_ / "npm").write_text("\n".join(["#!/bin/sh", *lines]))
    (bin_ / "npm").chmod(0o755)
    (bin_ / "python").symlink_to(sys.executable)
    done = subprocess.run([bin_ / "python", copied / ".ci/vendor.py"], capture_output=True, text=True, check=False)
    names = {path.name for path in vendor.iterdir()}
    assert names == ({"old.js"} if fails else {*VENDOR_FILES, *ABOUT})
    assert done.returncode == int(fails)
    assert ("there is no page" in done.stderr) == fails
    assert fails or (vendor / "LICENSES.txt").read_text() == "ol 10.0.0: BSD-2-Clause\n\nol/LICENSE.md\n"
    assert fails or json.loads((vendor / "sbom.cdx.json").read_text()) == {"components": []}
    assert [path.name for path in vendor.parent.iterdir()] == ["vendor"]


def test_the_lock_of_the_scripts_has_hashes_and_no_addresses():
    packages = json.loads((ROOT / "search/web/package-lock.json").read_text())["packages"]
    assert all(package.get("integrity", "").startswith("sha512-") for name, package in packages.items() if name)
    assert "http" not in (ROOT / "search/web/package-lock.json").read_text()


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


@pytest.fixture(scope="module")
def client_only(wheel, tmp_path_factory):
    """Return an environment in which only the wheel and its base requirements are installed.

    The base packages are linked from the environment of the tests: this machine may have no package index.
    """
    folder = tmp_path_factory.mktemp("client")
    venv.create(folder, with_pip=False)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", site, wheel]
    subprocess.run([str(part) for part in install], check=True, capture_output=True, timeout=600)
    for name in requirement_closure("orbithash"):
        for file in metadata.distribution(name).files or ():
            top = Path(file.parts[0])
            source = Path(str(metadata.distribution(name).locate_file(top)))
            if ".." not in file.parts and source.exists() and not (site / top).exists():
                (site / top).symlink_to(source)
    return folder


def requirement_closure(name, extras=("",)):
    """Return the names of the distributions that `name` requires with these extras, itself not included."""
    found, waiting = set(), [(name, extra) for extra in extras]
    while waiting:
        current, extra = waiting.pop()
        try:
            texts = metadata.requires(current) or ()
        except metadata.PackageNotFoundError:
            # Of an extra that is not installed here; its own requirements are not needed.
            continue
        for text in texts:
            requirement = Requirement(text)
            needed = requirement.marker is None or requirement.marker.evaluate({"extra": extra})
            if needed and (key := canonicalize_name(requirement.name)) not in found:
                waiting += [(requirement.name, each) for each in ("", *requirement.extras)]
                if key != name:
                    found.add(key)
            elif needed and requirement.extras and canonicalize_name(requirement.name) == name:
                waiting += [(name, each) for each in requirement.extras]
    return found


def test_the_base_requirements_are_few():
    heavy = {"torch", "ray", "numpy", "pyarrow", "pylance", "faiss-cpu", "pillow", "transformers"}
    assert not requirement_closure("orbithash") & heavy


def test_the_client_works_with_the_base_requirements_alone(client_only):
    program = (
        "from orbithash.search import AsyncClient, Client\n"
        "import importlib.util\n"
        "assert not any(map(importlib.util.find_spec, ('numpy', 'torch', 'ray', 'pyarrow')))\n"
        "try:\n"
        "    with Client('127.0.0.1:1') as client: client.describe()\n"
        "except Exception as err: print(type(err).__name__)"
    )
    done = run(client_only, "-c", program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["GatewayUnreachable"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--help",), 0, ""),
        (("query", "--key", "a.tif", "--address", "127.0.0.1:1", "--timeout", "1"), 2, "no gateway at 127.0.0.1:1"),
        (("train", "dhcl", "--data", ".", "--out", "run"), 2, "pip install 'orbithash[train]'"),
        (("serve", "archive", "--model", "model"), 2, "pip install 'orbithash[serve,cpu]'"),
    ],
)
def test_the_command_line_says_what_to_install(client_only, words, code, message):
    start = "import sys; from orbithash.cluster.cli.main import main; sys.argv[0] = 'orbithash'; main()"
    done = run(client_only, "-c", start, *words)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_extras_install_what_the_messages_name():
    distributions = metadata.packages_distributions()
    for module, extras in EXTRAS.items():
        names = {canonicalize_name(name) for name in distributions.get(module, ())}
        if not names:
            continue
        # `gpu` has another build of the same module.
        for extra in set(extras) - {"gpu"}:
            assert names & requirement_closure("orbithash", ("", extra)), (module, extra)


def test_the_extra_of_the_page_installs_all_that_it_imports():
    """Also what is imported within functions."""
    folders = [ROOT / name for name in ("search/web", "search/detectors", "encoders/places", "search/client")]
    imported = set()
    for path in [path for folder in folders for path in folder.rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.partition(".")[0])
    distributions = metadata.packages_distributions()
    installed = requirement_closure("orbithash", ("", "web"))
    for module in imported - sys.stdlib_module_names - {"orbithash"}:
        names = {canonicalize_name(name) for name in distributions.get(module, ())}
        assert names & installed, module
