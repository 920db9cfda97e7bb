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


def setup(app: Any) -> dict[str, bool]:
    """Register the extension with Sphinx."""
    write_pages(Path(app.srcdir) / "reference")
    return {"parallel_read_safe": True}
