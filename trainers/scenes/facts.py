"""The facts of a drawn scene, for its captions."""

import math
from dataclasses import dataclass, field

from orbithash.trainers.scenes.geometry import EXTENT, Point

__all__ = ["Facts", "compass", "course", "joined", "place"]


@dataclass(frozen=True)
class Facts:
    """The facts that captions can state about one scene.

    Args:
        counts: number of visible objects of each kind, by its name in the singular.
        words: colours, positions and directions in words, by the name of their placeholder.
    """

    counts: dict[str, int] = field(default_factory=dict)
    words: dict[str, str] = field(default_factory=dict)


def place(point: Point) -> str:
    """Return the ninth of the image that contains a point: "upper left", "centre", "right"."""
    column, row = (min(2, max(0, int(value / EXTENT * 3))) for value in point)
    across, down = ("left", "", "right")[column], ("upper", "", "lower")[row]
    if not across and not down:
        return "centre"
    if not across:
        return {"upper": "top", "lower": "bottom"}[down]
    return f"{down} {across}".strip()


def compass(angle: float) -> str:
    """Return the compass direction of an image angle (radians, clockwise from the right, north up) in words."""
    names = ("east", "south-east", "south", "south-west", "west", "north-west", "north", "north-east")
    return names[round(angle / (math.pi / 4)) % 8]


def course(angle: float) -> str:
    """Return the course of a line at this image angle in words: "from north to south"."""
    toward = compass(angle)
    pairs = {"north": "south", "north-east": "south-west", "west": "east", "north-west": "south-east"}
    for first, second in pairs.items():
        if toward in (first, second):
            return f"from {first} to {second}"
    raise AssertionError(toward)


def joined(words: list[str]) -> str:
    """Return words joined as in a sentence: "green, yellow and brown"."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
