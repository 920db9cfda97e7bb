"""Print the requirements that an image installs beside orbithash's own wheel.

Arguments: PYPROJECT DEVICE; the device is cpu or cuda.
"""

import re
import sys
import tomllib
from pathlib import Path

EXTRAS = {"cpu": "cpu", "cuda": "gpu"}

_OWN_EXTRAS = re.compile(r"orbithash\[([\w,]+)\]")


def requirements(pyproject: Path, device: str) -> list[str]:
    """Return the requirements in pip's format: those to train, to serve and of the page, then the device's."""
    project = tomllib.loads(pyproject.read_text())["project"]
    extras = project["optional-dependencies"]

    def expanded(requirement: str) -> list[str]:
        own = _OWN_EXTRAS.fullmatch(requirement)
        if own is None:
            return [requirement]
        return [each for name in own[1].split(",") for inner in extras[name] for each in expanded(inner)]

    found = [*project["dependencies"], *expanded("orbithash[train,serve,web]"), *extras[EXTRAS[device]]]
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[2] not in EXTRAS:
        sys.exit(f"usage: {sys.argv[0]} PYPROJECT {'|'.join(EXTRAS)}")
    print(*requirements(Path(sys.argv[1]), sys.argv[2]), sep="\n")
