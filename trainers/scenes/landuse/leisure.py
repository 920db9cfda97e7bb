"""Golf courses, tennis courts and running tracks."""

import math

import numpy as np

from orbithash.trainers.scenes.canvas import Canvas
from orbithash.trainers.scenes.facts import Facts, course, place
from orbithash.trainers.scenes.geometry import EXTENT, MIDDLE, Frame, Point, Shape, blob, circle, inside, ribbon
from orbithash.trainers.scenes.palette import CONCRETE, SAND, WATER, WHITE, Color, mixed, pick, scaled, varied

__all__ = ["draw_golf_course", "draw_running_track", "draw_tennis_courts"]

COURTS = {"green": (72, 128, 84), "blue": (48, 94, 150), "red clay": (184, 96, 66), "purple": (98, 78, 132)}
SURROUNDS = {"green": (58, 100, 70), "blue": (82, 126, 92), "red clay": (168, 88, 62), "purple": (72, 116, 84)}
TRACKS = {"red": (172, 74, 56), "blue": (52, 98, 152), "orange": (196, 108, 66)}
LAWN: Color = (84, 134, 58)


def draw_golf_course(canvas: Canvas, rng: np.random.Generator) -> Facts:
    """Draw fairways, greens with flags, sand bunkers, trees and sometimes a pond."""
    canvas.meadow(mixed(LAWN, canvas.season.grass, 0.6), 0.36)
    frame = Frame(rng.uniform(0, 2 * math.pi))
    fairway = varied(LAWN, rng, 0.1)
    mown = canvas.texture(fairway, canvas.stripes(9, frame.angle + 0.8) * 0.07 + canvas.noise(25, 3) * 0.05)
    lanes = [frame.beside(rng.uniform(-14, 14), v) for v in (-52, 4, 58)]
    lanes = lanes if rng.random() < 0.5 else lanes[:2]
    trees: list[Point] = []
    for v in (-84, -25, 31, 86):
        trees += [frame.at(u, v + rng.normal(0, 4)) for u in rng.uniform(-120, 120, 34).tolist()]
    canvas.trees(trees, rng.uniform(3, 4.4))
    bends = rng.uniform(-12, 12, len(lanes)).tolist()
    for lane, bend in zip(lanes, bends, strict=True):
        canvas.fill(_fairway(lane, bend, rng.uniform(24, 30)), mown)
    _, sand = pick(rng, {"golden": SAND["golden"], "pale": SAND["pale"]})
    greens = [lane.beside(rng.uniform(34, 56) * float(rng.choice([-1, 1])), 0) for lane in lanes]
    greens = [green for green in greens if inside((green.x, green.y), 25)] or [frame]
    pond = rng.random() < 0.5
    water = lanes[0].beside(-14, 20)
    if pond:
        _pond(canvas, water, rng)
    bunkers = sum(_green(canvas, green, sand, rng) for green in greens)
    words = {"pond": f"a pond at the {place((water.x, water.y))}" if pond else "no pond"}
    return Facts({"bunker": bunkers, "green": len(greens)}, {**words, "course": course(frame.angle)})


def _fairway(lane: Frame, bend: float, width: float) -> list[Shape]:
    """Return the shapes of a bent fairway along u with round ends."""
    steps = np.linspace(-1, 1, 25).tolist()
    path = lane.path([(62 * step, bend * step * step) for step in steps])
    return [ribbon(path, width), *(circle(*end, width / 2) for end in (path[0], path[-1]))]


def _green(canvas: Canvas, spot: Frame, sand: Color, rng: np.random.Generator) -> int:
    """Draw a putting green with a flag and bunkers around it; return the number of bunkers."""
    start, bunkers = rng.uniform(0, 2 * math.pi), int(rng.integers(2, 5))
    canvas.fill([blob(rng, spot.x, spot.y, 13, 1.15, start)], scaled(LAWN, 1.1))
    canvas.fill([blob(rng, spot.x, spot.y, 10, 1.15, start)], (124, 176, 84))
    canvas.disc(spot.x, spot.y, 0.8, WHITE)
    for bunker in range(bunkers):
        turn = start + bunker * rng.uniform(1.25, 1.57)
        x, y = Frame(turn, spot.x, spot.y).at(17.5, 0)
        pit = blob(rng, x, y, rng.uniform(4.6, 6), 1.3, turn + math.pi / 2)
        sun_x, sun_y = canvas.light.toward
        canvas.fill([pit], scaled(sand, 0.72))
        canvas.fill([[(px - sun_x, py - sun_y) for px, py in pit]], scaled(sand, 1.08))
    return bunkers


def _pond(canvas: Canvas, spot: Frame, rng: np.random.Generator) -> None:
    _, water = pick(rng, {name: WATER[name] for name in ("dark blue", "blue", "green")})
    shore = blob(rng, spot.x, spot.y, 15, 1.3, spot.angle)
    canvas.fill([[(spot.x + (x - spot.x) * 1.12, spot.y + (y - spot.y) * 1.12) for x, y in shore]], (112, 116, 74))
    canvas.fill([shore], water)


