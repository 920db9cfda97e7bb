"""The page of `orbithash reproduce`: baselines, published values, failures of the runs."""

import dataclasses
import json

import pytest

from orbithash.cluster.experiments.reproduction_page import write_table
from orbithash.cluster.experiments.reproduction_table import Row

FIRST = Row(
    method="dhcl",
    variant="",
    network="resnet8",
    dataset="ucmd",
    protocol="dhcl",
    direction="",
    bits=64,
    metric="success@20",
    ours=[0.9, 0.94],
    clean=[0.8, 0.82],
    published=0.996,
    source="readme",
    baselines={"itq": [0.6, 0.62], "lsh": [0.3, 0.3]},
    cosine=[0.7, 0.7],
    runs=["dhcl/dhcl/64-0", "dhcl/dhcl/64-1"],
)
ROWS = [
    FIRST,
    dataclasses.replace(FIRST, method="mhcln", published=0.92, clean=[0.5, 0.5], runs=["absent"]),
    dataclasses.replace(FIRST, method="duch", direction="image->text", published=None, baselines={}, runs=[]),
]
FAILURES = {
    "worst": [{"label": "<i>river", "ap": 0.012, "baseline": {"name": "itq", "ap": 0.4}}],
    "confused": [{"label": "dense", "nearest": "medium", "queries": 12.5, "of": 80}],
    "bits": {"dead": [3, 7], "num_correlated": 1234},
}


def written(out, rows=ROWS) -> str:
    write_table(out, rows, out / "images")
    return (out / "report.html").read_text()


def test_the_page_compares_with_baselines_and_published_values(tmp_path):
    html = written(tmp_path)
    assert "1 of 2" in html
    assert "Worse than a baseline of no more bytes: mhcln, dhcl, 64 bits." in html
    assert "Below it: dhcl, dhcl, 64 bits." in html
    assert '<dd class="baseline">itq: 0.610</dd>' in html
    assert f"ucmd in {tmp_path / 'images'}" in html
    assert json.loads((tmp_path / "reproduce.json").read_text())[0]["runs"] == FIRST.runs
    assert "Failures" not in html


@pytest.mark.parametrize("direction", ["", "image->image"])
def test_the_failures_of_the_runs_are_named_and_linked(tmp_path, direction):
    folder = tmp_path / FIRST.runs[0] / "evaluation"
    folder.mkdir(parents=True)
    (folder / "failures.json").write_text(json.dumps({"directions": {direction: FAILURES}}))
    html = written(tmp_path)
    assert "&lt;i&gt;river: 0.01 (itq: 0.40)" in html
    assert "dense → medium (12.5 of 80)" in html
    assert 'href="./dhcl/dhcl/64-0/evaluation/report.html"' in html
    assert "1,234" in html


def test_a_single_row_without_baselines(tmp_path):
    html = written(tmp_path, [ROWS[2]])
    assert "0 of 0" not in html
    assert "published value reached" not in html.lower()
