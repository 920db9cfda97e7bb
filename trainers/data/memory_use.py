"""Memory in use and its peak, in MiB: of tensors on a CUDA device, otherwise of this process.

The peak of a process can be reset on Linux only. On other systems, or if the kernel refuses, it is the peak since the
process started.
"""

import math
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["available_memory_mb", "memory_mb", "peak_memory_mb", "peak_memory_of_process_mb", "reset_peak_memory"]


def reset_peak_memory(device: "torch.device") -> None:
    """Start a new measurement of `peak_memory_mb`."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def memory_mb(device: "torch.device") -> float:
    """Return the memory in use, or the peak on systems that do not report it."""
    if device.type == "cuda":
        import torch

        return torch.cuda.memory_allocated(device) / 2**20
    return _of_process("VmRSS")


def peak_memory_mb(device: "torch.device") -> float:
    """Return the peak of the memory in use since `reset_peak_memory`."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**20
    return peak_memory_of_process_mb()


def peak_memory_of_process_mb() -> float:
    """Return the peak of this process's resident memory since it started its program, or since the last reset.

    `getrusage` begins with the peak of the process that started this one.
    """
    return _of_process("VmHWM")


def available_memory_mb() -> float:
    """Return the memory still available to this container; the whole memory on systems that do not report it."""
    available = math.inf
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        # "max" without a limit, which is not a number.
        limit = int((group / "memory.max").read_text())
        available = (limit - int((group / "memory.current").read_text())) / 2**20
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return min(available, int(line.split()[1]) / 2**10)
    return min(available, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**20)


def _of_process(name: str) -> float:
    """Return a value of /proc/self/status, or the peak since the process started."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, others KiB.
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
