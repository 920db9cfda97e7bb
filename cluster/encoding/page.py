"""The page of a run of `encode`: rates by stage, refused items, and the quality of the archive's codes."""

import io
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from orbithash.cluster.encoding.summary import EncodeSummary
from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.codes import Codes
from orbithash.encoders.sources.folders import natural
from orbithash.trainers.metrics.code_statistics import CORRELATION_LIMIT, RARE_SHARE, code_statistics
from orbithash.trainers.reports.page import (
    Fact,
    Facts,
    Figure,
    Figures,
    Gallery,
    GalleryRow,
    Section,
    Table,
    Tile,
    thumbnail_data_uri,
    write_report,
)
from orbithash.trainers.reports.plots import bars, bit_balance
from orbithash.trainers.reports.provenance import Provenance

__all__ = ["write_encode_page"]

# Maximum number of codes that are examined, of refused items and of reasons listed.
MAX_CODES, MAX_REFUSED, MAX_REASONS = 1_000_000, 50, 10
# Maximum number of catalogs listed.
MAX_GROUPS = 20
# Number of repeated codes shown, rows shown of each, minimum number of rows of a repeated code.
NUM_REPEATED, NUM_ROWS, MIN_REPEATS = 5, 8, 2
# Side of a thumbnail on the page; larger ones than this in the archive are not decoded.
_SIDE_PX, _MAX_SIDE_PX = 180, 4096


def write_encode_page(path: Path, source: str, summary: EncodeSummary, archive_path: str) -> None:
    """Write the page of a run that has ended.

    Args:
        path: the HTML file.
        source: what was encoded, as given.
        summary: the counts and times of the run.
        archive_path: the archive that was extended.
    """
    archive = Archive.open(archive_path)
    refused = archive.refused()
    ids, codes = _sample(archive)
    sections: list[Section] = [_facts(summary, archive, codes), *_stages(summary)]
    sections += _refused(refused)
    if summary.groups:
        largest = sorted(summary.groups.items(), key=lambda group: -group[1])[:MAX_GROUPS]
        rows = [[name, f"{count:,}"] for name, count in largest]
        note = f"{len(summary.groups):,} catalogs, collections or files of STAC; the largest ones."
        sections.append(Table("Catalogs", ["catalog", "items"], rows, note))
    if summary.left_out:
        rows = [[kind, f"{count:,}"] for kind, count in summary.left_out.items()]
        sections.append(
            Table(
                "Not read",
                ["what", "number"],
                rows,
                "Files of the source that are not images, and links of catalogs that are not followed.",
            )
        )
    if len(codes):
        sections += _codes(archive, ids, codes)
    write_report(
        path,
        f"{summary.num_encoded:,} of {summary.num_listed:,} items encoded",
        f"The archive has {summary.rows_in_archive:,} rows of {archive.bits} bits.",
        sections,
        Provenance("Encoding", source, {"Archive": archive_path, "Model": f"model_id {archive.model_id}"}),
    )


def _sample(archive: Archive) -> tuple[npt.NDArray[np.uint64], Codes]:
    """Return ids and codes of about `MAX_CODES` rows, or of all if there are fewer; the same ones every time."""
    rng, share = np.random.default_rng(0), min(1.0, MAX_CODES / max(1, archive.num_rows))
    ids, codes = [np.empty(0, np.uint64)], [np.empty((0, math.ceil(archive.bits / 8)), np.uint8)]
    for batch_ids, batch_codes in archive.code_batches():
        chosen = rng.random(len(batch_ids)) < share
        ids.append(batch_ids[chosen])
        codes.append(batch_codes[chosen])
    return np.concatenate(ids), np.concatenate(codes)


def _facts(summary: EncodeSummary, archive: Archive, codes: Codes) -> Facts:
    num_read = summary.num_encoded + summary.num_refused
    num_refused = summary.num_refused + summary.num_refused_before
    facts = [
        Fact(
            "Encoded",
            f"{summary.num_encoded:,}",
            f"Encoded before and unchanged: {summary.num_done_before:,}. Rows replaced, because their files had "
            f"changed: {summary.num_replaced:,}.",
            f"listed in the source: {summary.num_listed:,}",
        ),
        Fact(
            "Refused",
            f"{num_refused:,}",
            f"Could not be read; {summary.num_refused_before:,} of them were refused before and have not changed.",
            f"read now: {num_read:,}",
        ),
    ]
    if summary.rows_per_s and num_read:
        slowest = min(summary.worker_images_per_s.items(), key=lambda item: item[1], default=None)
        facts.append(
            Fact(
                "Rate",
                f"{summary.rows_per_s:,.0f}/s",
                f"Items per second from the first batch to the last commit, {summary.encode_s:,.1f} s; "
                f"{summary.start_s:,.1f} s of start-up come before.",
                f"one worker, {slowest[0]} alone: {slowest[1]:,.0f}/s" if slowest else "",
            )
        )
    if len(codes):
        distinct = len(np.unique(codes, axis=0))
        facts.append(
            Fact("Distinct codes", f"{distinct:,}", _examined(archive, codes), f"codes examined: {len(codes):,}")
        )
    return Facts("In short", facts)


