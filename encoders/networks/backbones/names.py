"""Names of backbones: which exist, and what they need. Imports no library of networks."""

import difflib

from orbithash.encoders.errors import InputError

__all__ = ["MIN_SIDE_PX", "TORCHVISION", "check_backbone_name", "split_name"]

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


def split_name(backbone: str) -> tuple[str, str]:
    """Return source and name of a backbone; `InputError` for an unknown one."""
    if backbone in TORCHVISION:
        return "torchvision", backbone
    source, colon, name = backbone.partition(":")
    if colon and source == "embedding":
        return source, name
    near = difflib.get_close_matches(backbone, TORCHVISION, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise InputError(f"unknown backbone {backbone!r}; {hint}Allowed are {', '.join(TORCHVISION)}")


def check_backbone_name(backbone: str) -> str:
    """Return the name of a backbone unchanged; `InputError` for an unknown one."""
    split_name(backbone)
    return backbone
