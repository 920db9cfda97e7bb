"""Prints what an image installs beside our own wheel: PYPROJECT DEVICE, the device being cpu or cuda."""

import sys
import tomllib
from pathlib import Path

EXTRAS = {"cpu": "cpu", "cuda": "gpu"}


def requirements(pyproject: Path, device: str) -> list[str]:
    """One requirement a line, as pip reads them."""
    project = tomllib.loads(pyproject.read_text())["project"]
    return [*project["dependencies"], *project["optional-dependencies"][EXTRAS[device]]]


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[2] not in EXTRAS:
        sys.exit(f"usage: {sys.argv[0]} PYPROJECT {'|'.join(EXTRAS)}")
    print(*requirements(Path(sys.argv[1]), sys.argv[2]), sep="\n")
