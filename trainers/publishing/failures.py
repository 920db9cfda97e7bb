"""Where a model fails, in Markdown: worst queries, most confused classes, dead and correlated bits."""

from collections.abc import Iterator, Mapping
from typing import Any

from orbithash.trainers.publishing.markdown import code, table, text
from orbithash.trainers.publishing.trained_model import TrainedModel

__all__ = ["failure_blocks"]

NUM_WORST, NUM_HITS, NUM_CONFUSED, NUM_CORRELATED = 5, 3, 8, 5


def failure_blocks(model: TrainedModel, has_examples: bool) -> Iterator[str]:
    """Yield paragraphs and tables; one sentence says it if the run holds no analysis of failures.

    Without `has_examples`, keys and sentences of single items are left out.
    """
    found = False
    for evaluation in model.evaluations:
        for direction in evaluation.directions:
            if direction.failures is None:
                continue
            found = True
            title = ", ".join(filter(None, (evaluation.protocol, direction.name.replace("->", " to "))))
            yield f"### Protocol {text(title)}"
            yield from _confused(direction.failures)
            if has_examples:
                yield from _worst(direction.failures)
            yield from _bits(direction.failures)
    if not found:
        yield "Not analysed: the run holds no `failures.json` of this model. `orbithash evaluate` writes it."


def _confused(failures: Mapping[str, Any]) -> Iterator[str]:
    pairs = failures.get("confused") or []
    if not pairs:
        return
    yield "Classes whose nearest item is most often of another class:"
    rows = [
        [text(pair["label"]), text(pair["nearest"]), f"{pair['queries']:.3g} of {pair['of']:,}", _baseline_pair(pair)]
        for pair in pairs[:NUM_CONFUSED]
    ]
    yield _without_empty(["class of the query", "class of the nearest", "queries", "with a simple method"], rows)


def _worst(failures: Mapping[str, Any]) -> Iterator[str]:
    # The list holds the worst queries also where all of them are perfect.
    queries = [query for query in failures.get("worst") or [] if query["ap"] < 1]
    if not queries:
        return
    yield "Queries with the lowest average precision, and their nearest items:"
    rows = []
    for query in queries[:NUM_WORST]:
        hits = [f"{text(hit['label'])} (d = {hit['distance']})" for hit in query["hits"][:NUM_HITS]]
        rows.append(
            [
                text(query["sentence"]) if query.get("sentence") else code(query["key"]),
                text(query["label"]),
                f"{query['ap']:.3f}",
                ", ".join(hits),
                _baseline_query(query),
            ]
        )
    yield _without_empty(
        ["query", "class", "average precision", "classes of the nearest", "with a simple method"], rows
    )


def _bits(failures: Mapping[str, Any]) -> Iterator[str]:
    bits = failures.get("bits")
    if not bits:
        return
    dead, correlated = bits.get("dead", []), bits.get("correlated", [])
    shown_dead = ", ".join(map(str, dead))
    sentences = [
        f"{len(dead) or 'None'} of the {bits['count']} bits of the database's codes {'is' if len(dead) < 2 else 'are'} "
        f"dead, the same in all codes{f': {shown_dead}' if dead else ''}."
    ]
    if "limit" in bits:
        number = bits.get("num_correlated", len(correlated))
        sentences.append(
            f"{number or 'No'} pair{'' if number == 1 else 's'} of bits {'is' if number == 1 else 'are'} correlated by "
            f"at least {bits['limit']:g}{f', the strongest: {_pairs(correlated)}' if correlated else ''}."
        )
    yield " ".join(sentences)


def _pairs(correlated: list[dict[str, Any]]) -> str:
    return ", ".join(
        f"{pair['bits'][0]} and {pair['bits'][1]} ({pair['correlation']:+.2f})" for pair in correlated[:NUM_CORRELATED]
    )


def _baseline_pair(pair: Mapping[str, Any]) -> str:
    baseline = pair.get("baseline")
    return f"{baseline['queries']:.3g} ({text(baseline['name'])})" if baseline else ""


def _baseline_query(query: Mapping[str, Any]) -> str:
    baseline = query.get("baseline")
    return f"{baseline['ap']:.3f} ({text(baseline['name'])})" if baseline else ""


def _without_empty(columns: list[str], rows: list[list[str]]) -> str:
    """Return the table without its last column if that is empty in all rows."""
    if not any(row[-1] for row in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    return table(columns, rows)
