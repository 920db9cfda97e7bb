"""HTML pages from the templates of this room."""

from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from starlette.requests import Request
from starlette.responses import HTMLResponse

__all__ = ["render"]


@cache
def _templates() -> jinja2.Environment:
    # Every file is escaped: labels, captions, keys and file names come from other people.
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(request: Request, template: str, /, status: int = 200, **values: Any) -> HTMLResponse:
    """Return a page of a template.

    Besides `values`, templates know `request`, `settings`, `has_token` (whether the visitor has logged in) and
    `static(path)`, the address of a file of static/.
    """
    page = _templates().get_template(template)
    state = request.app.state
    has_token = getattr(request.state, "token", None) is not None
    text = page.render(
        request=request, settings=state.settings, static=state.assets.address, has_token=has_token, **values
    )
    return HTMLResponse(text, status, {"Cache-Control": "no-store"})
