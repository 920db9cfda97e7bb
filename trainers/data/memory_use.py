"""What a stretch of a program needs: memory of the GPU's tensors for a CUDA device, else of this process, in MiB.

The peak of a process can be set back on Linux only. Elsewhere, and where the kernel forbids it, it is the most since
the process began.
"""

import math
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

__all__ = ["available_memory_mb", "memory_mb", "peak_memory_mb", "reset_peak_memory"]


def reset_peak_memory(device: torch.device) -> None:
    """Begins the stretch that `peak_memory_mb` tells of."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def memory_mb(device: torch.device) -> float:
    """Memory in use now; the most so far where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    return _of_process("VmRSS")


def peak_memory_mb(device: torch.device) -> float:
    """The most memory in use since `reset_peak_memory`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return _of_process("VmHWM")


def available_memory_mb() -> float:
    """What this process and others of its container may still take; all of the machine's where the system is silent."""
    available = math.inf
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        # "max" where there is no limit.
        limit = int((group / "memory.max").read_text())
        available = (limit - int((group / "memory.current").read_text())) / 2**20
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return min(available, int(line.split()[1]) / 2**10)
    return min(available, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**20)


def _of_process(name: str) -> float:
    """A line of /proc/self/status, else the most memory since the process began."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) / 2**10
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, others KiB.
    return most / (2**20 if sys.platform == "darwin" else 2**10)
