"""Forests, deserts, rivers and beaches."""

import math

import numpy as np

from orbithash.trainers.scenes.canvas import Canvas
from orbithash.trainers.scenes.facts import Facts, compass, course
from orbithash.trainers.scenes.geometry import EXTENT, Frame, Shape, blob, inside, ribbon, wavy
from orbithash.trainers.scenes.palette import CARS, SAND, WATER, WHITE, Color, mixed, pick, scaled, varied

__all__ = ["draw_beach", "draw_desert", "draw_forest", "draw_river"]

CONIFERS: tuple[Color, ...] = ((36, 62, 44), (46, 74, 50), (30, 54, 42))


def draw_forest(canvas: Canvas, rng: np.random.Generator) -> Facts:
    """Draw a closed canopy, sometimes with a track or clearings."""
    canvas.meadow(scaled(mixed(canvas.season.foliage[0], canvas.season.soil, 0.4), 0.72), 0.3)
    kind = ("conifers", "broad-leaved trees")[rng.integers(2)]
    radius = rng.uniform(3.4, 4.4) if kind == "conifers" else rng.uniform(4.6, 7)
    pitch = radius * 1.25
    steps = np.arange(-pitch, EXTENT + pitch, pitch)
    grid = np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2)
    spots = rng.permutation(grid + rng.uniform(-0.5, 0.5, grid.shape) * pitch)
    frame = Frame(rng.uniform(0, math.pi))
    corners = [(u, v) for u in (-62, 62) for v in (-62, 62)]
    clearings = [frame.at(u * 0.85, v * 0.85) for u, v in corners if rng.random() < 0.35]
    for x, y in clearings:
        hole = np.asarray(blob(rng, x, y, rng.uniform(14, 22)))
        nearest = np.linalg.norm(spots[:, None] - hole[None], axis=2).argmin(axis=1)
        away = np.hypot(spots[:, 0] - x, spots[:, 1] - y)
        spots = spots[away > np.hypot(*(hole - (x, y)).T)[nearest]]
    tracked = rng.random() < 0.45
    if tracked:
        path = wavy(rng, frame, rng.uniform(6, 16))
        canvas.fill([ribbon(path, 6)], canvas.season.covered(scaled(canvas.season.soil, 1.15)))
        line = np.asarray(path)[::2]
        spots = spots[np.linalg.norm(spots[:, None] - line[None], axis=2).min(axis=1) > radius + 3]
    canvas.trees([(x, y) for x, y in spots.tolist()], radius, CONIFERS if kind == "conifers" else (), shaded=False)
    track = f"a track {course(frame.angle)}" if tracked else "no track"
    return Facts({"clearing": len(clearings)}, {"kind": kind, "track": track})


def draw_desert(canvas: Canvas, rng: np.random.Generator) -> Facts:
    """Draw wind-blown dunes with sharp crests and scattered shrubs."""
    name, color = pick(rng, SAND)
    angle = rng.uniform(0, math.pi)
    warp = canvas.noise(80, 2) * rng.uniform(9, 18)
    phase = (canvas.grid(angle) + warp) / rng.uniform(24, 60)
    rise = phase - np.floor(phase)
    # The windward slope of a dune is gentle, the leeward slope steep.
    slope = np.where(rise < 0.72, 0.1 + 0.2 * rise, -0.34 + 1.1 * (rise - 0.72))
    lit = float(canvas.light.toward[0] * math.cos(angle) + canvas.light.toward[1] * math.sin(angle))
    ripples = canvas.stripes(5.5, angle + 0.3) * 0.02
    relief = slope * (-1 if lit > 0 else 1) * 0.8 + ripples + canvas.noise(50, 3) * 0.07
    canvas.cover(canvas.texture(color, relief.astype(np.float32)))
    shrubs = [(x, y) for x, y in rng.uniform(4, EXTENT - 4, (int(rng.integers(0, 26)), 2)).tolist()]
    if shrubs:
        canvas.trees(shrubs, rng.uniform(1.6, 2.8), [(96, 98, 62), (116, 108, 70)])
    return Facts({"shrub": len(shrubs)}, {"color": name, "course": course(angle + math.pi / 2)})


