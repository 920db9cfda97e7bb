"""Which parameters of a backbone train, at which rates, and low-rank adapters (LoRA, Hu et al., ICLR 2022).

A parameter belongs to a block of the backbone. Parameters before the first block (embeddings, a stem) belong to a level
of their own below it, parameters after the last block (a last normalisation) to the last block.
"""

from torch import nn

from orbithash.encoders.errors import InputError
from orbithash.encoders.networks.backbones.backbone import Backbone

__all__ = ["add_adapters", "check_blocks", "freeze", "merge_adapters", "rates"]


def check_blocks(backbone: Backbone, num_trained: int) -> None:
    """Raise `InputError` if the backbone has fewer blocks than are to be trained."""
    count = len(_blocks(backbone))
    if num_trained > count:
        raise InputError(f"tune_blocks is {num_trained}; {backbone.spec.name} has {count} blocks")


def freeze(backbone: Backbone, num_trained: int) -> None:
    """Put all but the last `num_trained` blocks in evaluation mode, so that batch norm keeps its statistics there."""
    for block in _blocks(backbone)[:-num_trained]:
        block.eval()


def rates(backbone: Backbone, num_trained: int | None, decay: float) -> list[tuple[nn.Parameter, float]]:
    """Return the parameters that train, in order, with the factor on the learning rate of each.

    The factor is 1 in the last block and `decay` times smaller with each block before it.

    Args:
        backbone: one with adapters trains these, otherwise all its weights.
        num_trained: number of last blocks that train; None: all blocks, and what is before them.
        decay: the layer-wise rate decay, above 0 to 1.
    """
    blocks = _blocks(backbone)
    level_of = {parameter: level for level, block in enumerate(blocks) for parameter in block.parameters()}
    level, last = -1, len(blocks) - 1
    lowest = -1 if num_trained is None else len(blocks) - num_trained
    adapters = {parameter for name, parameter in backbone.named_parameters() if "lora_" in name}
    found = []
    for name, parameter in backbone.named_parameters():
        if parameter in level_of:
            level = level_of[parameter]
        elif level >= 0:
            level = last
        if name.endswith("mask_token"):
            # Used in masked pretraining only: it would get no gradient, which DDP does not allow.
            continue
        if level >= lowest and (not adapters or parameter in adapters):
            found.append((parameter, decay ** (last - level)))
    return found


def _blocks(backbone: Backbone) -> list[nn.Module]:
    """Return the blocks that have parameters."""
    return [block for block in backbone.blocks() if any(True for _ in block.parameters())]


def add_adapters(backbone: Backbone, rank: int, alpha: float) -> None:
    """Add low-rank adapters to the attention of a backbone; they change nothing before the first step.

    Raises:
        InputError: the backbone has no attention, or the library peft is missing.
    """
    names = backbone.attention_linears
    if not names:
        raise InputError(
            f"tune=lora adapts attention layers, and {backbone.spec.name} has none; use tune=last, all or none"
        )
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as err:
        raise InputError("tune=lora needs the library peft; install orbithash[train]") from err
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(names), lora_dropout=0.0, bias="none")  # type: ignore[arg-type] # any number is allowed
    inject_adapter_in_model(config, backbone)


def merge_adapters(backbone: Backbone) -> None:
    """Add the adapters to the weights of their layers and remove them."""
    done: tuple[str, ...] = ()
    for path, layer in list(backbone.named_modules()):
        parent_path, _, name = path.rpartition(".")
        if path.startswith(done):
            continue
        if hasattr(layer, "unload_and_optionally_merge_module"):
            # An attention layer of torch, with the adapter of its output layer.
            merged = layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
        elif hasattr(layer, "base_layer") and hasattr(layer, "lora_A"):
            layer.merge()
            merged = layer.get_base_layer()
        else:
            continue
        setattr(backbone.get_submodule(parent_path), name, merged)
        done += (f"{path}.",)
    if hasattr(backbone, "peft_config"):
        del backbone.peft_config
