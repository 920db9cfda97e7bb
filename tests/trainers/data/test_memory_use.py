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


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        # 100 MiB are allowed and 90 are in use, of which 20 and 30 are the cache of files.
        ({"memory.max": 100, "memory.current": 90, "memory.stat": ("", 20, 30)}, 60),
        ({"memory.max": 100, "memory.current": 90}, 10),
        ({"memory.max": "max", "memory.current": 90, "memory.stat": ("", 20, 30)}, 1000),
        (
            {
                "memory/memory.limit_in_bytes": 100,
                "memory/memory.usage_in_bytes": 90,
                "memory/memory.stat": ("total_", 20, 30),
            },
            60,
        ),
    ],
)
def test_memory_of_a_container_includes_its_cache_of_files(files, expected, tmp_path, monkeypatch):
    written = {"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {1000 * 2**10} kB\n"}
    for name, value in files.items():
        if isinstance(value, tuple):
            prefix, *sizes = value
            value = f"anon 1000\n{prefix}active_file {sizes[0] * 2**20}\n{prefix}inactive_file {sizes[1] * 2**20}\n"
        elif isinstance(value, int):
            value *= 2**20
        written[f"sys/fs/cgroup/{name}"] = f"{value}\n"
    for name, text in written.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory_use, "Path", lambda name: tmp_path / name.lstrip("/"))
    assert available_memory_mb() == pytest.approx(expected, abs=0.01)
