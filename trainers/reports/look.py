"""Colours and text cleaning shared by plots and pages."""

import re

__all__ = ["BLUE", "GREEN", "GRID", "INK", "MUTED", "ORANGE", "PURPLE", "SERIES", "printable", "themed"]

# Text, secondary text and grid lines of a plot; `themed` maps them to the page's colour scheme.
INK, MUTED, GRID = "#1f2430", "#5b6472", "#d9dee6"
# Distinguishable with colour blindness, with contrast to both a white and a near-black page.
BLUE, ORANGE, GREEN, PURPLE = "#2b7bba", "#d9730d", "#1a9c82", "#b05fa5"
SERIES = (BLUE, ORANGE, GREEN, PURPLE)

_DARK = {INK: "#e7eaf0", MUTED: "#a1a9b6", GRID: "#333a46"}

# Control characters, overrides of the writing direction and lone surrogates, which XML and HTML must not contain.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def printable(text: str) -> str:
    """Return the text with all characters that a page or a plot must not contain replaced by U+FFFD."""
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def themed(svg: str) -> str:
    """Return a plot's SVG with colours that follow the reader's light or dark colour scheme."""
    light = "".join(f"--c{i}:{colour};" for i, colour in enumerate(_DARK))
    dark = "".join(f"--c{i}:{colour};" for i, colour in enumerate(_DARK.values()))
    for i, colour in enumerate(_DARK):
        svg = svg.replace(colour, f"var(--c{i})")
    style = f"<style>svg{{{light}}}@media(prefers-color-scheme:dark){{svg{{{dark}}}}}</style>"
    return re.sub(r"(<svg\b[^>]*>)", lambda match: match[1] + style, svg, count=1)
