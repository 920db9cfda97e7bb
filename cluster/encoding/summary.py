"""Counts and times of a run of `encode`: collected while it runs, summarised at its end."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from orbithash.cluster.encoding.items import Portion
from orbithash.cluster.encoding.stages import STAGES, Written
from orbithash.cluster.output import say

__all__ = ["EncodeSummary", "Tally"]

# Maximum number of refused items that are printed.
MAX_PRINTED = 10


@dataclasses.dataclass(frozen=True)
class EncodeSummary:
    """Counts and times of one run of `encode`.

    Attributes:
        num_listed: items in the source.
        num_done_before: listed items that already had a row of the same content.
        num_refused_before: listed items that were refused before and have not changed.
        num_encoded: items that became rows, new ones and replaced ones.
        num_replaced: encoded items that replaced a row of other content.
        num_refused: items that could not be read in this run.
        left_out: number of files of each kind in the source that are not read.
        start_s: seconds until the first batch reached a network.
        encode_s: seconds from the first batch to the last commit.
        rows_per_s: items read per second of `encode_s`, encoded or refused.
        worker_s: busy seconds of all workers together, by stage.
        worker_images_per_s: images per busy second: the rate of one worker with this stage alone.
        rows_in_archive: rows of the archive at the end.
        groups: number of STAC items by the catalog, collection or file that they are in.
        unit: what the items are: images, vectors or codes.
    """

    num_listed: int
    num_done_before: int
    num_refused_before: int
    num_encoded: int
    num_replaced: int
    num_refused: int
    left_out: dict[str, int]
    start_s: float
    encode_s: float
    rows_per_s: float
    worker_s: dict[str, float]
    worker_images_per_s: dict[str, float]
    rows_in_archive: int
    groups: dict[str, int] = dataclasses.field(default_factory=dict)
    unit: str = "images"

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        """Return the text for a terminal."""
        rate = f" at {self.rows_per_s:.0f}/s after {self.start_s:.1f} s of start-up" if self.num_encoded else ""
        verb = "imported" if self.unit == "codes" else "encoded"
        parts = [f"{verb} {self.num_encoded} of {self.num_listed} {self.unit}{rate}"]
        if self.num_replaced:
            parts.append(f"{self.num_replaced} of them replaced rows, because their files had changed")
        if self.num_done_before:
            parts.append(f"{self.num_done_before} were {verb} before")
        if self.num_refused:
            parts.append(f"refused {self.num_refused}")
        if self.num_refused_before:
            parts.append(f"{self.num_refused_before} were refused before and have not changed")
        see = " (`orbithash refused` lists them)" if self.num_refused or self.num_refused_before else ""
        text = f"{', '.join(parts)}{see}; the archive has {self.rows_in_archive} rows"
        if self.worker_images_per_s:
            stages = ", ".join(
                f"{name} {self.worker_s[name]:.1f} s ({rate:.0f}/s)" for name, rate in self.worker_images_per_s.items()
            )
            text += f"\nbusy time of all workers (and rate of one worker) by stage: {stages}"
        return text


@dataclasses.dataclass
class Tally:
    """The counts of a run so far; see `EncodeSummary`."""

    num_done_before: int = 0
    num_refused_before: int = 0
    num_encoded: int = 0
    num_replaced: int = 0
    num_refused: int = 0
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)
    groups: Mapping[str, int] = dataclasses.field(default_factory=dict)
    unit: str = "images"
    start_s: float = 0.0
    encode_s: float = 0.0
    worker_s: dict[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    def add_known(self, portion: Portion) -> None:
        """Count the items of a portion that need not be encoded."""
        self.num_done_before += portion.num_done
        self.num_refused_before += portion.num_refused

    def add(self, written: Written) -> None:
        """Count encoded and refused items, and print the first reasons."""
        refused = written.refused_items()
        for key, reason in refused[: max(0, MAX_PRINTED - self.num_refused)]:
            # Only a refused item can have a key with control characters.
            say(f"refused {key if key.isprintable() else ascii(key)}: {reason}")
        self.num_encoded += written.num_rows
        self.num_replaced += written.num_replaced
        self.num_refused += len(refused)
        for stage in STAGES:
            self.worker_s[stage] += getattr(written, f"{stage}_s")

    @property
    def num_read(self) -> int:
        """Number of items that were read, encoded or refused."""
        return self.num_encoded + self.num_refused

    def summary(self, num_listed: int, rows_in_archive: int) -> EncodeSummary:
        """Return the summary of a run that ends now."""
        return EncodeSummary(
            num_listed=num_listed,
            num_done_before=self.num_done_before,
            num_refused_before=self.num_refused_before,
            num_encoded=self.num_encoded,
            num_replaced=self.num_replaced,
            num_refused=self.num_refused,
            left_out=dict(self.left_out),
            start_s=self.start_s,
            encode_s=self.encode_s,
            rows_per_s=self.num_read / self.encode_s if self.encode_s else 0.0,
            worker_s=self.worker_s,
            worker_images_per_s={name: self.num_read / seconds for name, seconds in self.worker_s.items() if seconds},
            rows_in_archive=rows_in_archive,
            groups=dict(self.groups),
            unit=self.unit,
        )
