"""Housing, storage tanks and solar farms."""

import math

import numpy as np

from orbithash.trainers.scenes.canvas import Canvas
from orbithash.trainers.scenes.facts import Facts, course, place
from orbithash.trainers.scenes.geometry import Frame, Point, circle, inside, wavy
from orbithash.trainers.scenes.palette import ASPHALT, CONCRETE, ROOFS, WHITE, Color, mixed, pick, scaled, varied

__all__ = ["draw_dense_residential", "draw_solar_farm", "draw_sparse_residential", "draw_storage_tanks"]

POOL: Color = (70, 186, 204)
TANKS = {"white": (226, 226, 220), "grey": (160, 162, 162), "rust-brown": (142, 92, 66), "pale green": (172, 188, 164)}
PANELS = {"dark blue": (34, 46, 84), "black": (32, 34, 42), "blue": (44, 66, 116)}


def draw_dense_residential(canvas: Canvas, rng: np.random.Generator) -> Facts:
    """Draw rows of houses along parallel streets."""
    frame = Frame(rng.uniform(0, math.pi))
    canvas.meadow()
    roof_name, roof = pick(rng, ROOFS)
    others = [varied(color, rng) for color in ROOFS.values()]
    lot, deep = rng.uniform(14, 19), rng.uniform(25, 31)
    street = varied(ASPHALT["grey"], rng, 0.15)
    streets = np.arange(-3, 4) * (2 * deep + 8.0) + rng.uniform(-20, 20)
    cross = rng.uniform(-60, 60)
    houses: list[Frame] = []
    trees: list[Point] = []
    for v in streets.tolist():
        canvas.road(frame.path([(-200, v), (200, v)]), 7, street)
        for side in (-1, 1):
            for u in np.arange(-140, 140, lot).tolist():
                if abs(u - cross) > lot * 0.5 + 5:
                    houses.append(frame.beside(u, v + side * (deep * 0.52 + rng.uniform(-1, 1)), rng.normal(0, 0.03)))
                    trees += [frame.at(u + rng.uniform(-0.5, 0.5) * lot, v + side * deep * rng.uniform(0.85, 1.0))]
    canvas.road(frame.path([(cross, -200), (cross, 200)]), 8, street, WHITE)
    houses = [house for house in houses if inside((house.x, house.y), 3)]
    canvas.trees([tree for tree in trees if rng.random() < 0.8], rng.uniform(2.4, 3.6))
    _houses(canvas, houses, (lot * 0.78, deep * 0.4), [roof] * 6 + others, rng)
    seen = sum(_shows(frame, v) for v in streets.tolist()) + 1
    return Facts({"house": len(houses), "street": seen}, {"roof": roof_name, "course": course(frame.angle)})


def _shows(frame: Frame, v: float) -> bool:
    """Return whether the line at v, parallel to u, crosses the scene."""
    return any(inside(frame.at(u, v), 2) for u in np.linspace(-140, 140, 57).tolist())


def _houses(
    canvas: Canvas, spots: list[Frame], size: tuple[float, float], roofs: list[Color], rng: np.random.Generator
) -> None:
    """Draw a house at each spot; `size` is its approximate length (along u) and width in metres."""
    sizes = [(size[0] * rng.uniform(0.82, 1.08), size[1] * rng.uniform(0.85, 1.12)) for _ in spots]
    canvas.cast([spot.box(0, 0, *area) for spot, area in zip(spots, sizes, strict=True)], 5.5)
    for spot, (length, width) in zip(spots, sizes, strict=True):
        color = varied(roofs[rng.integers(len(roofs))], rng, 0.1)
        if rng.random() < 0.35:
            canvas.gable(spot.beside(length * 0.2, width * 0.42, math.pi / 2), width * 0.8, length * 0.45, color)
        canvas.gable(spot, length, width, color)
        canvas.fill([spot.box(length * 0.25, width * 0.2, 1.2, 1.2)], (96, 88, 84))


