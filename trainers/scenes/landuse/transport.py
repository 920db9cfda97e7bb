"""Airports, motorways, parking lots and railway yards."""

import math

import numpy as np

from orbithash.trainers.scenes.canvas import Canvas
from orbithash.trainers.scenes.facts import Facts, compass, course
from orbithash.trainers.scenes.geometry import EXTENT, MIDDLE, Frame, Shape, inside, ribbon, wavy
from orbithash.trainers.scenes.palette import ASPHALT, CARS, CONCRETE, ROOFS, WHITE, Color, pick, scaled, varied

__all__ = ["draw_airport", "draw_motorway", "draw_parking_lot", "draw_railway_yard"]

YELLOW: Color = (206, 172, 60)
RAIL: Color = (206, 204, 200)


def draw_airport(canvas: Canvas, rng: np.random.Generator) -> Facts:
    """Draw a runway with its markings, a taxiway beside it, and aircraft."""
    frame = Frame(rng.uniform(0, 2 * math.pi))
    surface, color = pick(rng, ASPHALT)
    canvas.meadow()
    runway_v = rng.uniform(-52, -30)
    end = rng.uniform(-70, -45)
    _runway(canvas, frame.beside(0, runway_v), color, rng.uniform(30, 42), end)
    taxi_v = runway_v + rng.uniform(42, 50)
    _, concrete = pick(rng, CONCRETE)
    apron_u = rng.uniform(-20, 20)
    for shape in (frame.box(0, taxi_v, 400, 13), frame.box(apron_u, taxi_v + 62, 118, 112)):
        canvas.fill([shape], canvas.season.covered(concrete, 0.15))
    canvas.fill(
        [frame.box(max(apron_u - 40, end + 10), (runway_v + taxi_v) / 2, 12, taxi_v - runway_v)], scaled(color, 1.05)
    )
    canvas.line(frame.path([(-200, taxi_v), (200, taxi_v)]), YELLOW, 0.8)
    _terminal(canvas, frame.beside(apron_u, taxi_v + 66), rng)
    size = rng.uniform(24, 34)
    spots = [frame.beside(apron_u + side * 0.62 * size, taxi_v + 28) for side in (-1, 1)]
    spots.append(frame.beside(rng.uniform(end + 20, 70), runway_v, rng.choice([0.0, math.pi]) - math.pi / 2))
    count = _aircraft(canvas, [spot for spot in spots if rng.random() < 0.72] or spots[:1], size, rng)
    return Facts({"aircraft": count}, {"surface": surface, "course": course(frame.angle)})


def _terminal(canvas: Canvas, frame: Frame, rng: np.random.Generator) -> None:
    """Draw a long flat building with a canopy on the side of the apron."""
    canvas.cast([frame.box(0, 0, 100, 22)], 9)
    canvas.fill([frame.box(0, 0, 100, 22)], canvas.season.covered(varied((186, 190, 196), rng), 0.5))
    canvas.fill([frame.box(0, -9, 100, 4)], (112, 124, 136))
    canvas.fill([frame.box(u, 4, 7, 5) for u in (-36, -12, 12, 36)], (148, 150, 152))


def _runway(canvas: Canvas, frame: Frame, color: Color, width: float, end: float) -> None:
    """Draw a runway along u that starts at `end`, with skid marks, edge lines, threshold stripes and a centre line."""
    covered = canvas.season.covered
    canvas.fill([frame.box(end + 190, 0, 400, width + 8)], covered(scaled(color, 1.25), 0.3))
    canvas.fill([frame.box(end + 200, 0, 400, width)], covered(color, 0.1))
    canvas.fill([frame.box(end + 80, side * width * 0.13, 90, 3.4) for side in (-1, 1)], scaled(color, 0.78))
    for side in (-1, 1):
        canvas.line(frame.path([(end + 3, side * width * 0.45), (end + 400, side * width * 0.45)]), WHITE, 0.9)
    stripes = [frame.box(end + 14, width * (place - 3.5) / 9, 18, width / 17) for place in range(8)]
    marks = [frame.box(end + 78, side * width * 0.22, 22, 3.4) for side in (-1, 1)]
    canvas.fill(stripes + marks, WHITE)
    canvas.dashes(frame.path([(end + 34, 0), (end + 400, 0)]), WHITE, 1.1, 14, 10)


