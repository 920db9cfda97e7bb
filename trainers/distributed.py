"""The few things ranks say to each other. In a single process each is what it would be with one rank."""

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["gather_rows", "gather_with_gradient", "rank", "sum_over_ranks", "world_size"]


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


def gather_rows(rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Rows [N_rank, B] of every rank, dealt round robin, back in order: row i came from rank i % W."""
    if world_size() == 1:
        return rows
    parts: list[npt.NDArray[np.uint8] | None] = [None] * world_size()
    dist.all_gather_object(parts, rows)
    whole = np.empty((sum(len(part) for part in parts if part is not None), *rows.shape[1:]), rows.dtype)
    for number, part in enumerate(parts):
        whole[number :: world_size()] = part
    return whole


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of every rank's `values`."""
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values
