"""Harbours: a marina with piers and boats."""

import math

import numpy as np

from orbithash.trainers.scenes.canvas import Canvas
from orbithash.trainers.scenes.facts import Facts, compass
from orbithash.trainers.scenes.geometry import Frame, Shape, inside
from orbithash.trainers.scenes.palette import CONCRETE, ROOFS, WATER, WHITE, Color, mixed, pick, scaled, varied

__all__ = ["draw_harbor"]

HULLS: tuple[Color, ...] = (*3 * ((240, 240, 238), (226, 230, 234), (244, 242, 232)), (54, 74, 120), (160, 56, 48))


def draw_harbor(canvas: Canvas, rng: np.random.Generator) -> Facts:
    """Draw a marina: a quay with piers and boats moored on both sides of each pier."""
    angle = rng.uniform(0, 2 * math.pi)
    frame = Frame(angle)
    name, water = pick(rng, WATER)
    ripples = canvas.stripes(5, rng.uniform(0, math.pi)) * 0.03 + canvas.noise(50, 4) * 0.09
    canvas.cover(canvas.texture(water, ripples))
    quay = rng.uniform(-62, -44)
    _, pavement = pick(rng, CONCRETE)
    canvas.cast([frame.box(quay - 100, 0, 200, 400)], 2)
    canvas.fill([frame.box(quay - 100, 0, 200, 400)], pavement)
    canvas.fill([frame.box(quay - 0.8, 0, 1.6, 400)], scaled(pavement, 1.2))
    canvas.fill([frame.box(quay - 15, 0, 8, 400)], (104, 104, 106))
    _sheds(canvas, frame.beside(quay - 27, 0), rng)
    size = rng.uniform(10, 19)
    pitch = 2 * size + rng.uniform(12, 18)
    places = np.arange(-130, 130, pitch) + rng.uniform(0, pitch)
    length = rng.uniform(80, 118)
    boats = piers = 0
    for v in places.tolist():
        if inside(frame.at(quay + 20, v), 2):
            boats += _pier(canvas, frame.beside(quay, v), length, size, rng)
            piers += 1
    under_way = _under_way(canvas, frame.beside(quay + length + 16, 0), size, rng)
    land = compass(angle + math.pi)
    return Facts({"boat": boats + under_way, "pier": piers}, {"water": name, "land": land})


def _sheds(canvas: Canvas, frame: Frame, rng: np.random.Generator) -> None:
    for v in np.arange(-105, 120, 42).tolist():
        if rng.random() < 0.75 or abs(v) < 25:
            shed = frame.beside(rng.uniform(-4, 4), v + rng.uniform(-4, 4), math.pi / 2)
            length = rng.uniform(20, 34)
            canvas.cast([shed.box(0, 0, length, 14)], 6)
            canvas.gable(shed, length, 14, pick(rng, ROOFS)[1])


def _pier(canvas: Canvas, frame: Frame, length: float, size: float, rng: np.random.Generator) -> int:
    """Draw a pier along u with boats on both sides; return the number of visible boats."""
    spots = []
    for side in (-1, 1):
        for u in np.arange(10, length - 2, size * 0.48).tolist():
            spot = frame.beside(u, side * (size * 0.5 + 2.2), side * math.pi / 2)
            if rng.random() < 0.72 and inside((spot.x, spot.y), 3):
                spots.append((spot, size * rng.uniform(0.75, 1.0)))
    deck = frame.box(length / 2, 0, length, 2.6)
    canvas.cast([deck, *(_hull(spot, longest) for spot, longest in spots)], 1.2)
    canvas.fill([deck], (178, 160, 136))
    for spot, longest in spots:
        _boat(canvas, spot, longest, rng)
    return len(spots)


def _boat(canvas: Canvas, spot: Frame, length: float, rng: np.random.Generator) -> None:
    """Draw one boat with its bow along u: hull, cockpit, and a cabin or a mast."""
    hull = HULLS[rng.integers(len(HULLS))]
    canvas.fill([_hull(spot, length)], varied(hull, rng, 0.04))
    canvas.fill([spot.box(-length * 0.26, 0, length * 0.3, length * 0.17)], (142, 112, 84))
    if rng.random() < 0.5:
        canvas.fill([spot.box(length * 0.1, 0, length * 0.28, length * 0.18)], mixed(hull, (90, 110, 130), 0.6))
    else:
        canvas.line(spot.path([(-length * 0.4, 0), (length * 0.2, 0)]), (70, 84, 122), 0.8)


def _hull(spot: Frame, length: float) -> Shape:
    half = 0.16
    outline = [(0.5, 0.0), (0.3, 0.11), (0.05, half), (-0.5, 0.13), (-0.5, -0.13), (0.05, -half), (0.3, -0.11)]
    return spot.path([(u * length, v * length) for u, v in outline])


def _under_way(canvas: Canvas, frame: Frame, size: float, rng: np.random.Generator) -> int:
    """Draw up to three boats under way beyond the piers, each with a wake; return the number of visible boats."""
    count = 0
    for v in (-55, 0, 55):
        spot = frame.beside(rng.uniform(0, 6), v + rng.uniform(-12, 12), math.pi / 2 + rng.uniform(-0.3, 0.3))
        if rng.random() < 0.4 and inside((spot.x, spot.y), 8):
            for side in (-1, 1):
                canvas.line(spot.path([(0, 0), (-size * 1.9, side * size * 0.4)]), (188, 206, 210), 1.0)
            canvas.line(spot.path([(-size * 0.4, 0), (-size * 1.4, 0)]), WHITE, 1.2)
            _boat(canvas, spot, size, rng)
            count += 1
    return count
