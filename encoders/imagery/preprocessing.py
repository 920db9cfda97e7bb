"""Preprocessing: from a rendered image of any size to the square input of the network.

Does not import torch, because the processes that decode images run it, and there are many of them.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from orbithash.encoders.errors import InputError, listed
from orbithash.encoders.imagery.rendering import Image, Pixels, Rendering
from orbithash.encoders.imagery.resampling import INTERPOLATIONS, resample

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "Preprocessing"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# For bands other than RGB, for which pretrained weights define no statistics.
OTHER_MEAN, OTHER_STD = 0.5, 0.25

MIN_SIDE_PX, MAX_SIDE_PX = 16, 1024

ORIENTATIONS = (1, 4, 8)


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the network's input; stored in the model folder, and exact when loaded from it.

    The centre square of the image, `crop / resize` of its shorter side, is resampled to `crop` x `crop` pixels
    (antialiased). The result is that of resizing the shorter side to `resize` and cropping `crop`, in one
    step whose memory does not depend on the aspect ratio.

    Attributes:
        rendering: bands, and what their values become.
        resize: pixels of the shorter side before cropping.
        crop: pixels of the side of the network's input.
        mean: mean of each band of the rendered image: of a picture in 0 to 1, else in the unit of the numbers. Empty:
            of a picture ImageNet's for three bands, else 0.5 each; of numbers not known yet.
        std: standard deviation likewise; empty: of a picture ImageNet's for three bands, else 0.25 each.
        orientations: number of orientations of the square over which the network's features are averaged: 1 as it is,
            4 with quarter turns, 8 with mirror images, too. Images from above have no upright direction, so that the
            mean loses no information about the scene. The time to encode is proportional to it.
        interpolation: bilinear or bicubic.
        smaller: sides in pixels to which the square is resampled as well; the network's features are averaged over all
            sizes. Each adds the time of its own pass.
    """

    rendering: Rendering
    resize: int
    crop: int
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    orientations: int = 1
    interpolation: str = "bilinear"
    smaller: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.mean and not self.std and self.rendering.is_picture:
            mean: tuple[float, ...] = IMAGENET_MEAN
            std: tuple[float, ...] = IMAGENET_STD
            if self.channels != 3:
                mean, std = (OTHER_MEAN,) * self.channels, (OTHER_STD,) * self.channels
            object.__setattr__(self, "mean", mean)
            object.__setattr__(self, "std", std)
        problems = []
        if not MIN_SIDE_PX <= self.crop <= self.resize <= MAX_SIDE_PX:
            problems.append(
                f"resize {self.resize} and crop {self.crop}; {MIN_SIDE_PX} <= crop <= resize <= {MAX_SIDE_PX} pixels "
                "is required"
            )
        if (self.mean or self.std) and not (
            len(self.mean) == len(self.std) == self.channels
            and all(map(math.isfinite, (*self.mean, *self.std)))
            and all(s > 0 for s in self.std)
        ):
            problems.append(
                f"mean {self.mean} and std {self.std}; {self.channels} numbers each are required, the std above 0"
            )
        if self.interpolation not in INTERPOLATIONS:
            problems.append(f"interpolation {self.interpolation!r}; {', '.join(INTERPOLATIONS)} are allowed")
        if self.orientations not in ORIENTATIONS:
            problems.append(f"orientations {self.orientations}; {', '.join(map(str, ORIENTATIONS))} are allowed")
        if not all(MIN_SIDE_PX <= side < self.crop for side in self.smaller) or len({*self.smaller}) < len(
            self.smaller
        ):
            problems.append(
                f"smaller {self.smaller}; different sides from {MIN_SIDE_PX} to below {self.crop} are allowed"
            )
        if problems:
            raise listed(problems, "preprocessing")

    @property
    def channels(self) -> int:
        """Number of bands of the network's input."""
        return self.rendering.channels

    @property
    def dtype(self) -> str:
        """The type of a prepared image: uint8 of a picture, float32 of numbers."""
        return self.rendering.dtype

    @property
    def num_bytes(self) -> int:
        """Number of bytes of a prepared image."""
        return self.crop**2 * self.channels * np.dtype(self.dtype).itemsize

    def prepare(self, image: Image) -> Pixels:
        """Resample a rendered image [H, W, C] to [crop, crop, C] of the same type, which is `dtype`.

        Missing pixels of numbers stay missing (NaN); they do not change their neighbours.
        """
        if image.dtype != self.dtype or image.ndim != 3 or image.shape[2] != self.channels or not image.size:
            raise InputError(
                f"an image is {self.dtype} [H, W, {self.channels}] and not empty, got {image.dtype} {list(image.shape)}"
            )
        height, width = image.shape[:2]
        side = min(height, width) * self.crop / self.resize
        left, top = (width - side) / 2, (height - side) / 2
        return resample(image, self.crop, (left, top, left + side, top + side), self.interpolation)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return {
            "rendering": self.rendering.to_json(),
            "resize": self.resize,
            "crop": self.crop,
            "mean": list(self.mean),
            "std": list(self.std),
            "orientations": self.orientations,
            "interpolation": self.interpolation,
            "smaller": list(self.smaller),
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Preprocessing":
        """Return the preprocessing that `to_json` wrote; `KeyError`, `TypeError` or `InputError` for anything else."""
        return cls(
            rendering=Rendering.from_json(fields["rendering"]),
            resize=int(fields["resize"]),
            crop=int(fields["crop"]),
            mean=tuple(float(v) for v in fields["mean"]),
            std=tuple(float(v) for v in fields["std"]),
            orientations=int(fields["orientations"]),
            interpolation=str(fields["interpolation"]),
            smaller=tuple(int(v) for v in fields["smaller"]),
        )