def _aircraft(canvas: Canvas, spots: list[Frame], size: float, rng: np.random.Generator) -> int:
    """Draw aircraft `size` metres long, noses along v of each spot; return the number of visible ones."""
    seen = [spot for spot in spots if inside((spot.x, spot.y), 10)]
    for spot in seen:
        plane = spot.beside(0, 0, math.pi / 2)
        wings = _airframe(plane, size)
        canvas.cast(wings, 4, 0.5)
        canvas.fill(wings, varied((228, 230, 234), rng, 0.05))
        canvas.fill([plane.box(-size * 0.43, 0, size * 0.13, size * 0.05)], varied(CARS[rng.integers(3, 5)], rng))
        canvas.fill([plane.box(size * 0.44, 0, size * 0.05, size * 0.06)], (70, 76, 84))
        canvas.fill([plane.box(size * 0.05, s * size * 0.2, size * 0.1, size * 0.05) for s in (-1, 1)], (150, 152, 158))
    return len(seen)


def _airframe(plane: Frame, size: float) -> list[Shape]:
    body = [(0.5, 0.0), (0.44, 0.05), (-0.3, 0.05), (-0.5, 0.02), (-0.5, -0.02), (-0.3, -0.05), (0.44, -0.05)]
    wing = [(0.12, 0.04), (-0.14, 0.47), (-0.2, 0.47), (-0.08, 0.04)]
    tail = [(-0.36, 0.03), (-0.47, 0.18), (-0.52, 0.18), (-0.47, 0.03)]
    halves = [wing, tail, [(u, -v) for u, v in wing], [(u, -v) for u, v in tail]]
    return [plane.path([(u * size, v * size) for u, v in part]) for part in [body, *halves]]


def draw_motorway(canvas: Canvas, rng: np.random.Generator) -> Facts:
    """Draw two carriageways with traffic, sometimes under a bridge."""
    frame = Frame(rng.uniform(0, math.pi))
    canvas.meadow()
    lanes = int(rng.integers(2, 4))
    width = lanes * 4.4 + 4
    middle = wavy(rng, frame, rng.uniform(2, 12), waves=0.4)
    apart = width / 2 + rng.uniform(2.5, 6)
    color = varied(ASPHALT[("dark grey", "grey", "pale grey")[rng.integers(3)]], rng)
    trees = [frame.at(*spot) for spot in zip(rng.uniform(-130, 130, 70), rng.uniform(34, 90, 70), strict=True)]
    canvas.trees(trees, rng.uniform(3, 4.5))
    canvas.fill([ribbon(middle, 4 * apart)], canvas.season.covered(scaled(canvas.season.grass, 1.12), 0.9))
    for side in (-1, 1):
        canvas.fill([ribbon(middle, width, side * apart)], canvas.season.covered(color, 0.1))
        for lane in range(lanes + 1):
            path = _shifted(middle, side * apart + (lane - lanes / 2) * 4.4)
            if lane in (0, lanes):
                canvas.line(path, WHITE, 0.7)
            else:
                canvas.dashes(path, WHITE, 0.7, 5, 7)
    crossed = rng.random() < 0.4
    vehicles = _traffic(canvas, middle, apart, lanes, clear_of_middle=56 if crossed else 0)
    if crossed:
        _overpass(canvas, frame.beside(rng.uniform(-25, 25), 0, math.pi / 2 + rng.uniform(-0.3, 0.3)), color)
    words = {"course": course(frame.angle), "bridge": "under one bridge" if crossed else "with no bridge over it"}
    return Facts({"vehicle": vehicles, "lane": lanes, "carriageway": 2}, words)


