"""Parts of Markdown pages."""

import re
from collections.abc import Iterable, Sequence

__all__ = ["code", "escaped", "index", "table"]


def escaped(text: str) -> str:
    """Return one line of Markdown that shows a plain text, except that code in backquotes stays code."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    plain = [part if part.startswith("`") else re.sub(r"([\\*<\[\]$])", r"\\\1", part) for part in parts]
    return "".join(plain).replace("|", "\\|")


def code(text: str) -> str:
    """Return a text as code, for a cell of a table."""
    return f"`{text}`".replace("|", "\\|") if text else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of cells that are Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def index(title: str, intro: str, head: Sequence[str], rows: Sequence[tuple[str, str, str]]) -> str:
    """Return a page that lists other pages: their file names without ending, titles, and descriptions."""
    listed = table(head, ((f"[{code(name)}]({stem}.md)", about) for stem, name, about in rows))
    stems = "\n".join(stem for stem, _, _ in rows)
    return f"# {title}\n\n{intro}\n\n{listed}\n```{{toctree}}\n:hidden:\n\n{stems}\n```\n"
