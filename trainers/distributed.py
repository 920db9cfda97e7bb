"""The few things ranks say to each other. In a single process each is what it would be with one rank."""

from collections.abc import Callable
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
    "gather_objects",
    "gather_rows",
    "gather_with_gradient",
    "rank",
    "sum_over_ranks",
    "sum_with_gradient",
    "synchronise_batch_norm",
    "world_size",
]


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


class _Gather(torch.autograd.Function):
    """All ranks' rows, in rank order. Backward sums over the ranks what each of them derives for these rows."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(world_size())[rank()]


def gather_with_gradient(rows: Tensor) -> Tensor:
    """Rows [B, ...] of every rank as [W * B, ...]; every rank holds the same number of rows.

    A loss computed from the result on every rank alike, averaged over ranks as DDP averages gradients, has the gradient
    of the same loss in one process: each rank's rows receive W equal copies, and the averaging divides by W.
    """
    if world_size() == 1:
        return rows
    gathered: Tensor = _Gather.apply(rows)  # type: ignore[no-untyped-call]
    return gathered


Rows = TypeVar("Rows", bound=npt.NDArray[Any])


def gather_rows(rows: Rows) -> Rows:
    """Rows [N_rank, ...] of every rank, dealt round robin, back in order: row i came from rank i % W."""
    if world_size() == 1:
        return rows
    parts = gather_objects(rows)
    whole: Rows = np.empty_like(rows, shape=(sum(map(len, parts)), *rows.shape[1:]))
    for number, part in enumerate(parts):
        whole[number :: world_size()] = part
    return whole


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, in rank order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


Made = TypeVar("Made")


def from_first_rank(make: Callable[[], Made]) -> Made:
    """What `make` returns on the first rank, on every rank; the others do not call it.

    An `InputError` that it raises there is raised on all of them.
    """
    if world_size() == 1:
        return make()
    answer: list[Any] = [None, None]
    if rank() == 0:
        try:
            answer[0] = make()
        except InputError as err:
            answer[1] = str(err)
    dist.broadcast_object_list(answer, src=0)
    made, problem = answer
    if problem is not None:
        raise InputError(problem)
    return made  # type: ignore[no-any-return] # the type that the first rank made


def broadcast_state(module: nn.Module) -> None:
    """Gives every rank the first one's parameters and buffers."""
    if world_size() > 1:
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, src=0)


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of every rank's `values`."""
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


class _Sum(torch.autograd.Function):
    """The sum of every rank's tensor; backward sums over the ranks what each of them derives for the sum."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, values: Tensor) -> Tensor:
        return sum_over_ranks(values.contiguous())

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> Tensor:
        return sum_over_ranks(gradients[0].contiguous())


def sum_with_gradient(values: Tensor) -> Tensor:
    """The sum of every rank's `values`, for statistics of the whole batch that gradients flow through."""
    if world_size() == 1:
        return values
    total: Tensor = _Sum.apply(values)  # type: ignore[no-untyped-call]
    return total


class _SynchronisedBatchNorm(nn.Module):
    """Batch norm over all ranks' rows, with the state of the layer it stands for. torch's own needs a GPU."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, like: nn.BatchNorm1d | nn.BatchNorm2d) -> None:
        super().__init__()
        assert like.momentum is not None, "a running mean with a fixed momentum"
        self.eps, self.momentum = like.eps, like.momentum
        self.weight, self.bias = like.weight, like.bias
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(like, name))

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs float [N, C, ...]."""
        if not self.training:
            return F.batch_norm(inputs, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        shape = [1, -1] + [1] * (inputs.dim() - 2)
        others = [dim for dim in range(inputs.dim()) if dim != 1]
        count = inputs.numel() // inputs.shape[1] * world_size()
        mean = sum_with_gradient(inputs.sum(others)) / count
        centred = inputs - mean.view(shape)
        variance = sum_with_gradient(centred.square().sum(others)) / count
        with torch.no_grad():
            momentum = self.momentum
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(variance * count / max(1, count - 1), momentum)
        scale = (self.weight * torch.rsqrt(variance + self.eps)).view(shape)
        return centred * scale + self.bias.view(shape)


def synchronise_batch_norm(module: nn.Module) -> None:
    """Makes every batch norm in `module` normalise with the statistics of all ranks' rows."""
    if world_size() == 1:
        return
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            setattr(module, name, _SynchronisedBatchNorm(child))
        else:
            synchronise_batch_norm(child)
