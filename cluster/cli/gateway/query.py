"""The queries and orders of `orbithash query`, `rank` and `count`, and their answers as tables or as JSON."""

import base64
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from orbithash.encoders.errors import InputError
from orbithash.search.protocol.forms import vector_bytes
from orbithash.search.protocol.queries import Answer, Cursor, Example, Hit, Query
from orbithash.search.protocol.rankings import By, Groups, Place, RankAnswer, RankCursor, Shuffle, TimeOrder

__all__ = [
    "as_fields",
    "as_table",
    "find_duplicates",
    "group_fields",
    "make_order",
    "make_query",
    "print_groups",
    "print_ranked",
    "rank_cursor",
    "ranked_fields",
    "read_vector",
]

WIDTH_WITHOUT_TERMINAL = 500


def make_query(
    image: Path | None = None,
    text: str | None = None,
    vector: Path | None = None,
    key: str | None = None,
    code: str | None = None,
    like: Sequence[str] = (),
    unlike: Sequence[str] = (),
    weights: Sequence[str] = (),
    after: str | None = None,
    **fields: Any,
) -> Query:
    """Return the query of the options of the command line. Raises `InputError` for invalid options.

    Several of the options image, text, vector, key, code and like together are positive examples of one query.

    Args:
        image: an image file.
        text: a sentence.
        vector: a NumPy file with one vector.
        key: the key of a row.
        code: a packed code in hexadecimal.
        like: keys of positive examples.
        unlike: keys of negative examples.
        weights: weights of the examples of an option, OPTION=NUMBER.
        after: a cursor, DISTANCE:ID.
        **fields: further fields of `Query`.
    """
    contents = {
        "image": image,
        "text": text,
        "vector": None if vector is None else read_vector(vector),
        "key": key,
        "code": None if code is None else _from_hex(code),
    }
    given: dict[str, Any] = {name: value for name, value in contents.items() if value is not None}
    if not given and not like:
        raise InputError("give at least one of --image, --text, --vector, --key, --code and --like, got none")
    common: dict[str, Any] = {"after": None if after is None else _cursor(after), **fields}
    if len(given) == 1 and not like and not unlike and not weights:
        query = Query(**given, **common)
    else:
        numbers = _weights(weights, [*given, *(["like"] if like else []), *(["unlike"] if unlike else [])])
        positives = [Example(**{name: value}, weight=numbers.get(name, 1)) for name, value in given.items()]
        positives += [Example(key=each, weight=numbers.get("like", 1)) for each in like]
        negatives = [Example(key=each, weight=numbers.get("unlike", 1)) for each in unlike]
        query = Query(positives=tuple(positives), negatives=tuple(negatives), **common)
    query.check()
    return query


def read_vector(path: Path) -> bytes:
    """Return the vector of a NumPy file, of shape [dimensions] or [1, dimensions], as the bytes of float32."""
    import numpy as np

    try:
        array = np.load(path, allow_pickle=False)
    except OSError as err:
        raise InputError(f"--vector {path}: cannot be read ({err.strerror or 'not a file of numpy.save'})") from err
    except (ValueError, EOFError) as err:
        raise InputError(f"--vector {path}: not an array of numbers saved by numpy.save") from err
    if not isinstance(array, np.ndarray):
        array.close()
        raise InputError(f"--vector {path}: an archive of several arrays; save one array with numpy.save")
    if array.ndim == 2 and len(array) == 1:
        array = array[0]
    try:
        return vector_bytes(array.astype(array.dtype.newbyteorder("=")))
    except InputError as err:
        raise InputError(f"--vector {path}: {err}") from err


def _weights(weights: Sequence[str], allowed: Sequence[str]) -> dict[str, float]:
    """Return the weights by option."""
    numbers: dict[str, float] = {}
    for each in weights:
        name, _, number = each.partition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = None
        if weight is None or name not in allowed:
            options = ", ".join(allowed)
            raise InputError(f"--weight {each!r} is not OPTION=NUMBER with an option of this query ({options})")
        if name in numbers:
            raise InputError(f"--weight {name} is given twice; give it once, it holds for all examples of --{name}")
        numbers[name] = weight
    return numbers


def find_duplicates(archive: Path, radius: int, filter_text: str) -> list[list[str]]:
    """Return the keys of each group of similar rows among those that pass the filter; see `duplicate_groups`."""
    import numpy as np

    from orbithash.encoders.archive.archive import Archive
    from orbithash.search.index.duplicates import duplicate_groups
    from orbithash.search.segments.filters.expressions import parse_filter

    opened = Archive.open(archive)
    ids, codes = opened.codes()
    if filter_text:
        condition = parse_filter(filter_text)
        rows, table = opened.scan(list(condition.columns))
        passes = np.isin(ids, rows[condition.mask(table)])
        ids, codes = ids[passes], codes[passes]
    groups = duplicate_groups(ids, codes, opened.bits, radius)
    rows, table = opened.scan(["key"])
    key_of = dict(zip(rows.tolist(), table["key"].to_pylist(), strict=True)) if groups else {}
    return [[key_of[row] for row in group.tolist()] for group in groups]


