"""Reports: one self-contained HTML page of a head and sections.

The head says what the report is, when, by which command and version, on which machine and from which data it was made.
The page loads nothing from the network, runs no script, and follows the reader's light or dark colour scheme. All text
is escaped, because class names are names of users' folders.
"""

import base64
import io
import os
import re
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jinja2
import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from PIL import Image

from orbithash.encoders.files import write_file
from orbithash.trainers.reports.look import printable, themed
from orbithash.trainers.reports.provenance import Provenance

__all__ = [
    "Fact",
    "Facts",
    "Figure",
    "Figures",
    "Gallery",
    "GalleryRow",
    "Link",
    "Part",
    "Section",
    "Table",
    "Text",
    "Tile",
    "thumbnail_data_uri",
    "write_report",
]


@dataclass(frozen=True)
class Fact:
    """One headline number; `explanation` defines it, `baseline` is the value that it is compared with."""

    label: str
    value: str
    explanation: str
    baseline: str = ""


@dataclass(frozen=True)
class Facts:
    """A row of headline numbers, the most important first."""

    title: str
    facts: Sequence[Fact]
    lead: str = ""


@dataclass(frozen=True)
class Figure:
    """A plot, SVG text or PNG bytes, with a caption that explains it."""

    title: str
    plot: str | bytes
    caption: str

    @property
    def uri(self) -> str:
        """The plot as a data URI."""
        if isinstance(self.plot, bytes):
            return _data_uri("image/png", self.plot)
        return _data_uri("image/svg+xml", themed(self.plot).encode())


@dataclass(frozen=True)
class Figures:
    """Figures, side by side in pairs if the page is wide enough."""

    title: str
    figures: Sequence[Figure]
    lead: str = ""


@dataclass(frozen=True)
class Link:
    """Text of a table that leads to a file; `path` is relative to the page."""

    text: str
    path: str

    @property
    def address(self) -> str:
        """The path as a relative address, which no name of a folder can turn into another scheme or host."""
        return "./" + urllib.parse.quote(os.fsencode(self.path))

    def __str__(self) -> str:
        """Return the text."""
        return self.text


@dataclass(frozen=True)
class Table:
    """A table of text; columns of numbers are aligned right."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | Link]]
    caption: str = ""

    @property
    def numeric(self) -> list[bool]:
        """Whether each column has only numbers, with or without a unit."""
        number = re.compile(r"[-+]?\d[\d,.]*( ± [\d.]+)?( ?[^\d\s]{1,8})?|-?")
        columns = zip(*self.rows, strict=True) if self.rows else [()] * len(self.columns)
        return [bool(column) and all(number.fullmatch(str(cell)) for cell in column) for column in columns]


@dataclass(frozen=True)
class Tile:
    """One item of a gallery: an image (a data URI) or a sentence, its label, and a note such as its distance.

    `relevant` marks a hit as relevant or not; None: no mark.
    """

    label: str
    image: str | None = None
    sentence: str | None = None
    note: str = ""
    relevant: bool | None = None


@dataclass(frozen=True)
class GalleryRow:
    """A query and its nearest items, nearest first; `title` says why they are shown."""

    query: Tile
    hits: Sequence[Tile]
    title: str = ""


@dataclass(frozen=True)
class Gallery:
    """Queries and their nearest items."""

    title: str
    rows: Sequence[GalleryRow]
    caption: str = ""


@dataclass(frozen=True)
class Text:
    """Plain paragraphs."""

    title: str
    paragraphs: Sequence[str]


@dataclass(frozen=True)
class Part:
    """The heading of the sections that follow, up to the next part."""

    title: str
    lead: str = ""


Section = Facts | Figures | Table | Gallery | Text | Part


def write_report(path: Path, title: str, subtitle: str, sections: Sequence[Section], provenance: Provenance) -> None:
    """Write the page atomically: a reader of `path` finds the previous page or the new one, complete."""
    template = _environment().get_template("report.html.jinja")
    kinds = {Part: "part", Facts: "facts", Figures: "figures", Table: "table", Gallery: "gallery", Text: "text"}
    page = template.render(
        title=title,
        subtitle=subtitle,
        provenance=provenance,
        sections=[(kinds[type(section)], section) for section in sections],
    )
    write_file(path, page)


def thumbnail_data_uri(image: npt.NDArray[np.uint8], max_side_px: int = 160) -> str:
    """Return an image uint8 [H, W, 3] as a JPEG data URI, scaled down to at most `max_side_px` but never up."""
    thumbnail = Image.fromarray(image)
    thumbnail.thumbnail((max_side_px, max_side_px), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    thumbnail.save(out, "JPEG", quality=84, optimize=True)
    return _data_uri("image/jpeg", out.getvalue())


def _data_uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _finalize(value: object) -> object:
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
