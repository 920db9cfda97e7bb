"""Sphinx extension: the directive `screenshot`, a picture of the page from the tests, or a line without one.

`make docs-screenshots` takes the pictures. They are not in the repository.
"""

from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive

FOLDER = "_static/screens"


class Screenshot(Directive):
    """A picture by its name; the text of the block describes it."""

    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        """Return the picture with its description, or a line about how to make it."""
        name, text = self.arguments[0], " ".join(self.content)
        environment = self.state.document.settings.env
        if not (Path(environment.app.srcdir) / FOLDER / f"{name}.png").exists():
            environment.note_reread()
            return [nodes.paragraph("", "", nodes.emphasis("", f"Picture ({text}): `make docs-screenshots` takes it."))]
        picture = nodes.image(uri=f"/{FOLDER}/{name}.png", alt=text, width="100%")
        return [nodes.figure("", picture, nodes.caption("", text))]


def setup(app: Any) -> dict[str, bool]:
    """Register the directive with Sphinx."""
    app.add_directive("screenshot", Screenshot)
    return {"parallel_read_safe": True}
