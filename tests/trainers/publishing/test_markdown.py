"""Text of users in Markdown: whatever its characters, tables keep their cells and nothing becomes markup."""

import re

from hypothesis import given
from hypothesis import strategies as st

from orbithash.trainers.publishing.markdown import code, table, text

NAMES = st.text(st.sampled_from("ab_|`<>*#[]()\\ \n\t&!é") | st.characters(codec="utf-8"), max_size=20)


@given(st.lists(NAMES, min_size=1, max_size=4))
def test_a_row_has_as_many_cells_as_it_is_given(names):
    for shown in (text, code):
        lines = table(["name"] * len(names), [[shown(name) for name in names]]).split("\n")
        assert len(lines) == 3
        assert [len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in lines] == [len(names) + 1] * 3


@given(NAMES)
def test_no_character_of_markup_is_left_bare(name):
    bare = re.sub(r"\\[\\`*\[\]<>|#&_]", "", text(name))
    assert not re.search(r"[\\`*\[\]<>|#&]", bare)


def test_usual_names_are_shown_as_they_are():
    assert text("parking_lot") == "parking_lot"
    assert text("_init_") == r"\_init\_"
    assert text("two\nlines  of 5 m") == "two lines of 5 m"
    assert code("a/b.png") == "`a/b.png`"
    assert code("a`b") == "`` a`b ``"
    assert code("a|b*") == r"a\|b\*"
    assert code("") == "` `"