def draw_sparse_residential(canvas: Canvas, rng: np.random.Generator) -> Facts:
    """Draw a few houses among trees, in large gardens on a winding lane."""
    frame = Frame(rng.uniform(0, math.pi))
    canvas.meadow()
    lane = wavy(rng, frame, rng.uniform(4, 10), waves=0.7)
    roof_name, roof = pick(rng, ROOFS)
    pale = mixed(ASPHALT["pale grey"], canvas.season.soil, 0.5)
    canvas.road(lane, 6, pale)
    houses, pools = [], 0
    for u, side in ((-62, -1), (-58, 1), (0, -1), (6, 1), (60, -1), (64, 1)):
        spot = frame.beside(u + rng.uniform(-7, 7), side * rng.uniform(34, 46), rng.uniform(-0.4, 0.4))
        if rng.random() < 0.7 and inside((spot.x, spot.y), 14):
            houses.append(spot)
            canvas.line([(spot.x, spot.y), frame.at(u, side * 4)], canvas.season.covered(pale, 0.4), 3.5)
            pool = spot.beside(-2, side * 17)
            if rng.random() < 0.5 and not canvas.season.snow and inside((pool.x, pool.y), 6):
                pools += 1
                canvas.fill([pool.box(0, 0, 14, 9)], canvas.season.covered((204, 196, 182)))
                canvas.fill([pool.box(0, 0, 10, 5)], POOL)
    houses = houses or [frame.beside(0, 36)]
    _garden_trees(canvas, frame, houses, lane, rng)
    _houses(canvas, houses, (20, 13), [roof], rng)
    return Facts({"house": len(houses), "pool": pools}, {"roof": roof_name, "course": course(frame.angle)})


def _garden_trees(
    canvas: Canvas, frame: Frame, houses: list[Frame], lane: list[Point], rng: np.random.Generator
) -> None:
    """Draw trees in the gardens, clear of the houses, the pools behind them and the lane."""
    keep_off = [(house.x, house.y) for house in houses]
    spots = rng.uniform(-8, 200, (int(rng.integers(90, 220)), 2)).tolist()
    spots = [(x, y) for x, y in spots if abs(_across(frame, x, y)) > 16]
    free = [(x, y) for x, y in spots if all(math.hypot(x - hx, y - hy) > 26 for hx, hy in keep_off)]
    canvas.trees(free, rng.uniform(3.2, 5))


def _across(frame: Frame, x: float, y: float) -> float:
    """Return the v coordinate in the frame of a point in scene coordinates."""
    return -(x - frame.x) * math.sin(frame.angle) + (y - frame.y) * math.cos(frame.angle)


def draw_storage_tanks(canvas: Canvas, rng: np.random.Generator) -> Facts:
    """Draw cylindrical tanks inside low walls, connected by pipes."""
    frame = Frame(rng.uniform(0, math.pi))
    _, yard = pick(rng, {**CONCRETE, "sand": (186, 164, 132)})
    canvas.cover(canvas.texture(canvas.season.covered(yard, 0.5), canvas.noise(35, 4) * 0.1))
    columns, rows = int(rng.integers(2, 5)), int(rng.integers(2, 5))
    pitch = min(156 / max(columns, rows), rng.uniform(48, 76))
    name, color = pick(rng, TANKS)
    across = [(column - (columns - 1) / 2) * pitch for column in range(columns)]
    down = [(row - (rows - 1) / 2) * pitch for row in range(rows)]
    spots = [frame.beside(u, v) for u in across for v in down if rng.random() < 0.88] or [frame]
    lawns = [frame.box(0, side * 140, 400, 100) for side in (-1, 1)]
    canvas.fill(lawns, canvas.season.covered(canvas.season.grass))
    road = frame.path([(-200, 84), (200, 84)])
    canvas.road(road, 7, varied(ASPHALT["grey"], rng), WHITE)
    for spot in spots:
        canvas.fill([spot.box(0, 0, pitch * 0.94, pitch * 0.94)], canvas.season.covered(scaled(yard, 1.14), 0.3))
        canvas.fill([spot.box(0, 0, pitch * 0.88, pitch * 0.88)], canvas.season.covered(scaled(yard, 0.86), 0.4))
    for v in down:
        canvas.line(frame.path([(-100, v + pitch * 0.4), (100, v + pitch * 0.4)]), (206, 204, 198), 1.2)
    radius = pitch * rng.uniform(0.3, 0.38)
    floating = rng.random() < 0.5
    seen = [spot for spot in spots if inside((spot.x, spot.y), 6)]
    radii = [radius * rng.uniform(0.8, 1.05) for _ in seen]
    canvas.cast([circle(spot.x, spot.y, size) for spot, size in zip(seen, radii, strict=True)], min(12, radius * 0.7))
    for spot, size in zip(seen, radii, strict=True):
        _tank(canvas, spot, size, varied(color, rng, 0.06), floating)
    roof = "floating roofs" if floating else "domed roofs"
    return Facts({"tank": len(seen)}, {"color": name, "roof": roof, "course": course(frame.angle)})


