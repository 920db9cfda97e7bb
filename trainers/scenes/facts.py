"""The facts of a scene that its captions state, and their wording."""

import math
from dataclasses import dataclass, field

from orbithash.trainers.scenes.geometry import EXTENT, Point

__all__ = ["Facts", "compass", "course", "joined", "place"]


@dataclass(frozen=True)
class Facts:
    """The facts that captions can state about one scene.

    Args:
        counts: number of visible objects of each kind, by the singular noun.
        words: colours, positions and directions in words, by the name of the placeholder.
    """

    counts: dict[str, int] = field(default_factory=dict)
    words: dict[str, str] = field(default_factory=dict)


def place(point: Point) -> str:
    """Return the position of a point in the image in words, on a grid of 3 x 3: "upper left", "centre", "right"."""
    column, row = (min(2, max(0, int(value / EXTENT * 3))) for value in point)
    across, down = ("left", "", "right")[column], ("upper", "", "lower")[row]
    if not across and not down:
        return "centre"
    if not across:
        return {"upper": "top", "lower": "bottom"}[down]
    return f"{down} {across}".strip()


def compass(angle: float) -> str:
    """Return the compass direction, in words, of an angle in radians, clockwise from east."""
    names = ("east", "south-east", "south", "south-west", "west", "north-west", "north", "north-east")
    return names[round(angle / (math.pi / 4)) % 8]


def course(angle: float) -> str:
    """Return the course, in words, of a line at an angle in radians, clockwise from east: "from north to south"."""
    toward = compass(angle)
    pairs = {"north": "south", "north-east": "south-west", "west": "east", "north-west": "south-east"}
    for first, second in pairs.items():
        if toward in (first, second):
            return f"from {first} to {second}"
    raise AssertionError(toward)


def joined(words: list[str]) -> str:
    """Return a list of words joined as in a sentence: "green, yellow and brown"."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
