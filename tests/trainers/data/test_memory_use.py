"""Peak memory: freed memory counts, memory before the measurement does not."""

import mmap
from pathlib import Path

import pytest
import torch

from orbithash.trainers.data import memory_use
from orbithash.trainers.data.memory_use import available_memory_mb, memory_mb, peak_memory_mb, reset_peak_memory

CPU = torch.device("cpu")


def allocate(mib):
    """Then return it to the system, not to an allocator that keeps it."""
    with mmap.mmap(-1, mib * 2**20) as memory:
        for start in range(0, len(memory), mmap.PAGESIZE):
            memory[start] = 1


def test_the_peak_is_of_the_stretch():
    allocate(400)
    reset_peak_memory(CPU)
    before = memory_mb(CPU)
    assert peak_memory_mb(CPU) == pytest.approx(before, abs=5)
    allocate(100)
    assert memory_mb(CPU) == pytest.approx(before, abs=20)
    assert peak_memory_mb(CPU) - before == pytest.approx(100, abs=20)


def test_where_the_system_does_not_tell_it_is_the_most_so_far(monkeypatch):
    monkeypatch.setattr(memory_use, "Path", lambda name: Path("/nowhere") / name.lstrip("/"))
    reset_peak_memory(CPU)
    assert memory_mb(CPU) == peak_memory_mb(CPU) > 50


def test_memory_that_is_free():
    assert 1 < available_memory_mb() < 2**24
