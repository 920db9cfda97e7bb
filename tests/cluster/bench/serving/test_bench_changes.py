"""`bench changes` measures every part of a shard and of a gateway. Speed is never asserted."""

import json

import numpy as np
import pytest

from orbithash.cluster.bench.serving.changes import ChangesBench, bench_changes, polygon, show_changes
from orbithash.cluster.bench.serving.stream import QueryStream
from orbithash.encoders.errors import InputError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rows": 100}, "--rows is 100; at least 2000"),
        ({"bits": 4}, "4"),
        ({"seconds": float("nan")}, "--seconds is nan"),
        ({"parts": ("shards",)}, "--part shards does not exist; allowed: shard, gateway"),
    ],
)
def test_invalid_settings_of_bench_changes(settings, message):
    with pytest.raises(InputError, match=message):
        bench_changes(ChangesBench(**settings))


@pytest.mark.parametrize("share", [0.01, 0.05])
def test_a_polygon_covers_its_share_of_the_rows(share):
    import shapely

    area = shapely.from_wkt(polygon(share, 3, 1))
    assert area.is_valid
    assert len(area.exterior.coords) == 201
    rng = np.random.default_rng(0)
    points = shapely.points(rng.uniform(-180, 180, 200_000), rng.uniform(-80, 80, 200_000))
    assert shapely.contains(area, points).mean() == pytest.approx(share, rel=0.06)


def test_latencies_of_a_time(monkeypatch):
    stream = QueryStream(None, np.zeros((1, 8), np.uint8), 10)
    stream._sent = [(0.0, 0.5, False), (1.0, 0.25, False), (2.0, 0.125, True), (3.0, 4.0, False)]
    assert stream.latencies(1.1, 2.5) == (2, 1, 187.5, pytest.approx(248.75), 250)
    assert stream.latencies(8, 9).num_queries == 0


def test_the_table_says_what_is_met(capsys):
    measurements = [
        {"name": "start", "value": 3.0, "unit": "s", "target": 1},
        {"name": "commit", "value": 3.0, "unit": "ms", "target": 20},
        {"name": "failed", "value": float("nan"), "unit": "", "target": 0.0},
        {"name": "share", "value": 0.25, "unit": "share", "target": None},
    ]
    show_changes({"rows": 5, "measurements": measurements}, False)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    verdicts = {row[0]: row[-1] for row in rows if row and row[0] in ("start", "commit", "failed", "share")}
    assert verdicts == {"start": "missed", "commit": "met", "failed": "missed", "share": "share"}


@pytest.mark.slow
def test_bench_changes(cli):
    args = ("--rows", "3000", "--local", "--seconds", "0.5", "--centres", "50", "--outlines", "--json")
    ended = cli("bench", "changes", *args)
    assert ended.code == 0
    result = json.loads(ended.out)
    values = {each["name"]: each["value"] for each in result["measurements"]}
    assert values["wrong answers after all of that"] == 0
    assert values["new filter, label: rows"] == 0.25
    assert 0 < values["memory a row, one version"] <= values["memory a row, 6 versions"]
    assert values["rows appended: failed queries meanwhile"] == 0
    for name in ("start from the archive", "start from its own segments", "1000 rows appended: until found"):
        assert values[name] > 0
