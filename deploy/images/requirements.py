"""Print the requirements that an image installs beside orbithash's own wheel.

Arguments: PYPROJECT DEVICE; the device is cpu or cuda.
"""

import sys
import tomllib
from pathlib import Path

EXTRAS = {"cpu": "cpu", "cuda": "gpu"}


def requirements(pyproject: Path, device: str) -> list[str]:
    """Return the requirements in pip's format: those of the project, then those of the device's extra."""
    project = tomllib.loads(pyproject.read_text())["project"]
    return [*project["dependencies"], *project["optional-dependencies"][EXTRAS[device]]]


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[2] not in EXTRAS:
        sys.exit(f"usage: {sys.argv[0]} PYPROJECT {'|'.join(EXTRAS)}")
    print(*requirements(Path(sys.argv[1]), sys.argv[2]), sep="\n")
