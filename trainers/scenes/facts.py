"""What is in a scene, as the drawing knows it."""

import math
from dataclasses import dataclass, field

from orbithash.trainers.scenes.geometry import EXTENT, Point

__all__ = ["Facts", "compass", "course", "joined", "place"]


@dataclass(frozen=True)
class Facts:
    """What captions may say of one scene.

    Args:
        counts: how many of each thing are seen, by its name in the singular.
        words: colours, positions and the like, by the name that captions use.
    """

    counts: dict[str, int] = field(default_factory=dict)
    words: dict[str, str] = field(default_factory=dict)


def place(point: Point) -> str:
    """Which ninth of the image a point lies in: "upper left", "centre", "right"."""
    column, row = (min(2, max(0, int(value / EXTENT * 3))) for value in point)
    across, down = ("left", "", "right")[column], ("upper", "", "lower")[row]
    if not across and not down:
        return "centre"
    if not across:
        return {"upper": "top", "lower": "bottom"}[down]
    return f"{down} {across}".strip()


def compass(angle: float) -> str:
    """The direction in words that an image angle (radians, clockwise from the right, north up) points to."""
    names = ("east", "south-east", "south", "south-west", "west", "north-west", "north", "north-east")
    return names[round(angle / (math.pi / 4)) % 8]


def course(angle: float) -> str:
    """How a line of that image angle runs: "from north to south"."""
    toward = compass(angle)
    pairs = {"north": "south", "north-east": "south-west", "west": "east", "north-west": "south-east"}
    for first, second in pairs.items():
        if toward in (first, second):
            return f"from {first} to {second}"
    raise AssertionError(toward)


def joined(words: list[str]) -> str:
    """Words as a list in a sentence: "green, yellow and brown"."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
