"""The report page: one self-contained file, user text escaped, and plots of ordinary and degenerate data."""

import base64
import datetime as dt
import io
import re
import threading
import warnings
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from orbithash.trainers.metrics.average_precision import Histograms
from orbithash.trainers.metrics.metrics import radius_curve
from orbithash.trainers.reports import plots
from orbithash.trainers.reports.look import printable, themed
from orbithash.trainers.reports.page import (
    Fact,
    Facts,
    Figure,
    Figures,
    Gallery,
    GalleryRow,
    Link,
    Part,
    Table,
    Text,
    Tile,
    thumbnail_data_uri,
    write_report,
)
from orbithash.trainers.reports.provenance import Provenance

HOSTILE = "</title><script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{ 7*7 }}$\\frac$\x00\x1b\u202e\udcff&amp;"
WHEN = dt.datetime(2026, 11, 29, tzinfo=dt.UTC)
ORIGIN = Provenance("Test", "data", {}, WHEN, "orbithash test", "orbithash 1", "2 cores")
VOID = {"meta", "link", "img", "br", "hr"}


class Page(HTMLParser):
    """The elements, attributes and text of a page; asserts that tags are balanced."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if not self._open or self._open[-1] not in ("style", "script"):
            self.text.append(data)


def picture(height=40, width=60):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def all_sections(text):
    image = thumbnail_data_uri(picture())
    tiles = [
        Tile(text, image, note=text, relevant=True),
        Tile(text, sentence=text, relevant=False),
        Tile(text, note=text),
    ]
    return [
        Part(text, text),
        Facts(text, [Fact(text, text, text, text)], lead=text),
        Figures(text, [Figure(text, plots.bars({text: 0.5}, "share"), text)], lead=text),
        Table(text, [text, "n", "page"], [[text, "3", Link(text, text)]], caption=text),
        Gallery(text, [GalleryRow(Tile(text, image), tiles, text)], caption=text),
        Text(text, [text, text]),
    ]


def write(tmp_path, sections, title="A title", subtitle="A subtitle", origin=ORIGIN) -> str:
    path = tmp_path / "new" / "folder" / "report.html"
    write_report(path, title, subtitle, sections, origin)
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    return path.read_text(encoding="utf-8")


def test_hostile_text_is_escaped(tmp_path):
    origin = Provenance(HOSTILE, HOSTILE, {HOSTILE: HOSTILE}, WHEN, HOSTILE, HOSTILE, HOSTILE)
    page = Page(write(tmp_path, all_sections(HOSTILE), HOSTILE, HOSTILE, origin))
    assert "script" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "49" not in "".join(page.text)
    shown = printable(HOSTILE)
    assert "\x00" not in shown
    assert "".join(page.text).count(shown) >= 25


def test_the_page_loads_nothing_from_elsewhere(tmp_path):
    html = write(tmp_path, all_sections("harbor"))
    page = Page(html)
    addresses = [value for name, value in page.attributes if name in ("src", "href", "srcset", "data", "action")]
    assert addresses
    assert all(value.startswith(("data:", "#", "./")) for value in addresses)
    assert not re.search(r"url\(|@import", html)
    policy = dict(page.attributes)["content"]
    assert any("default-src 'none'" in value for name, value in page.attributes if name == "content"), policy
    assert html.lstrip().startswith("<!doctype html>")


@pytest.mark.parametrize("path", ["javascript:alert(1)", "//host/x", "data:text/html,x", "a b/../é?#.html", "\udcff"])
def test_links_stay_beside_the_page(tmp_path, path):
    page = Page(write(tmp_path, [Table("t", ["run"], [[Link("the page", path)]])]))
    (address,) = (value for name, value in page.attributes if name == "href" and not value.startswith(("data:", "#")))
    assert address.startswith("./")
    assert not set(address[2:]) & set('?#: "<>')


def test_the_head_says_what_when_how_and_where(tmp_path):
    text = "".join(Page(write(tmp_path, [])).text)
    for name, value in [("Data", "data"), ("Date", "2026-11-29 00:00 UTC"), ("Machine", "2 cores")]:
        assert text.index(name) < text.index(value)
    assert "orbithash test" in text


def test_relevance_is_marked_by_label_and_symbol(tmp_path):
    html = write(tmp_path, all_sections("harbor"))
    text = "".join(Page(html).text)
    assert text.count("✓") == text.count("✗") == 1
    assert 'aria-label="relevant"' in html
    assert 'aria-label="not relevant"' in html


def test_every_section_is_on_the_page_in_order(tmp_path):
    sections = [Text(f"Section {i}", [f"Paragraph {i}"]) for i in range(4)]
    text = "".join(Page(write(tmp_path, sections)).text)
    positions = [text.index(f"Paragraph {i}") for i in range(4)]
    assert positions == sorted(positions)


def test_columns_of_numbers_are_recognised():
    rows = [
        ["ap_min@20", "0.91", "1,680", "12 ms", "-", "3 of 4", "0.9 ± 0.01"],
        ["x", "-1.5", "7", "3.1 s", "2", "1", "1.0 ± 0.2"],
    ]
    assert Table("t", [""] * 7, rows).numeric == [False, True, True, True, True, False, True]
    assert Table("t", ["a", "b"], []).numeric == [False, False]


def test_a_failed_write_keeps_the_previous_page(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    write_report(path, "before", "", [], ORIGIN)
    before = path.read_bytes()
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_report(path, "after", "", [], ORIGIN)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize(("shape", "size"), [((300, 600), (160, 80)), ((20, 30), (30, 20)), ((1, 900), (160, 1))])
def test_thumbnails(shape, size):
    uri = thumbnail_data_uri(picture(*shape))
    kind, data = uri.split(",")
    assert kind == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == size


def test_png_and_svg_plots_become_images():
    out = io.BytesIO()
    Image.fromarray(picture()).save(out, "PNG")
    assert Figure("t", out.getvalue(), "c").uri.startswith("data:image/png;base64,")
    assert Figure("t", plots.bit_balance([0.5]), "c").uri.startswith("data:image/svg+xml;base64,")


def histograms(bits=16, queries=5, seed=0):
    items = np.random.default_rng(seed).integers(0, 9, (queries, bits + 1))
    return Histograms(items, items // 3)


def confusion(count):
    shares = np.random.default_rng(count).random((count, count))
    return shares / shares.sum(1, keepdims=True)


HISTORY = [
    {"epoch": 1, "lr": 0.1, "train/loss": 3.0, "images_per_s": 9.0},
    {"epoch": 2, "lr": 0.1, "train/loss": 2.0, "train/extra": 1.0, "validation/ap_min@20": 0.5},
]
CURVE = radius_curve(histograms())
DRAWINGS = {
    "losses": lambda: plots.learning_curves(HISTORY, "train"),
    "validation": lambda: plots.learning_curves(HISTORY, "validation"),
    "one epoch": lambda: plots.learning_curves(HISTORY[:1], "train"),
    "no validation": lambda: plots.learning_curves(HISTORY[:1], "validation"),
    "recall": lambda: plots.precision_recall({"": CURVE}),
    "two recalls": lambda: plots.precision_recall({"image->text": CURVE, HOSTILE: CURVE}),
    "cutoffs": lambda: plots.cutoff_curve([1, 5, 20], {"expected": np.array([1, 0.5, 0.2])}, chance=0.1),
    "one cutoff": lambda: plots.cutoff_curve([1], {"a": np.ones(1)}, band=(np.zeros(1), np.ones(1))),
    "bits": lambda: plots.bit_balance(np.linspace(0, 1, 512).tolist()),
    "bars": lambda: plots.bars({f"class {i}": i / 9 for i in range(9)}, "AP", mean=0.5, limit=1),
    "many bars": lambda: plots.bars({f"class {i}": i / 900 for i in range(900)}, "AP", limit=1),
    "seconds": lambda: plots.bars({"train": 123.4, "encode": 0.2}, "s"),
    "zero": lambda: plots.bars({"a": 0.0}, "AP", mean=0.0, limit=1),
    "hostile bars": lambda: plots.bars({HOSTILE: 0.5, "$a_$": 0.1, "港": 0.2, "": 0.3}, "AP"),
    "one class": lambda: plots.class_confusion(np.ones((1, 1)), ["harbor"]),
    "hostile class": lambda: plots.class_confusion(confusion(2), [HOSTILE, "$$"]),
    "21 classes": lambda: plots.class_confusion(confusion(21), [f"class {i}" for i in range(21)]),
    "80 classes": lambda: plots.class_confusion(confusion(80), [f"class {i}" for i in range(80)]),
    "map": lambda: plots.code_map(np.arange(60.0).reshape(30, 2), [f"class {i % 21}" for i in range(30)]),
    "hostile map": lambda: plots.code_map(np.zeros((3, 2)), [HOSTILE, "$$", HOSTILE]),
    "map of 80 classes": lambda: plots.code_map(np.eye(160)[:, :2], [f"class {i % 80}" for i in range(160)]),
    "distances": lambda: plots.distance_histogram(histograms().items[0], histograms().relevant[0]),
    "nothing relevant": lambda: plots.distance_histogram(np.arange(9), np.zeros(9, int)),
    "nothing at all": lambda: plots.distance_histogram(np.zeros(9, int), np.zeros(9, int)),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_plots_are_well_formed_themed_and_repeatable(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svg = DRAWINGS[name]()
    assert svg == DRAWINGS[name]()
    assert "DejaVu Sans'," not in svg.replace("'Noto Sans', 'DejaVu Sans',", "")
    for text in (svg, themed(svg)):
        root = ElementTree.fromstring(text)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert not root.findall(".//{*}script")
    assert "prefers-color-scheme" in themed(svg)


def test_class_names_are_drawn_verbatim_and_shortened():
    svg = plots.bars({"$x$ <b>": 0.5, "x" * 80: 0.2}, "AP")
    texts = [element.text for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert "$x$ <b>" in texts
    assert "x" * (plots.MAX_NAME - 1) + "…" in texts


def test_plots_do_not_change_matplotlib_settings():
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    plots.bit_balance([0.5])
    assert dict(mpl.rcParams) == before


def test_plots_can_be_drawn_in_another_thread():
    drawn = []
    thread = threading.Thread(target=lambda: drawn.append(plots.bit_balance([0.2, 0.8])))
    thread.start()
    thread.join()
    assert drawn == [plots.bit_balance([0.2, 0.8])]
