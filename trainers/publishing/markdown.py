"""Text of users in Markdown: escaped, so that names of classes and files are shown as they are."""

import re
from collections.abc import Iterable, Sequence

__all__ = ["code", "table", "text"]


def text(value: object) -> str:
    """Return a value as one line of plain Markdown text."""
    line = " ".join(str(value).split())
    line = re.sub(r"([\\`*\[\]<>|#&])", r"\\\1", line)
    # An underscore is emphasis only at the border of a word.
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", line)


def code(value: object) -> str:
    """Return a value as a code span; as plain text if it has a pipe, which no code span can hold in a table."""
    line = " ".join(str(value).split()) or " "
    if "|" in line:
        return text(line)
    fence = "`" * (1 + max((len(run) for run in re.findall(r"`+", line)), default=0))
    pad = " " if "`" in line else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table; cells are Markdown already."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)
