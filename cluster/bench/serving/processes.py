"""Processes of a service, as /proc shows them: the gateway, shard actors, Ray."""

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

__all__ = ["ResidentBytes", "busy_seconds", "kind_of", "process_seconds", "resident_bytes", "resident_mb", "shard_pids"]

_SHARD = "shard"
# Ray shows the class of an actor, or its name (`RayBackend.start`).
_NAME = "[0-9a-f]{16}-shard-"


def resident_mb(pid: int) -> dict[str, float]:
    """Return MiB of a process and its descendants by kind of process; shared pages count for each process."""
    sizes: defaultdict[str, float] = defaultdict(float)
    for each in _family(pid):
        sizes["gateway" if each == pid else _kind(each)] += _size_mb(each)
    return dict(sizes)


def shard_pids(pid: int) -> list[int]:
    """Return the processes of shard actors among the descendants of a process, in ascending order."""
    return sorted(each for each in _family(pid) if _kind(each) == _SHARD)


class ResidentBytes(NamedTuple):
    """Resident memory of a process in bytes: all of it, and without mapped files."""

    whole: int
    anonymous: int


def resident_bytes() -> ResidentBytes:
    """Return the resident memory of this process."""
    values = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return ResidentBytes(*(1024 * int(values[name].split()[0]) for name in ("VmRSS", "RssAnon")))


def busy_seconds(pid: int) -> float:
    """Return the seconds of a core that a process and its present descendants have used."""
    return sum(map(process_seconds, _family(pid)))


def process_seconds(pid: int) -> float:
    """Return the seconds of a core that a process has used; 0 if it does not run."""
    with suppress(OSError, ValueError, IndexError):
        # The name in brackets may contain spaces.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def _family(pid: int) -> Sequence[int]:
    """Return a process and its descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            found = re.search(r"\nPPid:\t(\d+)", (entry / "status").read_text())
            children.setdefault(int(found[1]) if found else 0, []).append(int(entry.name))
    members, todo = [], [pid]
    while todo:
        members.append(each := todo.pop())
        todo += children.get(each, [])
    return members


def _kind(pid: int) -> str:
    with suppress(OSError):
        return kind_of(Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode(errors="replace"))
    return "ray"


def kind_of(title: str) -> str:
    """Return the kind of a process by its title: "shard", the class of another Ray actor, or "ray"."""
    if re.match(rf"ray::({_NAME}|_ShardActor)", title):
        return _SHARD
    actor = re.match(r"ray::_?(\w+)", title)
    return actor[1].lower() if actor else "ray"


def _size_mb(pid: int) -> float:
    with suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    return 0.0
