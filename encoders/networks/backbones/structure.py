"""Blocks and attention layers of networks of any library, found by the names that all of them use."""

import re

from torch import nn

__all__ = ["attention_linears", "find_blocks"]

# Containers of blocks, without the stem and what follows the last block.
_CONTAINERS = ("blocks", "layers", "stages", "resblocks", "layer", "features")
_RESNET_STAGE = re.compile(r"layer[1-9]")
_ATTENTION = re.compile(r"attn|attention")


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a network in order: those of its outermost container of blocks, else its children."""
    # The outermost container first: a stage may have blocks of its own.
    for path, module in sorted(model.named_modules(), key=lambda named: named[0].count(".")):
        is_container = path.rpartition(".")[2] in _CONTAINERS and isinstance(module, nn.Sequential | nn.ModuleList)
        if is_container and len(module):
            return list(module)
        stages = [child for name, child in module.named_children() if _RESNET_STAGE.fullmatch(name)]
        if stages:
            return stages
    while len(children := list(model.children())) == 1:
        model = children[0]
    return children


def attention_linears(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the linear layers of attention; of torch's own attention layer, the name of that layer."""
    names: list[str] = []
    own = [path for path, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    for path, module in model.named_modules():
        if path in own or (
            isinstance(module, nn.Linear) and _ATTENTION.search(path) and path.rpartition(".")[0] not in own
        ):
            names.append(path)
    return tuple(names)
