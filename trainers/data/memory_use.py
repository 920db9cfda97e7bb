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

# Limit, use and statistics of the control group of a container, and the prefix of statistics that count its subgroups:
# version 2, then version 1.
_GROUPS = (
    ("memory.max", "memory.current", "memory.stat", ""),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_"),
)


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
    """Return the memory still available to this container; the whole memory on systems that do not report it.

    The cache of files is available, because the kernel drops it when memory is needed.
    """
    available = min(_available_to_group(*names) for names in _GROUPS)
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return min(available, int(line.split()[1]) / 2**10)
    return min(available, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**20)


def _available_to_group(limit: str, use: str, statistics: str, prefix: str) -> float:
    """Return the MiB that a control group may still use, given the names of its files; infinity without a limit."""
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):
        # "max" without a limit, which is not a number.
        available = int((group / limit).read_text()) - int((group / use).read_text())
        with suppress(OSError):
            for line in (group / statistics).read_text().splitlines():
                name, _, value = line.partition(" ")
                if name in (f"{prefix}active_file", f"{prefix}inactive_file"):
                    available += int(value)
        return available / 2**20
    return math.inf


def _of_process(name: str) -> float:
    """Return a value of /proc/self/status, or the peak since the process started."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, others KiB.
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
