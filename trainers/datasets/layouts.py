"""The result of every finder: images with their classes, sentences and second sources, and the problems."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orbithash.encoders.sources.folders import natural

__all__ = ["MAX_LISTED", "FoundImages", "LabelledImage", "by_path", "first_problems", "read_json"]

# Problems of each kind that an error message lists.
MAX_LISTED = 10


@dataclasses.dataclass(frozen=True)
class LabelledImage:
    """An image before the split.

    Paths are absolute, of objects relative to their folder. `split` is the part that the dataset states, "" if it does
    not.
    """

    path: Path
    classes: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()
    second: Path | None = None
    split: str = ""


@dataclasses.dataclass(frozen=True)
class FoundImages:
    """The images of a dataset in the order of the manifest, the names of its classes, and all its problems."""

    rows: list[LabelledImage]
    classes: tuple[str, ...]
    problems: list[str]


def by_path(rows: Sequence[LabelledImage], root: Path) -> list[LabelledImage]:
    """Return the images in natural order of their paths below `root`."""
    return sorted(rows, key=lambda row: natural(row.path.relative_to(root).as_posix()))


def first_problems(problems: Sequence[str]) -> list[str]:
    """Return the first ten problems of one kind, and a line with the number of others."""
    if len(problems) <= MAX_LISTED:
        return list(problems)
    return [*problems[:MAX_LISTED], f"and {len(problems) - MAX_LISTED} more"]


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; `ValueError` in one line when it cannot be read or is damaged."""
    try:
        return json.loads(path.read_bytes())
    except OSError as err:
        raise ValueError(f"{path.name} cannot be read ({err.strerror})") from err
    except (ValueError, RecursionError) as err:
        raise ValueError(f"{path.name} is damaged, or not JSON ({err})") from err
