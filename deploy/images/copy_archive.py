#!/usr/bin/env python3
"""Copy the newest version of an archive. Arguments: SOURCE TARGET.

The copy is consistent even if the archive changes meanwhile. Copying file by file is not: a commit between two files
would leave a version without its rows.
"""

import sys
from pathlib import Path

import lance

from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.errors import InputError
from orbithash.encoders.files import new_folder

# The table of refused items, a dataset inside the archive's folder.
REFUSED = "_refused.lance"


def copy(source: Path, target: Path) -> Archive:
    """Copy the newest version of `source` to the new folder `target` and return the copy.

    `target` appears only when the copy is complete. Raises `InputError` if `target` exists or `source` is not an
    archive.
    """
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
