#!/usr/bin/env python3
"""Copies the newest version of an archive: SOURCE TARGET. The copy is whole also while somebody writes.

Files copied one by one are not: a change that comes between two of them leaves a version without its rows.
"""

import sys
from pathlib import Path

import lance

from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.errors import InputError
from orbithash.encoders.files import new_folder

# What images were refused, and why: a dataset of its own inside of the archive.
REFUSED = "_refused.lance"


def copy(source: Path, target: Path) -> Archive:
    """The copy, which is at `target` when it is whole. `InputError` where that exists, or `source` is no archive."""
    if target.exists():
        raise InputError(f"{target} exists; choose a new folder")
    archive = Archive.open(source)
    with new_folder(target) as part:
        for name, version in ((".", archive.version), (REFUSED, None)):
            if not Path(archive.path, name).is_dir():
                continue
            dataset = lance.dataset(str(Path(archive.path, name)), version=version)
            dataset.deep_clone(str(part / name), dataset.version)
        made = Archive.open(part)
        if made.num_rows != archive.num_rows:
            raise InputError(
                f"{part} has {made.num_rows} rows, version {archive.version} of {source} {archive.num_rows}"
            )
    return Archive.open(target)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: {Path(sys.argv[0]).name} SOURCE TARGET")
    try:
        copied = copy(Path(sys.argv[1]), Path(sys.argv[2]))
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"version {copied.version} with {copied.num_rows} rows")
