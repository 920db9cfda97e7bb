"""The origin of a report: what it is about, when, by which command and version, on which machine, from which data."""

import datetime as dt
import importlib.metadata
import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Provenance", "machine", "package_versions"]

PROGRAM = "orbithash"
# Versions of these libraries are stated if the process has loaded them.
LIBRARIES = {
    "torch": "torch",
    "torchvision": "torchvision",
    "ray": "ray",
    "lance": "pylance",
    "faiss": "faiss-cpu",
    "numpy": "numpy",
}

# User and password in an address, such as s3://KEY:SECRET@bucket; the query of an address, such as ?sig=SECRET; and an
# option whose value is a secret.
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_QUERY = re.compile(r"(\w+://[^\s?#'\"]*)[?#][^\s'\"]+")
_SECRET_OPTION = re.compile(r"(--?[\w-]*(?:token|secret|password|credential)[\w-]*)(?:=.*)?", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class Provenance:
    """The origin of a report, shown at its head.

    Attributes:
        kind: what the report is, such as "Evaluation".
        data: what it was measured on.
        details: further entries of the head by name, such as the model.
        when: UTC.
        command: the command line, without secrets; "" in another program.
    """

    kind: str
    data: str
    details: Mapping[str, str] = field(default_factory=dict)
    when: dt.datetime = field(default_factory=lambda: dt.datetime.now(dt.UTC))
    command: str = field(default_factory=lambda: command_line(sys.argv))
    version: str = field(default_factory=lambda: ", ".join(package_versions()))
    machine: str = field(default_factory=lambda: machine())

    @property
    def entries(self) -> list[tuple[str, str]]:
        """The names and values of the head, without empty ones."""
        entries = {
            "Data": self.data,
            **self.details,
            "Date": self.when.strftime("%Y-%m-%d %H:%M UTC"),
            "Command": self.command or "called from Python",
            "Version": self.version,
            "Machine": self.machine,
        }
        return [(name, without_secrets(value)) for name, value in entries.items() if value]


def without_secrets(text: str) -> str:
    """Return the text with the users, passwords and queries of addresses replaced."""
    return _QUERY.sub(r"\1?***", _CREDENTIALS.sub("***", text))


def command_line(arguments: list[str]) -> str:
    """Return the command line of orbithash with its secrets replaced; "" if another program runs."""
    if not arguments or Path(arguments[0]).name not in (PROGRAM, f"{PROGRAM}.exe"):
        return ""
    words: list[str] = []
    hides_next = False
    for word in arguments[1:]:
        option = _SECRET_OPTION.fullmatch(word)
        if hides_next:
            words.append("***")
        elif option and "=" in word:
            words.append(f"{option[1]}=***")
        else:
            words.append(shlex.quote(without_secrets(word)))
        hides_next = option is not None and "=" not in word
    return " ".join([PROGRAM, *words])


def package_versions(*packages: str) -> list[str]:
    """Return "NAME VERSION" of orbithash, Python, and these packages; by default the loaded ones of `LIBRARIES`."""
    names = packages or [package for module, package in LIBRARIES.items() if module in sys.modules]
    versions = [f"{name} {found}" for name in dict.fromkeys((PROGRAM, *names)) if (found := _version(name))]
    return [*versions[:1], f"Python {platform.python_version()}", *versions[1:]]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> str:
    """Return processor, cores, memory, operating system and GPUs of this machine; never its name."""
    cores, usable = os.cpu_count() or 1, len(os.sched_getaffinity(0))
    parts = [
        f"{cores} cores" if usable == cores else f"{usable} of {cores} cores",
        _processor(),
        f"{_memory_gib():.0f} GiB of memory",
        f"{platform.system()} {platform.machine()}",
    ]
    return ", ".join(filter(None, [*parts, *_gpus()]))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else ""


def _memory_gib() -> float:
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)


def _gpus() -> list[str]:
    """Return the names of the GPUs that torch sees, if this process has loaded it."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
