"""Codes of the benchmarks and queries for them: random codes, a mixture of centres, or the codes of an archive.

Random codes are the worst case of an exact search: the nearest of them are far away. Codes of trained models lie near
one another, as those of a mixture do.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np

from orbithash.encoders.codes import Codes, check_bits, num_bytes, pack, unpack
from orbithash.encoders.errors import InputError

__all__ = ["BenchCodes", "CodeKind", "CodeSource", "mixture_codes", "near_codes", "random_codes"]

CodeKind = Literal["random", "mixture", "archive"]

# Codes drawn at a time: 16 million random numbers at 64 bits.
_CHUNK = 2**18
# Share of the bits of a row's code that are flipped to make a query to the codes of an archive.
_FLIPPED_SHARE = 1 / 32


class BenchCodes(NamedTuple):
    """Codes uint8 [N, B], queries uint8 [Q, B], their length in bits, and descriptions of both."""

    codes: Codes
    queries: Codes
    bits: int
    kind: str
    query_kind: str


def random_codes(rows: int, bits: int, rng: np.random.Generator) -> Codes:
    """Return uniformly random codes uint8 [rows, B]."""
    codes = rng.integers(0, 256, (rows, num_bytes(bits)), np.uint8)
    if bits % 8:
        codes[:, -1] &= 0xFF << (8 - bits % 8) & 0xFF
    return codes


def mixture_codes(rows: int, bits: int, centres: int, flip: float, rng: np.random.Generator) -> Codes:
    """Return codes uint8 [rows, B]: each is one of `centres` random codes, each bit flipped with probability `flip`."""
    middles = random_codes(centres, bits, rng)
    codes = np.empty((rows, num_bytes(bits)), np.uint8)
    for start in range(0, rows, _CHUNK):
        part = codes[start : start + _CHUNK]
        flipped = rng.random((len(part), bits), np.float32) < flip
        np.bitwise_xor(middles[rng.integers(0, centres, len(part))], np.packbits(flipped, axis=1), out=part)
    return codes


def near_codes(codes: Codes, bits: int, count: int, share: float, rng: np.random.Generator) -> Codes:
    """Return codes uint8 [count, B] of randomly chosen rows, with every bit flipped with probability `share`."""
    rows = unpack(codes[rng.integers(0, len(codes), count)], bits)
    return pack(rows ^ (rng.random(rows.shape) < share))


@dataclass(frozen=True)
class CodeSource:
    """Where the codes of a benchmark come from.

    Attributes:
        kind: uniformly random codes, a mixture (`mixture_codes`), or the codes of an archive.
        centres, flip: number of centres of the mixture, probability that a bit differs from that of the centre.
        distinct: share of distinct codes; the others repeat one of them. None: all are drawn independently.
        archive: the archive whose codes are used; only with the kind "archive".
    """

    kind: CodeKind = "random"
    centres: int = 10_000
    flip: float = 0.06
    distinct: float | None = None
    archive: Path | None = None

    def check(self) -> None:
        """Raise `InputError` for an invalid setting."""
        if self.kind not in get_args(CodeKind):
            raise InputError(f"--codes is {self.kind!r}; allowed: {', '.join(get_args(CodeKind))}")
        if (self.kind == "archive") != (self.archive is not None):
            raise InputError("--codes archive and --archive belong together; give both, or neither")
        if not 1 <= self.centres <= 10**8:
            raise InputError(f"--centres is {self.centres}; from 1 to 100,000,000 are allowed")
        # The comparison is also false for NaN.
        if not 0 <= self.flip <= 0.5:
            raise InputError(f"--flip is {self.flip:g}; a probability from 0 to 0.5 is needed")
        if self.distinct is not None and not 0 < self.distinct <= 1:
            raise InputError(f"--distinct is {self.distinct:g}; a share above 0 and up to 1 is needed")
        if self.distinct is not None and self.archive is not None:
            raise InputError("got --distinct and --archive; --distinct is for generated codes, so give one of them")

    def draw(self, rows: int, bits: int, queries: int, rng: np.random.Generator) -> BenchCodes:
        """Return the codes and queries of the same distribution; an archive ignores `rows` and `bits`.

        Queries of random codes and of a mixture are drawn like rows and are not among them. Queries to an archive are
        codes of rows with some bits flipped.
        """
        self.check()
        if self.archive is not None:
            from orbithash.encoders.archive.archive import Archive

            archive = Archive.open(self.archive)
            codes = np.ascontiguousarray(archive.codes()[1])
            asked = near_codes(codes, archive.bits, queries, _FLIPPED_SHARE, rng)
            kind = f"codes of rows, each bit flipped with probability {_FLIPPED_SHARE:g}"
            return BenchCodes(codes, asked, archive.bits, str(self.archive), kind)
        count = rows if self.distinct is None else max(1, round(self.distinct * rows))
        if self.kind == "random":
            drawn, kind = random_codes(count + queries, check_bits(bits), rng), "random codes"
        else:
            drawn = mixture_codes(count + queries, check_bits(bits), self.centres, self.flip, rng)
            kind = f"mixture of {self.centres:,} centres, each bit flipped with probability {self.flip:g}"
        codes = drawn[:count]
        if count < rows:
            repeated = np.concatenate([np.arange(count), rng.integers(0, count, rows - count)])
            codes = codes[rng.permutation(repeated)]
        return BenchCodes(codes, drawn[count:], bits, kind, f"drawn like the rows ({kind})")
