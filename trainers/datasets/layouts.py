"""What every layout's finder gives back: images with their classes, sentences and second sources, and what is wrong."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orbithash.encoders.imagery.folders import natural

__all__ = ["MAX_LISTED", "Found", "Row", "by_path", "cut", "read_json"]

# Of each kind of problem.
MAX_LISTED = 10


@dataclasses.dataclass(frozen=True)
class Row:
    """One image before the split. Paths are absolute."""

    path: Path
    classes: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()
    second: Path | None = None


@dataclasses.dataclass(frozen=True)
class Found:
    """The images of a dataset in the manifest's order, the names of its classes, and all that is wrong with it."""

    rows: list[Row]
    classes: tuple[str, ...]
    problems: list[str]


def by_path(rows: Sequence[Row], root: Path) -> list[Row]:
    """The rows in natural order of their paths below `root`."""
    return sorted(rows, key=lambda row: natural(row.path.relative_to(root).as_posix()))


def cut(problems: Sequence[str]) -> list[str]:
    """The first ten of one kind of problem, and how many more there are."""
    if len(problems) <= MAX_LISTED:
        return list(problems)
    return [*problems[:MAX_LISTED], f"and {len(problems) - MAX_LISTED} more"]


def read_json(path: Path) -> Any:
    """The content of a JSON file; `ValueError` in one line when it cannot be read or is damaged."""
    try:
        return json.loads(path.read_bytes())
    except OSError as err:
        raise ValueError(f"{path.name} cannot be read ({err.strerror})") from err
    except (ValueError, RecursionError) as err:
        raise ValueError(f"{path.name} is damaged, or no JSON ({err})") from err
