"""Sphinx extension: writes the pages of docs/reference that are made from the code, before Sphinx reads the pages."""

from pathlib import Path
from typing import Any

import commands
import methods
import protocol

MADE = {"commands": commands.pages, "methods": methods.pages, "protocol": protocol.pages}


def write_pages(folder: Path) -> None:
    """Write the made pages into folders below `folder`; files that have not changed stay as they are."""
    for name, make in MADE.items():
        made = make()
        for page in (folder / name).glob("*.md"):
            if page.stem not in made:
                page.unlink()
        (folder / name).mkdir(parents=True, exist_ok=True)
        for stem, text in made.items():
            file = folder / name / f"{stem}.md"
            if not file.exists() or file.read_text() != text:
                file.write_text(text)


def as_literal_blocks(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Mark indented paragraphs of a docstring as examples; reStructuredText would take them for quotations."""
    out: list[str] = []
    literal_indent: int | None = None
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if literal_indent is not None and line.strip() and indent < literal_indent:
            literal_indent = None
        before = next((each for each in reversed(out) if each.strip()), "")
        is_deeper = indent > len(before) - len(before.lstrip())
        if literal_indent is None and line.strip() and out and not out[-1].strip() and is_deeper:
            literal_indent = indent
            out += [f"{' ' * (len(before) - len(before.lstrip()))}::", ""]
        out.append(line)
    lines[:] = out


def setup(app: Any) -> dict[str, bool]:
    """Register the extension with Sphinx."""
    write_pages(Path(app.srcdir) / "reference")
    # Before napoleon, which reads sections such as "Args:".
    app.connect("autodoc-process-docstring", as_literal_blocks, priority=400)
    return {"parallel_read_safe": True}
