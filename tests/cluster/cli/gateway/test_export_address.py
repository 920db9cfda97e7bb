"""The verb `export --address`: the rows behind a gateway."""

import csv
import json

import pytest
from search_parts import local_engine, serving, small_case


@pytest.fixture(scope="module")
def address():
    with serving(local_engine(small_case())) as gateway:
        yield gateway.address


def test_rows_are_written(cli, address, tmp_path):
    out = tmp_path / "rows.csv"
    done = cli("export", "--address", address, str(out), "--json")
    assert done.code == 0, done.err
    rows = list(csv.DictReader(out.open(newline="")))
    assert json.loads(done.out) == {"out": str(out), "rows": len(rows)}
    assert [int(row["row_id"]) for row in rows] == list(range(40))
    done = cli("export", "--address", address, str(out), "--filter", "label IS NOT NULL")
    kept = sum(1 for row in rows if row["label"])
    assert (done.code, done.out.strip()) == (0, f"{out}: wrote {kept} rows")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["archive", "rows.csv"], "ARCHIVE archive cannot be given with --address"),
        (["rows.csv", "--version", "3"], "--version cannot be given with --address"),
        (["rows.csv", "--licence", "MIT"], "--licence cannot be given with --address"),
        (["rows"], "rows has no ending of a file of places"),
    ],
)
def test_what_a_gateway_cannot_do_is_refused(cli, address, words, message):
    done = cli("export", "--address", address, *words)
    assert done.code == 2
    assert message in done.err