def _cursor(text: str) -> Cursor:
    distance, colon, row = text.partition(":")
    if not colon or not (distance.isascii() and distance.isdigit() and row.isascii() and row.isdigit()):
        raise InputError(f"--after {text!r} is not DISTANCE:ID, as printed in the last line of an answer")
    return Cursor(int(distance), int(row))


def _from_hex(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError as err:
        raise InputError(f"--code {text!r} is not hexadecimal; a 64-bit code has 16 digits such as 00ff…") from err


def as_fields(answer: Answer) -> dict[str, Any]:
    """Return the answer as the fields of `--json`."""
    hits = [
        {
            "rank": hit.rank,
            "distance": hit.distance,
            **({} if answer.shortlist_radius is None else {"score": hit.score}),
            "id": hit.id,
            "key": hit.key,
            "label": hit.label,
            "lon": hit.lon,
            "lat": hit.lat,
            "datetime": None if hit.datetime is None else hit.datetime.isoformat(),
            **{name: _text(name, value) for name, value in hit.extra.items()},
        }
        for hit in answer.hits
    ]
    fields = {
        "hits": hits,
        "ties_at_cutoff": answer.ties_at_cutoff,
        "coverage": answer.coverage.fraction,
        "is_exact": answer.is_exact,
        "took_ms": round(answer.took_ms, 3),
        "next": None if answer.next is None else f"{answer.next.distance}:{answer.next.id}",
    }
    if answer.shortlist_radius is not None:
        fields |= {
            "shortlist_radius": answer.shortlist_radius,
            "is_shortlist_bounded": answer.is_shortlist_bounded,
        }
    return fields if answer.matching_rows is None else {**fields, "matching_rows": answer.matching_rows}


def _text(name: str, value: str | bytes | None) -> str | None:
    """Return a value of a column for JSON: codes in hexadecimal, as `--code` reads them, other bytes in base64."""
    if not isinstance(value, bytes):
        return value
    return value.hex() if name == "code" else base64.b64encode(value).decode()


def _score_format(answer: Answer) -> str:
    """Return the format of the answer's scores: asymmetric distances are whole numbers, cosines are at most 1."""
    scores = [hit.score for hit in answer.hits if hit.score is not None]
    return ".0f" if max(scores, default=0) > 1 else ".4f"


def as_table(answer: Answer) -> None:
    """Print the answer as a table."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    is_rescored, score_format = answer.shortlist_radius is not None, _score_format(answer)
    for name in ("rank", "distance", *(["score"] if is_rescored else []), "key", "label", "place", "date"):
        # Keys are printed whole, to be copied into the next query.
        table.add_column(name, overflow="fold")
    for fields in as_fields(answer)["hits"]:
        place = "" if fields["lon"] is None else f"{fields['lat']:.4f} {fields['lon']:.4f}"
        date = (fields["datetime"] or "")[:10]
        score = []
        if is_rescored:
            score = ["" if fields["score"] is None else format(fields["score"], score_format)]
        table.add_row(
            str(fields["rank"]), str(fields["distance"]), *score, fields["key"], fields["label"] or "", place, date
        )
    console = _console()
    console.print(table)
    last = answer.shortlist_radius if is_rescored or not answer.hits else answer.hits[-1].distance
    ties = f"{answer.ties_at_cutoff} rows tie at distance {last}" if answer.hits else "no rows"
    if is_rescored:
        ties = f"rescored rows up to distance {last}, at which {answer.ties_at_cutoff} rows tie"
    console.print(f"{ties}; {answer.coverage.fraction:.0%} of the archive searched; {answer.took_ms:.1f} ms")
    if answer.matching_rows is not None:
        console.print(f"{answer.matching_rows} rows pass the filter")
    if answer.next is not None:
        console.print(f"more: --after {answer.next.distance}:{answer.next.id}")
    if answer.is_shortlist_bounded:
        console.print("more rows tie with the last of the shortlist than it can hold; they were not rescored")
    if not answer.is_exact:
        console.print("approximate index: nearer rows may be missing")
    if answer.coverage.fraction < 1:
        missing = answer.coverage.total_shards - answer.coverage.answered_shards
        console.print(f"partial answer: {missing} of {answer.coverage.total_shards} shards did not answer")


def make_order(
    near: str | None,
    max_distance_m: float | None,
    newest: bool,
    oldest: bool,
    same_place: str | None,
    random: int | None,
    detector: Path | None,
    least_certain: bool,
    min_score: float | None,
) -> By:
    """Return the order of the options of `orbithash rank`. Raises `InputError` unless they name exactly one."""
    orders: dict[str, By] = {}
    if near is not None:
        orders["--near"] = _place(near, max_distance_m)
    if newest and oldest:
        raise InputError("got --newest and --oldest; give one of them")
    if newest or oldest or same_place is not None:
        name = "--newest" if newest else "--oldest" if oldest else "--same-place"
        orders[name] = TimeOrder(newest, same_place or "")
    if random is not None:
        orders["--random"] = Shuffle(random)
    if detector is not None:
        # Needs numpy, which a client does without.
        from orbithash.cluster.detection.fit import read_detector

        orders["--detector"] = read_detector(detector).linear(least_certain)
    if len(orders) != 1:
        options = "--near, --newest, --oldest, --same-place, --random and --detector"
        raise InputError(f"give one order of {options}; got {' and '.join(orders) or 'none'}")
    for option, is_given, needs in (
        ("--max-distance", max_distance_m is not None, "--near"),
        ("--least-certain", least_certain, "--detector"),
        ("--min-score", min_score is not None, "--detector"),
    ):
        if is_given and needs not in orders:
            raise InputError(f"{option} belongs to {needs}")
    return next(iter(orders.values()))


def _place(text: str, max_distance_m: float | None) -> Place:
    lon, comma, lat = text.partition(",")
    try:
        if comma:
            return Place(float(lon), float(lat), max_distance_m)
    except ValueError:
        pass
    raise InputError(f"--near {text!r} is not LON,LAT in degrees, such as 139.77,35.62")


def rank_cursor(text: str | None) -> RankCursor | None:
    """Return the cursor NUMBER:ID of the command line."""
    if text is None:
        return None
    key, colon, row = text.partition(":")
    try:
        if colon:
            return RankCursor(int(key), int(row))
    except ValueError:
        pass
    raise InputError(f"--after {text!r} is not NUMBER:ID, as printed in the last line of an answer")


def ranked_fields(answer: RankAnswer) -> dict[str, Any]:
    """Return the answer as the fields of `--json`."""
    return {
        "rows": [_ranked_row(hit) for hit in answer.hits],
        "ranked_rows": answer.ranked_rows,
        "rows_within": answer.rows_within,
        "matching_rows": answer.matching_rows,
        "coverage": answer.coverage.fraction,
        "took_ms": round(answer.took_ms, 3),
        "next": None if answer.next is None else f"{answer.next.key}:{answer.next.id}",
    }


def _ranked_row(hit: Hit) -> dict[str, Any]:
    return {
        "rank": hit.rank,
        "score": hit.score,
        "id": hit.id,
        "key": hit.key,
        "label": hit.label,
        "lon": hit.lon,
        "lat": hit.lat,
        "datetime": None if hit.datetime is None else hit.datetime.isoformat(),
        **{name: _text(name, value) for name, value in hit.extra.items()},
    }


def print_ranked(answer: RankAnswer, score_name: str) -> None:
    """Print the answer as a table; `score_name` is the heading of the scores."""
    has_scores = any(hit.score is not None for hit in answer.hits)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("rank", *([score_name] if has_scores else []), "key", "label", "place", "date"):
        table.add_column(name, overflow="fold")
    for hit in answer.hits:
        score = [] if not has_scores else ["" if hit.score is None else f"{hit.score:.2f}"]
        place = "" if hit.lon is None or hit.lat is None else f"{hit.lat:.4f} {hit.lon:.4f}"
        date = "" if hit.datetime is None else hit.datetime.isoformat()[:10]
        table.add_row(str(hit.rank), *score, hit.key, hit.label or "", place, date)
    console = _console()
    console.print(table)
    console.print(f"{answer.rows_within:,} rows in this order; {answer.coverage.fraction:.0%} of the archive searched")
    if answer.next is not None:
        console.print(f"more: --after {answer.next.key}:{answer.next.id}")
    if answer.coverage.fraction < 1:
        missing = answer.coverage.total_shards - answer.coverage.answered_shards
        console.print(f"partial answer: {missing} of {answer.coverage.total_shards} shards did not answer")


def _console() -> Console:
    # A pipe has no width.
    return Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else WIDTH_WITHOUT_TERMINAL)


def group_fields(groups: Groups) -> dict[str, Any]:
    """Return groups as the fields of `--json`."""
    return {
        "rows": dict(groups.rows),
        "without": groups.without,
        "others": groups.others,
        "coverage": groups.coverage.fraction,
    }


def print_groups(groups: Groups, by: str) -> None:
    """Print groups as a table."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(by, overflow="fold")
    table.add_column("rows", justify="right")
    for value, number in groups.rows.items():
        table.add_row(value, f"{number:,}")
    console = _console()
    console.print(table)
    if groups.others:
        console.print(f"{groups.others:,} rows of further groups")
    if groups.without:
        console.print(f"{groups.without:,} rows without a {'label' if by == 'label' else 'time'}")
    if groups.coverage.fraction < 1:
        console.print(f"partial answer: {groups.coverage.fraction:.0%} of the archive was counted")
