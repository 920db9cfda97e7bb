"""The page of a run of `encode`: counts, refused items, wasted bits, repeated codes."""

import dataclasses
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from orbithash.cluster.encoding import page
from orbithash.cluster.encoding.page import write_encode_page
from orbithash.cluster.encoding.summary import EncodeSummary
from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.codes import pack

BITS = 16
NOTHING = EncodeSummary(0, 0, 0, 0, 0, 0, {}, 0.0, 0.0, 0.0, {}, {}, 0)


def summary(**changes) -> EncodeSummary:
    values = {
        "num_listed": 43,
        "num_done_before": 1,
        "num_refused_before": 0,
        "num_encoded": 40,
        "num_replaced": 0,
        "num_refused": 2,
        "left_out": {"text file": 3},
        "start_s": 1.5,
        "encode_s": 4.0,
        "rows_per_s": 10.5,
        "worker_s": {"decode": 2.0, "encode": 1.0, "write": 0.0},
        "worker_images_per_s": {"decode": 21.0, "encode": 42.0},
        "rows_in_archive": 40,
    }
    return EncodeSummary(**values | changes)


@pytest.fixture
def archive(tmp_path):
    """An archive of 40 rows: 30 distinct codes, bit 3 dead; 11 rows have one code and thumbnails; two refused items."""
    rng = np.random.default_rng(0)
    bits = rng.random((40, BITS)) < 0.5
    bits[:11] = bits[0]
    bits[:, 3] = True
    picture = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)).save(picture, "JPEG")
    made = Archive.create(tmp_path / "archive", BITS, "abc")
    keys = [f"<b>{number}</b>.jpg" for number in range(40)]
    thumbnails = [picture.getvalue() if number < 11 else None for number in range(40)]
    made.write(Archive.table(pack(bits), BITS, keys, keys, thumbnail=thumbnails))
    made.refuse([("bad.jpg", "truncated <i>"), ("worse.jpg", "truncated <i>")])
    return made


def written(archive, tmp_path, **changes) -> str:
    write_encode_page(tmp_path / "report.html", "tiles", summary(**changes), archive.path)
    return (tmp_path / "report.html").read_text()


def test_the_page_of_a_run(archive, tmp_path):
    html = written(archive, tmp_path)
    for text in ("40 of 43 items encoded", "10/s", "one worker, decode alone: 21/s", "text file", "Dead: 3."):
        assert text in html
    assert "truncated &lt;i&gt;" in html
    assert "Reasons of refusal" in html
    assert "model_id abc" in html
    assert "<b>3" not in html


def test_the_most_frequent_codes_are_shown_with_their_rows(archive, tmp_path):
    html = written(archive, tmp_path)
    assert "11 of 40 codes" in html
    assert html.count("data:image/jpeg") == page.NUM_ROWS


def png_of(width: int, height: int) -> bytes:
    """Return a PNG file of one pixel whose header states another size."""
    out = io.BytesIO()
    Image.new("L", (1, 1)).save(out, "PNG")
    head = b"IHDR" + struct.pack(">II", width, height) + out.getvalue()[24:29]
    return out.getvalue()[:12] + head + struct.pack(">I", zlib.crc32(head)) + out.getvalue()[33:]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    "data",
    [b"", b"no image", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0" + bytes(40), png_of(5000, 5000), png_of(2**17, 2**17)],
)
def test_thumbnails_that_are_no_images_are_left_out(data):
    assert page._picture(data) is None


def test_a_large_archive_is_sampled(archive, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "MAX_CODES", 20)
    ids, codes = page._sample(archive)
    assert 5 < len(ids) < 35
    assert (page._sample(archive)[0] == ids).all()
    by_id = dict(zip(*archive.codes(), strict=True))
    assert all((by_id[row] == code).all() for row, code in zip(ids, codes, strict=True))
    assert "Of a random sample of the 40 rows" in written(archive, tmp_path)


def test_a_run_that_did_nothing(tmp_path):
    empty = Archive.create(tmp_path / "archive", BITS, "abc")
    write_encode_page(tmp_path / "report.html", "tiles", NOTHING, empty.path)
    html = (tmp_path / "report.html").read_text()
    assert "0 of 0 items encoded" in html
    assert "Stages" not in html


def test_catalogs_that_the_items_are_from(tmp_path):
    empty = Archive.create(tmp_path / "archive", BITS, "abc")
    summary = dataclasses.replace(NOTHING, groups={"small": 1, "<b>large</b>": 1000})
    write_encode_page(tmp_path / "report.html", "catalog.json", summary, empty.path)
    html = (tmp_path / "report.html").read_text()
    assert html.index("&lt;b&gt;large&lt;/b&gt;") < html.index("small")
    assert "2 catalogs, collections or files of STAC" in html
