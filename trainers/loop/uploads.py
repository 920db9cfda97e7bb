"""Batches on their way to the device: on a GPU, the next batch is copied while the current one trains."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from orbithash.trainers.methods import Batch

__all__ = ["one_ahead", "uploaded"]

Item = TypeVar("Item")
Begun = TypeVar("Begun")


def uploaded(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield batches of tensors on the CPU as batches on `device`."""
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def begin(batch: Batch) -> tuple[Batch, torch.cuda.Event]:
        """Begin to copy a batch and return an event that is recorded when its tensors are complete."""
        with torch.cuda.stream(stream):
            # Only pinned memory is copied beside other work. torch keeps it until the copy is complete.
            copied = _mapped(batch, lambda tensor: tensor.pin_memory().to(device, non_blocking=True))
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(stream)
        return copied, event

    for batch, event in one_ahead(batches, begin):
        current = torch.cuda.current_stream(device)
        current.wait_event(event)
        for tensor in _tensors(batch):
            # Its memory is used again only when the work on it is complete, not when the copy is.
            tensor.record_stream(current)
        yield batch


def one_ahead(items: Iterable[Item], begin: Callable[[Item], Begun]) -> Iterator[Begun]:
    """Yield `begin(item)` of each item; the next one is called before the result of the last one is yielded."""
    begun = map(begin, items)
    for current in begun:
        for following in begun:
            yield current
            current = following
        yield current


def _tensors(batch: Batch) -> list[Tensor]:
    tensors = [batch.rows, batch.labels, *batch.features.values()]
    return tensors if batch.images is None else [*tensors, batch.images]


def _mapped(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """Return a batch with `change` applied to each of its tensors."""
    return batch._replace(
        rows=change(batch.rows),
        labels=change(batch.labels),
        images=None if batch.images is None else change(batch.images),
        features={name: change(table) for name, table in batch.features.items()},
    )
