"""Configuration of Sphinx: `make docs` builds the pages. docs/extend/documents.md describes how they are written."""

import sys
from importlib.metadata import version as version_of
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "_reference"))

project = "orbithash"
release = version = version_of("orbithash")
author = copyright = "the orbithash contributors"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    # Pages made from the code; in docs/_reference.
    "reference",
    "screenshots",
]
exclude_patterns = ["_reference", "_static"]

myst_enable_extensions = ["colon_fence", "deflist"]
# Links to headings of other pages: page.md#protection.
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True}
# Docstrings are plain text with code in single backquotes.
default_role = "code"
napoleon_use_ivar = True
napoleon_use_rtype = False
python_maximum_signature_line_length = 100

html_theme = "pydata_sphinx_theme"
html_title = f"orbithash {release}"
html_static_path = ["_static"]
html_css_files = ["orbithash.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "logo": {"text": "orbithash"},
    "navbar_align": "left",
    "header_links_before_dropdown": 7,
    "show_prev_next": True,
    "navigation_with_keys": False,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
}
html_sidebars = {"index": []}

copybutton_exclude = ".linenos, .gp, .go, .c1"

# `make docs-links` only: addresses of examples that nobody serves.
linkcheck_ignore = [r"https?://(localhost|127\.0\.0\.1)", r"https://orbithash\.example"]
linkcheck_timeout = 20