def draw_tennis_courts(canvas: Canvas, rng: np.random.Generator) -> Facts:
    """Draw tennis courts side by side, with lines, nets and fences."""
    frame = Frame(rng.uniform(0, math.pi))
    canvas.meadow()
    columns, rows = int(rng.integers(1, 6)), int(rng.integers(1, 4))
    size = min(1.7, 168 / math.hypot(columns * 18, rows * 36)) * rng.uniform(0.85, 1)
    name, color = pick(rng, COURTS)
    surround = varied(SURROUNDS[name], rng)
    reach = math.hypot(columns * 9, rows * 18) * size
    slack = max(6.0, 62 - reach)
    block = frame.beside(rng.uniform(-slack, slack), rng.uniform(-slack, slack))
    spots = rng.uniform(-6, EXTENT + 6, (150, 2)).tolist()
    trees = [(x, y) for x, y in spots if math.hypot(x - block.x, y - block.y) > reach + 9]
    canvas.trees(trees, rng.uniform(3.4, 5))
    path = canvas.season.covered(varied(CONCRETE["pale"], rng))
    canvas.fill([block.box(0, 0, columns * 18 * size + 10, rows * 36 * size + 10)], path)
    canvas.fill([block.box(0, 0, columns * 18 * size + 3, rows * 36 * size + 3)], surround)
    for column in range(columns):
        for row in range(rows):
            court = block.beside((column - (columns - 1) / 2) * 18 * size, (row - (rows - 1) / 2) * 36 * size)
            _court(canvas, court, size, varied(color, rng, 0.04))
    fence = block.box(0, 0, columns * 18 * size + 3, rows * 36 * size + 3)
    canvas.line([*fence, fence[0]], (96, 100, 98), 0.6)
    return Facts(
        {"court": columns * rows}, {"color": name, "where": place((block.x, block.y)), "course": course(frame.angle)}
    )


def _court(canvas: Canvas, court: Frame, size: float, color: Color) -> None:
    """Draw one court, its length along v, with all lines of the rules except the centre marks."""
    canvas.fill([court.box(0, 0, 10.97 * size, 23.77 * size)], color)
    singles, doubles, service, base = (value * size for value in (4.115, 5.485, 6.4, 11.885))
    lines = [[(side * u, -base), (side * u, base)] for side in (-1, 1) for u in (singles, doubles)]
    lines += [[(-doubles, side * base), (doubles, side * base)] for side in (-1, 1)]
    lines += [[(-singles, side * service), (singles, side * service)] for side in (-1, 1)]
    lines += [[(0, -service), (0, service)]]
    for line in lines:
        canvas.line(court.path(line), WHITE, 0.7)
    net = court.box(0, 0, doubles * 2 + 2, 0.5)
    canvas.cast([net], 1.2, 0.6)
    canvas.fill([net], (64, 66, 70))


def draw_running_track(canvas: Canvas, rng: np.random.Generator) -> Facts:
    """Draw an oval running track around a football pitch, with stands beside it."""
    frame = Frame(rng.uniform(0, math.pi), MIDDLE + rng.uniform(-8, 8), MIDDLE + rng.uniform(-8, 8))
    canvas.meadow()
    size = rng.uniform(0.78, 1.0)
    name, color = pick(rng, TRACKS)
    canvas.trees(_outside(frame, 112 * size, rng), rng.uniform(3.4, 5))
    canvas.fill([_oval(frame, 46 * size, 42 * size)], canvas.season.covered(CONCRETE["pale"], 0.5))
    canvas.fill([_oval(frame, 43.5 * size, 42 * size)], canvas.season.covered(color, 0.15))
    for lane in range(1, 6):
        oval = _oval(frame, (34 + lane * 1.6) * size, 42 * size)
        canvas.line([*oval, oval[0]], mixed(color, WHITE, 0.7), 0.4)
    lawn = canvas.season.covered(varied(LAWN, rng, 0.12), 0.55)
    stripes = canvas.stripes(rng.uniform(12, 20), frame.angle)
    canvas.fill([_oval(frame, 34 * size, 42 * size)], canvas.texture(lawn, np.sign(stripes) * np.float32(0.06)))
    _pitch(canvas, frame, size)
    stands = [side for side in (-1, 1) if rng.random() < 0.6]
    for side in stands:
        stand = frame.beside(0, side * 55 * size)
        canvas.cast([stand.box(0, 0, 84 * size, 13)], 8)
        canvas.fill([stand.box(0, 0, 84 * size, 13)], varied((196, 198, 200), rng))
        for row in range(4):
            canvas.line(stand.path([(-42 * size, row * 3 - 4.5), (42 * size, row * 3 - 4.5)]), (140, 144, 150), 0.6)
    return Facts({"stand": len(stands)}, {"color": name, "course": course(frame.angle)})


def _oval(frame: Frame, radius: float, half_straight: float) -> Shape:
    """Return an oval: two straight lines joined by semicircles."""
    turns = [math.pi * step / 20 - math.pi / 2 for step in range(21)]
    right = [(half_straight + radius * math.cos(turn), radius * math.sin(turn)) for turn in turns]
    return frame.path(right + [(-u, -v) for u, v in right])


def _pitch(canvas: Canvas, frame: Frame, size: float) -> None:
    """Draw the lines of a football pitch."""
    length, width = 50 * size, 30 * size
    for box in (
        frame.box(0, 0, 2 * length, 2 * width),
        *(frame.box(s * 42 * size, 0, 16 * size, 36 * size) for s in (-1, 1)),
    ):
        canvas.line([*box, box[0]], WHITE, 0.6)
    canvas.line(frame.path([(0, -width), (0, width)]), WHITE, 0.6)
    ring = circle(frame.x, frame.y, 9 * size)
    canvas.line([*ring, ring[0]], WHITE, 0.6)


def _outside(frame: Frame, reach: float, rng: np.random.Generator) -> list[Point]:
    """Return random points outside the stadium, for trees."""
    spots = rng.uniform(-6, EXTENT + 6, (130, 2)).tolist()
    return [(x, y) for x, y in spots if math.hypot(x - frame.x, y - frame.y) > reach * 0.9]
