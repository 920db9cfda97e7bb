"""Devices that networks run on, and the arithmetic that makes codes reproducible on them."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from orbithash.encoders.errors import InputError

__all__ = ["check_device", "exact_float32", "tensor_float32"]


def check_device(device: str | torch.device) -> torch.device:
    """Return a device that exists on this machine: `cpu`, `cuda` or `cuda:N`; `InputError` for any other."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise InputError(f"device is {str(device)!r}; cpu, cuda and cuda:N are allowed")
    if found.type == "cuda":
        num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (found.index or 0) >= num_gpus:
            raise InputError(
                f"device is {str(device)!r}, but torch can use {num_gpus} GPUs here; use cpu or another GPU"
            )
    elif found.index:
        raise InputError(f"device is {str(device)!r}; there is one cpu, without a number")
    return found


class _ExactFloat32:
    """The process-wide settings of `exact_float32`, kept while any thread needs them."""

    def __init__(self) -> None:
        self._lock, self._num_users = threading.Lock(), 0
        self._settings = ExitStack()

    def enter(self) -> None:
        with self._lock:
            if self._num_users == 0:
                # Any: torch has types for some of these modules only.
                backends: Any = torch.backends
                self._settings.enter_context(backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False))
                for operation in (
                    backends.cuda.matmul,
                    backends.cudnn.conv,
                    backends.mkldnn.matmul,
                    backends.mkldnn.conv,
                ):
                    self._settings.callback(setattr, operation, "fp32_precision", operation.fp32_precision)
                    operation.fp32_precision = "ieee"
            self._num_users += 1

    def exit(self) -> None:
        with self._lock:
            self._num_users -= 1
            if self._num_users == 0:
                self._settings.close()


_EXACT_FLOAT32 = _ExactFloat32()


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Compute in float32 without TensorFloat-32, bfloat16 or autocast, whatever the caller has allowed.

    TensorFloat-32 rounds a thousand times coarser than float32. cuDNN uses deterministic algorithms only.
    """
    _EXACT_FLOAT32.enter()
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        _EXACT_FLOAT32.exit()


@contextmanager
def tensor_float32(is_allowed: bool) -> Iterator[None]:
    """Compute float32 products and convolutions on a GPU in TensorFloat-32, or not; `exact_float32` overrides it."""
    # Any: torch has types for some of these modules only.
    backends: Any = torch.backends
    cudnn = backends.cudnn
    with ExitStack() as settings:
        # The older setting, too: where the two differ, torch refuses to read them, as `exact_float32` does.
        settings.enter_context(
            cudnn.flags(
                enabled=cudnn.enabled,
                benchmark=cudnn.benchmark,
                benchmark_limit=cudnn.benchmark_limit,
                deterministic=cudnn.deterministic,
                allow_tf32=is_allowed,
            )
        )
        for operation in (backends.cuda.matmul, backends.cudnn.conv):
            settings.callback(setattr, operation, "fp32_precision", operation.fp32_precision)
            operation.fp32_precision = "tf32" if is_allowed else "ieee"
        yield
