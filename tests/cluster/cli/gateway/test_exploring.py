"""The verbs `rank` and `count` against a gateway."""

import json

import pytest
from search_parts import local_engine, serving, small_case


@pytest.fixture(scope="module")
def address():
    with serving(local_engine(small_case())) as gateway:
        yield gateway.address


@pytest.fixture
def run(cli, address):
    """Return a function: arguments -> the JSON that the verb prints."""

    def call(verb, *args):
        result = cli(verb, *args, "--address", address, "--json")
        assert result.code == 0, result.err
        return json.loads(result.out)

    return call


def test_orders(run, cli, address):
    shuffled = run("rank", "--random", "3", "-k", "100")
    assert sorted(row["id"] for row in shuffled["rows"]) == list(range(40))
    first = run("rank", "--random", "3", "-k", "7")
    rest = run("rank", "--random", "3", "-k", "100", "--after", first["next"])
    assert first["rows"] + [row | {"rank": row["rank"] + 7} for row in rest["rows"]] == shuffled["rows"]
    near = run("rank", "--near", "-180,-90", "--max-distance", "3e6", "--filter", "label IS NOT NULL")
    assert [row["score"] for row in near["rows"]] == sorted(row["score"] for row in near["rows"])
    times = [row["datetime"] for row in run("rank", "--newest", "-k", "100")["rows"]]
    assert times == sorted(times, reverse=True)
    key = near["rows"][0]["key"]
    assert [row["key"] for row in run("rank", "--same-place", key)["rows"]] == [key]
    table = cli("rank", "--near", "10,20", "-k", "2", "--address", address).out.splitlines()
    assert table[0].split() == ["rank", "metres", "key", "label", "place", "date"]
    assert "rows in this order; 100% of the archive searched" in table[3]
    assert table[4].startswith("more: --after ")


def test_counts(run, cli, address):
    assert run("count") == {"rows": 40}
    labels = run("count", "--by", "label")
    assert sum(labels["rows"].values()) + labels["without"] == 40
    assert run("count", "--by", "year")["rows"] == {"2020": 40 - labels["without"]}
    assert cli("count", "--filter", "label IS NULL", "--address", address).out == f"{labels['without']}\n"
    printed = cli("count", "--by", "label", "--address", address).out.splitlines()
    assert printed[0].split() == ["label", "rows"]
    assert printed[-1] == f"{labels['without']} rows without a label"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "give one order of --near, --newest"),
        (("--newest", "--random", "1"), "got --newest and --random"),
        (("--newest", "--oldest"), "got --newest and --oldest; give one of them"),
        (("--near", "10"), "--near '10' is not LON,LAT"),
        (("--near", "10,95"), "from -90 to 90, got 95.0"),
        (("--newest", "--max-distance", "5"), "--max-distance belongs to --near"),
        (("--newest", "--min-score", "5"), "--min-score belongs to --detector"),
        (("--random", "1", "--after", "5"), "--after '5' is not NUMBER:ID"),
        (("--random", "-1"), "from 0 to 2^64 - 1"),
        (("--detector", "absent.json"), "absent.json cannot be read"),
        (("--same-place", "absent"), "no row of the archive has the key 'absent'"),
    ],
)
def test_wrong_options(cli, address, args, words):
    result = cli("rank", *args, "--address", address)
    assert result.code == 2
    assert words in result.err
    assert len(result.err.strip().splitlines()) == 1


def test_counting_by_something_else(cli, address):
    result = cli("count", "--by", "colour", "--address", address)
    assert result.code == 2
    assert "label, month or year, got 'colour'" in result.err
