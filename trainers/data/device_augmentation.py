"""Random views of a batch of training images on a device, with the draws and the arithmetic of `augmentation`.

A crop is resampled by two matrices for each image, whose rows are the filter of Pillow: horizontally, then vertically.
Weights, results of each of the two and colours are rounded where Pillow rounds them, so pictures are those of Pillow
bit for bit, and a view does not depend on the batch that it is made in.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from orbithash.trainers.data.augmentation import Augmentation, ViewDraw

__all__ = ["ViewDraws", "views_of"]

# Pillow's weights of pictures are multiples of a part of 1 in this many.
_STEPS_OF_WEIGHTS = 2**22


class ViewDraws(NamedTuple):
    """The draws of the views of B images, see `ViewDraw`.

    Attributes:
        boxes: float32 [B, 4], as Pillow takes them.
        orientations: int64 [B].
        factors: float32 [B, 3].
        hue_turns: int64 [B]; 0 without a change of hue.
        are_grey: bool [B].
    """

    boxes: Tensor
    orientations: Tensor
    factors: Tensor
    hue_turns: Tensor
    are_grey: Tensor

    @classmethod
    def stack(cls, draws: Sequence[ViewDraw]) -> "ViewDraws":
        """Return the draws of one image each as tensors on the CPU."""
        return cls(
            torch.tensor([draw.box for draw in draws], dtype=torch.float32).reshape(-1, 4),
            torch.tensor([draw.orientation for draw in draws], dtype=torch.int64),
            torch.tensor([draw.factors for draw in draws], dtype=torch.float32).reshape(-1, 3),
            torch.tensor([draw.hue_turn or 0 for draw in draws], dtype=torch.int64),
            torch.tensor([draw.is_grey for draw in draws], dtype=torch.bool),
        )


def views_of(images: Tensor, draws: ViewDraws, side: int, augmentation: Augmentation) -> Tensor:
    """Return the views float32 [B, side, side, C] of images uint8 or float32 [B, S, S, C] on their device.

    Views of pictures have whole numbers from 0 to 255. In numbers, missing pixels (NaN, infinite) have no weight; a
    result is missing where they have more than half of the weight.
    """
    left, top, right, bottom = draws.boxes.unbind(1)
    planes = images.permute(0, 3, 1, 2)
    across, down = (
        _filters(start, end, images.shape[1], side, augmentation.interpolation)
        for start, end in ((left, right), (top, bottom))
    )
    if images.dtype == torch.uint8:
        # Whole multiples of a step, half steps away from 0. Their sums in float64 are exact, in any order.
        across, down = (
            (weights.abs() * _STEPS_OF_WEIGHTS + 0.5).floor().copysign(weights) / _STEPS_OF_WEIGHTS
            for weights in (across, down)
        )
        cut = _resampled(planes, across, down, lambda values: (values + 0.5).floor().clamp(0, 255).float())
    else:
        there = planes.isfinite()
        weight, total = (
            _resampled(values, across, down, lambda values: values.float())
            for values in (there, planes.masked_fill(~there, 0.0))
        )
        cut = (total / weight.clamp(min=0.5)).masked_fill(weight < 0.5, torch.nan)
    if augmentation.changes_colours:
        cut = _recoloured(cut, draws, turns_hue=augmentation.colour_jitter > 0)
    return _turned(cut, draws.orientations).permute(0, 2, 3, 1).contiguous()


def _filters(start: Tensor, end: Tensor, size: int, side: int, interpolation: str) -> Tensor:
    """Return the weights float64 [B, 1, side, size] of the pixels of a line in those of its resampled part."""
    scale = (end - start).double() / side
    numbers = torch.arange(max(side, size), device=start.device)
    centres = start.double()[:, None] + (numbers[:side] + 0.5) * scale[:, None]
    # Antialiased: the filter is as wide as a pixel of the result.
    distances = (numbers[:size] - centres[:, :, None] + 0.5).abs() * (1 / scale.clamp(min=1))[:, None, None]
    if interpolation == "bicubic":
        # Keys' filter with a = -0.5.
        near = (1.5 * distances - 2.5) * distances * distances + 1
        far = (((distances - 5) * distances + 8) * distances - 4) * -0.5
        weights = near.where(distances < 1, far.masked_fill(distances >= 2, 0.0))
    else:
        weights = (1 - distances).clamp(min=0)
    return (weights / weights.sum(dim=2, keepdim=True))[:, None]


def _resampled(planes: Tensor, across: Tensor, down: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    return rounded(down @ rounded(planes.double() @ across.mT).double())


def _turned(planes: Tensor, orientations: Tensor) -> Tensor:
    """Return each of the square images [B, C, S, S] in its orientation, as `numpy.rot90` and then a mirror image."""
    turns, is_mirrored = orientations % 4, orientations >= 4

    def where(flags: Tensor, changed: Tensor, otherwise: Tensor) -> Tensor:
        return changed.where(flags[:, None, None, None], otherwise)

    planes = where(turns % 2 == 1, planes.mT, planes)
    planes = where((turns == 1) | (turns == 2), planes.flip(2), planes)
    return where((turns >= 2) ^ is_mirrored, planes.flip(3), planes)


def _recoloured(planes: Tensor, draws: ViewDraws, turns_hue: bool) -> Tensor:
    """Return pictures [B, 3, S, S] with other colours."""
    brightness, contrast, saturation = draws.factors[:, :, None, None, None].unbind(1)
    planes = _blended(torch.zeros_like(planes), planes, brightness)
    mean = (_luma(planes).double().mean(dim=(2, 3), keepdim=True) + 0.5).floor().float()
    planes = _blended(mean, planes, contrast)
    planes = _blended(_luma(planes), planes, saturation)
    if turns_hue:
        planes = _with_hue(planes, draws.hue_turns)
    return _luma(planes).expand_as(planes).where(draws.are_grey[:, None, None, None], planes)


def _blended(one: Tensor, other: Tensor, share: Tensor) -> Tensor:
    return (one + share * (other - one)).clamp(0, 255).floor()


def _luma(planes: Tensor) -> Tensor:
    """Return the luma [B, 1, S, S] of ITU-R 601-2 in 16 bits, as Pillow computes it."""
    red, green, blue = planes.int().unbind(1)
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16)[:, None].float()


def _with_hue(planes: Tensor, turns: Tensor) -> Tensor:
    """Return pictures whose hue, one of 256 values as in Pillow's HSV, is changed by `turns` int64 [B].

    Types are those of Pillow's steps, because colours are cut to whole numbers after them.
    """
    red, green, blue = planes.unbind(1)
    value = planes.amax(dim=1)
    chroma = value - planes.amin(dim=1)
    from_red, from_green, from_blue = ((value - plane) / chroma.clamp(min=1) for plane in (red, green, blue))
    sixths = (4 + from_green.double() - from_red).where(green != value, 2 + from_red.double() - from_blue).float()
    sixths = sixths.where(red != value, from_blue - from_green)
    hue = ((sixths.double() / 6 + 1).remainder(1).float().double() * 255).floor()
    saturation = ((chroma / value.clamp(min=1)).double() * 255).floor()

    turned = (hue + turns[:, None, None]).remainder(256) * 6 / 255
    sector, share = turned.floor(), (saturation / 255).float()
    rest = (turned - sector).float()
    shares = (share.double(), (share * rest).double(), share.double() * (1 - rest.double()))
    lowest, falling, rising = ((value.double() * (1 - of_chroma) + 0.5).floor().float() for of_chroma in shares)
    # What red, green and blue are in each of the six sectors.
    colours = torch.stack([value, falling, lowest, rising], dim=1)
    order = [(0, 1, 2, 2, 3, 0), (3, 0, 0, 1, 2, 2), (2, 2, 3, 0, 0, 1)]
    return torch.cat([_picked(colours, sector.remainder(6), choice) for choice in order], dim=1)


def _picked(colours: Tensor, sector: Tensor, choice: tuple[int, ...]) -> Tensor:
    """Return [B, 1, S, S]: of colours [B, 4, S, S], the one that `choice` has for each pixel's sector [B, S, S]."""
    picked = colours[:, choice[0]]
    for number, colour in enumerate(choice[1:], start=1):
        picked = colours[:, colour].where(sector == number, picked)
    return picked[:, None]
