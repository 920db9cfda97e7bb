"""Names of backbones: which exist, and what they need. Imports no library of networks."""

import difflib
from pathlib import Path
from typing import NamedTuple

from orbithash.encoders.errors import InputError

__all__ = [
    "MIN_SIDE_PX",
    "SPELLINGS",
    "TORCHVISION",
    "InputDefaults",
    "check_backbone_name",
    "needs_lookup",
    "split_name",
]

# Convolutional networks of torchvision, and resnet8, which is ours.
TORCHVISION = (
    "mobilenet_v2",
    "mobilenet_v3_small",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "alexnet",
    "googlenet",
    "inception_v3",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet8",
)

# Smallest image side of backbones whose layers would shrink a smaller image to nothing.
MIN_SIDE_PX = {"alexnet": 63, "googlenet": 47, "inception_v3": 75}

# Names of other libraries' backbones, by source.
SPELLINGS = {
    "timm": "timm:NAME",
    "hf": "hf:FOLDER or hf:ORG/NAME[@REVISION]",
    "open_clip": "open_clip:NAME[/TAG] or open_clip:FOLDER",
    "torchgeo": "torchgeo:ENUM.MEMBER",
}


class InputDefaults(NamedTuple):
    """The images that a backbone was trained on.

    Attributes:
        size: side in pixels.
        mean: mean of each band, in the unit of `values`; empty: that of `Preprocessing`.
        std: standard deviation likewise.
        interpolation: bilinear or bicubic.
        bands: names of the bands in order; None: red, green, blue.
        values: what the numbers are, as the setting of the same name.
    """

    size: int
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    interpolation: str = "bilinear"
    bands: tuple[str, ...] | None = None
    values: str = "picture"


def split_name(backbone: str) -> tuple[str, str]:
    """Return source and name of a backbone; `InputError` for an unknown source or network of torchvision."""
    if backbone in TORCHVISION:
        return "torchvision", backbone
    source, colon, name = backbone.partition(":")
    if colon and source == "embedding":
        return source, name
    if colon and source in SPELLINGS:
        if not name:
            raise InputError(f"backbone {backbone!r} has no name after the colon; write {SPELLINGS[source]}")
        return source, name
    near = difflib.get_close_matches(backbone, TORCHVISION, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise InputError(
        f"unknown backbone {backbone!r}; {hint}Allowed are {', '.join((*TORCHVISION, *SPELLINGS.values()))}"
    )


def needs_lookup(backbone: str) -> bool:
    """Return whether a library knows the images that a backbone was trained on; False for an unknown name."""
    return backbone.partition(":")[0] in SPELLINGS


def check_backbone_name(backbone: str) -> str:
    """Return the name of a backbone, with the absolute path of a folder that exists; `InputError` for an unknown one.

    Workers that read the settings later have another current folder.
    """
    source, name = split_name(backbone)
    if source in ("hf", "open_clip") and Path(name).is_dir():
        return f"{source}:{Path(name).absolute()}"
    return backbone
