"""The input of a plan: the archive, the load, and the nodes to use."""

from dataclasses import dataclass
from typing import Literal, get_args

from orbithash.encoders.codes import check_bits
from orbithash.encoders.errors import InputError

__all__ = ["CodeKind", "Requirements"]

# How codes are distributed: near one another, as those of a trained model, or uniformly random.
CodeKind = Literal["learned", "random"]


@dataclass(frozen=True)
class Requirements:
    """The archive and load to serve, and the nodes to serve it on.

    Attributes:
        rows, bits: number of rows of the archive, length of a code.
        codes: how the codes are distributed, which decides whether a search probes tables or compares all codes.
        qps: queries per second.
        k: hits per query.
        distinct: share of distinct codes among the rows; there are at most 2^bits distinct codes.
        replicas: replicas of each shard.
        cores, memory_gb: size of a node; 1 GB is 10^9 bytes.
        headroom: share of cores and memory that stays free.
        p99_ms: maximum 99th percentile of the latency, ms.
        has_changes: whether rows are written while it serves, so that several versions are in memory.
    """

    rows: float
    bits: int = 64
    codes: CodeKind = "learned"
    qps: float = 100.0
    k: int = 10
    distinct: float = 1.0
    replicas: int = 2
    cores: int = 16
    memory_gb: float = 64.0
    headroom: float = 0.3
    p99_ms: float = 100.0
    has_changes: bool = True

    def check(self) -> None:
        """Raise `InputError` for an invalid value."""
        check_bits(self.bits)
        if self.codes not in get_args(CodeKind):
            raise InputError(f"--codes is {self.codes!r}; allowed: {', '.join(get_args(CodeKind))}")
        for name, value, minimum, maximum in (
            ("--rows", self.rows, 1, 1e13),
            ("--qps", self.qps, 1e-3, 1e7),
            ("-k", self.k, 1, 10_000),
            ("--replicas", self.replicas, 1, 16),
            ("--cores", self.cores, 1, 1024),
            ("--memory", self.memory_gb, 1, 1e5),
            ("--headroom", self.headroom, 0, 0.9),
            ("--p99", self.p99_ms, 1, 1e6),
        ):
            # The comparison is also false for NaN.
            if not minimum <= value <= maximum:
                raise InputError(f"{name} is {value:g}; from {minimum:g} to {maximum:g} are allowed")
        if self.rows != int(self.rows):
            raise InputError(f"--rows is {self.rows:g}; a whole number, such as 1e9, is needed")
        if not 0 < self.distinct <= 1:
            raise InputError(f"--distinct is {self.distinct:g}; a share above 0 and up to 1 is needed")

    @property
    def num_distinct(self) -> float:
        """The number of distinct codes."""
        return max(1.0, min(self.rows * self.distinct, 2.0**self.bits))

    @property
    def used_share(self) -> float:
        """The share of a node that may be used."""
        return 1 - self.headroom
