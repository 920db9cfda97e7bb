"""Rescored answers on the command line."""

from orbithash.cluster.cli.gateway.query import as_fields, as_table
from orbithash.search.protocol.queries import Answer, Coverage, Hit


def make_answer(scores=(0.70711, -0.25), **fields):
    hits = (
        Hit(1, 3, 7, "a", "beach", None, None, None, {}, scores[0]),
        Hit(2, 1, 8, "b", None, None, None, None, {}, scores[1]),
        Hit(3, 2, 9, "c", None, None, None, None),
    )
    return Answer(hits, 5, Coverage(9, 9, 1, 1), 1.0, "m", 1, **fields)


def test_scores_are_printed_where_an_answer_is_rescored(capsys):
    fields = as_fields(make_answer(shortlist_radius=4, is_shortlist_bounded=True))
    assert [hit["score"] for hit in fields["hits"]] == [0.70711, -0.25, None]
    assert (fields["shortlist_radius"], fields["is_shortlist_bounded"]) == (4, True)
    as_table(make_answer(shortlist_radius=4, is_shortlist_bounded=True))
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in printed[:4]] == [
        ["rank", "distance", "score"],
        ["1", "3", "0.7071"],
        ["2", "1", "-0.2500"],
        ["3", "2", "c"],
    ]
    assert printed[4].startswith("rescored rows up to distance 4, at which 5 rows tie; 100% of the archive")
    assert printed[5].startswith("more rows tie with the last of the shortlist")


def test_asymmetric_distances_are_whole_numbers(capsys):
    as_table(make_answer((0.0, 127.0), shortlist_radius=4))
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in printed[1:3]] == ["0", "127"]


def test_other_answers_have_no_scores(capsys):
    assert "score" not in as_fields(make_answer())["hits"][0]
    as_table(make_answer())
    assert "score" not in capsys.readouterr().out
