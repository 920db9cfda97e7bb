"""Communication between the ranks of a distributed training. Without a process group, there is one rank, 0.

Collectives of torch fail when a rank is missing for the group's time-out (30 minutes with Ray Train). After work of
unequal length, ranks therefore wait for each other in `meet`, for up to `MAX_WORK`, before the next collective.
`from_first_rank`, `on_every_rank`, `gather_rows`, `gather_objects` and `gather_flags` do so themselves. If a rank ends
in the meantime, Ray Train or torchrun ends the others.
"""

from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from orbithash.encoders.errors import InputError

__all__ = [
    "broadcast_state",
    "from_first_rank",
    "gather_flags",
    "gather_objects",
    "gather_rows",
    "gather_with_gradient",
    "meet",
    "on_every_rank",
    "rank",
    "send_rows",
    "sum_over_ranks",
    "sum_with_gradient",
    "synchronise_batch_norm",
    "world_size",
]


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


class _Gather(torch.autograd.Function):
    """Concatenate the rows of all ranks in rank order; backward sums the gradients of all ranks for these rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: Sequence[int]) -> Tensor:
        ctx.counts = counts
        # A collective needs tensors of one shape.
        missing = max(counts) - len(rows)
        padded = torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows.contiguous()
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].contiguous()
        dist.all_reduce(gradient)
        return torch.split_with_sizes(gradient, ctx.counts)[rank()], None


def gather_with_gradient(rows: Tensor, counts: Sequence[int] | None = None) -> Tensor:
    """Concatenate rows [B, ...] of all ranks, which have `counts` rows, by default all as many as this rank.

    Every rank computes the same loss from the result, and DDP averages the gradients. The average equals the gradient
    in one process: the rows of a rank receive W equal gradients on W ranks, and averaging divides by W.
    """
    if world_size() == 1:
        return rows
    gathered: Tensor = _Gather.apply(rows, counts or [len(rows)] * world_size())  # type: ignore[no-untyped-call]
    return gathered


Rows = TypeVar("Rows", bound=npt.NDArray[Any])


def gather_rows(rows: Rows) -> Rows:
    """Merge rows [N_rank, ...] that were dealt to W ranks round robin: row i is from rank i % W."""
    if world_size() == 1:
        return rows
    parts = gather_objects(rows)
    whole: Rows = np.empty_like(rows, shape=(sum(map(len, parts)), *rows.shape[1:]))
    for number, part in enumerate(parts):
        whole[number :: world_size()] = part
    return whole


def gather_objects(value: Any) -> list[Any]:
    """Return the values of all ranks in rank order, once all are there."""
    if world_size() == 1:
        return [value]
    meet()
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def _device() -> torch.device:
    """Return a device whose tensors the collectives of the process group take."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def gather_flags(flags: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Return the flags bool [N] of all W ranks, bool [W, N]; every rank must have the same number of flags."""
    if world_size() == 1:
        return flags[None]
    meet()
    mine = torch.from_numpy(flags.astype(np.uint8)).to(_device())
    parts = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(parts, mine)
    return torch.stack(parts).cpu().numpy().astype(np.bool_)


def send_rows(rows: npt.NDArray[np.float32], source: int) -> npt.NDArray[np.float32]:
    """Return the rows float32 [N, D] of the rank `source`; the other ranks give any rows of this shape."""
    if world_size() == 1:
        return rows
    sent = torch.from_numpy(rows).to(_device())
    dist.broadcast(sent, src=source)
    return sent.cpu().numpy()


Made = TypeVar("Made")

# Longest time that one rank may work while the others wait.
MAX_WORK = timedelta(days=7)

_meetings = count()


def from_first_rank(make: Callable[[], Made]) -> Made:
    """Call `make` on the first rank and return its result on every rank; all ranks raise its `InputError`."""
    if world_size() == 1:
        return make()
    outcome: tuple[Any, str | None] = (None, None)
    if rank() == 0:
        outcome = _attempt(make)
    meet()
    outcomes = [outcome]
    dist.broadcast_object_list(outcomes, src=0)
    made, problem = outcomes[0]
    if problem is not None:
        raise InputError(problem)
    return made  # type: ignore[no-any-return] # the result of `make`


def on_every_rank(make: Callable[[], Made]) -> Made:
    """Call `make` on every rank and return its result once all are done; an `InputError` of one is raised on all."""
    if world_size() == 1:
        return make()
    made, problem = _attempt(make)
    for of_rank in gather_objects(problem):
        if of_rank is not None:
            raise InputError(of_rank)
    return made  # type: ignore[no-any-return] # the result of `make`


