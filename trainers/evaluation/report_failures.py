"""The report's failures: worst queries, confused classes and wasted bits, each beside the best baseline."""

import math
from collections.abc import Callable

from orbithash.trainers.evaluation.evaluation import Evaluation
from orbithash.trainers.evaluation.gallery import ConfusedPair, GalleryHit, GalleryQuery, Reason
from orbithash.trainers.evaluation.report_text import BASELINE_NAMES
from orbithash.trainers.metrics.code_statistics import CORRELATION_LIMIT, RARE_SHARE, CodeStatistics
from orbithash.trainers.reports.page import Gallery, GalleryRow, Section, Table, Tile

__all__ = ["MakeTile", "answers", "failure_sections"]

# Makes the tile of a query or a hit: the item, a note, and whether it is relevant (None: a query).
MakeTile = Callable[[GalleryQuery | GalleryHit, str, bool | None], Tile]

_MARKS = (
    "A tick on a solid frame marks an item of the query's class, a cross on a dashed frame any other item; d is the "
    "Hamming distance."
)


def failure_sections(evaluation: Evaluation, make_tile: MakeTile) -> list[Section]:
    """Return the sections of the failures, without those that are empty."""
    sections: list[Section] = []
    worst = answers(evaluation, "worst", make_tile)
    if worst:
        caption = f"The queries with the lowest average precision (AP) within 20 hits.{_beside(evaluation)} {_MARKS}"
        sections.append(Gallery("Worst answers", worst, caption))
    if evaluation.confused:
        sections.append(_confused_table(evaluation))
        caption = (
            "For each of the most confused pairs, one query of the first class whose nearest item is of the second "
            f"class: the one with the lowest average precision.{_beside(evaluation)}"
        )
        sections.append(Gallery("Examples of confused classes", answers(evaluation, "confused", make_tile), caption))
    return [*sections, *_bit_sections(evaluation)]


def answers(evaluation: Evaluation, reason: Reason, make_tile: MakeTile) -> list[GalleryRow]:
    """Return the gallery's queries of one reason with their nearest items."""
    queries = [query for query in evaluation.gallery if query.reason == reason]
    titles = [""] * len(queries)
    if reason == "confused":
        titles = [_pair_title(evaluation, pair) for pair in evaluation.confused[: len(queries)]]
    return [
        GalleryRow(
            make_tile(query, _precision(evaluation, query), None),
            [make_tile(hit, f"d = {hit.distance}", hit.relevant) for hit in query.hits],
            title,
        )
        for query, title in zip(queries, titles, strict=True)
    ]


def _beside(evaluation: Evaluation) -> str:
    """Return a sentence that names the baseline of the notes, empty without one."""
    if evaluation.main_baseline is None:
        return ""
    name, _ = evaluation.main_baseline
    return f" The second AP is that of {BASELINE_NAMES[name]}, the best simple method of at most as many bytes."


def _precision(evaluation: Evaluation, query: GalleryQuery) -> str:
    text = f"AP {query.average_precision:.2f}"
    if evaluation.main_baseline is None:
        return text
    _, baseline = evaluation.main_baseline
    return f"{text}, baseline {baseline.scores[query.position]:.2f}"


def _pair_title(evaluation: Evaluation, pair: ConfusedPair) -> str:
    classes = evaluation.classes
    return f"{classes[pair.label]} → {classes[pair.nearest]}: {_count(pair.queries)} of {pair.of:,} queries"


def _confused_table(evaluation: Evaluation) -> Table:
    name, baseline = evaluation.main_baseline or ("", None)
    columns = ["class of the query", "class of its nearest item", "queries", "of"]
    caption = (
        "The most frequent pairs of different classes: queries of the first class whose nearest item is of the second. "
        "A query whose nearest items tie counts in parts."
    )
    if evaluation.query_labels.ndim == 2:
        caption += (
            " Only nearest items that share no class with the query count, in equal parts for all pairs of their "
            "classes."
        )
    if baseline is not None:
        columns.append(f"queries, {BASELINE_NAMES[name]}")
        caption += " The last column is the same pair with the best simple method of at most as many bytes."
    rows = []
    for pair in evaluation.confused:
        row = [evaluation.classes[pair.label], evaluation.classes[pair.nearest], _count(pair.queries), f"{pair.of:,}"]
        if baseline is not None:
            row.append(_count(float(baseline.nearest[pair.label, pair.nearest])))
        rows.append(row)
    return Table("Confused classes", columns, rows, caption)


def _bit_sections(evaluation: Evaluation) -> list[Section]:
    """Return the table of the statistics of the bits beside those of the baselines, and the lists of wasted bits."""
    own, bits = evaluation.codes, evaluation.metrics["bits"]
    baselines = {
        BASELINE_NAMES[name]: result.codes for name, result in evaluation.baselines.items() if result.codes is not None
    }
    independent = math.sqrt(2 / (math.pi * own.count))
    columns = [own, *baselines.values()]
    statistics: list[tuple[str, Callable[[CodeStatistics], str], str]] = [
        ("dead bits", lambda codes: str(len(codes.dead_bits)), "0"),
        ("unbalanced bits", lambda codes: str(len(codes.unbalanced_bits)), "0"),
        (f"pairs correlated by {CORRELATION_LIMIT:g} or more", lambda codes: f"{codes.num_correlated:,}", "0"),
        ("mean absolute correlation", lambda codes: _optional(codes.mean_abs_correlation), f"{independent:.3f}"),
        ("mean entropy of a bit", lambda codes: f"{codes.bit_entropy:.3f}", "1.000"),
        ("distinct codes", lambda codes: f"{codes.distinct:,}", "-"),
    ]
    rows = [[name, *map(text_of, columns), ideal] for name, text_of, ideal in statistics]
    caption = (
        f"Of {bits} bits in {own.count:,} codes of the database. A dead bit has the same value in all codes; an "
        f"unbalanced one has its rarer value in less than {RARE_SHARE:.0%} of them. Ideal bits are balanced and "
        "independent; few classes can make good codes repeat and correlate."
    )
    sections: list[Section] = [Table("Wasted bits", ["statistic", "this model", *baselines, "ideal"], rows, caption)]
    wasted = [[str(bit), "dead", "-"] for bit in own.dead_bits]
    wasted += [[str(each.bit), "unbalanced", f"{each.ones:.2%}"] for each in own.unbalanced_bits]
    if wasted:
        sections.append(Table("Dead and unbalanced bits", ["bit", "state", "ones"], wasted))
    if own.correlated_bits:
        pairs = [[str(each.bits[0]), str(each.bits[1]), f"{each.correlation:+.3f}"] for each in own.correlated_bits]
        caption = f"The strongest of {own.num_correlated:,} pairs. At 1 or -1, one bit of the pair says nothing."
        sections.append(Table("Correlated bits", ["bit", "other bit", "correlation"], pairs, caption))
    return sections


def _optional(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _count(value: float) -> str:
    return f"{value:,.0f}" if abs(value - round(value)) < 0.005 else f"{value:,.2f}"