def _shifted(path: Shape, shift: float) -> Shape:
    """Return the path moved `shift` metres to its right."""
    return ribbon(path, 0, shift)[: len(path)]


def _traffic(canvas: Canvas, middle: Shape, apart: float, lanes: int, clear_of_middle: float) -> int:
    """Draw vehicles on both carriageways and return their number.

    No vehicle is drawn within `clear_of_middle` metres of the middle of the scene.
    """
    rng = canvas.rng
    count = 0
    share = rng.uniform(0.05, 0.4)
    for side in (-1, 1):
        for lane in range(lanes):
            path = _shifted(middle, side * apart + (lane + 0.5 - lanes / 2) * 4.4)
            for start, end in zip(path[::4], path[1::4], strict=False):
                spot = Frame(math.atan2(end[1] - start[1], end[0] - start[0]), *start)
                clear = math.hypot(spot.x - MIDDLE, spot.y - MIDDLE) >= clear_of_middle
                if clear and inside(start, 8) and rng.random() < share:
                    length = 13.0 if rng.random() < 0.2 else 6.0
                    canvas.cast([spot.box(0, 0, length, 2.8)], 2, 0.4)
                    canvas.fill([spot.box(0, 0, length, 2.8)], CARS[rng.integers(len(CARS))])
                    count += 1
    return count


def _overpass(canvas: Canvas, frame: Frame, color: Color) -> None:
    deck = frame.box(0, 0, 420, 12)
    canvas.cast([deck], 5, 0.6)
    canvas.fill([deck], (186, 184, 178))
    canvas.fill([frame.box(0, 0, 420, 9.5)], canvas.season.covered(scaled(color, 1.15), 0.15))
    canvas.dashes(frame.path([(-200, 0), (200, 0)]), WHITE, 0.6, 4, 5)


def draw_parking_lot(canvas: Canvas, rng: np.random.Generator) -> Facts:
    """Draw rows of marked bays with cars, sometimes with trees between the rows."""
    frame = Frame(rng.uniform(0, math.pi))
    surface, color = pick(rng, ASPHALT)
    size = rng.uniform(1.15, 1.6)
    bay, depth, aisle = 3.2 * size, 6.2 * size, 8.5 * size
    occupied, planted = rng.uniform(0.3, 0.92), rng.random() < 0.6
    canvas.cover(canvas.texture(canvas.season.covered(color, 0.15), canvas.noise(30, 3) * 0.09))
    canvas.fill([frame.box(0, side * 152, 400, 160) for side in (-1, 1)], canvas.season.covered(canvas.season.grass))
    cars = rows = 0
    trees = []
    for v in np.arange(-72 + depth, 72 - depth, 2 * depth + aisle).tolist():
        rows += 2
        if planted:
            canvas.fill([frame.box(0, v, 400, 3)], canvas.season.covered(canvas.season.grass))
            trees += [frame.at(u, v) for u in np.arange(-126, 126, 22.0).tolist()]
        for side in (-1, 1):
            cars += _bays(canvas, frame.beside(0, v + side * (depth / 2 + 1.5)), (bay, depth), occupied, rng)
    if trees:
        canvas.trees(trees, 3.6)
    fullness = "nearly full" if occupied > 0.75 else "half-full" if occupied > 0.45 else "rather empty"
    return Facts({"car": cars, "row": rows}, {"surface": surface, "fullness": fullness, "course": course(frame.angle)})


