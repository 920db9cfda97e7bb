"""The examples of a state: rows that are searched for or marked, and the query that they make together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orbithash.search.client import AsyncClient, Example, Row
from orbithash.search.protocol.description import Description
from orbithash.search.protocol.queries import MAX_EXAMPLES
from orbithash.search.web.page.state import State

__all__ = ["Examples", "read_examples"]

# Of the examples of a query, bad ones, where there are many of both kinds.
_MIN_BAD = 24


@dataclass(frozen=True)
class Examples:
    """Rows of a state by id, and the query that they make.

    Attributes:
        rows: the rows that the state names and the archive has, with code and thumbnail.
        query: the fields of the query that the examples make; empty if nothing is searched for.
        notes: sentences for the user about rows that are not used.
        problem: why the marks have no effect, "" if they have.
    """

    rows: Mapping[int, Row]
    query: Mapping[str, Any]
    notes: tuple[str, ...]
    problem: str = ""


async def read_examples(client: AsyncClient, state: State, description: Description) -> Examples:
    """Return the examples of a state; reads the rows that it names, in one call."""
    ids = tuple(dict.fromkeys((*(() if state.like is None else (state.like,)), *state.good, *state.bad)))
    rows: dict[int, Row] = {}
    if ids:
        rows = {row.id: row for row in (await client.get(ids=ids, include=("code", "thumbnail"))).values()}  # type: ignore[misc]
    notes = []
    if missing := sum(row not in rows for row in (*state.good, *state.bad)):
        notes.append(f"{missing:,} marked {'tile is' if missing == 1 else 'tiles are'} no longer in the archive.")
    if state.like is not None and state.like not in rows:
        notes.append("The tile that you searched for is no longer in the archive.")
    contents = []
    if state.q:
        contents.append(Example(text=state.q) if description.has_text else Example(key=state.q))
    if state.code:
        contents.append(Example(code=state.code))
    if state.like is not None and state.like in rows:
        contents.append(Example(code=rows[state.like].code))
    good = [Example(code=rows[row].code) for row in state.good if row in rows]
    bad = [Example(code=rows[row].code) for row in state.bad if row in rows]
    problem = ""
    if bad and not contents and not good:
        problem = "Mark at least one tile as good (+): bad marks alone do not say what to look for."
        bad = []
    room = MAX_EXAMPLES - len(contents)
    if len(good) + len(bad) > room:
        num_bad = min(len(bad), max(_MIN_BAD, room - len(good)))
        bad, good = bad[len(bad) - num_bad :], good[len(good) - min(len(good), room - num_bad) :]
        notes.append(
            f"The nearest tiles are decided by the newest {len(good)} good and {len(bad)} bad marks; "
            "“Find all” uses all of them."
        )
    return Examples(rows, _query((*contents, *good), bad), tuple(notes), problem)


def _query(positives: Sequence[Example], negatives: Sequence[Example]) -> dict[str, Any]:
    if not positives:
        return {}
    if len(positives) == 1 and not negatives:
        (kind,) = positives[0].given()
        return {kind: getattr(positives[0], kind)}
    return {"positives": tuple(positives), "negatives": tuple(negatives)}