def _attempt(make: Callable[[], Any]) -> tuple[Any, str | None]:
    """Return the result of `make`, or the message of its `InputError`."""
    try:
        return make(), None
    except InputError as err:
        return None, str(err)


def meet() -> None:
    """Wait until all ranks are here, for up to `MAX_WORK`. Called before a collective after work of unequal length."""
    if world_size() == 1:
        return
    # The store of the process group: a collective would fail after the time-out of the group.
    store = dist.distributed_c10d._get_default_store()
    number = next(_meetings)
    keys = [f"orbithash/{number}/{each}" for each in range(world_size())]
    store.set(keys[rank()], "here")
    store.wait(keys, MAX_WORK)
    # All ranks have come from the meeting before.
    store.delete_key(f"orbithash/{number - 1}/{rank()}")


def broadcast_state(module: nn.Module) -> None:
    """Copy the parameters and buffers of the first rank to all ranks."""
    if world_size() > 1:
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, src=0)


def sum_over_ranks(values: Tensor) -> Tensor:
    """Return the sum of `values` over all ranks."""
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


class _Sum(torch.autograd.Function):
    """Sum a tensor over all ranks; backward sums the gradients of all ranks."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, values: Tensor) -> Tensor:
        return sum_over_ranks(values.contiguous())

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> Tensor:
        return sum_over_ranks(gradients[0].contiguous())


def sum_with_gradient(values: Tensor) -> Tensor:
    """Return the sum of `values` over all ranks, for statistics of the whole batch with gradients."""
    if world_size() == 1:
        return values
    total: Tensor = _Sum.apply(values)  # type: ignore[no-untyped-call]
    return total


class _SynchronisedBatchNorm(nn.Module):
    """Batch norm over the rows of all ranks on CPUs, with the state of the layer it replaces.

    torch's own needs a GPU. Statistics of bfloat16 are float32.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, like: nn.BatchNorm1d | nn.BatchNorm2d) -> None:
        super().__init__()
        assert like.momentum is not None, "the momentum is fixed"
        self.eps, self.momentum = like.eps, like.momentum
        self.weight, self.bias = like.weight, like.bias
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(like, name))
        # timm's norms have them.
        self.drop, self.act = getattr(like, "drop", nn.Identity()), getattr(like, "act", nn.Identity())

    def forward(self, inputs: Tensor) -> Tensor:
        """Return normalised inputs float [N, C, ...], in timm's norms after their activation."""
        activated: Tensor = self.act(self.drop(self._normalise(inputs)))
        return activated

    def _normalise(self, inputs: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(inputs, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        shape = [1, -1] + [1] * (inputs.dim() - 2)
        others = [dim for dim in range(inputs.dim()) if dim != 1]
        # Ranks may have different numbers of rows.
        count = sum_over_ranks(torch.tensor(inputs.numel() // inputs.shape[1], device=inputs.device))
        wide = inputs.float() if inputs.dtype == torch.bfloat16 else inputs
        mean = sum_with_gradient(wide.sum(others)) / count
        centred = wide - mean.view(shape)
        variance = sum_with_gradient(centred.square().sum(others)) / count
        with torch.no_grad():
            momentum = self.momentum
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(variance * count / (count - 1).clamp(min=1), momentum)
        scale = (self.weight * torch.rsqrt(variance + self.eps)).view(shape)
        return (centred * scale + self.bias.view(shape)).to(inputs.dtype)


def synchronise_batch_norm(module: nn.Module, device: torch.device) -> None:
    """Replace every batch norm in `module` by one that uses the statistics of all ranks' rows, for `device`."""
    if world_size() == 1:
        return
    for name, child in module.named_children():
        if not isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            synchronise_batch_norm(child, device)
        elif device.type == "cuda":
            setattr(module, name, _torch_synchronised(child))
        else:
            setattr(module, name, _SynchronisedBatchNorm(child))


def _torch_synchronised(norm: nn.Module) -> nn.Module:
    if type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d):
        plain: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(norm)  # type: ignore[no-untyped-call]
        return plain
    # timm's, which contains an activation, too.
    from timm.layers import convert_sync_batchnorm

    also_activates: nn.Module = convert_sync_batchnorm(norm)
    return also_activates
