"""The Python examples of docs/operate/client.md run as they are printed, and the limits in gateway.md are true."""

import re
import textwrap
from pathlib import Path

import numpy as np
from archive_parts import encode, serving_archive
from images import encoded, picture
from search_parts import StubEncoder

from orbithash.search.client import Client, Row
from orbithash.search.engine.engine import MAX_READS
from orbithash.search.engine.protocols import Covered, Picture
from orbithash.search.gateway.limits import GatewayLimits
from orbithash.search.protocol import queries, rankings, rows
from orbithash.search.protocol.forms import MAX_VECTOR_DIMS

OPERATE = Path(__file__).resolve().parents[3] / "docs/operate"


class Seeing(StubEncoder):
    """An encoder that may read the images of rows."""

    async def view(self, source, max_side):
        return Picture(b"picture", max_side, max_side)

    async def cover(self, source, cells):
        return Covered(np.ones((1 + cells**2, 16), np.int8), (0.0, 0.0, 1.0, 1.0))


def test_the_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tile.png").write_bytes(encoded(picture(), "PNG"))
    blocks = re.findall(r"```python\n(.*?)```", (OPERATE / "client.md").read_text(), re.DOTALL)
    assert len(blocks) == 5
    # Indented blocks continue the one before them.
    programs = []
    for block in blocks:
        if block.startswith(" "):
            programs[-1] += block
        else:
            programs.append(block)

    async def encode_others(items):
        return np.array([[0, len(item)] for item in items], np.uint8)

    encoder = Seeing(encode, encode_others, encode_others)
    with serving_archive(tmp_path / "archive", encoder=encoder) as (address, _, _):
        with Client(address) as client:
            client.upsert(
                Row(key=f"scenes/{i:04}.tif", code=bytes([0, i]), label="harbor" if i % 2 else "beach", lat=60.0 + i)
                for i in range(20)
            )
        for program in programs:
            names = {"codes": np.array([[0, 1], [0, 2], [3, 4]], np.uint8), "embedding": np.ones(4, np.float32)}
            exec(textwrap.dedent(program).replace("127.0.0.1:50051", address), names)
        with Client(address) as client:
            assert client.count() == 20
            assert client.count("key LIKE 'new/%'") == 0


def test_the_limits_are_those_of_the_code():
    table = (OPERATE / "gateway.md").read_text().partition("## Limits")[2]
    limits = GatewayLimits()
    mib = 2**20
    for words in (
        f"{queries.MAX_K:,}; {queries.MAX_LARGE_ROWS:,} with thumbnails",
        f"{queries.MAX_QUERIES}, with {queries.MAX_BATCH_HITS:,} hits",
        f"{queries.MAX_IMAGE_BYTES // mib} MiB",
        f"{MAX_VECTOR_DIMS:,} dimensions",
        f"{rankings.MAX_GROUPS:,}, those with the most rows",
        f"{rankings.MAX_VIEW_PX:,} pixels; {rankings.MAX_CELLS} x {rankings.MAX_CELLS}",
        f"rankings and counts in progress | {MAX_READS} |",
        f"{queries.MAX_SENTENCE_CHARS:,}, {rows.MAX_KEY_CHARS:,} and {queries.MAX_FILTER_CHARS:,} characters",
        f"| {queries.MAX_EXAMPLES} |",
        f"| {rows.MAX_ROWS:,} |",
        f"| {limits.max_receive_bytes // mib} MiB |",
        f"| {limits.max_request_bytes // mib} MiB |",
        f"{limits.max_concurrent_rpcs:,}, with at most {limits.max_streams} streams",
        f"{limits.max_timeout_s:g} s; a refresh",
        f"| {limits.max_idle_s:g} s, {limits.max_idle_connection_s / 60:g} minutes |",
    ):
        assert words in table, words