def draw_river(canvas: Canvas, rng: np.random.Generator) -> Facts:
    """Draw a winding river between wooded banks, sometimes under a bridge."""
    frame = Frame(rng.uniform(0, math.pi))
    canvas.meadow()
    name, color = pick(rng, {**WATER, "brown": (122, 104, 76)})
    width = rng.uniform(24, 50)
    waves = rng.uniform(0.6, 1.3)
    # The radius of the tightest bend must exceed half the width, or the inner bank would intersect itself.
    tightest = (EXTENT / (2 * math.pi * waves)) ** 2 / (width / 2 + 12)
    path = wavy(rng, frame, min(rng.uniform(8, 26), 0.7 * tightest), waves=waves)
    line = np.asarray(path)[::2]
    spots = rng.uniform(-6, EXTENT + 6, (int(rng.integers(220, 460)), 2))
    away = np.linalg.norm(spots[:, None] - line[None], axis=2).min(axis=1)
    wood = spots[(away > width / 2 + 5) & (away < width / 2 + rng.uniform(20, 60))]
    canvas.fill([ribbon(path, width + 9, float(rng.uniform(-2, 2)))], canvas.season.covered(SAND["greyish"], 0.7))
    flow = canvas.noise(60, 4) * 0.1 + canvas.stripes(7, frame.angle + math.pi / 2) * 0.02
    canvas.fill([ribbon(path, width)], mixed(color, (150, 150, 120), 0.35))
    canvas.fill([ribbon(path, width - 5, float(rng.uniform(-1.5, 1.5)))], canvas.texture(color, flow))
    crossed = rng.random() < 0.45
    if crossed:
        middle = path[len(path) // 2]
        deck = Frame(frame.angle + math.pi / 2, *middle)
        wood = wood[np.abs((wood - middle) @ [math.cos(frame.angle), math.sin(frame.angle)]) > 12]
        canvas.trees([(x, y) for x, y in wood.tolist()], 3.8)
        canvas.cast([deck.box(0, 0, width + 30, 11)], 6)
        canvas.fill([deck.box(0, 0, 420, 11)], (184, 182, 176))
        canvas.fill([deck.box(0, 0, 420, 8)], canvas.season.covered((104, 104, 106), 0.1))
        canvas.dashes(deck.path([(-200, 0), (200, 0)]), WHITE, 0.5, 4, 5)
    else:
        canvas.trees([(x, y) for x, y in wood.tolist()], 3.8)
    bridge = "one bridge" if crossed else "no bridge"
    return Facts({}, {"color": name, "course": course(frame.angle), "bridge": bridge})


def draw_beach(canvas: Canvas, rng: np.random.Generator) -> Facts:
    """Draw the sea, the surf, a sandy beach with parasols, and the land behind it."""
    angle = rng.uniform(0, 2 * math.pi)
    frame = Frame(angle + math.pi / 2)
    water_name, water = pick(rng, {name: WATER[name] for name in ("turquoise", "blue", "dark blue")})
    sand_name, sand = pick(rng, SAND)
    shift = rng.uniform(-14, 26)
    shore = Frame(frame.angle, *Frame(angle).at(shift, 0))
    coast = wavy(rng, shore, rng.uniform(4, 12), waves=rng.uniform(0.4, 0.9))
    broad = rng.uniform(34, 56)
    canvas.meadow()
    _scrub(canvas, Frame(angle).beside(shift - broad - 30, 0), rng)
    canvas.fill([_seaward(coast, angle, -broad)], canvas.texture(sand, canvas.noise(24, 4) * 0.07))
    canvas.fill([_seaward(coast, angle, -9)], scaled(sand, 0.8))
    deep = canvas.grid(angle) - float(np.dot(shore.at(0, 0), (math.cos(angle), math.sin(angle))))
    sea = canvas.texture(mixed(water, (118, 190, 178), 0.45), np.clip(deep / 60 - 1, -1, 1), scaled(water, 0.85))
    canvas.fill([_seaward(coast, angle, 0)], sea)
    for distance in [0.0, *np.cumsum(rng.uniform(7, 13, rng.integers(1, 4))).tolist()]:
        _surf(canvas, coast, angle, distance, rng)
    parasols = _parasols(canvas, coast, angle, broad, rng)
    words = {"water": water_name, "sand": sand_name, "sea": compass(angle), "land": compass(angle + math.pi)}
    return Facts({"parasol": parasols}, words)


def _seaward(coast: Shape, angle: float, shift: float) -> Shape:
    """Return the area on the seaward side of the coastline, after moving the line `shift` metres seaward."""
    x, y = math.cos(angle), math.sin(angle)
    near = [(px + x * shift, py + y * shift) for px, py in coast]
    return [*near, *((px + x * 400, py + y * 400) for px, py in reversed(coast))]


def _surf(canvas: Canvas, coast: Shape, angle: float, distance: float, rng: np.random.Generator) -> None:
    """Draw a line of foam along the coast, with gaps where the wave has not broken yet."""
    moved = np.asarray(coast) + np.asarray((math.cos(angle), math.sin(angle))) * distance
    moved += rng.normal(0, 0.6, moved.shape)
    points = [(x, y) for x, y in moved.tolist()]
    if distance == 0:
        canvas.line(points, (214, 226, 224), 3.2)
    start = 0
    while start < len(points):
        end = start + int(rng.integers(2, 9))
        if rng.random() < 0.55:
            canvas.line(points[start : end + 1], (184, 212, 212), rng.uniform(1.6, 3.4))
            canvas.line(points[start + 1 : end], (242, 246, 246), rng.uniform(0.8, 1.6))
        start = end


def _scrub(canvas: Canvas, frame: Frame, rng: np.random.Generator) -> None:
    spots = [frame.at(*rng.normal(0, (22, 70)).tolist()) for _ in range(90)]
    canvas.trees(spots, rng.uniform(2.2, 3.6))


def _parasols(canvas: Canvas, coast: Shape, angle: float, broad: float, rng: np.random.Generator) -> int:
    """Draw parasols on the dry sand without overlaps; return their number."""
    crowd = rng.uniform(0, 0.9) if rng.random() < 0.75 else 0.0
    spots = [
        (x - back * math.cos(angle), y - back * math.sin(angle))
        for x, y in coast[::2]
        for back in np.arange(17, broad - 8, 9.0) + rng.uniform(-1, 1)
        if rng.random() < crowd
    ]
    spots = [spot for spot in spots if inside(spot, 4)]
    color = CARS[rng.integers(3, 5)]
    canvas.cast([[(x - 2, y - 2), (x + 2, y - 2), (x + 2, y + 2), (x - 2, y + 2)] for x, y in spots], 2)
    for x, y in spots:
        canvas.disc(x, y, 2.3, varied(color, rng))
        canvas.disc(x, y, 1.0, WHITE)
    return len(spots)
