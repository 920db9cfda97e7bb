import importlib

import pytest
from segment_parts import MODULES_WITH_CHUNKS


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 16 rows, so that a few rows are several chunks."""
    for name in MODULES_WITH_CHUNKS:
        monkeypatch.setattr(importlib.import_module(f"orbithash.search.segments.{name}"), "ROWS_PER_CHUNK", 16)
