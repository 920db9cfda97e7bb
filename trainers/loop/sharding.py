"""Sharding: each rank holds a share of all weights, gradients and optimizer state (FSDP2, `fully_shard` of torch).

A pass of the network gathers the weights of a block when it needs them and frees them again; the gradients of a block
are averaged over ranks, as DDP does, and each rank keeps those of its share. Between passes parameters are DTensors,
split along their first dimension. A checkpoint has whole tensors, so a run resumes with any number of ranks, with or
without sharding.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from orbithash.encoders.networks.hash_network import HashNetwork
from orbithash.trainers.config import TrainConfig
from orbithash.trainers.distributed import rank, world_size
from orbithash.trainers.methods import Method
from orbithash.trainers.methods.fine_tuning import FineTuningConfig

__all__ = ["gathered", "is_sharded", "load_shares", "shard", "whole_weights"]


def is_sharded(config: TrainConfig) -> bool:
    """Return whether a run with these settings is sharded; one rank holds everything."""
    return world_size() > 1 and isinstance(config, FineTuningConfig) and config.shard


def shard(method: Method, device: torch.device) -> None:
    """Replace all parameters of `method` by this rank's shares. Its weights are the same on every rank, on `device`.

    Each block of a backbone is gathered on its own. What is outside of the blocks is gathered for a whole step, because
    losses read it, too.
    """
    mesh = init_device_mesh(device.type, (world_size(),))
    for parameter in method.parameters():
        # FSDP takes no other order of the elements, such as that of channels last.
        parameter.data = parameter.data.contiguous()
    for network in [module for module in method.modules() if isinstance(module, HashNetwork)]:
        for block in _blocks(network.backbone, method):
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
        if network is not method.network:
            # It runs outside of the method's forward pass, which gathers the rest of the trained network.
            fully_shard(network, mesh=mesh, reshard_after_forward=True)
    fully_shard(method, mesh=mesh, reshard_after_forward=False)


def _blocks(backbone: nn.Module, method: Method) -> list[nn.Module]:
    """Return the blocks of a backbone that can be gathered on their own."""
    uses = Counter(parameter for _, parameter in method.named_parameters(remove_duplicate=False))

    def is_alone(block: nn.Module) -> bool:
        # Parameters that others use, too, are gathered for the whole step. A list of modules has no pass of its own.
        own = Counter(parameter for _, parameter in block.named_parameters(remove_duplicate=False))
        return bool(own) and all(uses[each] == own[each] for each in own) and type(block) is not nn.ModuleList

    return [block for block in getattr(backbone, "blocks", list)() if is_alone(block)]


@contextmanager
def whole_weights(method: Method) -> Iterator[None]:
    """Hold the whole weights on every rank, so that each may run the networks as often as it needs, in evaluation mode.

    Afterwards there are no gradients. A method that is not sharded stays as it is.
    """
    if not isinstance(method, FSDPModule):
        yield
        return
    parts = [module for module in method.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        # FSDP has noted these passes, to gather weights ahead in the next backward pass. Ranks with different numbers
        # of passes would then gather different weights, and wait for each other without end.
        method.reset_iter_state()
        for part in parts:
            part.set_reshard_after_forward(not isinstance(part, Method), recurse=False)


def gathered(value: Any) -> Any:
    """Return nested dicts and lists of the first rank with whole tensors on the CPU in place of shares.

    Every rank calls it; the other ranks' result is without tensors.
    """
    if isinstance(value, dict):
        return {key: gathered(item) for key, item in value.items()}
    if isinstance(value, list):
        return [gathered(item) for item in value]
    if isinstance(value, DTensor):
        whole = value.full_tensor()
        return whole.detach().cpu() if rank() == 0 else None
    return value


def load_shares(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load the whole `state` of an optimizer of the same parameters; each rank keeps its shares."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def share(tensor: Any, parameter: nn.Parameter) -> Any:
        if not isinstance(parameter, DTensor) or not isinstance(tensor, torch.Tensor) or not tensor.dim():
            return tensor
        # Every rank has read the whole tensor, so nothing is sent.
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)

    shares = {
        number: {name: share(item, parameters[number]) for name, item in of_parameter.items()}
        for number, of_parameter in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": shares})
