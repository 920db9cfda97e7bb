"""Farmland: rectangular parcels, and circular fields with centre-pivot irrigation."""

import math

import numpy as np

from orbithash.trainers.scenes.canvas import Canvas
from orbithash.trainers.scenes.facts import Facts, course, joined, place
from orbithash.trainers.scenes.geometry import EXTENT, MIDDLE, Frame, Shape, circle, inside
from orbithash.trainers.scenes.palette import SAND, Color, mixed, pick, scaled

__all__ = ["draw_circular_farmland", "draw_farmland"]

Parcel = tuple[float, float, float, float]
"""A rectangle in metres of a frame: minimum u, minimum v, maximum u, maximum v."""

CROPS: dict[str, Color] = {
    "green": (92, 132, 58),
    "dark green": (56, 92, 46),
    "yellow": (202, 178, 84),
    "straw-coloured": (198, 174, 122),
    "brown": (134, 100, 72),
}


def draw_farmland(canvas: Canvas, rng: np.random.Generator) -> Facts:
    """Draw a patchwork of parcels, each with its own crop and furrows, separated by hedges and a track."""
    frame = Frame(rng.uniform(0, math.pi))
    canvas.meadow()
    parcels = _parcels((-118, -118, 118, 118), rng, int(rng.integers(2, 5)))
    crops: list[str] = []
    for parcel in parcels:
        name, color = pick(rng, CROPS)
        _parcel(canvas, frame, parcel, color, rng)
        if _area_seen(frame, parcel) > 150:
            crops.append(name)
        if rng.random() < 0.35:
            u, start, _, end = parcel
            hedge = [frame.at(u, v + rng.normal(0, 1)) for v in np.arange(start, end, 6.0).tolist()]
            canvas.trees([spot for spot in hedge if rng.random() < 0.8], 2.6)
    track = canvas.season.covered(mixed(canvas.season.soil, (224, 210, 186), 0.5), 0.6)
    cut = parcels[0][2]
    canvas.line(frame.path([(cut, -160), (cut, 160)]), track, 4)
    colors = "snow-covered" if canvas.season.snow else joined(sorted(set(crops)))
    return Facts({"field": len(crops)}, {"colors": colors, "course": course(frame.angle + math.pi / 2)})


def _parcels(whole: Parcel, rng: np.random.Generator, depth: int) -> list[Parcel]:
    """Split a rectangle across its longer side, `depth` times over, and return the parts."""
    u0, v0, u1, v1 = whole
    if depth == 0 or max(u1 - u0, v1 - v0) < 44:
        return [whole]
    share = rng.uniform(0.34, 0.66)
    if u1 - u0 > v1 - v0:
        cut = u0 + share * (u1 - u0)
        halves = (u0, v0, cut, v1), (cut, v0, u1, v1)
    else:
        cut = v0 + share * (v1 - v0)
        halves = (u0, v0, u1, cut), (u0, cut, u1, v1)
    return [parcel for half in halves for parcel in _parcels(half, rng, depth - 1)]


def _area_seen(frame: Frame, parcel: Parcel) -> float:
    """Return the approximate area in square metres of the part of a parcel inside the scene."""
    u0, v0, u1, v1 = parcel
    us, vs = np.linspace(u0, u1, 16).tolist(), np.linspace(v0, v1, 16).tolist()
    return sum(inside(frame.at(u, v)) for u in us for v in vs) / 256 * (u1 - u0) * (v1 - v0)


def _parcel(canvas: Canvas, frame: Frame, parcel: Parcel, color: Color, rng: np.random.Generator) -> None:
    """Draw one field with furrows parallel to one of its sides, and leave a strip of grass around it."""
    u0, v0, u1, v1 = (edge + strip for edge, strip in zip(parcel, (1.4, 1.4, -1.4, -1.4), strict=True))
    covered = canvas.season.covered(color, 0.72)
    canvas.fill([frame.path([(u0, v0), (u1, v0), (u1, v1), (u0, v1)])], covered)
    furrow, pitch = scaled(covered, rng.uniform(0.8, 0.94)), rng.uniform(4.5, 9)
    lines: list[Shape]
    if rng.random() < 0.5:
        lines = [[(u, v0), (u, v1)] for u in np.arange(u0 + 2, u1, pitch).tolist()]
    else:
        lines = [[(u0, v), (u1, v)] for v in np.arange(v0 + 2, v1, pitch).tolist()]
    for line in lines:
        canvas.line(frame.path(line), furrow, pitch * 0.4)


def draw_circular_farmland(canvas: Canvas, rng: np.random.Generator) -> Facts:
    """Draw circular fields on dry ground, each with the arm of its sprinkler and its wheel tracks."""
    ground_name, ground = pick(rng, SAND)
    canvas.cover(canvas.texture(scaled(ground, 0.92), canvas.noise(45, 4) * 0.12))
    radius = rng.uniform(34, 92)
    pitch = 2 * radius + rng.uniform(3, 8)
    shift = rng.uniform(-0.3, 0.3, 2) * radius if radius > 62 or rng.random() < 0.4 else np.full(2, pitch / 2)
    frame = Frame(rng.normal(0, 0.05)).beside(*shift.tolist())
    fields = []
    for column in range(-3, 4):
        edge = (column + 0.5) * pitch
        canvas.line(frame.path([(-300, edge), (300, edge)]), scaled(ground, 1.08), 2.5)
        fields += [frame.beside(column * pitch, row * pitch, rng.uniform(0, 6.28)) for row in range(-3, 4)]
    seen = [field for field in fields if _distance(field) < radius - 4]
    crops = [_pivot(canvas, field, radius, rng) for field in seen]
    biggest = min(range(len(seen)), key=lambda i: math.hypot(seen[i].x - MIDDLE, seen[i].y - MIDDLE))
    where = place((seen[biggest].x, seen[biggest].y))
    return Facts({"circle": len(seen)}, {"crop": crops[biggest], "where": where, "ground": ground_name})


def _distance(frame: Frame) -> float:
    """Return the distance in metres from the origin of a frame to the nearest point of the scene."""
    return math.hypot(*(max(-value, 0, value - EXTENT) for value in (frame.x, frame.y)))


def _pivot(canvas: Canvas, frame: Frame, radius: float, rng: np.random.Generator) -> str:
    """Draw one circular field, sometimes with a sector of another crop; return the name of its crop colour."""
    x, y = frame.x, frame.y
    name, color = pick(rng, CROPS)
    canvas.disc(x, y, radius, color)
    if rng.random() < 0.55:
        turns = np.linspace(0, rng.uniform(0.7, 2.6), 24).tolist()
        sector = [(0.0, 0.0), *((radius * math.cos(turn), radius * math.sin(turn)) for turn in turns)]
        canvas.fill([frame.path(sector)], pick(rng, CROPS)[1])
    for reach in np.arange(8, radius, rng.uniform(7, 12)).tolist():
        rut = circle(x, y, reach, 40)
        canvas.line([*rut, rut[0]], scaled(color, 0.82), 0.8)
    canvas.line([(x, y), frame.at(radius, 0)], (222, 224, 224), 1.2)
    canvas.disc(x, y, 2.2, (226, 222, 210))
    return name