def _examined(archive: Archive, codes: Codes) -> str:
    if len(codes) == archive.num_rows:
        return "Of all rows of the archive."
    return f"Of a random sample of the {archive.num_rows:,} rows of the archive."


def _stages(summary: EncodeSummary) -> list[Section]:
    """Return the figures of the stages, empty if nothing was read."""
    if not summary.worker_images_per_s:
        return []
    busy = {name: seconds for name, seconds in summary.worker_s.items() if name in summary.worker_images_per_s}
    return [
        Figures(
            "Stages",
            [
                Figure("Busy time", bars(busy, "s"), "Time that all workers together were busy in each stage."),
                Figure(
                    "Rate of one worker",
                    bars(
                        {**summary.worker_images_per_s, "whole run": summary.rows_per_s},
                        "items/s",
                        highlighted="whole run",
                    ),
                    "Items per second of one worker that is busy with one stage alone, beside the rate of the whole "
                    "run with all workers.",
                ),
            ],
        )
    ]


def _refused(refused: Mapping[str, str]) -> list[Section]:
    if not refused:
        return []
    reasons = Counter(refused.values()).most_common()
    tables: list[Section] = []
    if len(reasons) < len(refused):
        rows = [[reason, f"{count:,}"] for reason, count in reasons[:MAX_REASONS]]
        caption = f"The {len(rows)} most frequent of {len(reasons):,} reasons." if len(rows) < len(reasons) else ""
        tables.append(Table("Reasons of refusal", ["reason", "items"], rows, caption))
    keys = sorted(refused, key=natural)[:MAX_REFUSED]
    caption = "They are in the side table of the archive; `orbithash refused` lists them."
    if len(keys) < len(refused):
        caption = f"The first {len(keys)} of {len(refused):,}. {caption}"
    return [*tables, Table("Refused items", ["key", "reason"], [[key, refused[key]] for key in keys], caption)]


def _codes(archive: Archive, ids: npt.NDArray[np.uint64], codes: Codes) -> list[Section]:
    statistics = code_statistics(codes, archive.bits)
    independent = math.sqrt(2 / (math.pi * len(codes)))
    correlation = statistics.mean_abs_correlation
    rows = [
        ["dead bits", str(len(statistics.dead_bits)), "0"],
        ["unbalanced bits", str(len(statistics.unbalanced_bits)), "0"],
        [f"pairs correlated by {CORRELATION_LIMIT:g} or more", f"{statistics.num_correlated:,}", "0"],
        ["mean absolute correlation", "-" if correlation is None else f"{correlation:.3f}", f"{independent:.3f}"],
        ["mean entropy of a bit", f"{statistics.bit_entropy:.3f}", "1.000"],
    ]
    numbers = ", ".join(map(str, statistics.dead_bits))
    caption = (
        f"{_examined(archive, codes)} A dead bit has the same value in all codes; an unbalanced one has its rarer "
        f"value in less than {RARE_SHARE:.0%} of them. Ideal bits are balanced and independent."
        + (f" Dead: {numbers}." if numbers else "")
    )
    balance = Figure(
        "Balance of the bits",
        bit_balance(statistics.bit_balance),
        "Share of codes in which each bit is 1. A bit near one half carries the most information.",
    )
    sections: list[Section] = [
        Table("Bits of the codes", ["statistic", "this archive", "ideal"], rows, caption),
        Figures("Balance", [balance]),
    ]
    repeated = _repeated(archive, ids, codes)
    if repeated:
        caption = (
            "The most frequent codes and some of their rows. No search by distance can tell rows of one code apart."
        )
        sections.append(Gallery("Repeated codes", repeated, caption))
    return sections


def _repeated(archive: Archive, ids: npt.NDArray[np.uint64], codes: Codes) -> list[GalleryRow]:
    """Return the most frequent codes with the rows of the smallest ids."""
    distinct, inverse, counts = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
    rows = []
    for place in np.argsort(-counts, kind="stable")[:NUM_REPEATED].tolist():
        if counts[place] < MIN_REPEATS:
            break
        members = np.sort(ids[inverse.ravel() == place])[:NUM_ROWS]
        table = archive.take(members, ["key", "label", "thumbnail"]).to_pylist()
        tiles = [Tile(row["label"] or row["key"], _picture(row["thumbnail"]), note=row["key"]) for row in table]
        count = f"{counts[place]:,} of {len(codes):,} codes"
        code = Tile("code", sentence=distinct[place].tobytes().hex(" "), note=count)
        rows.append(GalleryRow(code, tiles))
    return rows


def _picture(thumbnail: bytes | None) -> str | None:
    """Return a thumbnail as a data URI; None if there is none or it is no image, as clients may write anything."""
    if thumbnail is None:
        return None
    try:
        with Image.open(io.BytesIO(thumbnail)) as image:
            if max(image.size) > _MAX_SIDE_PX:
                return None
            return thumbnail_data_uri(np.asarray(image.convert("RGB")), _SIDE_PX)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
