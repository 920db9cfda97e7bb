"""The filter of a state, as an expression in CQL2 text."""

from orbithash.search.web.page.rings import format_ring
from orbithash.search.web.page.state import State

__all__ = ["filter_text"]


def filter_text(state: State, *, without: str = "") -> str:
    """Return the expression that the rows of a state pass; "" if all pass.

    `without` leaves out the classes ("label") or the dates ("dates").
    """
    parts = []
    if state.filter:
        parts.append(f"({state.filter})")
    if state.label and without != "label":
        parts.append(f"label IN ({', '.join(map(_quoted, state.label))})")
    if state.start and without != "dates":
        parts.append(f"datetime >= DATE('{state.start}')")
    if state.end and without != "dates":
        parts.append(f"datetime <= DATE('{state.end}')")
    if state.area:
        parts.append(f"S_INTERSECTS(footprint, POLYGON(({format_ring(state.area)})))")
    return " AND ".join(parts)


def _quoted(text: str) -> str:
    doubled = text.replace("'", "''")
    return f"'{doubled}'"
