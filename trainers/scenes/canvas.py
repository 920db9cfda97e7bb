"""The canvas of a scene, with methods that draw shapes, textures, shadows and trees. Lengths are in metres."""

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from orbithash.trainers.scenes.geometry import EXTENT, Frame, Point, Shape, ribbon
from orbithash.trainers.scenes.moment import Light, Season
from orbithash.trainers.scenes.palette import Color, mixed, scaled, varied

__all__ = ["OVERSAMPLING", "Canvas", "Field", "Paint"]

OVERSAMPLING = 2
"""Canvas pixels per panchromatic pixel along each axis, for anti-aliasing."""

SHADOW: Color = (16, 20, 34)

Field = NDArray[np.float32]
"""One value per panchromatic pixel, float32 [2 * size_px, 2 * size_px]."""

Paint = Color | Image.Image


class Canvas:
    """The canvas on which one scene is drawn.

    Args:
        size_px: side of the finished RGB image in pixels.
        season: colours of the vegetation and the ground.
        light: position of the sun.
        rng: random generator of the scene.
    """

    def __init__(self, size_px: int, season: Season, light: Light, rng: np.random.Generator) -> None:
        self.season, self.light, self.rng = season, light, rng
        self.field_px = 2 * size_px
        self.side_px = OVERSAMPLING * self.field_px
        self.scale = self.side_px / EXTENT
        self.image = Image.new("RGB", (self.side_px, self.side_px))
        self._draw = ImageDraw.Draw(self.image)

    # Fields and textures

    def noise(self, cell: float, octaves: int = 3) -> Field:
        """Return smooth noise from about -1 to 1; its largest features are `cell` metres wide."""
        total = np.zeros((self.field_px, self.field_px), np.float32)
        for octave in range(octaves):
            cells = min(self.field_px, max(2, math.ceil(EXTENT / cell * 2.4**octave)))
            grid = self.rng.random((cells, cells), np.float32) * 2 - 1
            smooth = Image.fromarray(grid).resize((self.field_px, self.field_px), Image.Resampling.BICUBIC)
            total += np.asarray(smooth) * 0.6**octave
        return total

    def grid(self, angle: float) -> Field:
        """Return the coordinate of each pixel, in metres, along an axis at `angle` (radians, clockwise from east)."""
        axis = (np.arange(self.field_px, dtype=np.float32) + 0.5) * np.float32(EXTENT / self.field_px)
        return axis[None, :] * np.float32(math.cos(angle)) + axis[:, None] * np.float32(math.sin(angle))

    def stripes(self, period: float, angle: float) -> Field:
        """Return a sine wave from -1 to 1 with a period of `period` metres along `angle`."""
        waves: Field = np.sin(self.grid(angle) * np.float32(2 * math.pi / period))
        return waves

    def texture(self, color: Color, relief: Field, second: Color | None = None) -> Image.Image:
        """Return an image of one colour shaded by `relief`: 0 is the colour itself, -1 is black.

        With a second colour, blend the two instead: -1 is the first, 1 is the second.
        """
        first = np.asarray(color, np.float32)
        if second is None:
            pixels = (1 + relief)[..., None] * first
        else:
            share = np.clip(relief * 0.5 + 0.5, 0, 1)[..., None]
            pixels = first + share * (np.asarray(second, np.float32) - first)
        small = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        return small.resize((self.side_px, self.side_px), Image.Resampling.BILINEAR)

    # Paint

    def cover(self, paint: Paint) -> None:
        """Paint the whole scene."""
        if isinstance(paint, Image.Image):
            self.image.paste(paint)
        else:
            self.image.paste(paint, (0, 0, self.side_px, self.side_px))

    def meadow(self, color: Color | None = None, contrast: float = 0.5) -> None:
        """Cover the scene with grass, or with `color`, in patches of two tones; in winter, snow covers most of it."""
        color = varied(color or self.season.grass, self.rng, 0.1)
        dark, bright = scaled(color, 1 - contrast / 2), scaled(mixed(color, self.season.soil, 0.3), 1 + contrast / 3)
        covered = self.season.covered
        self.cover(self.texture(covered(dark, 0.84), self.noise(26, 4), covered(bright, 0.96)))

    def fill(self, shapes: Iterable[Shape], paint: Paint) -> None:
        """Paint shapes with one colour or texture."""
        if isinstance(paint, Image.Image):
            mask, draw = self._mask()
            for shape in shapes:
                draw.polygon(self._pixels(shape), fill=255)
            self.image.paste(paint, mask=mask)
        else:
            for shape in shapes:
                self._draw.polygon(self._pixels(shape), fill=paint)

    def line(self, path: Shape, color: Color, width: float = 0.5) -> None:
        """Draw a line of `width` metres."""
        pixels = max(1, round(width * self.scale))
        self._draw.line(self._pixels(path), fill=color, width=pixels, joint="curve" if pixels > 3 else None)

    def dashes(self, path: Shape, color: Color, width: float, dash: float, gap: float) -> None:
        """Draw a dashed line: dashes are `dash` metres long, with gaps of `gap` metres."""
        points = np.asarray(path)
        reached = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))])
        starts = np.arange(0, reached[-1] - dash, dash + gap)
        ends = np.stack([starts, starts + dash], axis=1)
        x, y = (np.interp(ends, reached, points[:, axis]) for axis in (0, 1))
        for piece in np.stack([x, y], axis=2).tolist():
            self.line([(px, py) for px, py in piece], color, width)

    def disc(self, x: float, y: float, radius: float, color: Color) -> None:
        """Paint a circle."""
        s = self.scale
        box = ((x - radius) * s, (y - radius) * s, (x + radius) * s, (y + radius) * s)
        self._draw.ellipse(box, fill=color)

    def road(self, path: Shape, width: float, color: Color, marking: Color | None = None) -> None:
        """Paint a road with a pale verge and, if `marking` is given, a dashed centre line of that colour."""
        self.fill([ribbon(path, width + 2.4)], self.season.covered(mixed(color, self.season.soil, 0.5), 0.5))
        self.fill([ribbon(path, width)], self.season.covered(color, 0.2))
        if marking is not None:
            self.dashes(path, marking, 0.5, 4, 5)

    # Objects with height

    def cast(self, shapes: Iterable[Shape], height: float, depth: float = 0.55) -> None:
        """Draw the shadows of objects with these outlines and this height in metres.

        `depth` is the opacity of the shadow, 0 to 1.
        """
        mask, draw = self._mask()
        dx, dy = (value * height for value in self.light.shadow)
        level = round(255 * depth)
        for shape in shapes:
            moved = [(x + dx, y + dy) for x, y in shape]
            draw.polygon(self._pixels(moved), fill=level)
            for i, corner in enumerate(shape):
                draw.polygon(self._pixels([shape[i - 1], corner, moved[i], moved[i - 1]]), fill=level)
        self.image.paste(SHADOW, mask=mask)

    def gable(self, frame: Frame, length: float, width: float, color: Color) -> None:
        """Paint a gable roof around the origin of the frame, its ridge along u; the side facing the sun is brighter."""
        color = self.season.covered(color, 0.5)
        sunny = self.light.toward[1] * math.cos(frame.angle) - self.light.toward[0] * math.sin(frame.angle)
        for side in (-1, 1):
            self.fill([frame.box(0, side * width / 4, length, width / 2)], scaled(color, 0.92 + 0.26 * side * sunny))
        self.line(frame.path([(-length / 2, 0), (length / 2, 0)]), scaled(color, 1.16), 0.5)

    def trees(self, spots: Sequence[Point], radius: float, colors: Sequence[Color] = (), shaded: bool = True) -> None:
        """Draw a tree at each point, with a crown of about `radius` metres.

        `colors` replaces the colours of the season; `shaded` adds shadows on the ground.
        """
        colors = [self.season.covered(color, 0.35) for color in colors or self.season.foliage]
        if shaded:
            self._crown_shadows(spots, radius)
        crowns = [self._crown(color, radius * size) for color in colors for size in (0.75, 1.0, 1.2)]
        for (x, y), kind in zip(spots, self.rng.integers(len(crowns), size=len(spots)).tolist(), strict=True):
            crown = crowns[kind]
            corner = round(x * self.scale - crown.width / 2), round(y * self.scale - crown.height / 2)
            self.image.paste(crown, corner, crown)

    def _crown_shadows(self, spots: Sequence[Point], radius: float) -> None:
        """Draw the shadow of each crown, at a distance from the tree: the thin trunk casts none."""
        mask, draw = self._mask()
        reach = min(1.6 * radius, 1.5 * radius * math.hypot(*self.light.shadow))
        sun_x, sun_y = self.light.toward
        for x, y in spots:
            for share, size in ((0.5, 0.9), (1.0, 0.72)):
                px, py = ((x - sun_x * reach * share), (y - sun_y * reach * share))
                box = [value * self.scale for value in (px - radius * size, py - radius * size)]
                box += [value * self.scale for value in (px + radius * size, py + radius * size)]
                draw.ellipse(box, fill=120)
        self.image.paste(SHADOW, mask=mask)

    def _crown(self, color: Color, radius: float) -> Image.Image:
        """Return the RGBA image of a crown seen from above: uneven, with a ragged edge, brighter towards the sun."""
        half = max(2, round(radius * self.scale))
        axis = np.linspace(-1, 1, 2 * half + 1, dtype=np.float32)
        x, y = axis[None, :], axis[:, None]
        lumps = self.rng.random((6, 6), np.float32)
        lumpy = np.asarray(Image.fromarray(lumps).resize((axis.size, axis.size), Image.Resampling.BICUBIC))
        distance = x * x + y * y
        sun_x, sun_y = self.light.toward
        light = 0.62 + 0.5 * lumpy + 0.36 * (x * sun_x + y * sun_y) - 0.2 * distance
        pixels = np.empty((axis.size, axis.size, 4), np.uint8)
        pixels[..., :3] = np.clip(light[..., None] * np.asarray(color, np.float32), 0, 255)
        pixels[..., 3] = 255 * (distance < 0.55 + 0.5 * lumpy)
        return Image.fromarray(pixels)

    def _mask(self) -> tuple[Image.Image, ImageDraw.ImageDraw]:
        mask = Image.new("L", (self.side_px, self.side_px))
        return mask, ImageDraw.Draw(mask)

    def _pixels(self, shape: Shape) -> list[Point]:
        return [(x * self.scale, y * self.scale) for x, y in shape]
