"""Batches on their way to the device: on a GPU, the next batch is copied while the current one trains."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["one_ahead", "uploaded"]

Item = TypeVar("Item")
Begun = TypeVar("Begun")


def uploaded(items: Iterable[Item], device: torch.device) -> Iterator[Item]:
    """Yield items with their tensors on `device`: tuples and dicts, at any depth, of tensors on the CPU."""
    if device.type != "cuda":
        yield from items
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def begin(item: Item) -> tuple[Item, list[Tensor], torch.cuda.Event]:
        """Begin to copy an item and return it with its tensors and an event that is recorded when they are complete."""
        tensors: list[Tensor] = []

        def copied(tensor: Tensor) -> Tensor:
            # Only pinned memory is copied beside other work. torch keeps it until the copy is complete.
            tensors.append(tensor.pin_memory().to(device, non_blocking=True))
            return tensors[-1]

        with torch.cuda.stream(stream):
            there = _mapped(item, copied)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(stream)
        return there, tensors, event

    for item, tensors, event in one_ahead(items, begin):
        current = torch.cuda.current_stream(device)
        current.wait_event(event)
        for tensor in tensors:
            # Its memory is used again only when the work on it is complete, not when the copy is.
            tensor.record_stream(current)
        yield item


def one_ahead(items: Iterable[Item], begin: Callable[[Item], Begun]) -> Iterator[Begun]:
    """Yield `begin(item)` of each item; the next one is called before the result of the last one is yielded."""
    begun = map(begin, items)
    for current in begun:
        for following in begun:
            yield current
            current = following
        yield current


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return nested tuples and dicts with `change` applied to each tensor; other values stay."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    if isinstance(value, tuple):
        items = [_mapped(item, change) for item in value]
        # A named tuple takes its fields one by one.
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value
