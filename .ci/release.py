"""Build a release into a folder and try its wheel in new environments of every supported Python.

    python .ci/release.py [--out dist]

Writes the wheel and the source archive, orbithash-VERSION.cdx.json (what `orbithash[all,cpu]` installs, with the tested
versions and their licences, CycloneDX), and SHA256SUMS. The wheel carries the scripts of the page, their licences and
their own list (`orbithash/search/web/static/vendor/`). Publishes nothing.

A Python is looked for on the path and among those of pyenv; one that is absent is skipped and named.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
# Without torch: the client, the page and the command line. Everything else is the same code for every Python.
EXTRAS = "web"
TRY = """
import importlib, pkgutil, orbithash.v1, orbithash.search.client, orbithash.search.protocol, orbithash.search.web
from orbithash.search.web.assets import Assets
for room in (orbithash.v1, orbithash.search.client, orbithash.search.protocol, orbithash.search.web):
    for module in pkgutil.walk_packages(room.__path__, f"{room.__name__}."):
        importlib.import_module(module.name)
assert Assets().problem is None, Assets().problem
"""


def main() -> int:
    """Run the command line and return the exit code."""
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--out", type=Path, default=ROOT / "dist", help="folder of the release; replaced")
    out = options.parse_args().out.absolute()
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    if problem := problem_of(version):
        print(f"no release: {problem}", file=sys.stderr)
        return 1
    if out.exists() and not (out / "SHA256SUMS").exists() and any(out.iterdir()):
        print(f"no release: {out} holds something else than a release; choose another folder", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        new = Path(folder, "dist")
        run(sys.executable, "-m", "build", "--outdir", new, ROOT)
        (wheel,) = new.glob("*.whl")
        for name in PYTHONS:
            try_wheel(name, wheel)
        (new / f"orbithash-{version}.cdx.json").write_text(bill_of_materials())
        sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}" for path in sorted(new.iterdir())]
        (new / "SHA256SUMS").write_text("\n".join(sums) + "\n")
        shutil.rmtree(out, ignore_errors=True)
        new.rename(out)
    print("\n".join(str(path) for path in sorted(out.iterdir())))
    return 0


def problem_of(version: str) -> str:
    """Return why the tree is not ready for a release; "" if it is."""
    if not re.search(rf"^## {re.escape(version)} ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE):
        return f"CHANGELOG.md has no section of version {version}; write it, or change the version in pyproject.toml"
    if not (ROOT / "search/web/static/vendor/sbom.cdx.json").exists():
        return "the scripts of the page are not installed, and the wheel carries them; run make vendor"
    return ""


def run(*words: object) -> str:
    """Run a command and return what it prints; its errors are shown."""
    return subprocess.run([str(word) for word in words], check=True, stdout=subprocess.PIPE, text=True).stdout


def find_python(name: str) -> str | None:
    """Return the path of a Python such as 3.12."""
    own = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    found = sorted(own.glob(f"{name}.*/bin/python3"))
    return str(found[-1]) if found else shutil.which(f"python{name}")


def try_wheel(name: str, wheel: Path) -> None:
    """Install the wheel for one Python and use it."""
    python = find_python(name)
    if python is None:
        print(f"Python {name}: not on this machine, skipped")
        return
    with tempfile.TemporaryDirectory() as folder:
        run(python, "-m", "venv", folder)
        bin_ = Path(folder, "bin")
        constraints = ROOT / "constraints.txt"
        install = ("install", "--quiet", "--disable-pip-version-check", "--constraint", constraints)
        run(bin_ / "python", "-m", "pip", *install, f"{wheel}[{EXTRAS}]")
        run(bin_ / "python", "-I", "-c", TRY)
        shown = run(bin_ / "orbithash", "--version").strip()
        run(bin_ / "orbithash", "--help")
        words = [bin_ / "orbithash", "query", "--key", "a", "--address", "127.0.0.1:1", "--timeout", "1"]
        refused = subprocess.run(words, capture_output=True, text=True, check=False)
        if refused.returncode != 2 or "no gateway at 127.0.0.1:1" not in refused.stderr:
            raise SystemExit(f"Python {name}: {words[1:]} printed {refused.stderr!r}")
    print(f"Python {name}: {shown} works")


def bill_of_materials() -> str:
    """Return what orbithash[all,cpu] requires, with the versions and licences of this environment, as CycloneDX."""
    listed = json.loads(
        run(
            *(Path(sys.executable).parent / "cyclonedx-py", "environment", "--output-reproducible"),
            *("--pyproject", ROOT / "pyproject.toml", "--output-format", "JSON", sys.executable),
        )
    )
    names = requirements("orbithash", ("", "all", "cpu"))
    kept = [each for each in listed["components"] if canonicalize_name(each["name"]) in names]
    missing = names - {canonicalize_name(each["name"]) for each in kept}
    references = {each["bom-ref"] for each in kept} | {listed["metadata"]["component"]["bom-ref"]}
    listed["components"] = kept
    listed["dependencies"] = [
        {**each, "dependsOn": [name for name in each.get("dependsOn", ()) if name in references]}
        for each in listed["dependencies"]
        if each["ref"] in references
    ]
    if missing:
        print(f"not installed here, so without a version in the list: {', '.join(sorted(missing))}")
    return json.dumps(listed, indent=1) + "\n"


def requirements(name: str, extras: tuple[str, ...]) -> set[str]:
    """Return the normalised names of the distributions that `name` requires with these extras, on this machine."""
    found: set[str] = set()
    seen: set[tuple[str, str]] = set()
    waiting = [(canonicalize_name(name), extra) for extra in extras]
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        try:
            texts = metadata.requires(current[0]) or ()
        except metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, texts):
            if requirement.marker is None or requirement.marker.evaluate({"extra": current[1]}):
                key = canonicalize_name(requirement.name)
                found.add(key)
                waiting += [(key, extra) for extra in ("", *requirement.extras)]
    return found - {canonicalize_name(name)}


if __name__ == "__main__":
    sys.exit(main())
