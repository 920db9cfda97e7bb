"""The reader of lists in text files."""

import pytest

from orbithash.encoders.text_files import read_lines


def test_lines_and_their_ends(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeffa.png\r\n\r\n b\u2028c \n \t\nd\x0ce\x85".encode())
    assert list(read_lines(path)) == ["a.png", " b\u2028c ", "d\x0ce\x85"]
    path.write_bytes(b"")
    assert list(read_lines(path)) == []


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"^cannot be read \(No such file or directory\)$"):
        list(read_lines(tmp_path / "nowhere"))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"^is not UTF-8 text$"):
        list(read_lines(tmp_path / "latin.txt"))
