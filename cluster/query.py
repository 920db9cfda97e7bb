"""One query from the command line."""

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from orbithash.encoders.errors import InputError
from orbithash.search.client import Client
from orbithash.search.queries import MAX_IMAGE_BYTES, Answer

__all__ = ["as_fields", "as_table", "ask"]

WIDTH_WITHOUT_TERMINAL = 500


def ask(address: str, image: Path | None, key: str | None, code: str | None, k: int, timeout_s: float) -> Answer:
    """The gateway's answer; `InputError` for what is wrong with the query or the address."""
    given = [name for name, value in (("--image", image), ("--key", key), ("--code", code)) if value is not None]
    if len(given) != 1:
        raise InputError(f"give one of --image, --key and --code, got {' and '.join(given) or 'none'}")
    if not timeout_s > 0:
        raise InputError(f"--timeout is {timeout_s:g}; seconds above 0 are needed")
    with Client(address, timeout_s) as client:
        return client.search(
            image=None if image is None else _read_file(image),
            key=key,
            code=None if code is None else _from_hex(code),
            k=k,
        )


def _read_file(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_IMAGE_BYTES + 1)
    except OSError as err:
        raise InputError(f"{path}: cannot be read ({err.strerror})") from err
    if len(data) > MAX_IMAGE_BYTES:
        size = path.stat().st_size
        raise InputError(
            f"{path} has {size:,} bytes; a query image has at most {MAX_IMAGE_BYTES:,}: send a smaller one"
        )
    return data


def _from_hex(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError as err:
        raise InputError(f"--code {text!r} is not hexadecimal; a 64-bit code is 16 digits such as 00ff…") from err


def as_fields(answer: Answer) -> dict[str, Any]:
    """The answer as the fields of `--json`."""
    hits = [
        {
            "rank": hit.rank,
            "distance": hit.distance,
            "id": hit.id,
            "key": hit.key,
            "label": hit.label,
            "lon": hit.lon,
            "lat": hit.lat,
            "datetime": None if hit.datetime is None else hit.datetime.isoformat(),
        }
        for hit in answer.hits
    ]
    return {
        "hits": hits,
        "ties_at_cutoff": answer.ties_at_cutoff,
        "coverage": answer.coverage.fraction,
        "took_ms": round(answer.took_ms, 3),
    }


def as_table(answer: Answer) -> None:
    """Prints the answer for a person."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("rank", "distance", "key", "label", "place", "date"):
        # Whole keys, for the next query.
        table.add_column(name, overflow="fold")
    for fields in as_fields(answer)["hits"]:
        place = "" if fields["lon"] is None else f"{fields['lat']:.4f} {fields['lon']:.4f}"
        date = (fields["datetime"] or "")[:10]
        table.add_row(str(fields["rank"]), str(fields["distance"]), fields["key"], fields["label"] or "", place, date)
    # A pipe has no width to keep to.
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else WIDTH_WITHOUT_TERMINAL)
    console.print(table)
    last = answer.hits[-1].distance if answer.hits else 0
    ties = f"{answer.ties_at_cutoff} rows tie at distance {last}" if answer.hits else "no rows"
    console.print(f"{ties}; {answer.coverage.fraction:.0%} of the archive searched; {answer.took_ms:.1f} ms")
    if answer.coverage.fraction < 1:
        missing = answer.coverage.total_shards - answer.coverage.answered_shards
        console.print(f"partial answer: {missing} of {answer.coverage.total_shards} shards did not answer")
