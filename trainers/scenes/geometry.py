"""Shapes in metres. The origin is the upper left corner of the scene; x points east, y points south."""

import math
from collections.abc import Sequence

import numpy as np

__all__ = ["EXTENT", "MIDDLE", "Frame", "Point", "Shape", "blob", "circle", "inside", "ribbon", "wavy"]

EXTENT = 192.0
"""Side of a scene on the ground, in metres."""

MIDDLE = EXTENT / 2

Point = tuple[float, float]
Shape = list[Point]


class Frame:
    """A rotated coordinate system with its origin at (x, y).

    The axis u points along `angle` (radians, clockwise from east); v is 90 degrees clockwise from u.
    """

    def __init__(self, angle: float, x: float = MIDDLE, y: float = MIDDLE) -> None:
        self.angle, self.x, self.y = angle, x, y
        self._cos, self._sin = math.cos(angle), math.sin(angle)

    def at(self, u: float, v: float) -> Point:
        """Convert a point of this frame to scene coordinates."""
        return self.x + u * self._cos - v * self._sin, self.y + u * self._sin + v * self._cos

    def path(self, points: Sequence[Point]) -> Shape:
        """Convert several points of this frame to scene coordinates."""
        return [self.at(u, v) for u, v in points]

    def box(self, u: float, v: float, length: float, width: float) -> Shape:
        """Return the rectangle with its centre at (u, v): `length` along u, `width` along v."""
        a, b = length / 2, width / 2
        return self.path([(u - a, v - b), (u + a, v - b), (u + a, v + b), (u - a, v + b)])

    def beside(self, u: float, v: float, turn: float = 0.0) -> "Frame":
        """Return a frame with its origin at (u, v) of this frame, rotated by another `turn` radians."""
        return Frame(self.angle + turn, *self.at(u, v))


def inside(point: Point, margin: float = 0.0) -> bool:
    """Return whether a point lies in the scene, at least `margin` metres from its edge."""
    return all(margin <= value <= EXTENT - margin for value in point)


def circle(x: float, y: float, radius: float, corners: int = 24) -> Shape:
    """Return a regular polygon that approximates a circle."""
    turns = [2 * math.pi * corner / corners for corner in range(corners)]
    return [(x + radius * math.cos(turn), y + radius * math.sin(turn)) for turn in turns]


def blob(rng: np.random.Generator, x: float, y: float, radius: float, stretch: float = 1.4, turn: float = 0.0) -> Shape:
    """Return a rounded, irregular polygon of about this radius, elongated along the angle `turn` (radians)."""
    turns = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    radii = np.full(turns.size, radius, np.float64)
    for wave in (2, 3, 5):
        radii += radius * rng.uniform(0.04, 0.3) / wave * np.cos(wave * turns + rng.uniform(0, 2 * np.pi))
    u, v = radii * np.cos(turns) * stretch, radii * np.sin(turns) / stretch
    return list(
        zip(
            (x + u * math.cos(turn) - v * math.sin(turn)).tolist(),
            (y + u * math.sin(turn) + v * math.cos(turn)).tolist(),
            strict=True,
        )
    )


def wavy(rng: np.random.Generator, frame: Frame, amplitude: float, reach: float = EXTENT, waves: float = 1.3) -> Shape:
    """Return a path through the whole scene along u that oscillates around v = 0 by about `amplitude` metres."""
    u = np.linspace(-reach, reach, 97)
    v = np.zeros_like(u)
    for share, factor in ((0.82, 1.0), (0.18, 2.1)):
        v += share * amplitude * np.sin(np.pi * waves * factor * u / EXTENT * 2 + rng.uniform(0, 2 * np.pi))
    return frame.path(list(zip(u.tolist(), v.tolist(), strict=True)))


def ribbon(path: Shape, width: float, shift: float = 0.0) -> Shape:
    """Return the outline of a band of this width along a path, moved `shift` metres to the right of the path."""
    points = np.asarray(path)
    along = np.gradient(points, axis=0)
    across = np.stack([-along[:, 1], along[:, 0]], axis=1) / np.linalg.norm(along, axis=1, keepdims=True)
    left, right = points + across * (shift - width / 2), points + across * (shift + width / 2)
    return [(x, y) for x, y in np.concatenate([left, right[::-1]]).tolist()]