def _bays(canvas: Canvas, frame: Frame, bay: tuple[float, float], occupied: float, rng: np.random.Generator) -> int:
    """Draw the lines and cars of one row of bays along u; return the number of visible cars."""
    width, depth = bay
    places = np.arange(-128, 128, width).tolist()
    for u in places:
        canvas.line(frame.path([(u - width / 2, -depth / 2), (u - width / 2, depth / 2)]), (222, 222, 218), 0.5)
    spots = [frame.beside(u, rng.uniform(-0.4, 0.4)) for u in places if rng.random() < occupied]
    spots = [spot for spot in spots if inside((spot.x, spot.y), 1.5)]
    outlines = [spot.box(0, 0, width * 0.62, depth * 0.74) for spot in spots]
    canvas.cast(outlines, 1.5, 0.5)
    for spot, outline in zip(spots, outlines, strict=True):
        color = CARS[rng.integers(len(CARS))]
        canvas.fill([outline], color)
        canvas.fill([spot.box(0, 0, width * 0.5, depth * 0.34)], scaled(color, 0.72))
    return len(spots)


def draw_railway_yard(canvas: Canvas, rng: np.random.Generator) -> Facts:
    """Draw parallel tracks on ballast with trains of wagons, and a shed beside them."""
    frame = Frame(rng.uniform(0, math.pi))
    canvas.meadow()
    tracks = int(rng.integers(6, 13))
    gauge = rng.uniform(8.5, 10.0)
    bed = canvas.season.covered(varied((142, 130, 118), rng, 0.12), 0.4)
    middle = wavy(rng, frame, rng.uniform(0, 10), waves=0.4)
    canvas.fill([ribbon(middle, (tracks + 1) * gauge + 6)], canvas.texture(bed, canvas.noise(14, 4) * 0.12))
    trains = wagons = 0
    for track in range(tracks):
        path = _shifted(middle, (track - (tracks - 1) / 2) * gauge)
        canvas.fill([ribbon(path, 5)], scaled(bed, 0.66))
        for rail in (-1.4, 1.4):
            canvas.line(_shifted(path, rail), RAIL, 0.6)
        if rng.random() < 0.5:
            rake = _rake(canvas, path, rng)
            trains, wagons = trains + (rake > 0), wagons + rake
    shed_side = float(rng.choice([-1, 1]))
    shed_color, roof = pick(rng, ROOFS)
    shed = frame.beside(rng.uniform(-20, 20), shed_side * ((tracks + 1) * gauge / 2 + 18))
    words = {"course": course(frame.angle), "shed": "no building"}
    if inside((shed.x, shed.y), 10):
        canvas.cast([shed.box(0, 0, 56, 18)], 7)
        canvas.gable(shed, 56, 18, roof)
        words["shed"] = f"a {shed_color}-roofed shed on the {compass(frame.angle + shed_side * math.pi / 2)} side"
    return Facts({"track": tracks, "train": trains, "wagon": wagons}, words)


def _rake(canvas: Canvas, path: Shape, rng: np.random.Generator) -> int:
    """Draw coupled wagons on a track; return the number of visible wagons."""
    points = np.asarray(path)
    reached = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))])
    colors = [varied(CARS[rng.integers(len(CARS))], rng), varied((132, 74, 52), rng), varied((92, 96, 92), rng)]
    start, length = EXTENT * rng.uniform(0.5, 1.2), rng.uniform(13, 18)
    spots = []
    for place in np.arange(start, start + length * rng.integers(3, 11), length).tolist():
        x, y = (float(np.interp(place, reached, points[:, axis])) for axis in (0, 1))
        ahead_x, ahead_y = (float(np.interp(place + 1, reached, points[:, axis])) for axis in (0, 1))
        if inside((x, y), 3):
            spots.append(Frame(math.atan2(ahead_y - y, ahead_x - x), x, y))
    canvas.cast([spot.box(0, 0, length - 1, 4) for spot in spots], 4)
    for spot in spots:
        color = colors[rng.integers(3)]
        canvas.fill([spot.box(0, 0, length - 1.6, 4)], scaled(color, 0.85))
        canvas.fill([spot.box(0, 0, length - 2.4, 2)], color)
    return len(spots)
