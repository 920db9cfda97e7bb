"""Verbs that look around in the archive of a gateway: rank, count."""

from pathlib import Path
from typing import Annotated, Any

import typer

from orbithash.cluster.cli.options import (
    DEFAULT_ADDRESS,
    SEARCH,
    CaOption,
    CertKeyOption,
    CertOption,
    Connection,
    FilterOption,
    GatewayOption,
    JsonOption,
    TimeoutOption,
    TokenFileOption,
)
from orbithash.cluster.output import print_json

__all__ = ["verbs"]

verbs = typer.Typer()


@verbs.command(rich_help_panel=SEARCH, epilog="Example: orbithash rank --near 139.77,35.62 --max-distance 2000")
def rank(
    near: Annotated[str | None, typer.Option("--near", help="LON,LAT: order by the distance from this place.")] = None,
    max_distance: Annotated[
        float | None, typer.Option("--max-distance", help="With --near: maximum distance, metres. Default: no limit.")
    ] = None,
    newest: Annotated[bool, typer.Option("--newest", help="Order by time, the newest first.")] = False,
    oldest: Annotated[bool, typer.Option("--oldest", help="Order by time, the oldest first.")] = False,
    same_place: Annotated[
        str | None,
        typer.Option("--same-place", help="Order by time, only rows that show the place of the row with this key."),
    ] = None,
    random: Annotated[int | None, typer.Option("--random", help="Random order of this seed.")] = None,
    detector: Annotated[
        Path | None, typer.Option("--detector", help="Order by the score of the detector in this file.")
    ] = None,
    least_certain: Annotated[
        bool, typer.Option("--least-certain", help="With --detector: the rows of which it is least certain first.")
    ] = False,
    min_score: Annotated[
        float | None, typer.Option("--min-score", help="With --detector: smallest score. Default: no limit.")
    ] = None,
    k: Annotated[int, typer.Option("-k", help="Maximum number of rows, 1 to 10,000.")] = 10,
    filter_: FilterOption = "",
    after: Annotated[
        str | None, typer.Option("--after", help="NUMBER:ID, printed at the end of the page before this one.")
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option("--include", help="Column to add to --json: uri, caption, thumbnail, footprint, code or vector."),
    ] = None,
    address: GatewayOption = DEFAULT_ADDRESS,
    timeout: TimeoutOption = 10.0,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
    cert: CertOption = None,
    cert_key: CertKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """List rows of a gateway's archive by place, by time, at random or by a detector."""
    from orbithash.cluster.cli.gateway.query import make_order, print_ranked, rank_cursor, ranked_fields

    by = make_order(near, max_distance, newest, oldest, same_place, random, detector, least_certain, min_score)
    with Connection(address, timeout, token_file, ca, cert, cert_key).client() as client:
        columns: Any = tuple(include or ())
        answer = client.rank(by, k=k, filter=filter_, min_score=min_score, after=rank_cursor(after), include=columns)
    if as_json:
        print_json(ranked_fields(answer))
    else:
        print_ranked(answer, "score" if near is None else "metres")


@verbs.command(rich_help_panel=SEARCH, epilog='Example: orbithash count --by label --filter "lon > 10"')
def count(
    by: Annotated[
        str | None, typer.Option("--by", help="Count by label, month or year. Default: all rows together.")
    ] = None,
    filter_: FilterOption = "",
    address: GatewayOption = DEFAULT_ADDRESS,
    timeout: TimeoutOption = 10.0,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
    cert: CertOption = None,
    cert_key: CertKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Count the rows of a gateway's archive, also by class, month or year."""
    from orbithash.cluster.cli.gateway.query import group_fields, print_groups

    with Connection(address, timeout, token_file, ca, cert, cert_key).client() as client:
        if by is None:
            rows = client.count(filter_)
            if as_json:
                print_json({"rows": rows})
            else:
                print(rows)
            return
        name: Any = by
        groups = client.count_by(name, filter_)
    if as_json:
        print_json(group_fields(groups))
    else:
        print_groups(groups, by)