def _tank(canvas: Canvas, spot: Frame, radius: float, color: Color, floating: bool) -> None:
    """Draw one tank: its rim and either a floating roof with a shadow on it or a dome lit from one side."""
    x, y = spot.x, spot.y
    canvas.disc(x, y, radius, canvas.season.covered(scaled(color, 1.1), 0.3))
    sun_x, sun_y = canvas.light.toward
    if floating:
        canvas.disc(x, y, radius * 0.92, scaled(color, 0.5))
        canvas.disc(x - sun_x * radius * 0.14, y - sun_y * radius * 0.14, radius * 0.8, scaled(color, 0.88))
        canvas.disc(x, y, radius * 0.1, scaled(color, 0.6))
    else:
        for step in range(6):
            shift, share = radius * 0.09 * step, 0.93 - 0.15 * step
            tone = canvas.season.covered(scaled(color, 0.76 + 0.08 * step), 0.3)
            canvas.disc(x + sun_x * shift, y + sun_y * shift, radius * share, tone)
    canvas.line([(x, y), spot.at(radius, 0)], scaled(color, 0.6), 1)


def draw_solar_farm(canvas: Canvas, rng: np.random.Generator) -> Facts:
    """Draw blocks of long rows of solar panels, separated by service tracks."""
    frame = Frame(rng.uniform(-0.3, 0.3) + (math.pi / 2 if rng.random() < 0.3 else 0))
    canvas.meadow()
    name, color = pick(rng, PANELS)
    pitch, width = rng.uniform(7.5, 11), rng.uniform(4.2, 5.6)
    half_u, half_v = rng.uniform(66, 88), rng.uniform(62, 86)
    gap_u, gap_v = rng.uniform(-20, 20), rng.uniform(-20, 20)
    track = canvas.season.covered(mixed(canvas.season.soil, WHITE, 0.3), 0.7)
    canvas.line(frame.path([(gap_u, -200), (gap_u, 200)]), track, 5)
    canvas.line(frame.path([(-200, gap_v), (200, gap_v)]), track, 5)
    rows = [v for v in np.arange(-half_v, half_v, pitch).tolist() if abs(v - gap_v) > pitch * 0.8]
    parts = [((gap_u - 5 - half_u) / 2, gap_u - 5 + half_u), ((gap_u + 5 + half_u) / 2, half_u - gap_u - 5)]
    panels = [frame.box(u, v, length, width) for v in rows for u, length in parts]
    canvas.cast(panels, 2.2, 0.5)
    canvas.fill(panels, color)
    for v in rows:
        for edge, tone in ((-0.5, 1.9), (0, 1.35)):
            for u, length in parts:
                ends = [(u - length / 2, v + edge * width), (u + length / 2, v + edge * width)]
                canvas.line(frame.path(ends), scaled(color, tone), 0.5)
    hut = frame.beside(gap_u + 8, gap_v)
    canvas.cast([hut.box(0, 0, 7, 4)], 3)
    canvas.fill([hut.box(0, 0, 7, 4)], (226, 226, 222))
    words = {"color": name, "course": course(frame.angle), "where": place((hut.x, hut.y))}
    return Facts({"row": len(rows), "block": 4, "track": 2}, words)
